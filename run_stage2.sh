#!/usr/bin/env bash
# Stage 2 alone, on `--gpus N` processes (see run_staged.sh); every other flag goes to the stage.
set -euo pipefail
script=${BASH_SOURCE[0]}
while [[ -L $script ]]; do # readlink -f is not everywhere
    target=$(readlink -- "$script")
    script=$([[ $target == /* ]] || dirname -- "$script")/$target
done
exec bash "$(dirname -- "$script")/run_staged.sh" --only 2 "$@"
