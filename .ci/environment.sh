# Sourced by run_staged.sh, tests/run.sh and .ci/run: finds a Python that has all that is needed, or makes one.
# Works with bash 3.2.
# shellcheck shell=bash

RUNTIME_MODULES="torch diffusers transformers safetensors einops loguru tqdm imageio_ffmpeg PIL huggingface_hub"
TEST_MODULES="$RUNTIME_MODULES skimage matplotlib pytest pytest_timeout xdist hypothesis ray gguf"
TORCH=torch==2.13.0 # the version that the suite is tested with: a looser request takes whatever is newest
CPU_INDEX=https://download.pytorch.org/whl/cpu

fail() {
    local text=${1//[[:cntrl:]]/ }
    # As hunyuan_staged/errors.py: whatever it quotes, a line has an end.
    if ((${#text} > 1900)); then text="${text:0:940} […] ${text: -940}"; fi
    printf 'error: %s\n' "$text" >&2
    exit 2
}

# has_all PYTHON MODULES: whether it is Python 3.11 or later and has them.
has_all() {
    "$1" -c 'import importlib.util as u, sys
sys.exit(sys.version_info < (3, 11) or any(u.find_spec(name) is None for name in sys.argv[1].split()))' "$2" 2>/dev/null
}

# find_python ROOT MODULES sets $python: $PYTHON, else the python3 at hand, else ROOT/.venv's. Where none has all it is
# python3, which is enough to show --help and to refuse flags, and $incomplete is set: see make_environment.
find_python() {
    incomplete=
    if [[ -n ${PYTHON:-} ]]; then
        command -v -- "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a program"
        python=$PYTHON
    elif has_all python3 "$2"; then
        python=python3
    elif has_all "$1/.venv/bin/python" "$2"; then
        python=$1/.venv/bin/python
    else
        command -v python3 >/dev/null || fail "there is no python3; Python 3.11 or later is needed"
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "python3 is $(python3 --version 2>&1); Python 3.11 or later is needed"
        python=python3
        # shellcheck disable=SC2034
        incomplete=yes
    fi
}

has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'
}

# need_browser: a Chromium for the test of the gallery's page, from Debian's packages where there is none yet. Without
# one, that test is left out.
need_browser() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        if command -v "$name" >/dev/null; then return; fi
    done
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        echo "installing chromium, once: some 100 MB to download, 400 MB on disk" >&2
        { timeout 60 apt-get update && timeout 240 apt-get install --yes --no-install-recommends chromium; } >/dev/null ||
            echo "note: chromium could not be installed" >&2
    fi
}

# make_environment VENV ROOT [EXTRA]: makes VENV with the suite of ROOT, and sets $python.
make_environment() {
    local extra=${3:+[$3]} index=
    if has_gpu; then
        echo "making $1, once: torch with CUDA and what else the suite needs, some 3 GB to download, 7 GB on disk" >&2
    else
        echo "making $1, once: torch for CPUs and what else the suite needs, some 430 MB to download, up to 2.1 GB on disk" >&2
        # Where it can be reached: elsewhere the CUDA build, which is larger, does as well.
        if python3 -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
            "$CPU_INDEX/torch/" 2>/dev/null; then
            index=$CPU_INDEX
        fi
    fi
    python3 -m venv "$1" || fail "python3 cannot make $1; on Debian and Ubuntu it needs the package python3-venv"
    python=$1/bin/python
    "$python" -m pip install ${index:+--index-url "$index"} "$TORCH" >&2
    "$python" -m pip install --editable "$2$extra" >&2
}
