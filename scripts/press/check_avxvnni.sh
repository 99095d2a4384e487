#!/usr/bin/env bash
# Runs the kernel tests of "avxvnni" on a processor that has AVX2 and no AVX-VNNI: its instructions are computed when they
# trap (avxvnni.c).  The core is built into build/avxvnni, apart from the installed one, and believes that the processor
# has everything; only tests of avxvnni are run.
#
#   scripts/press/check_avxvnni.sh                      tests/native
#   scripts/press/check_avxvnni.sh tests/native/test_gptq_linear.py
#
# PYTHON names an interpreter in which the package's dependencies, pybind11 and setuptools are installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
ROPEWALK_CFLAGS="-D__builtin_cpu_supports(name)=1" \
  "$PYTHON" setup.py -q build --build-base build/avxvnni --build-lib build/avxvnni/lib
"${CC:-gcc}" -std=gnu11 -O2 -Wall -Wextra -fPIC -shared scripts/press/avxvnni.c -o build/avxvnni/avxvnni.so

export PYTHONPATH="build/avxvnni/lib${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export LD_PRELOAD="$PWD/build/avxvnni/avxvnni.so"
"$PYTHON" - <<'PROGRAM'
from ropewalk import _core
assert "build/avxvnni/lib" in _core.__file__, f"the tests would run {_core.__file__}"
assert "avxvnni" in _core.available_isas()
PROGRAM
if [ $# -eq 0 ]; then set -- tests/native; fi
# pytest's own handler of illegal instructions would take the place of ours.
exec "$PYTHON" -m pytest -q -p no:cacheprovider -p no:faulthandler -k avxvnni "$@"
