#!/usr/bin/env bash
# `make wheels`: builds source archive and wheel once and tries the wheel as a user has it: in a fresh environment of each
# Python, from an empty folder, with the newest versions that pyproject.toml allows. About 7 GB each, one after the other;
# what is made is removed. uv installs in a minute what takes pip ten, and shares files with its cache.
#   UVENV=.venv-uv bash requirements/wheels.sh PYTHON ...        EXTRAS='[remote]' installs an extra, too
set -eu
cd "$(dirname "$0")/.."
uv="$(realpath "$UVENV")/bin/uv"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export UV_PYTHON_DOWNLOADS=never
unset PYTHONPATH PYTHONDONTWRITEBYTECODE  # what a command imports is compiled once, not by each that follows
uv() { "$uv" --system-certs -q "$@"; }
uv build --python "$1" --out-dir "$work/dist" .
wheel=$(ls "$work"/dist/*.whl)
echo "$(basename "$wheel"), $(stat -c %s "$wheel") bytes; $(basename "$work"/dist/*.tar.gz)"
small="--trainer.max_steps 5 --trainer.val_check_interval 5 --trainer.enable_progress_bar false --data.pairs 512"
small="$small --data.val_pairs 128 --data.batch_size 64 --trainer.accelerator cpu"
shown='^(torch|transformers|diffusers|lightning|open-clip-torch|timm|huggingface-hub|numpy|pandas|pyarrow|ray|s3fs)='
failed=""
for python in "$@"; do
    rm -rf "$work/venv" "$work/empty"
    mkdir "$work/empty"
    name=$("$python" -c 'import platform; print("Python", platform.python_version())') || name=$python
    # not in the condition of an if, where set -e has no effect
    set +e
    (
        set -e
        "$python" -m venv --without-pip "$work/venv"
        uv pip install --python "$work/venv/bin/python" "$wheel${EXTRAS:-}"
        uv pip check --python "$work/venv/bin/python"
        cd "$work/empty"
        export PATH="$work/venv/bin:$PATH" OMP_NUM_THREADS=1
        mmsae --version
        mmsae --help > help.txt
        mmsae fit -c configs/smoke/paired_topk.yaml $small --trainer.default_root_dir run > fit.txt
        mmsae info run/sae > info.txt
        mmsae evaluate --help > help.txt
        uv pip list --python "$work/venv/bin/python" --format freeze | grep -E "$shown" | paste -sd ' '
    )
    rc=$?
    set -e
    if [ $rc = 0 ]; then
        echo "$name: works"
    else
        echo "$name: FAILED"
        failed="$failed $python"
    fi
done
[ -z "$failed" ] || { echo "The wheel does not work with:$failed" >&2; exit 1; }
