"""A model folder through everything that a user does with it, and what may come of that.

Accepted ends: an error of ropewalk that names a file, a tensor or a key of the folder, or results that are finite.
Everything else (another exception, NaN in a text, a bad request that is served) is an `Unacceptable`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ropewalk
from ropewalk.base.errors import RopewalkError, UnsupportedError
from ropewalk.generate.evaluate import perplexity
from ropewalk.generate.generate import Generation
from ropewalk.generate.sampling import SamplingParams
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.model.model import Model
from ropewalk.text.chat import load_chat_template
from ropewalk.text.tokenizer.load import Tokenizer

PROMPT = "The answer is 42.\né▁ </s> <s>"
OPTIONS = ({"compute": "int8"}, {"compute": "exact", "cache_type": "fp32", "max_seq_len": 40, "max_input_len": 3})
MAX_MESSAGE = 4000


class Unacceptable(Exception):
    """An end that no folder may have."""


def walk(folder: Path) -> list[str]:
    """Load, encode, run and generate in both compute modes; the names of the errors met, or "results".

    Raises:
        Unacceptable: see the module. Exceptions that are not of ropewalk come through as they are.
    """
    ends = []
    tokenizer = attempt(ends, folder, lambda: used_tokenizer(folder))
    for options in OPTIONS:
        model = attempt(ends, folder, lambda options=options: ropewalk.load_model(folder, threads=1, **options))
        if model is not None:
            attempt(ends, folder, lambda model=model: check_results(model))
            attempt(ends, folder, lambda model=model: check_requests(model))
        if model is not None and tokenizer is not None:
            attempt(ends, folder, lambda model=model: check_text(model, tokenizer))
    return sorted(set(ends)) or ["results"]


def attempt(ends: list[str], folder: Path, action: Callable[[], Any]) -> Any:
    """The result, or None with the name of the error added to `ends`."""
    try:
        return action()
    except RopewalkError as error:
        check_message(str(error), folder)
        ends.append(type(error).__name__)
        return None


def check_message(message: str, folder: Path) -> None:
    """A message is short and names something of the folder."""
    if len(message) > MAX_MESSAGE + 20 * len(str(folder)):
        raise Unacceptable(f"a message of {len(message)} characters: {message[:200]}...")
    if "not finite" not in message and not any(name in message for name in names_in(folder)):
        raise Unacceptable(f"a message that names nothing of the folder: {message}")


def names_in(folder: Path) -> Iterator[str]:
    """The folder, its files, the parts of tensor names, and all keys of config.json."""
    yield str(folder)
    yield from os.listdir(folder) if folder.is_dir() else ()
    yield from ("gpt_neox.", "embed_out", "model.layers.", "model.norm", "model.embed_tokens", "lm_head", "max_seq_len")
    try:
        yield from json.loads((folder / "config.json").read_bytes()[: 2**20])
    except (OSError, ValueError, RecursionError, TypeError):
        return


def used_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = ropewalk.load_tokenizer(folder)
    ids = tokenizer.encode(PROMPT)
    if not isinstance(tokenizer.decode([*ids, 0, 1, 511, 2**40]), str):
        raise Unacceptable("decode gave no text")
    template = load_chat_template(folder, tokenizer.special_tokens)
    if template is not None:
        template.render([{"role": "user", "content": "Hello"}])
    return tokenizer


def check_results(model: Model) -> None:
    """Logits in the shape promised; what is drawn from them is finite, or refused."""
    cache = model.new_cache()
    last = model.config.vocab_size - 1
    ids = [0, last, 1 % (last + 1), 0, last][: cache.capacity]
    logits = model.forward(ids, cache, logits="all")
    if tuple(logits.shape) != (len(ids), last + 1):
        raise Unacceptable(f"logits of shape {tuple(logits.shape)} for {len(ids)} tokens")
    if len(ids) > 1:
        nll = perplexity(model, ids, [len(ids)])[0].mean_nll
        if not math.isfinite(nll):
            raise Unacceptable(f"perplexity gave a mean of {nll}")
    with Scheduler(model).open(ids) as sequence:
        step = next(Generation(sequence, SamplingParams(temperature=0.0, max_new_tokens=1, logprobs=1)))
    if not math.isfinite(step.logprob):
        raise Unacceptable(f"a token was drawn with log probability {step.logprob}")


def check_requests(model: Model) -> None:
    """What cannot be served is refused, and leaves the cache as it was."""
    size = min(4, model.max_seq_len)
    cache, vocab_size = model.new_cache(size), model.config.vocab_size
    for ids in ([], [vocab_size], [-1], [2**63], [0, "a"], None, [0.5], [[0]], "0", [0] * (size + 1), [True]):
        refused(lambda ids=ids: model.forward(ids, cache), f"forward({ids!r})")
    for capacity in (0, -1, model.max_seq_len + 1, 2.5, "9"):
        refused(lambda capacity=capacity: model.new_cache(capacity), f"new_cache({capacity!r})")
    refused(lambda: cache.truncate(1), "truncate beyond the length")
    refused(lambda: model.forward([0], cache, logits="some"), "logits='some'")
    if cache.length:
        raise Unacceptable(f"refused requests left {cache.length} positions in the cache")


def refused(action: Callable[[], Any], what: str) -> None:
    try:
        action()
    except RopewalkError:
        return
    raise Unacceptable(f"{what} was served")


def check_text(model: Model, tokenizer: Tokenizer) -> None:
    """Greedy and sampled text; prompts that are empty or too long are refused."""
    engine = ropewalk.Engine(model, tokenizer)
    prompt = tokenizer.encode(PROMPT)
    if not prompt or len(prompt) > engine.context_size or max(prompt) >= model.config.vocab_size:
        refused(lambda: engine.generate(PROMPT), "a prompt that the model cannot read")
        return
    for params in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 1, "logprobs": 3}):
        text = engine.generate(PROMPT, SamplingParams(max_new_tokens=3, ignore_eos=True, **params)).text
        if not isinstance(text, str):
            raise Unacceptable("generate gave no text")
    refused(lambda: engine.generate([]), "an empty prompt")
    if engine.context_size < 2**20:
        refused(lambda: engine.generate([0] * (engine.context_size + 1)), "a prompt longer than the cache")
    try:
        engine.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_new_tokens=1)).close()
    except UnsupportedError as error:
        if "template" not in str(error):
            raise
