"""What every checkpoint fixture with logits of transformers is held to, whatever is special about its kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fixtures import measured
from ropewalk.model.loader import load_model
from ropewalk.model.step import Span
from variants import Variant

EXACT_ERROR = 2e-3  # of the fixtures' README
MOST_KL = 3  # times that of a simulated quantisation of the activations, likewise


def expected(folder: Path) -> dict[str, np.ndarray]:
    """What `expected.npz` holds."""
    with np.load(folder / "expected.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def check_exact(folder: Path, variant: Variant) -> None:
    """The logits are those of transformers."""
    want = expected(folder)
    got = _logits_at(folder, variant, "fp32", want)
    assert np.abs(got.numpy() - want["logits"]).max() <= EXACT_ERROR


def check_int8(folder: Path, variant: Variant) -> None:
    """The logits diverge no more than those of a simulated quantisation."""
    want = expected(folder)
    got = _logits_at(folder, variant, "fp16", want)
    p, q = (torch.log_softmax(torch.as_tensor(rows).double(), -1) for rows in (want["logits"], got))
    simulated = measured(folder, "simulated_error", "q8_block32_activations", "kl_mean")
    assert float((p.exp() * (p - q)).sum(-1).mean()) <= MOST_KL * simulated


def check_bits(folder: Path) -> None:
    """Chunks, threads and what else is in a step change no bit."""
    ids = expected(folder)["input_ids"].tolist()
    whole = load_model(folder, threads=1, backend="cpu")
    chunked = load_model(folder, threads=2, backend="cpu", max_input_len=7)
    want = whole.forward(ids, whole.new_cache(), logits="all")
    assert torch.equal(chunked.forward(ids, chunked.new_cache(), logits="all"), want)
    lengths = (len(ids), 5, 1)
    spans = [Span(ids[:length], whole.new_cache(), "all", seq_len=len(ids)) for length in lengths]
    for span, logits in zip(spans, whole.step(spans), strict=True):
        assert torch.equal(logits, want[: len(span.token_ids)])


def _logits_at(folder: Path, variant: Variant, cache_type: str, want: dict[str, np.ndarray]) -> torch.Tensor:
    model = variant.load(folder, cache_type=cache_type, max_input_len=20)
    logits = model.forward(want["input_ids"].tolist(), model.new_cache(), logits="all")
    return logits[torch.from_numpy(want["logits_positions"])]  # [P, V]
