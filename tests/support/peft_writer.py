"""Adapters made by PEFT on transformers' model of a checkpoint, and what PEFT says their logits are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from transformers_model import Logits, logits_of, their_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(folder: Path, base: Path, exact: dict[str, torch.Tensor], seed: int = 0, **settings: Any) -> Path:
    """An adapter of random matrices, saved by PEFT. settings: those of `peft.LoraConfig`."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM"} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(their_model(base, exact), config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                fan = parameter.shape[0 if "lora_embedding_A" in name else 1]
                parameter.data = torch.randn(parameter.shape, generator=generator) / fan**0.5
            elif "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = parameter.data + 0.3 * parameter.data.std() * noise
        model.save_pretrained(folder, safe_serialization=True)
    return folder


def train_adapter(
    folder: Path, base: Path, exact: dict[str, torch.Tensor], ids: Sequence[int], num_steps: int = 40, **settings: Any
) -> Path:
    """An adapter trained to continue windows of `ids`, saved by PEFT."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ALL, "task_type": "CAUSAL_LM"} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(their_model(base, exact), config).train()
        optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        windows = torch.tensor(list(ids)).unfold(0, 32, 32)  # [windows, 32]
        for _ in range(num_steps):
            optimiser.zero_grad()
            model(windows, labels=windows).loss.backward()
            optimiser.step()
        model.save_pretrained(folder)
    return folder


def peft_logits(
    base: Path, exact: dict[str, torch.Tensor], adapters: Sequence[tuple[Path, float]], ids: Sequence[int]
) -> Logits:
    """PEFT's logits with adapters that are loaded from their folders and stacked with weights."""
    return logits_of(lambda dtype: _peft_model(base, exact, adapters, dtype), ids)


def _peft_model(
    base: Path, exact: dict[str, torch.Tensor], adapters: Sequence[tuple[Path, float]], dtype: torch.dtype
) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = their_model(base, exact, dtype)
        names = [f"adapter{number}" for number in range(len(adapters))]
        model = peft.PeftModel.from_pretrained(model, adapters[0][0], adapter_name=names[0])
        for name, (folder, _) in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
        model.base_model.set_adapter(names)
        for name, (_, weight) in zip(names, adapters, strict=True):
            for module in model.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer) and name in module.scaling:
                    module.set_scale(name, weight)
    return model.to(dtype).eval()
