#!/usr/bin/env bash
# Measures this program on one GPU: parts of at most five minutes each, one after another.
#
#   benchmarks/gpu.sh [--dry-run] [--output DIR] [--data DIR] [PART ...]
#
# Parts, in this order (default: all): tests steps-vit steps-resnet steps-mlp factorization stability
# training application. A part that fails or runs out of time leaves what it has done, and the next
# one starts; the exit code is 1 then. DIR/gpu.json and DIR/gpu.md hold all that was measured.
#
# The host may be bare: torch, timm and h5py (application: also what `python -m app.train` needs, tests:
# pytest). --dry-run runs every part on the CPU with tiny sizes, and hides from Python what a bare host
# lacks. --data names a folder of packed data (python -m benchmarks.gpu.pack).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

output=gpu-results data="" dry=() parts=()
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry=(--dry-run) ;;
        --output) output=$2; shift ;;
        --data) data=$2; shift ;;
        -*) sed -n '2,13s/^# \{0,1\}//p' "$0"; [ "$1" = --help ] && exit 0 || exit 2 ;;
        *) parts+=("$1") ;;
    esac
    shift
done
all=(tests steps-vit steps-resnet steps-mlp factorization stability training application)
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
for part in "${parts[@]}"; do
    case " ${all[*]} " in
        *" $part "*) ;;
        *) echo "gpu.sh: no part $part; there are: ${all[*]}" >&2; exit 2 ;;
    esac
done

python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1
mkdir -p "$output"
failed=()
limit=300
[ ${#dry[@]} -eq 0 ] || limit=600

run() { # PART SECONDS COMMAND...: within its time, its output also in DIR/PART.log
    local part=$1 seconds=$2 path=${PYTHONPATH:-}
    shift 2
    if [ ${#dry[@]} -gt 0 ] && [ "$part" != application ]; then
        path=$PWD/benchmarks/gpu/bare${path:+:$path}
    fi
    echo "== $part"
    PYTHONPATH=$path timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$output/$part.log"
    [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$part")
}

measure() { # PART MODULE ARGUMENTS...
    local part=$1 module=$2
    shift 2
    run "$part" "$limit" "$python" -m "benchmarks.gpu.$module" --output "$output" "${dry[@]}" "$@"
}

for part in "${parts[@]}"; do
    case "$part" in
        tests) OIALR_GPU_DRY_RUN=${dry[*]:+1} run tests "$limit" "$python" -m pytest tests/gpu -q -rs -p no:cacheprovider ;;
        steps-*) measure "$part" steps "${part#steps-}" ;;
        training) measure training training ${data:+--data "$data"} ;;
        *) measure "$part" "$part" ;;
    esac
done
"$python" -m benchmarks.gpu.table "$output" || failed+=(table)
if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu.sh: failed or out of time: ${failed[*]}" >&2
    exit 1
fi
