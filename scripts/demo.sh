#!/usr/bin/env bash
# Sets up everything in .venv and lets the embedded GPTQ model write.
#
#   scripts/demo.sh [--prompt TEXT] [--max-new-tokens N] [any option of `ropewalk generate`]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
exec .venv/bin/ropewalk generate "$@"
