#!/usr/bin/env bash
# Shows that code compiled for one instruction set cannot leak into another: of every archive or object file given,
# the only symbol that other files can see is ropewalk::<isa>::kernel_table(), nothing is weak (the linker would keep
# one copy of a weak symbol for the whole module, perhaps the one that needs AVX-512), and no C++ function is called
# that lies outside.  See native/README.md, "One definition rule".
#
#   scripts/press/check_symbols.sh build/temp/libropewalk_avx2.a ...
#   scripts/press/check_symbols.sh            compiles the archives anew (setup.py build_clib) and checks those
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ $# -eq 0 ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  # At -O0 nothing is inlined away, so every copy that any optimisation level might emit is there to be seen.
  ROPEWALK_CFLAGS="${ROPEWALK_CFLAGS:--O0}" "${PYTHON:-python3}" setup.py -q build_clib -b "$folder" -t "$folder/temp"
  set -- "$folder"/*.a
fi

status=0
for file in "$@"; do
  symbols=$(nm --format=posix "$file" | awk 'NF >= 2')
  # Upper case: visible to other files. U: wanted from them. V, v, W, w, u: weak or unique.
  wrong=$(awk '$2 ~ /^[VvWwu]$/ ||
               ($2 ~ /^[A-TX-Z]$/ && $1 !~ /^_ZN8ropewalk[0-9]+[a-z0-9]+12kernel_tableEv$/) ||
               ($2 == "U" && $1 ~ /^_Z/)' <<<"$symbols" | c++filt)
  tables=$(awk '$2 == "T" && $1 ~ /12kernel_tableEv$/' <<<"$symbols" | wc -l)
  if [ -n "$wrong" ] || [ "$tables" -ne 1 ]; then
    echo "$file: defines $tables kernel tables (1 expected), and these symbols must not be there:" >&2
    echo "${wrong:-(none)}" >&2
    status=1
  else
    echo "$file: exports its kernel table alone"
  fi
done
exit $status
