#!/usr/bin/env bash
# Correctness, then the whole comparison of speed, on one GPU: under six minutes, with nothing to download.
#
#   bash benchmarks/gpu.sh [OUT]         # default: benchmarks/results/gpu
#   bash benchmarks/gpu.sh --dry-run     # the same script on a CPU at the smallest sizes, kernels interpreted
#
# Leaves OUT/{train_step,host_work,inference,fit}.{json,md,png}, OUT/goals.md (reached or missed) and OUT/tests.txt, each with date,
# device, driver and versions in its JSON. Other libraries take part where they are installed; those that are not are
# named. PYTHON says which Python, BUDGET how many seconds all of it may take.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=benchmarks/results/gpu
DRY=
for arg in "$@"; do
    case $arg in
        --dry-run) DRY=1 ;;
        -*) echo "usage: bash benchmarks/gpu.sh [--dry-run] [OUT]" >&2; exit 2 ;;
        *) OUT=$arg ;;
    esac
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$DRY" ]; then
    BUDGET=${BUDGET:-1800}
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
    DEVICE=(--device cpu --quick)
    [ "$OUT" = benchmarks/results/gpu ] && OUT=runs/gpu_dry_run
else
    BUDGET=${BUDGET:-340}
    DEVICE=(--device cuda)
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 2; }
fi
mkdir -p "$OUT"
FAILED=()
left() { echo $((BUDGET - SECONDS)); }
has_time() {  # NAME SECONDS: whether that is enough to begin; to `timeout` and to the benchmarks 0 means no bound
    [ "$2" -ge 5 ] && return
    echo "== $1: no time is left for it"
    FAILED+=("$1 (no time)")
    return 1
}
part() {  # NAME SHARE ARGS...: a benchmark within a share, in per cent, of what is left
    local name=$1 seconds=$(($(left) * $2 / 100)) most
    has_time "$name" "$seconds" || return
    most=$((seconds + 40 < $(left) ? seconds + 40 : $(left)))  # a case that has begun may go over its share
    shift 2
    echo "== $name, at most $seconds s"
    timeout -k 5 "$most" "$PYTHON" -m "benchmarks.$name" "${DEVICE[@]}" --budget "$seconds" --out "$OUT" "$@" \
        || FAILED+=("$name")
}
tests() {  # those marked gpu: on as many processes as compile their 560 kernels in a quarter of the time
    local seconds=$(($(left) / 4)) cores what=(tests/kernels tests/sae)
    has_time tests "$seconds" || return
    cores=$(nproc)
    if [ -n "$DRY" ]; then
        what=(tests/kernels/test_sparse.py)  # all of them are skipped
    elif [ "$cores" -ge 4 ] && "$PYTHON" -c 'import xdist' 2> /dev/null; then
        what+=(-n $((cores < 8 ? cores : 8)))
    else
        echo "without pytest-xdist and four cores: those at sizes of trainings alone"
        what+=(-k "sizes_of_trainings or cuda_equals_cpu")
    fi
    timeout -k 5 "$seconds" "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu "${what[@]}" > "$OUT/tests.txt" 2>&1
    case $? in
        0) ;;
        5) echo "no test is marked gpu" ;;
        *) FAILED+=(tests) ;;
    esac
    tail -n 3 "$OUT/tests.txt"
}

echo "== tests marked gpu"
tests
if [ -n "$DRY" ]; then
    part train_step 60 --cases "topk 16"
else
    part train_step 60
fi
part fit 50  # a round of it is half a minute
part inference 60
part host_work 90  # which says the same on any host
"$PYTHON" -m benchmarks.goals "$OUT" || FAILED+=(goals)
echo "== $SECONDS s in all; figures in $OUT"
if [ ${#FAILED[@]} -gt 0 ]; then
    echo "failed, or an mmsae contender disagrees: ${FAILED[*]}" >&2
    exit 1
fi
