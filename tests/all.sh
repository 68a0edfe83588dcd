#!/bin/sh
# Every test but those of `make test-faults`. What mostly waits (a cluster that scales, dashboards that fill, one
# configuration after another that starts) runs beside the tests without a cluster: one after the other they take ten
# minutes more, most of it idle.
set -u
PYTHON=$1
WAITS="tests/faults/test_autoscaling.py tests/integration/test_dashboards.py tests/helm/test_start.py"
LOG=build/tests-that-wait.log
mkdir -p build

# shellcheck disable=SC2086  # a list
"$PYTHON" -m pytest $WAITS >"$LOG" 2>&1 &
beside=$!
"$PYTHON" -m pytest tests/unit tests/dashboards tests/helm --ignore=tests/helm/test_start.py
alone=$?
wait "$beside"
waited=$?
cat "$LOG"
ignored=$(printf ' --ignore=%s' $WAITS)
# shellcheck disable=SC2086
"$PYTHON" -m pytest -m "not faults" $ignored tests/faults tests/image tests/integration tests/security
together=$?
echo "tests without a cluster: $alone, that wait: $waited, with a cluster: $together (0: passed)"
[ "$alone" -eq 0 ] && [ "$waited" -eq 0 ] && [ "$together" -eq 0 ]
