#!/bin/sh
# Build the image with the first container engine that works here:  image/build.sh cpu|gpu NAME:TAG [OPTION…]
set -eu

target=$1
name=$2
shift 2
cd "$(dirname "$0")/.."

revision=$(git rev-parse HEAD 2>/dev/null || echo "")
set -- --target "$target" --tag "$name" --build-arg "REVISION=$revision" --build-arg "CREATED=$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$@"

# A client without its daemon builds nothing.
if command -v docker >/dev/null 2>&1 && docker info >/dev/null 2>&1; then
  DOCKER_BUILDKIT=1 exec docker build "$@" .
elif command -v podman >/dev/null 2>&1 && podman info >/dev/null 2>&1; then
  exec podman build --format docker "$@" .
elif command -v buildah >/dev/null 2>&1 && buildah info >/dev/null 2>&1; then
  exec buildah build --format docker "$@" .
fi
echo "no container engine works here: docker (with its daemon running), podman or buildah is needed to build $name." >&2
command -v docker >/dev/null 2>&1 && echo "docker is installed, but its daemon does not answer." >&2
exit 1
