#!/usr/bin/env bash
# Sets up everything in .venv and shows the embedded GPTQ model: as a page in the browser, or as text here.
#
#   scripts/demo.sh [any option of `ropewalk demo`]
#   scripts/demo.sh --tour [any option of `ropewalk tour`]
#   scripts/demo.sh --prompt TEXT [--max-new-tokens N] [any option of `ropewalk generate`]
command=demo extras="[demo]" arguments=()
for argument in "$@"; do
    case "$argument" in
        --tour) command=tour extras="" && continue ;;
        --prompt | --prompt=* | --prompt-file | --prompt-file=*) command=generate extras="" ;;
    esac
    arguments+=("$argument")
done
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "$extras"
exec .venv/bin/ropewalk "$command" ${arguments[@]+"${arguments[@]}"}
