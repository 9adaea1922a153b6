#!/usr/bin/env bash
# Stage 1 alone, in one process (see run_staged.sh); every flag but `--gpus` goes to the stage.
set -euo pipefail
exec bash "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/run_staged.sh" --only 1 "$@"
