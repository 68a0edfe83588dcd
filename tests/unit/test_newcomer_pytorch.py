"""PyTorch's build for processors is asked of PyTorch's own page: the locked uv, and a stand-in for every host.

PyTorch's page itself is asked by nobody here: what is shown is which page uv asks for, that it installs what stands there
when its hash is the lock's, and what is said when it is not, or when the network refuses.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

from tests.stand_in import StandIn, stand_in

ROOT = Path(__file__).parents[2]
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}:{ROOT / '.tools' / 'bin'}:{os.environ['PATH']}")
TORCH = "torch-9.9.9+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"
PAGE = "/whl/cpu/torch/"
# What `UV_TORCH_BACKEND` would look for on that page too, where it need not be.
OTHER = "triton-1.0-py3-none-any.whl"


def wheel(file: Path) -> str:
    """A wheel of this name, empty but for one module; its hash."""
    name, version, *tags = file.name.removesuffix(".whl").split("-")
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        made.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        made.writestr(
            f"{about}/WHEEL", f"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: {'-'.join(tags)}\n"
        )
        made.writestr(f"{about}/RECORD", "")
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Place:
    """An environment, a lock of two packages, and the two wheels: PyTorch's on the page, the other's in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.page, self.links = directory / "page", directory / "links"
        self.page.mkdir()
        self.links.mkdir()
        self.lock = directory / "lock.txt"
        self.lock.write_text(
            f"triton==1.0 \\\n    --hash=sha256:{wheel(self.links / OTHER)}\n"
            f"torch==9.9.9+cpu \\\n    --hash=sha256:{wheel(self.page / TORCH)}\n    # via galerne\n"
        )
        subprocess.run([str(UV), "venv", "--quiet", "--python", sys.executable, directory / "env"], check=True)

    def answer(self, path: str) -> bytes | None:
        """PyTorch's page has the one wheel; the default index has nothing."""
        if path == PAGE:
            return f'<a href="{quote(TORCH)}">{TORCH}</a>'.encode()
        file = self.page / unquote(path.removeprefix(PAGE))
        return file.read_bytes() if path.startswith(PAGE) and file.is_file() else None

    def sync(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """The installation's own command, on a machine that was told of nothing else."""
        env = {"PATH": os.environ["PATH"], "HOME": str(self.directory), "UV_NO_CACHE": "1", "UV_HTTP_RETRIES": "0"}
        command = [ROOT / "setup" / "python.sh", ROOT / "setup" / "packages.py", "--uv", str(UV), "sync"]
        return subprocess.run(
            [*command, self.directory / "env" / "bin" / "python", self.lock],
            capture_output=True,
            text=True,
            check=False,
            env={**env, "UV_FIND_LINKS": str(self.links), **environment},
        )

    def through(self, seen: StandIn) -> subprocess.CompletedProcess[str]:
        return self.sync(HTTPS_PROXY=seen.proxy, SSL_CERT_FILE=str(seen.bundle))

    def installed(self) -> set[str]:
        found = self.directory.glob("env/lib/python*/site-packages/*.dist-info")
        return {path.name.removesuffix(".dist-info") for path in found}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    if UV is None:
        pytest.skip("uv is not installed here (`make install` brings it)")
    return Place(tmp_path)


def test_it_comes_from_pytorchs_own_page_and_nothing_else_does(place: Place) -> None:
    with stand_in(place.directory, place.answer) as seen:
        done = place.through(seen)
    assert done.returncode == 0, done.stderr
    assert place.installed() == {"torch-9.9.9+cpu", "triton-1.0"}
    # Its page is uv's to know; no file here has its name.
    (page,) = {host for host, path in seen.asked if path == PAGE}
    assert "torch" in page
    # What else the lock has is not looked for there: it need not be there.
    assert {unquote(path) for host, path in seen.asked if host == page} == {PAGE, PAGE + TORCH}
    # The second time it is installed, and its page is not asked.
    with stand_in(place.directory, place.answer) as seen:
        assert place.through(seen).returncode == 0
    assert page not in {host for host, _ in seen.asked}


def test_another_file_under_its_name_is_refused(place: Place) -> None:
    with zipfile.ZipFile(place.page / TORCH, "a") as changed:
        changed.writestr("more.py", "")
    with stand_in(place.directory, place.answer) as seen:
        done = place.through(seen)
    assert done.returncode != 0
    assert "galerne: what the package index gave is not the file that was locked" in done.stderr
    assert place.installed() == set()


def test_a_directory_that_has_it_is_enough(place: Place) -> None:
    (place.page / TORCH).rename(place.links / TORCH)
    with stand_in(place.directory, lambda _path: None) as seen:
        done = place.through(seen)
    assert done.returncode == 0, done.stderr
    assert place.installed() == {"torch-9.9.9+cpu", "triton-1.0"}
    assert [path for _, path in seen.asked if path.startswith("/whl/")] == []


def test_a_directory_with_everything_needs_no_network(place: Place) -> None:
    (place.page / TORCH).rename(place.links / TORCH)
    with stand_in(place.directory, lambda _path: None) as seen:
        done = place.sync(HTTPS_PROXY=seen.proxy, SSL_CERT_FILE=str(seen.bundle), GALERNE_WHEELS=str(place.links))
    assert done.returncode == 0, done.stderr
    assert place.installed() == {"torch-9.9.9+cpu", "triton-1.0"}
    assert seen.asked == []


def test_where_the_network_refuses_one_sentence_says_what_to_do(place: Place) -> None:
    # Nobody listens there.
    done = place.sync(HTTPS_PROXY="http://127.0.0.1:9")
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("galerne: ")]
    assert TORCH in said
    assert "TORCH_FIND_LINKS=/path/to/directory" in said
    with stand_in(place.directory, lambda _path: None) as seen:
        done = place.through(seen)
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("galerne: ")]
    assert TORCH in said


def test_a_certificate_that_is_not_known_is_named_as_the_cause(place: Place) -> None:
    with stand_in(place.directory, place.answer) as seen:
        done = place.sync(HTTPS_PROXY=seen.proxy)
    assert done.returncode != 0
    assert "SSL_CERT_FILE=/path/to/bundle.pem" in done.stderr
