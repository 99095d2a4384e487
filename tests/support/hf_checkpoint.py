"""The tiny model of the transformers tests: the folder, our class on it, and transformers' own model of its weights."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

import ropewalk.hf
from gptq_writer import write_checkpoint
from ropewalk.hf import RopewalkForCausalLM
from ropewalk.model.model import Model
from transformers_model import their_model

V = 128
EXACT = {"compute": "exact", "cache_type": "fp32", "threads": 1}  # within 1e-5 of transformers


@functools.cache
def checkpoint() -> tuple[Path, dict[str, torch.Tensor]]:
    """A GPTQ folder of act-order weights, written once per process, and its exact weights."""
    folder = Path(_keep_until_exit().name) / "tiny"
    return folder, write_checkpoint(folder, desc_act=True, sym=False)


@functools.cache
def _keep_until_exit() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def ours(**options) -> RopewalkForCausalLM:
    return ropewalk.hf.from_pretrained(checkpoint()[0], **EXACT | options)


@functools.cache
def theirs() -> torch.nn.Module:
    model = their_model(*checkpoint())
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    return model


def fresh_logits(model: Model, ids: list[int], **options) -> torch.Tensor:
    """[T, V]: what the model computes of a sequence in an empty cache."""
    return model.forward(ids, model.new_cache(), logits="all", **options)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """[1, count] ids of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, V, (1, count), generator=generator)
