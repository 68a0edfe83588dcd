#!/bin/sh
# The image's Python environment, from locks alone:  image/install.sh cpu|gpu PREFIX
#
# The Dockerfile's build stages run it, and a test runs it outside a container. Every package is checked against the hash
# in its lock; Galerne itself is built without fetching anything; an SBOM of what was installed lies in PREFIX; a .pth
# file that is not listed in image/pth-allowed.txt ends the build, because Python runs those at every start.
#
#   PYTHON             the interpreter that the environment is made of (python3.11)
#   COMPILE_BYTECODE   1: compile every module now (the image's root is read-only later)
#   UV_FIND_LINKS, UV_DEFAULT_INDEX, PIP_INDEX_URL …: where packages come from (setup/packages.py: PyTorch's build for
#                      processors by default from PyTorch's own page, which uv knows); hashes hold whatever it is
set -eu

kind=$1
prefix=$2
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3.11}
tools="$prefix.tools"

case "$kind" in
  cpu) lock="$root/locks/image-cpu.txt" ;;
  gpu) lock="$root/locks/gpu.txt" ;;
  *) echo "image/install.sh: cpu or gpu, not '$kind'" >&2; exit 2 ;;
esac
# For tests of this script alone.
lock=${LOCK:-$lock}

# uv by the interpreter's own pip, everything else by uv.
"$python" -m venv "$tools"
"$tools/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
  -r "$root/locks/uv.txt"
uv="$tools/bin/uv"
"$uv" pip install --quiet --python "$tools/bin/python" --require-hashes --no-deps -r "$root/locks/image-tools.txt"

compile=""
[ "${COMPILE_BYTECODE:-0}" = 0 ] || compile="--compile-bytecode"
"$uv" venv --quiet --python "$python" "$prefix"
# shellcheck disable=SC2086 # no option or one
"$python" "$root/setup/packages.py" --uv "$uv" sync "$prefix/bin/python" "$lock" $compile

# A copy, because setuptools writes beside the sources.
mkdir "$tools/source"
for part in pyproject.toml README.md LICENSE serving deployments loadtest; do
  cp -R "$root/$part" "$tools/source/"
done
"$tools/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-index --no-build-isolation \
  --wheel-dir "$tools/wheels" "$tools/source"
"$uv" pip install --quiet $compile --python "$prefix/bin/python" --no-deps --no-index "$tools"/wheels/galerne-*.whl

"$tools/bin/cyclonedx-py" environment --output-reproducible --output-format JSON \
  --output-file "$prefix/sbom.cdx.json" "$prefix/bin/python"

"$root/image/check-pth.sh" "$prefix"
rm -rf "$tools"
