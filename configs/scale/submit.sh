#!/usr/bin/env bash
# A filtering job as arrays of Slurm: no task knows of another, and one task merges what an array has done.
#
#   SAE=runs/paired/sae SHARDS='shards/{00000..09999}.tar' OUT=kept bash configs/scale/submit.sh 64
#
# Filtering has two passes, that which fits pair weights and that which scores, so the array is submitted twice; for
# extract, weights, patches, pope and chair once is enough. Where something failed, the tasks after it do not start:
# `mmsae status $OUT` names it, and this script, run again, does what is left.
set -euo pipefail
parts=${1:?how many parts}
here=$(cd "$(dirname "$0")" && pwd)
export SAE SHARDS OUT
after=()
for _ in 1 2; do
  array=$(sbatch --parsable --export=ALL "${after[@]}" --array="0-$((parts - 1))" "$here/filter.sbatch")
  merge=$(sbatch --parsable --export=ALL --dependency="afterok:$array" "$here/filter.sbatch" --merge)
  after=(--dependency="afterok:$merge")
done
echo "$merge is the last; mmsae status $OUT says how far it is"
