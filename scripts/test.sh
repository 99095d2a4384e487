#!/usr/bin/env bash
# Sets up everything in .venv and runs all tests.  Arguments go to pytest, which then runs once.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[test]"
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# Servers, browsers and web UIs are given time limits: two files at a time, in order. The rest has none that matter.
clocked=(tests/faces tests/gradio_demo tests/scripts tests/cluster/test_cluster.py)
status=0
.venv/bin/python -m pytest --durations 25 -n auto --maxprocesses 8 "${clocked[@]/#/--ignore=}" || status=$?
.venv/bin/python -m pytest --durations 25 -n 2 --dist loadfile "${clocked[@]}" || status=$?
exit $status
