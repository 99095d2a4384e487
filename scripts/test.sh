#!/usr/bin/env bash
# Sets up everything in .venv and runs all tests.  Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[test]"
exec .venv/bin/python -m pytest "$@"
