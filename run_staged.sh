#!/usr/bin/env bash
# Runs all three stages, or with `--only N` (run_stageN.sh) one. Chooses the Python and the number of processes, and
# passes every other flag on; `bash run_staged.sh --help` says more.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scripts=(stage1_text_encoder.py stage2_transformer.py stage3_vae_decoder.py)

fail() {
    echo "error: $1" >&2
    exit 2
}

# A Python 3.11 or later that has all modules which the stages import is used as it is.
has_all() {
    "$1" -c 'import importlib.util as u, sys
names = "torch diffusers transformers safetensors einops loguru tqdm imageio_ffmpeg PIL huggingface_hub"
sys.exit(sys.version_info < (3, 11) or any(u.find_spec(name) is None for name in names.split()))' 2>/dev/null
}

# $PYTHON, else the python3 at hand, else this folder's .venv. Where none has all, python3 itself, which is enough to
# show --help and to refuse flags; make_environment then makes the rest.
incomplete=
find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        python=$PYTHON
    elif has_all python3; then
        python=python3
    elif has_all "$here/.venv/bin/python"; then
        python=$here/.venv/bin/python
    else
        command -v python3 >/dev/null || fail "there is no python3; Python 3.11 or later is needed"
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "python3 is $(python3 --version 2>&1); Python 3.11 or later is needed"
        python=python3
        incomplete=yes
    fi
}

make_environment() {
    [[ -n $incomplete ]] || return 0
    echo "no Python here has all that the suite needs: making $here/.venv (once, some minutes)" >&2
    python3 -m venv "$here/.venv"
    python=$here/.venv/bin/python
    # First, and exactly the version that the suite is tested with: a looser request takes whatever is newest.
    "$python" -m pip install --quiet torch==2.13.0
    "$python" -m pip install --quiet --editable "$here"
}

# All GPUs that CUDA_VISIBLE_DEVICES shows, at most 8; one CPU process where there is none.
visible_gpus() {
    local count=0
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        if [[ -n $CUDA_VISIBLE_DEVICES && $CUDA_VISIBLE_DEVICES != -1 ]]; then
            count=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
        fi
    elif command -v nvidia-smi >/dev/null; then
        count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    fi
    if ((count > 8)); then count=8; fi
    if ((count < 1)); then count=1; fi
    echo "$count"
}

only=
gpus=${GPUS:-}
flags=()
while (($#)); do
    case $1 in
    --only) only=$2 && shift ;;
    --gpus) (($# > 1)) || fail "--gpus needs a number" && gpus=$2 && shift ;;
    --gpus=*) gpus=${1#*=} ;;
    *) flags+=("$1") ;;
    esac
    shift
done
gpus=${gpus:-$(visible_gpus)}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus $gpus is not a positive number"

# SIGTERM and Ctrl-C go on to the stage, which says what becomes of it, and whose status is then this script's.
child=
signalled=
forward() {
    if [[ -z $child ]]; then exit "$2"; fi
    signalled=yes
    kill -s "$1" "$child" 2>/dev/null || true
}
trap 'forward TERM 143' TERM
trap 'forward INT 130' INT

run_stage() {
    local script=$here/${scripts[$1 - 1]} status=0 code
    shift
    set -m # a process group of its own: a terminal's Ctrl-C reaches the stage once, from here
    if ((gpus == 1)); then
        "$python" "$script" "$@" &
    else
        "$python" "$here/utils.py" launch "$gpus" "$script" "$@" &
    fi
    child=$!
    set +m
    signalled=yes
    while [[ -n $signalled ]]; do # a signal ends the wait, not the stage
        signalled=
        code=0
        wait "$child" || code=$?
        if ((code != 127)); then status=$code; fi # 127: it has been waited for already
    done
    child=
    return "$status"
}

find_python
for flag in ${flags[@]+"${flags[@]}"}; do
    if [[ $flag == --help || $flag == -h ]]; then
        # By one process, however many would run.
        if [[ -n $only ]]; then exec "$python" "$here/utils.py" check "$only" --help; fi
        exec "$python" "$here/utils.py" split . --help
    fi
done
if [[ -n $only ]]; then
    "$python" "$here/utils.py" check "$only" ${flags[@]+"${flags[@]}"}
    make_environment
    run_stage "$only" ${flags[@]+"${flags[@]}"}
    exit
fi
lists=$(mktemp -d)
trap 'rm -rf "$lists"' EXIT
"$python" "$here/utils.py" split "$lists" ${flags[@]+"${flags[@]}"}
make_environment
for number in 1 2 3; do
    mapfile -d '' -t arguments <"$lists/$number"
    run_stage "$number" ${arguments[@]+"${arguments[@]}"}
done
