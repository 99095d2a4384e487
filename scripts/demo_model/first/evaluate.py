"""Held-out perplexity of the float and the quantised model through transformers, in float32.

The text is cut into blocks of equal length that do not overlap; within a block every token but the first is predicted
from the block's earlier ones. A shorter remainder at the end is left out. `ropewalk perplexity` counts in the same way.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from first.training import CONTEXT
from pieces import BOS_ID
from quantise import dequantised_state

LOGGER = logging.getLogger(__name__)
LENGTHS = (512, 1024, 2048, 4096, 8192)
LENGTH_TOKENS = 4 * LENGTHS[-1]


def float_model(folder: Path) -> LlamaForCausalLM:
    """The trained model before quantisation, float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def quantised_model(folder: Path, rope: dict[str, object] | None = None) -> LlamaForCausalLM:
    """The GPTQ checkpoint with its weights dequantised to float32; `rope` replaces the RoPE parameters."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(**{key: value for key, value in raw.items() if key != "quantization_config"})
    if rope is not None:
        config.rope_parameters = {"rope_theta": 10000.0} | rope
    model = LlamaForCausalLM(config).eval()
    missing = model.load_state_dict(dequantised_state(folder), strict=False).missing_keys
    assert missing == ["lm_head.weight"], f"tensors missing from {folder}: {missing}"  # tied to the embeddings
    return model


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, ids: np.ndarray, length: int) -> tuple[float, int]:
    """(mean negative log-likelihood in nats, predicted tokens) of ids [tokens] in blocks of `length`."""
    blocks = torch.from_numpy(ids[: len(ids) // length * length].astype(np.int64)).view(-1, length)
    total = 0.0
    for part in blocks.split(max(1, 4096 // length)):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]  # [rows, length - 1, V]
        total += functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    predicted = blocks.shape[0] * (length - 1)
    return total / predicted, predicted


def held_out_numbers(model: LlamaForCausalLM, ids: np.ndarray, num_bytes: int) -> dict[str, float]:
    """Perplexity per token and bits per byte of ids [tokens] (`num_bytes` of text) in blocks of CONTEXT tokens."""
    loss, predicted = mean_loss(model, ids, CONTEXT)
    bits_per_byte = loss / math.log(2) * len(ids) / num_bytes
    LOGGER.info("perplexity %.4f over %d tokens", math.exp(loss), predicted)
    return {"perplexity": math.exp(loss), "bits_per_byte": bits_per_byte, "predicted_tokens": predicted}


def perplexity_by_length(folder: Path, ids: np.ndarray) -> dict[str, dict[int, float]]:
    """{RoPE method: {block length: perplexity}} of the quantised model beyond its training length.

    "none" leaves RoPE as trained; linear and yarn take the factor length / 512, dynamic (NTK) the usual 2.
    """
    ids = ids[:LENGTH_TOKENS]  # every length reads the same tokens
    table: dict[str, dict[int, float]] = {"none": {}, "linear": {}, "dynamic": {}, "yarn": {}}
    for method, row in table.items():
        for length in LENGTHS:
            rope = None
            if method != "none" and length > CONTEXT:
                factor = 2.0 if method == "dynamic" else length / CONTEXT
                rope = {"rope_type": method, "factor": factor, "original_max_position_embeddings": CONTEXT}
            row[length] = math.exp(mean_loss(quantised_model(folder, rope), ids, length)[0])
            LOGGER.info("%s at %d: %.3f", method, length, row[length])
    return table


@torch.inference_mode()
def sample(model: LlamaForCausalLM, prompt_ids: list[int], num_tokens: int, seed: int) -> list[int]:
    """Token ids that the model writes after <s> and the prompt, at temperature 0.6 and top-p 0.9."""
    torch.manual_seed(seed)
    ids = torch.tensor([[BOS_ID, *prompt_ids]])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=0,
        pad_token_id=0,
    )
    return written[0, 1:].tolist()
