#!/usr/bin/env bash
# Builds the wheel once and tries it as a user has it: in a fresh environment of each Python, from an empty folder, with
# the newest versions that pyproject.toml allows. About 7 GB and some minutes for each; what is made is removed.
#   bash requirements/wheels.sh [PYTHON ...]        EXTRAS='[remote]' installs an extra, too
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- python3.10 python3.11 python3.12 python3.13
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$1" -m venv "$work/build"
"$work/build/bin/pip" install -q build
"$work/build/bin/python" -m build -q --outdir "$work/dist" .
wheel=$(ls "$work"/dist/*.whl)
echo "$(basename "$wheel"), $(stat -c %s "$wheel") bytes; $(basename "$work"/dist/*.tar.gz)"
small="--trainer.max_steps 5 --trainer.val_check_interval 5 --trainer.enable_progress_bar false --data.pairs 512"
small="$small --data.val_pairs 128 --data.batch_size 64 --trainer.accelerator cpu"
failed=0
for python in "$@"; do
    rm -rf "$work/venv" "$work/empty"
    mkdir "$work/empty"
    name=$("$python" -c 'import platform; print("Python", platform.python_version())')
    if "$python" -m venv "$work/venv" &&
        "$work/venv/bin/pip" install -q --no-warn-script-location "$wheel${EXTRAS:-}" &&
        "$work/venv/bin/pip" check &&
        (
            set -e
            cd "$work/empty"
            export PATH="$work/venv/bin:$PATH" OMP_NUM_THREADS=1
            unset PYTHONPATH
            mmsae --version
            mmsae --help > help.txt
            mmsae fit -c configs/smoke/paired_topk.yaml $small --trainer.default_root_dir run > fit.txt
            mmsae info run/sae > info.txt
            mmsae evaluate --help > help.txt
            pip list --format freeze | grep -iE '^(torch|transformers|diffusers|lightning|open_clip_torch|timm|huggingface_hub|numpy|pandas|pyarrow)=' | paste -sd ' '
        ); then
        echo "$name: works"
    else
        echo "$name: FAILED"
        failed=1
    fi
done
exit $failed
