"""Quantise the float model with gptqmodel: 4-bit, groups of 32, act-order, symmetric.

gptqmodel's own habits that matter here (7.7.0): on a CPU it would load in bfloat16, so float16 is asked for by name;
with two CPUs it needs GPTQMODEL_CPU_WORKERS=2; it rewrites the tokenizer, so ours is copied afterwards; and its `meta`
records folders of the machine, which are taken out.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

BITS, GROUP_SIZE = 4, 32
# Files of gptqmodel's output that belong to the model folder; its tokenizer files are replaced by ours.
KEPT_FILES = ("config.json", "generation_config.json", "quantize_config.json", "model.safetensors")
MACHINE_KEYS = ("offload_to_disk_path", "_name_or_path")


def quantise(float_folder: Path, calibration: np.ndarray, out: Path) -> None:
    """Write the GPTQ checkpoint of `float_folder` into `out`.

    calibration: [rows, tokens] integer — token ids that the layers' input statistics are taken from.
    """
    from gptqmodel import GPTQModel, QuantizeConfig

    with tempfile.TemporaryDirectory() as scratch:
        settings = QuantizeConfig(
            bits=BITS,
            group_size=GROUP_SIZE,
            desc_act=True,
            act_group_aware=False,
            sym=True,
            offload_to_disk=False,
        )
        model = GPTQModel.load(str(float_folder), settings, device="cpu", dtype=torch.float16)
        rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration]
        model.quantize(rows, batch_size=8)
        model.save(scratch)
        out.mkdir(parents=True, exist_ok=True)
        for name in KEPT_FILES:
            shutil.copyfile(Path(scratch) / name, out / name)
    for name in ("config.json", "quantize_config.json"):
        _without_machine_paths(out / name)


def dequantised_state(folder: Path) -> dict[str, torch.Tensor]:
    """float32 state dict for transformers: every quantised linear of `folder` as scale * (code - zero), [N, K].

    Written independently of the package's reader, so that the numbers of the model card check that reader.
    """
    packed = load_file(folder / "model.safetensors")
    state = {}
    for name, tensor in packed.items():
        if name.endswith(".qweight"):
            prefix = name.removesuffix("qweight")
            codes = _unpack(tensor, dim=0)  # [K, N]
            zeros = (_unpack(packed[prefix + "qzeros"], dim=1) + 1) % 2**BITS  # [G, N]
            group = packed[prefix + "g_idx"].long()  # [K]
            weight = packed[prefix + "scales"].float()[group] * (codes - zeros[group])
            state[prefix + "weight"] = weight.T.contiguous()
        elif name.rsplit(".", 1)[-1] not in ("qzeros", "g_idx", "scales"):
            state[name] = tensor.float()
    return state


def _unpack(words: torch.Tensor, dim: int) -> torch.Tensor:
    """int32 with 8 codes per word along `dim`, lowest bits first -> int64 codes, `dim` 8 times as long."""
    shifts = torch.arange(0, 32, BITS)
    codes = (words.long().unsqueeze(dim + 1) >> shifts.view([-1] + [1] * (words.ndim - 1 - dim))) % 2**BITS
    return codes.flatten(dim, dim + 1)


def _without_machine_paths(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if key not in MACHINE_KEYS}
        return value

    path.write_text(json.dumps(clean(config), indent=2) + "\n", encoding="utf-8")
