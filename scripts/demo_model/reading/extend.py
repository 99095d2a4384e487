"""A LoRA that takes the quantised model to a multiple of its context, trained under one RoPE scaling.

    python -m reading.extend --run RUN --model MODEL_FOLDER --method yarn --factor 8 --decay-from 3e6 --decay-tokens 7e6

(in scripts/demo_model; RUN holds the tokenizer and library of the model's own run.) As kaiokendev's SuperHOT did:
the weights stay, and low-rank changes of them learn to read the scaled positions. The base is the quantised model with
exactly dequantised weights, because that is what the LoRA runs on; the frequencies are the engine's.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.func import functional_call

import ropewalk
from quantise import dequantised_state
from reading.curriculum import Phase
from reading.network import TRANSFORMERS_NAMES, Network, Shape, load_transformers_state, rotation_tables
from reading.train import Trainer, add_run_options, vocabulary_and_library

RANK, ALPHA = 32, 64
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
PEAK_LR = 3e-3
STEP_TOKENS = 8192
HALF_LENGTH_TOKENS = 3e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--model", type=Path, required=True, help="the quantised model")
    parser.add_argument("--method", required=True, choices=("linear", "ntk-by-parts", "yarn", "default"))
    parser.add_argument("--factor", type=int, required=True)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    encoder, library = vocabulary_and_library(options.run)
    name = f"{options.method}-{options.factor}"
    options.run = options.run / name
    options.run.mkdir(exist_ok=True)
    scaling = rope_scaling(options.method, options.factor)
    network = Adapted(options.model, scaling, options.factor)
    optimizer = torch.optim.AdamW(
        [{"params": list(network.parameters()), "peak_lr": PEAK_LR}], betas=(0.9, 0.95), weight_decay=0.0
    )
    length = options.factor * Shape().context
    Trainer(options, encoder, library, network, [optimizer], long_phases(length)).run()
    save_adapter(network, scaling, options.run / "adapter")


def rope_scaling(method: str, factor: int) -> dict[str, object]:
    """As in config.json and adapter_config.json."""
    if method == "default":
        return {"rope_type": "default"}
    return {"rope_type": method, "factor": float(factor), "original_max_position_embeddings": Shape().context}


def long_phases(length: int) -> tuple[Phase, ...]:
    """Rows of half of `length` tokens, which are read twice as fast, then of all of it.

    A fact takes 14 to 20 tokens: a document fills a third of its row, or nearly all. With documents of every size, most
    questions would be about the first half of a row.
    """
    mix = (("keys", 0.08), ("pass key", 0.08), ("hidden", 0.06), ("facts", 0.7), ("library", 0.08))
    return tuple(
        Phase(until, row, STEP_TOKENS // row, mix, (row // 48, row // 20), 0.15, 0.3)
        for until, row in ((HALF_LENGTH_TOKENS, length // 2), (math.inf, length))
    )


class Adapted(torch.nn.Module):
    """The dequantised model with low-rank changes: only these are parameters, and only these are in its state."""

    def __init__(self, folder: Path, scaling: dict[str, object], factor: int) -> None:
        super().__init__()
        base = Network(Shape.of(folder))
        load_transformers_state(base, dequantised_state(folder))
        self.shape = base.shape
        self._base = [base.requires_grad_(False)]  # in a list: no submodule
        self._copies = threading.local()
        self.changes = torch.nn.ParameterDict()
        for name, weight in base.named_parameters():
            if name.rsplit(".", 1)[-1] in TARGETS:
                rows, columns = weight.shape
                key = name.replace(".", " ")
                self.changes[f"{key} A"] = torch.nn.Parameter(torch.randn(RANK, columns) / math.sqrt(columns))
                self.changes[f"{key} B"] = torch.nn.Parameter(torch.zeros(rows, RANK))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        length = factor * self.shape.context
        frequencies, scale = ropewalk.resolve_rope(config, rope_scaling=scaling).inverse_frequencies(length)
        self._tables = rotation_tables(length, torch.as_tensor(frequencies, dtype=torch.float64), scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """As `Network`, under the scaling. Changed weights are as small as the weights, so they are made at once."""
        weights = dict(self._base[0].named_parameters())
        for name in [name for name in weights if name.rsplit(".", 1)[-1] in TARGETS]:
            key = name.replace(".", " ")
            weights[name] = weights[name] + (ALPHA / RANK) * self.changes[f"{key} B"] @ self.changes[f"{key} A"]
        T = ids.shape[1]
        # functional_call puts the weights into the module while it runs: each thread needs one of its own.
        if not hasattr(self._copies, "base"):
            self._copies.base = copy.deepcopy(self._base[0])
        return functional_call(self._copies.base, weights, (ids, tuple(table[:T] for table in self._tables)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `Network.logits`."""
        return self._base[0].logits(hidden)


def save_adapter(network: Adapted, scaling: dict[str, object], folder: Path) -> None:
    """A PEFT folder in float16, with the RoPE scaling noted in its adapter_config.json."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for key, parameter in network.changes.items():
        _, index, name, part = key.split(" ")
        theirs = f"base_model.model.model.layers.{index}.{TRANSFORMERS_NAMES[name]}.lora_{part}.weight"
        tensors[theirs] = parameter.detach().half().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(TRANSFORMERS_NAMES[name].rsplit(".", 1)[-1] for name in TARGETS),
        "rope_scaling": scaling,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
