# Sourced by demo.sh and test.sh: makes .venv and installs the package into it, and again only if its sources changed.
# Usage: source scripts/environment.sh EXTRAS        (EXTRAS: "" or "[test]")
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH="torch==2.13.0"  # one known version, so that two people who run this run the same thing
extras="${1-}"

sources_digest() {
    find native loader_plugin gradio_demo setup.py pyproject.toml -type f -not -name '*.so' -not -path '*/__pycache__/*' \
        -not -path '*.egg-info/*' -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum | cut -d ' ' -f 1
}

if [ ! -x .venv/bin/python ]; then
    echo "Making .venv" >&2
    "${PYTHON:-python3}" -m venv .venv
fi

stamp=".venv/ropewalk-installed$extras"
digest="$(sources_digest) $TORCH"
valid=("$stamp")
[ -n "$extras" ] || valid=(.venv/ropewalk-installed*)  # extras only add
if ! grep -qsxF "$digest" "${valid[@]}"; then
    echo "Installing ropewalk$extras into .venv (compiles the core; the first time this also installs torch)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$TORCH"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check ".$extras"
    for other in .venv/ropewalk-installed*; do  # installs of the same sources with other extras still count
        if ! grep -qsxF "$digest" "$other"; then rm -f "$other"; fi
    done
    echo "$digest" > "$stamp"
fi
