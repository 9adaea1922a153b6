#!/usr/bin/env bash
# Runs the tests, and first makes the environment that they need unless there is one; what follows goes to pytest:
# `bash tests/run.sh -k readme`.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=.ci/environment.sh
source "$root/.ci/environment.sh"

find_python "$root" "$TEST_MODULES"
if [[ -n $incomplete ]]; then make_environment "$root/.venv" "$root" dev; fi
cd "$root"
exec "$python" -m pytest "$@"
