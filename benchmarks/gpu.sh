#!/usr/bin/env bash
# Everything that only a GPU can prove, in one command, into one folder named by the device: the suite, the sanitizers over
# the kernels' tests, every benchmark. A stage that fails does not stop the others; the exit code says whether one did.
# This script has not been run on hardware yet: report what it does there.
#
#   benchmarks/gpu.sh [FOLDER]    PYTHON=python3    where: benchmarks/results/DEVICE
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
unset NUMBA_ENABLE_CUDASIM

device=$("$python" - <<'PYTHON'
import re

from benchmarks import harness
from numbabuf import _cuda

if not harness.on_gpu():
    raise SystemExit("this is the simulator or the stand-in driver, not a GPU")
try:
    name = _cuda.device_name()
except Exception as error:
    raise SystemExit(str(error)) from None
print(re.sub(r"\W+", "-", name).strip("-").lower())
PYTHON
) || { echo "no GPU can be used; without one: NUMBA_ENABLE_CUDASIM=1 pytest" >&2; exit 2; }
out=${1:-benchmarks/results/$device}
mkdir -p "$out"
failed=()

stage() { # stage NAME SECONDS COMMAND...: its output into a file of that name, its time and verdict to the terminal
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1
    status=$?
    [ "$status" -eq 0 ] || failed+=("$name")
    printf '%-12s %s  %s s  %s\n' "$name" "$([ "$status" -eq 0 ] && echo ok || echo "FAILED ($status)")" \
        "$((SECONDS - began))" "$out/$name.txt"
}

{ nvidia-smi 2>&1; "$python" -m pip freeze; git describe --always --dirty; } >"$out/machine.txt"

stage suite 480 "$python" -m pytest --require-gpu -q -p no:cacheprovider

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        # an error that a tool reports makes the exit code 99
        stage "$tool" 160 compute-sanitizer --tool "$tool" --error-exitcode 99 \
            "$python" -m pytest --require-gpu -q -p no:cacheprovider tests/test_kernels.py
    done
else
    echo "sanitizers   left out: compute-sanitizer is not on PATH"
fi

stage benchmarks 480 "$python" -m benchmarks all --json "$out/benchmarks.json"

if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
