"""Engines over a model that says a given text."""

from __future__ import annotations

from pathlib import Path

from fake_model import FakeModel, reply
from gptq_writer import write_checkpoint
from ropewalk.engine.engine import Engine
from ropewalk.generate.sampling import SamplingParams
from ropewalk.text.tokenizer.load import Tokenizer, load_tokenizer
from tokenizer_writer import write_sentencepiece
from variants import Variant

PROMPT = "The quick brown"


GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


def engine_that_says(tokenizer: Tokenizer, text: str, prompt: str = PROMPT, **options) -> Engine:
    """An engine whose model continues `prompt` with `text` and then an end token."""
    prompt_ids = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + text)
    common = next((i for i, (a, b) in enumerate(zip(whole, prompt_ids, strict=False)) if a != b), len(prompt_ids))
    assert common == len(prompt_ids), "the text must not change the tokens of the prompt"
    script = reply([*whole[len(prompt_ids) :], tokenizer.eos_id], len(prompt_ids))
    return Engine(FakeModel(tokenizer.vocab_size, capacity=256, script=script), tokenizer, **options)


def say(tokenizer: Tokenizer, text: str, **params) -> tuple[list[str], object]:
    stream = engine_that_says(tokenizer, text).stream(PROMPT, SamplingParams(temperature=0, **params))
    return list(stream), stream


def engine_of(folder: Path, max_running: int, **options) -> Engine:
    """A real, tiny model on the compiled core."""
    write_checkpoint(folder, {"vocab_size": 400}, desc_act=True)
    model = Variant("cpu", "int8", None).load(write_sentencepiece(folder), max_seq_len=64, max_input_len=5)
    return Engine(model, load_tokenizer(folder), max_running=max_running, **options)
