"""transformers' own model on the weights of a checkpoint that a test wrote: what our logits are compared with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers

from accuracy import Size, error_of


class Logits(NamedTuple):
    """What transformers computes, as `assert_as_accurate` takes it."""

    exact: torch.Tensor  # [T, V] float64
    plain: torch.Tensor  # [T, V] float32

    @property
    def plain_error(self) -> Size:
        return error_of(self.plain, self.exact)

    def from_row(self, first: int) -> Logits:
        return Logits(self.exact[first:], self.plain[first:])


@contextlib.contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """In float64 also what transformers computes in float32 whatever the dtype of the model: norms, softmax, angles."""
    if dtype != torch.float64:
        yield
        return
    with (
        mock.patch.object(torch, "float32", dtype),
        mock.patch.object(torch, "float", dtype),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def their_model(
    folder: Path, exact: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, **overrides: Any
) -> torch.nn.Module:
    """transformers' model of these weights, its attention written out (eager); run it under `computing_in(dtype)`."""
    raw = json.loads((folder / "config.json").read_text()) | overrides
    raw.pop("quantization_config", None)
    config = transformers.AutoConfig.for_model(**raw, attn_implementation="eager")
    with computing_in(dtype):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    missing, unexpected = model.load_state_dict(exact, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def logits_of(make: Callable[[torch.dtype], torch.nn.Module], ids: Sequence[int]) -> Logits:
    """The logits of all tokens, by a model that `make` builds in float64 and in float32."""
    results = []
    for dtype in (torch.float64, torch.float32):
        model = make(dtype)
        with computing_in(dtype), torch.inference_mode():
            results.append(model(torch.tensor([list(ids)])).logits[0])
    assert [result.dtype for result in results] == [torch.float64, torch.float32]
    return Logits(*results)


def their_logits(folder: Path, exact: dict[str, torch.Tensor], ids: Sequence[int], **overrides: Any) -> Logits:
    return logits_of(lambda dtype: their_model(folder, exact, dtype, **overrides), ids)
