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
part() {  # NAME SHARE ARGS...: a benchmark within a share, in per cent, of what is left
    local name=$1 seconds=$(($(left) * $2 / 100)) most
    most=$((seconds + 40 < $(left) ? seconds + 40 : $(left)))  # a case that has begun may go over its share
    shift 2
    echo "== $name, at most $seconds s"
    timeout "$most" "$PYTHON" -m "benchmarks.$name" "${DEVICE[@]}" --budget "$seconds" --out "$OUT" "$@" \
        || FAILED+=("$name")
}

echo "== tests marked gpu"
TESTS=(tests/kernels tests/sae)
[ -n "$DRY" ] && TESTS=(tests/kernels/test_sparse.py)  # all of them are skipped
timeout $(($(left) / 4)) "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu "${TESTS[@]}" > "$OUT/tests.txt" 2>&1
case $? in
    0) ;;
    5) echo "no test is marked gpu" ;;
    *) FAILED+=(tests) ;;
esac
tail -n 3 "$OUT/tests.txt"
if [ -n "$DRY" ]; then
    part train_step 60 --cases "topk 16"
else
    part train_step 60
fi
part host_work 10
part inference 40
part fit 90
"$PYTHON" -m benchmarks.goals "$OUT" || FAILED+=(goals)
echo "== $SECONDS s in all; figures in $OUT"
if [ ${#FAILED[@]} -gt 0 ]; then
    echo "failed, or an mmsae contender disagrees: ${FAILED[*]}" >&2
    exit 1
fi
