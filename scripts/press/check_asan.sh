#!/usr/bin/env bash
# Builds the compiled core with AddressSanitizer and UndefinedBehaviorSanitizer into build/asan, apart from the
# installed one, and runs tests on it: those of the kernels, whatever pytest arguments are given, or a script of this
# folder.
#
#   scripts/press/check_asan.sh                      tests/native
#   scripts/press/check_asan.sh tests/gptq/test_linear.py -k truncated
#   scripts/press/check_asan.sh scripts/press/fuzz_checkpoints.py --memory-limit-mib 0 --time-limit-s 120
#
# PYTHON names an interpreter in which the package's dependencies, pybind11 and setuptools are installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
compiler=${CXX:-g++}

# -O1 keeps the tests quick.  The kernels are built without RTTI, which -fsanitize=vptr would need.  At -O1 GCC warns
# about the registers that its own intrinsics leave undefined on purpose.
flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g"
ROPEWALK_CFLAGS="$flags -Wno-uninitialized -Wno-maybe-uninitialized" \
  "$PYTHON" setup.py -q build --build-base build/asan --build-lib build/asan/lib

# The interpreter itself is not instrumented, so the libraries come first, and libstdc++ with them: AddressSanitizer
# looks up the thrower of C++ exceptions when it starts.
preload=""
for library in libasan.so libubsan.so libstdc++.so; do
  path=$("$compiler" -print-file-name="$library")
  [ -e "$path" ] || { echo "$library of $compiler was not found; install it (Debian: libasan8, libubsan1)" >&2; exit 1; }
  preload+="${preload:+ }$(readlink -f "$path")"
done

# Python's own allocations at exit are not leaks of ours; tests expect a MemoryError for allocations beyond memory.
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export UBSAN_OPTIONS="print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"
export PYTHONPATH="build/asan/lib${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export LD_PRELOAD="$preload"

"$PYTHON" - <<'EOF'
from ropewalk import _core
assert "build/asan/lib" in _core.__file__, f"the tests would run {_core.__file__}, which is not instrumented"
EOF
if [ $# -eq 0 ]; then set -- tests/native; fi
if [[ $1 == scripts/*/*.py ]]; then exec "$PYTHON" "$@"; fi
exec "$PYTHON" -m pytest -q -p no:cacheprovider "$@"
