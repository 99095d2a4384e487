"""Damage to the weights of a model folder: the files, their headers, their tensors. Importing this registers it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from hostile_folders import (
    ABSURD,
    damage,
    edit_tensors,
    header_of,
    pick,
    spoil_bytes,
    tensor_names,
    weight_file,
    write_header,
)

Rng = np.random.Generator
DTYPES = ("F16", "BF16", "F32", "F64", "I32", "I64", "U32", "U8", "BOOL", "F8_E4M3", "F4", "f16", "", None, 5)


@damage("weights: cut off anywhere")
def _(folder: Path, rng: Rng) -> None:
    path = weight_file(folder, rng)
    data = path.read_bytes()
    path.write_bytes(data[: int(rng.integers(len(data)))])


@damage("weights: cut off within the header")
def _(folder: Path, rng: Rng) -> None:
    path = weight_file(folder, rng)
    path.write_bytes(path.read_bytes()[: int(rng.integers(200))])


@damage("weights: bytes appended")
def _(folder: Path, rng: Rng) -> None:
    with weight_file(folder, rng).open("ab") as file:
        file.write(rng.bytes(int(rng.integers(1, 100))))


@damage("weights: length of the header")
def _(folder: Path, rng: Rng) -> None:
    path = weight_file(folder, rng)
    data = path.read_bytes()
    true = int.from_bytes(data[:8], "little")
    wrong = pick(rng, [0, 1, true - 8, true + 8, len(data) - 8, len(data), 10**8, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
    path.write_bytes(int(wrong).to_bytes(8, "little") + data[8:])


@damage("weights: bytes of the header")
def _(folder: Path, rng: Rng) -> None:
    path = weight_file(folder, rng)
    spoil_bytes(path, rng, 8, 8 + int.from_bytes(path.read_bytes()[:8], "little"))


@damage("weights: bytes of the tensors")
def _(folder: Path, rng: Rng) -> None:
    path = weight_file(folder, rng)
    spoil_bytes(path, rng, 8 + int.from_bytes(path.read_bytes()[:8], "little"))


@damage("header: shape")
def _(folder: Path, rng: Rng) -> None:
    path = weight_file(folder, rng)
    header, data = header_of(path)
    entry = header[pick(rng, [name for name in header if name != "__metadata__"])]
    shape = entry["shape"]
    absurd = [shape[::-1], [*shape, 1], shape[1:], [0], [-1, *shape], [2**62, 4], [2**63], [1.0], ["4"], [1] * 40, {}]
    entry["shape"] = pick(rng, [*absurd, None, [2**32, 2**32, 0], [True], shape[:-1] + [shape[-1] * 2]])
    write_header(path, header, data)


@damage("header: dtype")
def _(folder: Path, rng: Rng) -> None:
    path = weight_file(folder, rng)
    header, data = header_of(path)
    header[pick(rng, [name for name in header if name != "__metadata__"])]["dtype"] = pick(rng, DTYPES)
    write_header(path, header, data)


@damage("header: offsets")
def _(folder: Path, rng: Rng) -> None:
    path = weight_file(folder, rng)
    header, data = header_of(path)
    entry = header[pick(rng, [name for name in header if name != "__metadata__"])]
    begin, end = entry["data_offsets"]
    absurd = [[end, begin], [begin + 2, end + 2], [0, end - begin], [-2, end], [begin], [begin, end, end], "0, 1", None]
    entry["data_offsets"] = pick(
        rng, [*absurd, [2**62, 2**62 + end - begin], [float(begin), float(end)], [begin, begin]]
    )
    write_header(path, header, data)


@damage("header: entries and names")
def _(folder: Path, rng: Rng) -> None:
    path = weight_file(folder, rng)
    header, data = header_of(path)
    name = pick(rng, [name for name in header if name != "__metadata__"])
    action = int(rng.integers(4))
    if action == 0:
        header[name] = pick(rng, ABSURD)
    elif action == 1:
        header[pick(rng, ["", "\ud800", "a\nb", "x" * 10_000, "model.layers.-1.qweight", "é"])] = header.pop(name)
    elif action == 2:
        header["__metadata__"] = pick(rng, ABSURD)
    else:  # a key twice
        double = json.dumps(header)[:-1] + ", " + json.dumps({name: header[name]})[1:]
        write_header(path, double.encode(), data)
        return
    write_header(path, header, data)


@damage("tensors: one missing or renamed")
def _(folder: Path, rng: Rng) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, tensors)
        tensor = tensors.pop(name)
        if rng.integers(2):
            tensors[name.replace("model", "transformer")] = tensor

    edit_tensors(weight_file(folder, rng), edit)


@damage("tensors: wrong shape")
def _(folder: Path, rng: Rng) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, tensors)
        tensor = tensors[name]
        half = tensor[: max(1, tensor.shape[0] // 2)]
        tensors[name] = pick(
            rng,
            [
                tensor.t() if tensor.ndim < 3 else tensor,
                tensor.flatten(),
                half,
                tensor[:0],
                tensor[None],
                torch.cat([tensor, half]),
            ],
        )

    edit_tensors(weight_file(folder, rng), edit)


@damage("tensors: wrong dtype")
def _(folder: Path, rng: Rng) -> None:
    dtypes = [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.uint8,
        torch.bool,
    ]

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, tensors)
        tensors[name] = tensors[name].to(pick(rng, dtypes))

    edit_tensors(weight_file(folder, rng), edit)


@damage("tensors: g_idx out of range")
def _(folder: Path, rng: Rng) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, tensor_names(tensors, "g_idx", ".qzeros", ".weight_zero_point", ".weight_shape"))
        flat = tensors[name].view(-1)
        if rng.integers(3) == 0:
            flat[:] = pick(rng, [-2, 1, 2**20])
        else:
            flat[int(rng.integers(len(flat)))] = pick(rng, [-1, -(2**31), 2**31 - 1, 1000, 9])

    edit_tensors(weight_file(folder, rng), edit)


@damage("tensors: NaN and infinity")
def _(folder: Path, rng: Rng) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, [name for name in tensors if tensors[name].is_floating_point()])
        flat = tensors[name].view(-1)
        flat[int(rng.integers(len(flat)))] = pick(rng, [float("nan"), float("inf"), float("-inf")])

    edit_tensors(weight_file(folder, rng), edit)


@damage("tensors: huge, tiny and negative values")
def _(folder: Path, rng: Rng) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        kinds = [(".scales", ".weight_scale"), ("norm.weight",), (".bias",), ("embed_tokens.weight",)]
        for name in tensor_names(tensors, *pick(rng, kinds)):
            if tensors[name].is_floating_point():
                tensors[name][:] = pick(rng, [65504.0, -65504.0, 6e-8, 0.0, -1.0])

    edit_tensors(weight_file(folder, rng), edit)


@damage("tensors: random words")
def _(folder: Path, rng: Rng) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, tensor_names(tensors, ".qweight", ".qzeros", ".weight_packed", ".weight_zero_point"))
        noise = torch.from_numpy(np.frombuffer(rng.bytes(tensors[name].nbytes), np.uint8).copy())
        tensors[name] = noise.view(tensors[name].dtype).view(tensors[name].shape)

    edit_tensors(weight_file(folder, rng), edit)


@damage("tensors: foreign ones added")
def _(folder: Path, rng: Rng) -> None:
    prefix = "model.layers.0.self_attn.q_proj."
    names = [f"{prefix}B", f"{prefix}workspace", f"{prefix}weight", "model.layers.99.mlp.up_proj.qweight", "a b\n\0é"]

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        shape = tuple(int(size) for size in rng.integers(0, 9, int(rng.integers(4))))
        tensors[pick(rng, names)] = torch.zeros(shape, dtype=pick(rng, [torch.int32, torch.float16]))

    edit_tensors(weight_file(folder, rng), edit)
