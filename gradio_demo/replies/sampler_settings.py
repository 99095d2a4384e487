"""Sampler settings of the page: the fields, and presets of their values."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ropewalk.base.errors import RequestError
from ropewalk.generate.sampling import SamplingParams

BALANCED = "Balanced"
PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "Precise": {"temperature": 0.3, "top_p": 0.9, "top_k": 40, "min_p": 0.0, "repetition_penalty": 1.05},
        BALANCED: {"temperature": 0.7, "top_p": 0.95, "top_k": 40, "min_p": 0.0, "repetition_penalty": 1.1},
        "Lively": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.05, "repetition_penalty": 1.1},
        "Most likely": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    }
)
# name, label, lowest, highest, step, explanation
SLIDERS = (
    ("temperature", "Temperature", 0.0, 2.0, 0.05, "0 always takes the most likely token; higher is more surprising."),
    ("top_p", "Top-p", 0.05, 1.0, 0.01, "Choose among the likeliest tokens that together have this probability."),
    ("top_k", "Top-k", 0, 200, 1, "Choose among at most this many tokens. 0: no limit."),
    ("min_p", "Min-p", 0.0, 0.5, 0.01, "Leave out tokens less likely than this fraction of the likeliest."),
    ("repetition_penalty", "Repetition penalty", 1.0, 1.5, 0.01, "Above 1: avoid tokens that came before."),
)


def sampling_params(
    values: Mapping[str, Any], max_new_tokens: float, seed: str | float | None, **others: Any
) -> SamplingParams:
    """Parameters from what the fields hold; an empty seed draws a fresh one.

    Raises:
        RequestError: a value is out of range.
    """
    numbers = {name: float(values[name]) for name, *_ in SLIDERS}
    numbers["top_k"] = int(numbers["top_k"])
    return SamplingParams(**numbers, max_new_tokens=int(max_new_tokens), seed=_seed(seed), **others)


def _seed(value: str | float | None) -> int | None:
    text = "" if value is None else str(value).strip()
    try:
        return int(text) if text else None
    except ValueError as error:
        raise RequestError(f"a seed is a whole number, or empty for a fresh one; got {text!r:.60}") from error
