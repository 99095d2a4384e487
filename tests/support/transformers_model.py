"""transformers' own model on the weights of a checkpoint that a test wrote: what our logits are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

TOLERANCE = 5e-4  # logits have a standard deviation of about 1; float32 sums in two orders differ by 1e-5


def their_model(folder: Path, exact: dict[str, torch.Tensor], **overrides: Any) -> torch.nn.Module:
    """transformers' model in float32 with the exact weights, its attention written out (eager)."""
    raw = json.loads((folder / "config.json").read_text()) | overrides
    raw.pop("quantization_config", None)
    config = transformers.AutoConfig.for_model(**raw, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(exact, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model
