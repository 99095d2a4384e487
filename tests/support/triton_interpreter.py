"""What Triton's interpreter does not do by itself: stay inside tensors, round to TF32, run a line of assembly.

Tests that use these run where kernels are interpreted; on a card the hardware does the last two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

INTERPRETED = not torch.cuda.is_available()
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a card here, not in the interpreter")

GAP = 5  # elements between and around the rows of a guarded tensor


def guarded(tensor: torch.Tensor, gap: int = GAP) -> torch.Tensor:
    """The same values inside a larger buffer, rows apart, with NaN (or the largest integers) all around them."""
    filler = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    rows = tensor.reshape(tensor.shape[0], -1)
    room = torch.full((rows.shape[0] + 2, rows.shape[1] + 2 * gap), filler, dtype=tensor.dtype, device=tensor.device)
    inside = room[1:-1, gap:-gap]
    inside.copy_(rows)
    return inside.unflatten(1, tensor.shape[1:]) if tensor.ndim > 2 else inside


def room_around(view: torch.Tensor) -> torch.Tensor:
    """The buffer of a guarded tensor, with NaN in place of the tensor: NaN everywhere if nothing wrote beside it."""
    room = view._base.clone()
    room[1:-1, GAP:-GAP] = float("nan")
    return room


@contextmanager
def inside_arguments(monkeypatch: pytest.MonkeyPatch, also: Sequence[torch.Tensor] = ()) -> Iterator[None]:
    """Every address that a kernel reads or writes must be an element of a tensor that it was given, or of `also`."""
    ranges: list[tuple[int, int]] = []
    call = interpreter.GridExecutor.__call__
    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store

    def calling(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in (*args, *kwargs.values(), *also) if isinstance(arg, torch.Tensor) and arg.numel()]
        ranges[:] = [(tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)) for tensor in tensors]
        return call(self, *args, **kwargs)

    def check(what: str, pointers: Any, mask: Any) -> None:
        first = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if first.size:
            end = first + pointers.get_element_ty().primitive_bitwidth // 8
            inside = np.zeros(first.shape, dtype=bool)
            for low, high in ranges:
                inside |= (first >= low) & (end <= high)
            assert inside.all(), f"a kernel {what} {(~inside).sum()} elements outside the tensors that it was given"

    def loading(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("reads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def storing(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(interpreter.GridExecutor, "__call__", calling)
        patched.setattr(interpreter.InterpreterBuilder, "create_masked_load", loading)
        patched.setattr(interpreter.InterpreterBuilder, "create_masked_store", storing)
        yield


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to behind the last element."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def teach_tf32(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Products of "tf32" lose the bits that the hardware does not read. Returns the precisions of products to come."""
    seen: list[str] = []
    dot = interpreter.InterpreterBuilder.create_dot

    def rounding(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        name = str(precision).rpartition(".")[2].upper()
        seen.append(name)
        if name == "TF32":
            a, b = (interpreter.TensorHandle(_tf32(handle.data), handle.dtype) for handle in (a, b))
        return dot(self, a, b, d, precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", rounding)
    return seen


def _tf32(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def teach_assembly(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Inline assembly of mov.b32 and fma.rn.f16x2. Returns the texts of assembly to come."""
    seen: list[str] = []

    def assembled(self: Any, text: str, constraints: str, operands: list[Any], types: Any, *_: Any) -> SimpleNamespace:
        seen.append(text)
        kinds = [kind.strip("=") for kind in constraints.split(",")]
        num_results = len(kinds) - len(operands)
        registers = {}
        for number, operand in enumerate(operands, start=num_results):
            bits = np.ascontiguousarray(operand.data)
            registers[f"${number}"] = bits.view(np.uint16 if kinds[number] == "h" else np.uint32)
        for line in re.sub(r"^\s*{|}\s*$", "", text).split(";"):
            _execute(line.strip(), registers)
        dtypes = [interpreter._get_np_dtype(each.scalar) for each in types]
        results = [
            interpreter.TensorHandle(registers[f"${i}"].astype(np.uint16).view(dtype), each.scalar)
            for i, (dtype, each) in enumerate(zip(dtypes, types, strict=True))
        ]
        return SimpleNamespace(get_result=results.__getitem__)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", assembled)
    return seen


def _execute(line: str, registers: dict[str, np.ndarray]) -> None:
    """One instruction of PTX on every element."""
    name, _, rest = line.partition(" ")
    operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
    if name in ("", ".reg"):
        return
    if name == "mov.b32":
        target, source = operands
        low_high = [part.strip() for part in source.strip("{}").split(",")]
        if source.startswith("{"):
            low, high = (registers[each].astype(np.uint32) for each in low_high)
            registers[target] = low | (high << np.uint32(16))
        elif target.startswith("{"):
            low, high = (part.strip() for part in target.strip("{}").split(","))
            registers[low] = (registers[source] & 0xFFFF).astype(np.uint16)
            registers[high] = (registers[source] >> np.uint32(16)).astype(np.uint16)
        else:
            registers[target] = registers[source]
    elif name == "fma.rn.f16x2":
        a, b, c = (_halves(registers[each]) for each in operands[1:])
        low, high = (_bits(x * y + z) for x, y, z in zip(a, b, c, strict=True))
        registers[operands[0]] = low | (high << np.uint32(16))
    else:
        raise NotImplementedError(f"the tests' assembly knows no {name}: {line}")


def _halves(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two float16 of each word, in float64: products and sums are exact there, and rounded once."""
    halves = (word & np.uint32(0xFFFF), word >> np.uint32(16))
    return tuple(half.astype(np.uint16).view(np.float16).astype(np.float64) for half in halves)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint16).astype(np.uint32)
