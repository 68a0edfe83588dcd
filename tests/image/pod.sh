#!/bin/sh
# Run a command the way a restricted pod does, without a container:  pod.sh WRITABLE PYTHON_HOME COMMAND…
#
# In a mount namespace of its own: the root is read-only, /tmp and WRITABLE (an empty directory) are fresh and in memory,
# and the command runs as 10001 without groups or capabilities and may gain none. PYTHON_HOME is shown where it is even if it lies
# in a home directory that only its owner may enter. Needs root and unshare; 125 where the namespace cannot be made.
set -eu

if [ "${IN_NAMESPACE:-}" != 1 ]; then
  IN_NAMESPACE=1 exec unshare --mount --propagation private "$0" "$@"
fi

writable=$1
python=$2
shift 2
top="/$(echo "$python" | cut -d/ -f2)"
{
  if [ "$top" = /root ]; then
    mount --bind "$python" /mnt
    mount -t tmpfs -o mode=755 tmpfs /root
    mkdir -p "$python"
    mount --move /mnt "$python"
  fi
  mount -t tmpfs -o mode=1777 tmpfs /tmp
  mount --bind / /
  mount -o remount,bind,ro /
  mount -t tmpfs -o mode=700,uid=10001,gid=10001 tmpfs "$writable"
} || exit 125
cd "$writable"
exec setpriv --reuid=10001 --regid=10001 --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
