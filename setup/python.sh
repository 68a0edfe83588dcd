#!/bin/sh
# Run a program with whatever Python 3 this machine has:  setup/python.sh FILE [ARGUMENT…]
#
# The programs beside this one run before Galerne's own Python 3.11 is there, so any Python from 3.8 on will do. A name on
# the path proves nothing (pyenv has one for every version that anybody ever asked for): each is tried.
set -u

for python in python3.11 python3 python .venv/bin/python; do
  if command -v "$python" >/dev/null 2>&1 &&
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1; then
    exec "$python" "$@"
  fi
done
if command -v uv >/dev/null 2>&1; then
  uv=$(command -v uv)
elif [ -x .tools/bin/uv ]; then
  uv=.tools/bin/uv
else
  echo "galerne: there is no Python on this machine. Galerne needs Python 3.11 (Debian 12: apt-get install" \
    "python3 python3-venv) or uv, which fetches it." >&2
  exit 1
fi
echo "galerne: there is no Python on this machine; uv fetches Python 3.11." >&2
if ! "$uv" run --quiet --no-project --python 3.11 python "$@"; then
  [ -n "$("$uv" python find 3.11 2>/dev/null)" ] || echo "galerne: uv could not fetch Python 3.11: install it (Debian 12:" \
    "apt-get install python3 python3-venv), or name a mirror or directory in UV_PYTHON_INSTALL_MIRROR." >&2
  exit 1
fi
