#!/usr/bin/env bash
# Stage 1 alone, in one process (see run_staged.sh); every flag but `--gpus` goes to the stage.
set -euo pipefail
script=${BASH_SOURCE[0]}
while [[ -L $script ]]; do # readlink -f is not everywhere
    target=$(readlink -- "$script")
    script=$([[ $target == /* ]] || dirname -- "$script")/$target
done
exec bash "$(dirname -- "$script")/run_staged.sh" --only 1 "$@"
