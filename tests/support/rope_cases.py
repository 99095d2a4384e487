"""What the tests of RoPE share: the reference tables, a small config.json, and what transformers computes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fixtures import LOCAL_DATA, SHARED_FIXTURES
from ropewalk.rope.rope import Rope, resolve_rope

FOLDER = next((root / "rope" for root in (SHARED_FIXTURES, LOCAL_DATA) if (root / "rope").is_dir()), None)


MANIFEST = json.loads((FOLDER / "manifest.json").read_text())["cases"] if FOLDER else []


TABLES = [case for case in MANIFEST if case["grade"] != "peer-deviation"]


SPELLINGS = json.loads((FOLDER / "spellings.json").read_text()) if FOLDER else {"cases": [], "base_config": {}}


BASE: dict[str, Any] = {"model_type": "llama", "head_dim": 64, "max_position_embeddings": 2048}


def resolve(rope_scaling: Any = None, **config: Any) -> Rope:
    """The Rope of a small config.json with this scaling object and these changes."""
    return resolve_rope({**BASE, "rope_scaling": rope_scaling, **config})


def plain(theta: float, rotary_dim: int) -> np.ndarray:
    """[R/2] float64, written independently of the package."""
    return np.array([theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)])


def reference_of_transformers(config: dict[str, Any], seq_len: int) -> tuple[np.ndarray, float]:
    """(inverse frequencies, attention scale) that transformers computes in float32 for a llama with this config."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    known = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1}
    theirs = transformers.LlamaConfig(**{**known, **json.loads(json.dumps(config))})
    rope_type = theirs.rope_parameters["rope_type"]
    if rope_type == "default":
        inv, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        inv, scale = ROPE_INIT_FUNCTIONS[rope_type](theirs, "cpu", seq_len=seq_len)
    return inv.double().numpy(), float(scale)


def assert_as_transformers(config: dict[str, Any], seq_len: int) -> None:
    expected, expected_scale = reference_of_transformers(config, seq_len)
    inv, scale = resolve_rope(config).inverse_frequencies(seq_len)
    np.testing.assert_allclose(inv, expected, rtol=2e-5, atol=1e-12)
    assert scale == pytest.approx(expected_scale, rel=1e-6)


# What we do where the recommendation is not "as transformers 5.23.0": an equivalent plain config, or the error.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


WRONG_NUMBERS = [0, -1.0, 1e-320, float("nan"), float("inf"), float("-inf"), True, "4", [4], {}, 1e300, 10**400]
