"""What the GPU kernels become on each kind of card, compiled here without one: registers, memory, instructions.

    python scripts/press/gpu_compile_matrix.py                            all kernels, all targets: an hour
    python scripts/press/gpu_compile_matrix.py --target sm_80 --only w4   a part of them
    python scripts/press/gpu_compile_matrix.py --out benchmarks/FILE      writes the table there as well

NVIDIA's targets must keep within the limits below; ends with 1 if one does not. AMD's are reported. Nothing here has
run: what a card makes of these instructions shows on a card alone (scripts/bench/gpu.py).

Columns: registers of a thread; bytes of stack, where registers are spilled; shared memory of a program; the matrix
instruction; atomics; instructions of the innermost loop, which multiplies, and of it for each weight of a thread.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it would define the kernels as functions of Python

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gpu_cases_linear import CASES as LINEAR_CASES  # noqa: E402
from gpu_cases_rows import CASES as ROWS_CASES  # noqa: E402
from ropewalk.backends.gpu.codes import BLOCK_ROWS  # noqa: E402

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NVIDIA = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90, "sm_120": 120}
AMD = {"gfx942": 64, "gfx1100": 32}  # threads of a wave
SHARED_BYTES = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_120": 101376}  # of a program
MOST_REGISTERS = 255
# Kernels that wait for memory need several programs on a multiprocessor; 4 bits leave the least time for each weight.
LIMITS = {  # beginning of the name: (registers, instructions for each weight)
    "linear w4g128 decode": (128, 3.5),
    "linear w4g32 decode": (144, 4.5),
}
MATRIX_INSTRUCTIONS = r"^(HGMMA|HMMA|IMMA|QMMA|OMMA|UTCHMMA)"
SPILLS = ("LDL", "STL")
ATOMICS = r"^(ATOM|ATOMG|ATOMS|RED|REDG|REDUX\.ATOM)$"


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target."""

    target: str
    name: str
    registers: int
    stack: int
    shared: int
    matrix: str
    atomics: int
    loop: int
    per_weight: float | None
    seconds: float
    spills: int = 0  # of the innermost loop: where it has none, the stack holds what is put away while it runs

    def problems(self) -> list[str]:
        """What is beyond the limits; AMD's targets have none."""
        if self.target in AMD:
            return []
        registers, per_weight = next(
            (limits for start, limits in LIMITS.items() if self.name.startswith(start)), (MOST_REGISTERS, None)
        )
        found = []
        if self.stack:
            found.append(f"spills, {self.spills} times in the loop")
        if self.registers > registers:
            found.append(f"more than {registers} registers")
        if self.shared > SHARED_BYTES[self.target]:
            found.append(f"more than {SHARED_BYTES[self.target]} bytes of shared memory")
        if self.atomics:
            found.append("atomics")
        if per_weight is not None and (self.per_weight is None or self.per_weight > per_weight):
            found.append(f"more than {per_weight} instructions for a weight")
        if self.needs_matrix and self.matrix == "-":
            found.append("no matrix instruction")
        return found

    @property
    def needs_matrix(self) -> bool:
        """Products of float16 and TF32 are for matrix instructions; those in float32 have none."""
        return self.name.startswith(("linear", "dense", "attention")) and not re.search("exact|ieee", self.name)

    def __str__(self) -> str:
        per_weight = "-" if self.per_weight is None else f"{self.per_weight:.2f}"
        wrong = "; ".join(self.problems())
        return (
            f"{self.target:8} {self.name:40} {self.registers:4} {self.stack:6} {self.shared:7} {self.matrix:>22} "
            f"{self.atomics:4} {self.loop:6} {per_weight:>7} {self.seconds:6.1f}{f'   WRONG: {wrong}' if wrong else ''}"
        )


HEAD = (
    f"{'target':8} {'kernel':40} {'regs':>4} {'stack':>6} {'shared':>7} {'matrix instruction':>22} {'atom':>4} "
    f"{'loop':>6} {'/weight':>7} {'s':>6}"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=[*NVIDIA, *AMD], choices=[*NVIDIA, *AMD])
    parser.add_argument("--only", nargs="+", default=[""], help="kernels with one of these in their name")
    parser.add_argument("--out", type=Path, help="write the table there as well")
    args = parser.parse_args()
    cases = [case for case in (*LINEAR_CASES, *ROWS_CASES) if any(part in case[0] for part in args.only)]
    head = f"# kernels compiled without a card, of which none has run; Triton {triton.__version__}, {len(cases)} cases"
    lines = [head, f"# date: {datetime.date.today().isoformat()}; command: {' '.join(sys.argv)}", HEAD]
    print("\n".join(lines), flush=True)
    wrong = 0
    for compiled in results(cases, args.target):
        wrong += isinstance(compiled, str) or bool(compiled.problems())
        lines.append(str(compiled))
        print(compiled, flush=True)
    lines.append(f"{wrong} beyond the limits")
    print(lines[-1])
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(wrong > 0)


def results(cases: list[tuple], targets: list[str]) -> Iterator[Compiled | str]:
    """Every case on every target; a line of text where it does not compile."""
    names = {case[0] for case in cases}
    for target in targets:
        for name, kernel, signature, constants, options in cases:
            if not is_launched(name, target, names):
                continue
            started = time.perf_counter()
            try:
                compiled = build(kernel, signature, constants, options, target)
            except Exception as error:  # whatever the compiler raises belongs into the table
                yield f"{target:8} {name:40} NOT COMPILED: {type(error).__name__} {' '.join(str(error).split())[-200:]}"
                continue
            look = amd_facts if target in AMD else nvidia_facts
            per_iteration = weights_of_a_thread(name, constants, options)
            yield Compiled(
                target, name, **look(compiled, per_iteration), seconds=round(time.perf_counter() - started, 1)
            )


def is_launched(name: str, target: str, names: set[str]) -> bool:
    """Whether a card of this kind is given this kernel: a name may end with the one target whose tiles it has."""
    own = re.search(r" (sm_\d+)$", name)
    return own[1] == target if own else f"{name} {target}" not in names


def build(kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any], target: str):
    """Compile as a launch would: aligned pointers, integers that are multiples of 16 where the case says so."""
    if target in AMD and "ASSEMBLY" in constants:
        constants = constants | {"ASSEMBLY": False}  # it is NVIDIA's
    if target == "gfx1100" and "IEEE" in constants:
        constants = constants | {"IEEE": True}  # it has no TF32, see tiles.has_tf32
    names = kernel.arg_names
    types = {name: signature[name].split(":")[0] if name in signature else "constexpr" for name in names}
    multiples = [name for name, kind in signature.items() if kind.startswith("*") or kind.endswith(":16")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    chosen = GPUTarget("hip", target, AMD[target]) if target in AMD else GPUTarget("cuda", NVIDIA[target], 32)
    return triton.compile(source, target=chosen, options=options)


def weights_of_a_thread(name: str, constants: dict[str, Any], options: dict[str, Any]) -> float | None:
    """Weights that a thread multiplies in an iteration of the innermost loop."""
    rows = BLOCK_ROWS[constants["BITS"]] if "BITS" in constants else constants.get("BK")
    if rows is None or "BN" not in constants:
        return None
    return rows * constants["BN"] / (32 * options.get("num_warps", 4))


def nvidia_facts(compiled: Any, per_iteration: float | None) -> dict[str, Any]:
    """From the machine code, by NVIDIA's tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        code, loops = _instructions(_output("nvdisasm", "-c", file.name))
    counted = collections.Counter(code)
    matrix = [name for name in counted if re.match(MATRIX_INSTRUCTIONS, name)]
    loop = _loop(code, loops, matrix)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        "shared": compiled.metadata.shared,
        "matrix": " ".join(sorted(matrix)) or "-",
        "atomics": sum(count for name, count in counted.items() if re.match(ATOMICS, name)),
        "loop": len(loop),
        "per_weight": len(loop) / per_iteration if per_iteration and loop else None,
        "spills": sum(name in SPILLS for name in loop),
    }


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);|^(\.L_x?_?\w+):", re.MULTILINE)
LABEL = re.compile(r"`\((\.L_x?_?\w+)\)")


def _instructions(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The names of all instructions, without suffixes, in order; and the loops: (first, end) of what is jumped back
    over."""
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for name, rest, label in INSTRUCTION.findall(text):
        if label:
            labels[label] = len(code)
            continue
        code.append(name)
        target = LABEL.search(rest) if name == "BRA" else None
        if target is not None and target[1] in labels:
            loops.append((labels[target[1]], len(code)))
    return code, loops


def _loop(code: list[str], loops: list[tuple[int, int]], matrix: list[str]) -> list[str]:
    """The shortest loop that has a matrix instruction; where there is none, a multiplication."""
    sought = set(matrix) or {"FFMA", "FFMA2"}
    return min((code[first:end] for first, end in loops if sought & set(code[first:end])), key=len, default=[])


def amd_facts(compiled: Any, per_iteration: float | None) -> dict[str, Any]:
    """From the assembly that LLVM writes."""
    text = compiled.asm["amdgcn"]
    matrix = collections.Counter(re.findall(r"\bv_(mfma|wmma)_\w+", text))
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        "shared": compiled.metadata.shared,
        "matrix": " ".join(sorted(matrix)) or "-",
        "atomics": len(re.findall(r"\b(?:global|flat|buffer)_atomic_\w+", text)),
        "loop": 0,
        "per_weight": None,
    }


if __name__ == "__main__":
    sys.exit(main())
