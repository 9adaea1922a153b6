#!/usr/bin/env bash
# Runs all three stages, or with `--only N` (run_stageN.sh) one. Chooses the Python, and hands over to
# hunyuan_staged/launch.py; `bash run_staged.sh --help` says more.
set -euo pipefail

script=${BASH_SOURCE[0]}
while [[ -L $script ]]; do # readlink -f is not everywhere
    target=$(readlink -- "$script")
    if [[ $target != /* ]]; then target=$(dirname -- "$script")/$target; fi
    script=$target
done
here=$(CDPATH='' cd -- "$(dirname -- "$script")" && pwd -P)
# shellcheck source=.ci/environment.sh
source "$here/.ci/environment.sh"

# Ctrl-C waits from the first line on, until the launcher listens. -S: the launcher needs the standard library alone.
program='import _signal
_signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT, _signal.SIGTERM))
import sys
sys.path.insert(0, sys.argv[1])
from hunyuan_staged.launch import main
sys.exit(main(sys.argv[2:]))'

find_python "$here" "$RUNTIME_MODULES"
if [[ -n $incomplete ]]; then
    status=0
    "$python" -S -P -c "$program" "$here" "$python" check "$@" || status=$?
    if ((status == 100)); then exit 0; fi # it was asked for help
    if ((status)); then exit "$status"; fi
    make_environment "$here/.venv" "$here"
fi
exec "$python" -S -P -c "$program" "$here" "$python" run "$@"
