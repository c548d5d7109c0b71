#!/usr/bin/env bash
# Everything that only a GPU can prove, in one command, into one folder: the suite, the sanitizers over the kernels'
# tests, the benchmarks that a GPU changes. Under 25 minutes in all; each part alone ends within 10. A stage that fails or
# is missing does not stop the others; summary.txt and the exit code say whether one did.
# Rehearsed on the stand-in driver; not run on hardware yet.
#
#   benchmarks/gpu.sh [PART...]     suite, sanitizer, bench; default: all three
#   OUT=FOLDER                      default: benchmarks/results/DEVICE
#   PYTHON=python3                  an environment with numba-cuda, pytest, hypothesis; torch, CuPy, RMM where wanted
#   WHEELS=FOLDER                   wheels to install first, aside, on a machine without a network (see `make wheels`)
#   SMOKE=1                         a rehearsal: any backend, least sizes, one file of tests
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
sanitizer=${SANITIZER:-compute-sanitizer}
export PATH=$PATH:/usr/local/cuda/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# where Numba finds NVVM on a machine that has the toolkit but not its wheels
if [ -z "${CUDA_HOME:-}${CUDA_PATH:-}" ] && [ -d /usr/local/cuda ]; then
    export CUDA_HOME=/usr/local/cuda
fi

parts=("$@")
[ $# -gt 0 ] || parts=(suite sanitizer bench)
for part in "${parts[@]}"; do
    case $part in suite | sanitizer | bench) ;; *)
        echo "no part '$part': choose from suite, sanitizer, bench" >&2
        exit 2
        ;;
    esac
done

if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 2
    # numba-cuda puts itself in numba.cuda's place by a .pth file, which Python reads in site directories alone
    echo "import site; site.addsitedir('$site')" >"$site/sitecustomize.py"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

tests=() only=--require-gpu smoke=()
if [ -n "${SMOKE:-}" ]; then
    tests=(tests/_cuda/test_kernels.py) only=-q smoke=(--smoke)
else
    unset NUMBA_ENABLE_CUDASIM
fi
device=$("$python" - <<'PYTHON'
import os
import re

from benchmarks import harness
from numbabuf import _cuda

if not harness.on_gpu() and not os.environ.get("SMOKE"):
    raise SystemExit("this is the simulator or the stand-in driver, not a GPU")
try:
    name = _cuda.device_name()
except Exception as error:
    raise SystemExit(str(error)) from None
print(re.sub(r"\W+", "-", name).strip("-").lower())
PYTHON
) || { echo "no GPU can be used; without one: NUMBA_ENABLE_CUDASIM=1 pytest" >&2; exit 2; }
out=${OUT:-benchmarks/results/$device}
mkdir -p "$out"
failed=()

verdict() { # verdict NAME WORDS: one line to the terminal and the summary
    printf '%-10s %s\n' "$1" "$2" | tee -a "$out/summary.txt"
}

stage() { # stage NAME SECONDS COMMAND...: its output into a file of that name
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1
    status=$?
    if [ "$status" -eq 0 ]; then
        verdict "$name" "ok, $((SECONDS - began)) s"
    else
        failed+=("$name")
        verdict "$name" "FAILED (exit code $status), $((SECONDS - began)) s: see $name.txt"
        tail -n 15 "$out/$name.txt"
    fi
}

{
    echo "$device, $(date -u +%Y-%m-%dT%H:%MZ), $(git describe --always --dirty 2>/dev/null): ${parts[*]}"
    nvidia-smi 2>&1
    "$python" -m pip list --format=freeze 2>/dev/null
} >"$out/machine.txt"

suite() {
    stage suite 480 "$python" -m pytest $only -q -p no:cacheprovider ${tests[@]+"${tests[@]}"}
}

sanitizer() {
    if ! command -v "$sanitizer" >/dev/null; then
        failed+=(sanitizer)
        verdict sanitizer "LEFT OUT: $sanitizer is not there; the CUDA toolkit has it"
        return
    fi
    local tool options
    for tool in memcheck racecheck initcheck; do
        options=(--tool "$tool" --target-processes application-only --error-exitcode 99 --print-limit 20)
        # memcheck counts calls that the driver refuses as errors, too: Numba and cuda.core ask for what may not be
        # there, and the tests provoke refusals
        [ "$tool" != memcheck ] || options+=(--report-api-errors no)
        stage "$tool" 150 "$sanitizer" "${options[@]}" \
            "$python" -m pytest $only -q -p no:cacheprovider tests/_cuda/test_kernels.py
    done
}

bench() {
    # the most wanted first: what has been measured is kept when time runs out
    stage bench 540 "$python" -m benchmarks step fill moves pool capture tuning growth import_time \
        ${smoke[@]+"${smoke[@]}"} --json "$out/bench.json"
}

for part in "${parts[@]}"; do
    "$part"
done
echo "results in $out; pictures: $python -m benchmarks plot $out/bench.json"
if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
