#!/bin/sh
# Fails where an environment has a .pth file that is not known:  image/check-pth.sh PREFIX
#
# Python executes a .pth file's `import` lines at every start of every process; a stolen release of a popular package has
# come with one. Known ones are listed by content, so that a listed name with other content is found as well.
set -eu

prefix=$1
allowed="$(dirname "$0")/pth-allowed.txt"
found=$(mktemp)
trap 'rm -f "$found"' EXIT
# In a file and not in a pipe, because a pipe's loop could not end this script.
find "$prefix" -name '*.pth' -exec sha256sum {} + >"$found"
status=0
while read -r digest path; do
  if ! grep -qFx "$digest  $(basename "$path")" "$allowed"; then
    echo "unknown .pth file: $path (sha256 $digest)" >&2
    echo "It runs at every start of Python. Read it; where it is right, add its line to image/pth-allowed.txt." >&2
    status=1
  fi
done <"$found"
exit $status
