#!/bin/sh
# uv, which installs everything else:  setup/uv.sh --which  |  setup/uv.sh .tools/bin/uv
#
# --which prints the machine's own uv where it is new enough, else where ours belongs. Otherwise the locked uv is put there
# by whatever this machine's Python has for it: venv, or where that is missing (Debian splits ensurepip off) pip.
set -u

# The first one whose `pip sync` knows where PyTorch's builds are (UV_TORCH_BACKEND).
LEAST_MAJOR=0
LEAST_MINOR=8

if [ "$1" = --which ]; then
  found=$(command -v uv 2>/dev/null)
  version=$("${found:-false}" --version 2>/dev/null | sed -n 's/^uv \([0-9]*\)\.\([0-9]*\)\..*/\1 \2/p')
  if [ -n "$version" ]; then
    major=${version% *} minor=${version#* }
    if [ "$major" -gt "$LEAST_MAJOR" ] || { [ "$major" = "$LEAST_MAJOR" ] && [ "$minor" -ge "$LEAST_MINOR" ]; }; then
      echo "$found"
      exit 0
    fi
  fi
  echo .tools/bin/uv
  exit 0
fi

# pip does not know the variable that uv and Python know.
[ -z "${SSL_CERT_FILE:-}" ] || export PIP_CERT="${PIP_CERT:-$SSL_CERT_FILE}"
target=$1
tools=${target%/bin/uv}
install="-m pip install --quiet --disable-pip-version-check --require-hashes --no-deps"
log=$(mktemp)
trap 'rm -f "$log"' EXIT

failed() {
  grep -v "^WARNING: Retrying" "$log" >&2
  if grep -qi "certificate verify failed" "$log"; then
    echo "galerne: the package index or a proxy shows a certificate that is not known here: name your certificates with" \
      "SSL_CERT_FILE=/path/to/bundle.pem." >&2
  elif [ -n "${GALERNE_WHEELS:-}" ]; then
    echo "galerne: $GALERNE_WHEELS does not hold the uv of locks/uv.txt: put its wheel there, or put uv on the path." >&2
  else
    echo "galerne: uv could not be fetched from the package index: name a mirror (PIP_INDEX_URL), a proxy (HTTPS_PROXY)," \
      "certificates (PIP_CERT), or on a machine without a network a directory of wheels (WHEELS=/path/to/wheels)." >&2
  fi
  exit 1
}

for python in python3.11 python3 python; do
  command -v "$python" >/dev/null 2>&1 || continue
  # shellcheck disable=SC2086 # several words
  if "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    "$python" -m venv "$tools" >"$log" 2>&1 || failed
    "$tools/bin/python" $install -r locks/uv.txt >"$log" 2>&1 || failed
  elif "$python" -c 'import pip' >/dev/null 2>&1; then
    rm -rf "$tools/uv"
    "$python" $install --target "$tools/uv" -r locks/uv.txt >"$log" 2>&1 || failed
    mkdir -p "$tools/bin"
    cp "$tools/uv/bin/uv" "$tools/bin/uv"
    rm -rf "$tools/uv"
  else
    continue
  fi
  touch "$target"
  exit 0
done
echo "galerne: uv is not here, and no Python here has venv or pip to install it: apt-get install python3-venv (Debian," \
  "Ubuntu), or put uv on the path." >&2
exit 1
