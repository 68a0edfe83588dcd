#!/bin/sh
# Programs of the operating system that tests need, through apt-get where this may be done; tests without them are
# skipped and say so (in CI they fail). No service is left running or starts with the machine.
set -eu

PACKAGES="prometheus chromium postgresql redis-server"
PROGRAMS="prometheus promtool chromium redis-server"
LOG=build/system-parts.log
POLICY=/usr/sbin/policy-rc.d

missing=""
for program in $PROGRAMS; do
  command -v "$program" >/dev/null 2>&1 || missing="$missing $program"
done
# Debian keeps the server's programs off the path.
command -v initdb >/dev/null 2>&1 || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$missing initdb"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "not installed:$missing. Tests that need them are skipped; \`apt-get install $PACKAGES\` as root brings them." >&2
  exit 0
fi

mkdir -p build
made_policy=""
# Debian asks this program whether a service may start. One that is there already is somebody's own decision.
if [ ! -e "$POLICY" ]; then
  made_policy=1
  printf '#!/bin/sh\nexit 101\n' >"$POLICY"
  chmod 755 "$POLICY"
fi
trap '[ -z "$made_policy" ] || rm -f "$POLICY"' EXIT

echo "installing$missing (apt-get install $PACKAGES)"
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get -qq update && apt-get -qq install --yes --no-install-recommends $PACKAGES; } >"$LOG" 2>&1; then
  echo "apt-get could not install $PACKAGES (see $LOG); tests that need them are skipped." >&2
  exit 0
fi
# It was not here before, so nobody's service is stopped.
for service in $PACKAGES; do
  if [ -d /run/systemd/system ]; then
    systemctl --quiet disable --now "$service" >>"$LOG" 2>&1 || true
  elif [ -x "/etc/init.d/$service" ]; then
    "/etc/init.d/$service" stop >>"$LOG" 2>&1 || true
    update-rc.d "$service" disable >>"$LOG" 2>&1 || true
  fi
done
