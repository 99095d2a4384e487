"""The transformers configurations of a loaded model. They inform callers; the model itself never reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from ropewalk.model.model import Model

# How weights are stored and positions scaled concerns only ropewalk, and transformers may refuse the spellings.
OWN_KEYS = {"quantization_config", "rope_scaling", "rope_parameters", "layer_order"}
# The family is known by now; logits are float32, whatever the weights are.
REPLACED_KEYS = {"model_type", "dtype", "torch_dtype"}


def make_config(model: Model) -> PretrainedConfig:
    """The config.json of the folder without quantisation and RoPE scaling; max_position_embeddings is the context."""
    left_out = OWN_KEYS | REPLACED_KEYS
    facts: dict[str, Any] = {key: value for key, value in model.config.raw.items() if key not in left_out}
    facts["max_position_embeddings"] = model.max_seq_len
    config = AutoConfig.for_model(model.config.family, **facts)
    config.name_or_path = str(_folder(model))
    return config


def make_generation_config(model: Model) -> GenerationConfig:
    """The generation_config.json of the folder, or an empty one; either way with the end tokens of the model."""
    folder = _folder(model)
    if (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(str(folder))
    else:
        config = GenerationConfig(bos_token_id=model.config.bos_token_id)
    ends = list(model.config.eos_token_ids)
    if ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if config.pad_token_id is None and ends:
        config.pad_token_id = ends[0]  # only one sequence is ever run, so nothing is padded; silences a warning
    return config


def _folder(model: Model) -> Path:
    return Path(model.config.source).parent
