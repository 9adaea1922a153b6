#!/usr/bin/env bash
# Stage 2 alone, on `--gpus N` processes (see run_staged.sh); every other flag goes to the stage.
set -euo pipefail
exec bash "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/run_staged.sh" --only 2 "$@"
