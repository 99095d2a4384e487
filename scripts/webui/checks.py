"""What is checked in a running web UI through its API. Each check is a function of a Subject; it returns what it saw,
and raises AssertionError, or Skip if this version of the web UI has no such thing.

Over 400 lines because the checks are one sequence: each needs what those before it left in the web UI.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server import DEMO_MODEL, Refused, WebuiCopy, WebuiServer

MODEL = "demo-GPTQ"
PROMPT = "def read_lines(path):\n    with open(path) as file:\n"
GREEDY: dict[str, Any] = {"temperature": 0, "do_sample": False, "seed": 1}
# Every sampler that the web UI has on by default in some version is named, so that both sides use the same.
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}
SEEDS = (3, 11, 2026)
GRAMMAR = 'root ::= "yes" | "no"'
CONSOLE_LINE = re.compile(
    r"prompt (\d+) tokens \((\d+) reused\), [\d.]+ tokens/s; new (\d+) tokens, [\d.]+ tokens/s; context (\d+) of (\d+)"
)
GUESSED = re.compile(r"guessed (\d+), (\d+) right")
GUESSING_REPLIES = 8


class Skip(Exception):
    """Why a check is not made."""


@dataclass(slots=True)
class Subject:
    """A running server and the copy it runs in."""

    copy: WebuiCopy
    server: WebuiServer
    noted: dict[str, Any] = field(default_factory=dict)

    def load(self, name: str = MODEL, **arguments: Any) -> None:
        """Load a model; arguments by the names of this version."""
        self.server.api.post("/v1/internal/model/load", model_name=name, args=arguments)

    def info(self) -> dict[str, Any]:
        """Model, loader and LoRAs, as the API says."""
        return self.server.api.get("/v1/internal/model/info")

    def complete(self, prompt: str = PROMPT, **options: Any) -> dict[str, Any]:
        """The first choice of a completion; greedy, 24 tokens, unless told otherwise."""
        body = {"prompt": prompt, "max_tokens": 24} | GREEDY | options
        return self.server.api.post("/v1/completions", **body)["choices"][0]

    def text(self, prompt: str = PROMPT, **options: Any) -> str:
        """The text of a completion."""
        return self.complete(prompt, **options)["text"]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text as the web UI makes them."""
        return self.server.api.post("/v1/internal/encode", text=text)["tokens"]

    def need(self, path: str) -> None:
        """Skip if this version has no such endpoint."""
        if path not in self.server.api.paths():
            raise Skip(f"this version has no {path}")

    def replies_on_console(self) -> list[tuple[int, ...]]:
        """(prompt tokens, reused, new, context used, context) of each reply so far."""
        return [tuple(map(int, match)) for match in CONSOLE_LINE.findall(self.server.console())]


def add_models(copy: WebuiCopy) -> None:
    """The embedded model, broken variants of it, and two LoRAs for it."""
    shutil.copytree(DEMO_MODEL, copy.models(MODEL), ignore=shutil.ignore_patterns("*.md", "*.txt"))
    for name, damage in (BROKEN | {TOKEN_LIST: _list_special_tokens, "dense-no-weights": _leave_only_config}).items():
        shutil.copytree(copy.models(MODEL), copy.models(name))
        damage(copy.models(name))
    script = Path(__file__).with_name("reference.py")
    for seed, name in enumerate(LORAS):
        copy.run(script, "lora", copy.models(MODEL), copy.lora(name), str(seed))
    shutil.copytree(copy.lora(LORAS[0]), copy.lora("lora-broken"))
    config = copy.lora("lora-broken") / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))


LORAS = ("lora-one", "lora-two")


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _change_quantisation(folder: Path, method: str, **changes: Any) -> None:
    """Declared in config.json alone, as newer tools do."""
    declared = json.loads((folder / "quantize_config.json").read_text()) | {"quant_method": method}
    (folder / "quantize_config.json").unlink()
    _change_config(quantization_config=declared, **changes)(folder)


def _list_special_tokens(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": ["<|x|>"]}))


def _leave_only_config(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and path.name != "config.json":
            path.unlink()
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))


TOKEN_LIST = "token-list"  # which transformers 4 cannot read
BROKEN: dict[str, Callable[[Path], None]] = {
    "broken-half-a-file": _cut_weights,
    "broken-no-weights": lambda folder: (folder / "model.safetensors").unlink(),
    "broken-other-family": _change_config(model_type="mamba"),
    "broken-other-shape": _change_config(hidden_size=320),
    "broken-no-tokenizer": lambda folder: (folder / "tokenizer.model").unlink(),
    "broken-falcon": lambda folder: _change_quantisation(
        folder, "gptq", model_type="falcon", architectures=["FalconForCausalLM"]
    ),
    "broken-awq": lambda folder: _change_quantisation(folder, "awq"),
    "broken-rope": _change_config(rope_scaling={"type": "sideways", "factor": 2.0}, rope_parameters=None),
}


def gptq_folder_chooses_our_loader(subject: Subject) -> str:
    subject.load()
    info = subject.info()
    assert (info["model_name"], info["loader"]) == (MODEL, "ropewalk"), info
    return f"loader {info['loader']}"


def completion_is_repeatable(subject: Subject) -> str:
    first, again = subject.text(), subject.text()
    assert first and first == again, (first, again)
    subject.noted["base"] = first
    return repr(first[:40])


def text_equals_generate_on_our_class(subject: Subject) -> str:
    ids = subject.ids(PROMPT)
    requests = [{"ids": ids, "max_new_tokens": 40, "do_sample": False}]
    requests += [{"ids": ids, "max_new_tokens": 40, "seed": seed, **SAMPLED} for seed in SEEDS]
    script = Path(__file__).with_name("reference.py")
    options = json.dumps({"max_seq_len": 512})
    printed = subject.copy.run(script, "reply", subject.copy.models(MODEL), options, json.dumps(requests))
    expected = json.loads(printed.splitlines()[-1])
    ours = [subject.text(max_tokens=40)]
    ours += [subject.text(max_tokens=40, min_p=0, **SAMPLED | {"seed": seed}) for seed in SEEDS]
    assert len(set(expected)) > 1, "the seeds give the same text: nothing is compared"
    for number, (left, right) in enumerate(zip(ours, expected, strict=True)):
        assert left == right, f"reply {number}: {left!r} is not {right!r}"
    return f"greedy and seeds {', '.join(map(str, SEEDS))}: equal"


def indentation_is_kept(subject: Subject) -> str:
    text = subject.text(max_tokens=60)
    indents = [len(line) - len(line.lstrip(" ")) for line in (PROMPT + text).splitlines() if line.strip()]
    assert text.startswith(" " * 8), f"the reply does not start with eight spaces: {text!r}"
    assert max(indents) >= 8 and not any(indent % 4 for indent in indents), (indents, text)
    return f"lines start with {', '.join(map(str, indents))} spaces"


def stream_equals_completion(subject: Subject) -> str:
    body = {"prompt": PROMPT, "max_tokens": 24} | GREEDY
    pieces = [event["choices"][0].get("text", "") for event in subject.server.api.stream("/v1/completions", **body)]
    assert "".join(pieces) == subject.text(), pieces
    assert len(pieces) > 3, f"only {len(pieces)} events"
    return f"{len(pieces)} events"


def chat_and_its_stream_agree(subject: Subject) -> str:
    body = {"messages": [{"role": "user", "content": "Write a loop."}], "mode": "instruct", "max_tokens": 24} | GREEDY
    whole = subject.server.api.post("/v1/chat/completions", **body)
    text = whole["choices"][0]["message"]["content"]
    deltas = [event["choices"][0]["delta"] for event in subject.server.api.stream("/v1/chat/completions", **body)]
    streamed = "".join(delta.get("content") or "" for delta in deltas)
    # The web UI strips a chat message, but not what it streams; within, every space counts.
    assert text and streamed.strip() == text.strip(), (text, streamed)
    return f"{whole['usage']['completion_tokens']} tokens"


def logprobs_are_of_the_chosen_tokens(subject: Subject) -> str:
    choice = subject.complete(logprobs=3, max_tokens=8)
    tops = choice["logprobs"]["top_logprobs"]
    assert tops, choice
    for top in tops:
        assert len(top) >= 3 and sum(map(math.exp, top.values())) <= 1.001, top
    return f"of {len(tops)} of 8 tokens; the first {max(tops[0].values()):.3f}"


def prompt_logprobs_are_given(subject: Subject) -> str:
    choice = subject.complete(logprobs=2, max_tokens=1, echo=True)
    values = [value for value in choice["logprobs"].get("token_logprobs") or () if value is not None]
    if len(values) < 10:
        raise Skip("this version gives no logprobs of the prompt")
    assert all(value <= 1e-6 for value in values), values
    return f"{len(values)} prompt tokens, mean {sum(values) / len(values):.3f}"


def logits_of_the_next_token(subject: Subject) -> str:
    subject.need("/v1/internal/logits")
    answer = subject.server.api.post("/v1/internal/logits", prompt=PROMPT, use_samplers=False, top_logits=5)
    if answer is None:
        raise Skip("this version answers null on a CPU")
    tops = answer.get("logits", answer)
    token, value = next(iter(tops.items()))
    assert len(tops) == 5 and 0 < float(value) <= 1, answer
    return f"{len(tops)} tokens, first {token!r} {float(value):.3f}"


def logit_bias_forces_a_token(subject: Subject) -> str:
    token = subject.ids("return")[-1]
    text = subject.text(logit_bias={str(token): 100}, max_tokens=6)
    assert text.split() == ["return"] * 6 or text.strip() == "return" * 6, text
    return repr(text)


def grammar_is_kept(subject: Subject) -> str:
    text = subject.text(grammar_string=GRAMMAR, max_tokens=8).strip()
    assert text in ("yes", "no"), text
    return repr(text)


def guidance_changes_the_text(subject: Subject) -> str:
    plain = subject.text()
    guided = subject.text(guidance_scale=3.0, negative_prompt="import os\n")
    assert guided and guided != plain, guided
    assert subject.text() == plain, "the text without guidance changed after it"
    return repr(guided[:40])


def prefix_is_reused(subject: Subject) -> str:
    before = len(subject.replies_on_console())
    reply = subject.text()
    subject.text(PROMPT + reply + "\n\ndef ")
    lines = subject.replies_on_console()[before:]
    assert len(lines) == 2, f"{len(lines)} lines on the console after two replies"
    prompt, reused = lines[-1][:2]
    assert reused >= len(subject.ids(PROMPT)) - 1, lines
    return f"{reused} of {prompt} tokens"


def stopping_ends_a_reply(subject: Subject) -> str:
    subject.need("/v1/internal/stop-generation")
    arguments: dict[str, Any] = {subject.noted["context"]: 4096, "alpha_value": 8}
    subject.load(**arguments)
    body = {"prompt": PROMPT, "max_tokens": 3000, "ban_eos_token": True} | GREEDY
    count, stopped = 0, math.inf
    for _ in subject.server.api.stream("/v1/completions", **body):
        count += 1
        if count == 5:
            subject.server.api.post("/v1/internal/stop-generation")
            stopped = time.monotonic()
    took = time.monotonic() - stopped
    assert 5 <= count < 2500, f"{count} events"
    subject.load()
    return f"{count} events, ended {took:.1f} s after the request"


def arguments_set_the_context(subject: Subject) -> str:
    name = subject.noted["context"]
    arguments: dict[str, Any] = {name: 1536, "alpha_value": 4, "cache_type": "fp32", "chunk_size": 256}
    subject.load(**arguments)
    long_prompt = PROMPT * 70
    tokens = len(subject.ids(long_prompt))
    assert 1000 < tokens < 1500, tokens
    subject.text(long_prompt)
    prompt, _, _, _, context = subject.replies_on_console()[-1]
    assert (prompt, context) == (tokens, 1536), subject.replies_on_console()[-1]
    subject.text(PROMPT * 200)
    cut = subject.replies_on_console()[-1][0]
    assert 1400 < cut <= 1536, f"a prompt that is too long became {cut} tokens"
    return f"{name} 1536: {prompt} tokens read, a longer prompt cut to {cut}"


def arguments_do_not_outlast_the_load(subject: Subject) -> str:
    subject.load()
    text = subject.text()
    assert text == subject.noted["base"], text
    assert subject.replies_on_console()[-1][-1] == 512, subject.replies_on_console()[-1]
    return "context 512 again"


def guessing_ahead_changes_no_text(subject: Subject) -> str:
    copied = PROMPT * 6
    expected = subject.text(copied, max_tokens=120)
    seen = []
    for arguments in ({"speculation": "ngram"}, {"speculation": "draft", "model_draft": MODEL}):
        subject.load(**arguments)
        before = len(GUESSED.findall(subject.server.console()))
        for _ in range(GUESSING_REPLIES):  # how much is guessed depends on times, and may be nothing in one reply
            assert subject.text(copied, max_tokens=120) == expected, arguments
            guessed = GUESSED.findall(subject.server.console())[before:]
            if guessed:
                break
        assert guessed and int(guessed[-1][1]) <= int(guessed[-1][0]), guessed
        seen.append(f"{guessed[-1][1]} of {guessed[-1][0]} right")
    subject.load()
    return f"n-gram {seen[0]}, draft model {seen[1]}: the same text"


def loras_are_applied_and_removed(subject: Subject) -> str:
    base = subject.text()
    texts = []
    for names in ([LORAS[0]], [LORAS[1]], list(LORAS)):
        subject.server.api.post("/v1/internal/lora/unload")
        subject.server.api.post("/v1/internal/lora/load", lora_names=names)
        assert subject.info()["lora_names"] == names, subject.info()
        texts.append(subject.text())
    assert len({base, *texts}) == 4, (base, texts)
    subject.server.api.post("/v1/internal/lora/unload")
    assert subject.info()["lora_names"] == [] and subject.text() == base
    return "one, the other, both, none: four texts, and the first again"


def a_broken_lora_is_refused(subject: Subject) -> str:
    base = subject.text()
    try:
        subject.server.api.post("/v1/internal/lora/load", lora_names=["lora-broken"])
    except Refused as error:
        refused = error
    else:
        raise AssertionError("it was accepted")
    assert "DoRA" in str(refused) and "DoRA" in subject.server.console(), refused
    assert subject.text() == base
    return f"HTTP {refused.status} with the reason, the model as before"


def broken_folders_are_refused(subject: Subject) -> str:
    base, seen = subject.text(), []
    for name in BROKEN:
        reason = _refusal(subject, name, loader="ropewalk")
        assert name in reason, f"{name}: the answer has no reason: {reason}"
        assert subject.text() == base, f"after {name} another text"
        seen.append(name.removeprefix("broken-"))
    return f"{', '.join(seen)}: the reason in the answer, the previous model still there"


def unsupported_folders_are_refused_without_being_asked_for(subject: Subject) -> str:
    base = subject.text()
    for name, word in {"broken-falcon": "falcon", "broken-awq": "accepted is gemm"}.items():
        reason = _refusal(subject, name)
        assert word in reason.replace(name, ""), reason
        assert subject.text() == base, f"after {name} another text"
    return reason[:100]


def tokenizers_are_tried_before_the_model_is_unloaded(subject: Subject) -> str:
    base = subject.text()
    assert "has no tokenizer" in _refusal(subject, "broken-no-tokenizer")
    assert subject.text() == base
    if not subject.copy.run("-c", "import transformers; print(transformers.__version__)").startswith("4."):
        return "none; a list of special tokens is no trouble here"
    assert "extra_special_tokens" in _refusal(subject, TOKEN_LIST)
    assert subject.text() == base
    return "none, and a list of special tokens"


def a_misspelt_argument_is_refused(subject: Subject) -> str:
    base = subject.text()
    reason = _refusal(subject, MODEL, alpha_valeu=2)
    assert "did you mean alpha_value?" in reason, reason
    assert subject.text() == base
    return reason[:100]


def _refusal(subject: Subject, name: str, **arguments: Any) -> str:
    """What the API answers to a load that must fail and leave the previous model in place."""
    try:
        subject.load(name, **arguments)
    except Refused as error:
        assert subject.server.alive, f"{name} ended the server"
        assert subject.info()["model_name"] == MODEL, f"{name}: the previous model is gone"
        return str(error)
    raise AssertionError(f"{name} was accepted")


def errors_of_other_loaders_are_their_own(subject: Subject) -> str:
    seen = []
    for loader in ("Transformers", "llama.cpp"):
        before = len(subject.server.console())
        with suppress(Refused):  # llama.cpp says it on the console alone
            subject.load("dense-no-weights", loader=loader)
        said = subject.server.console()[before:]
        frames = re.findall(r"[^\s\"]*ropewalk/faces[^\s\"]*", said)
        assert "error" in said.lower() and not frames, frames or said
        seen.append(said.strip().splitlines()[-1].strip()[:60])
    subject.load()
    return "; ".join(seen)


def the_console_names_our_loader(subject: Subject) -> str:
    said = re.findall(r'LOADER: "([^"]*)"', subject.server.console())
    assert said and set(said) == {"ropewalk"}, said
    return f'LOADER: "ropewalk", {len(said)} times'


def messages_of_anthropic(subject: Subject) -> str:
    subject.need("/v1/messages")
    body = {"model": MODEL, "max_tokens": 16, "messages": [{"role": "user", "content": "Write a loop."}]}
    answer = subject.server.api.post("/v1/messages", **body)
    assert answer["content"][0]["text"], answer
    return f"{answer['usage']['output_tokens']} tokens"


def unloading_and_loading_again(subject: Subject) -> str:
    before = subject.text()
    subject.server.api.post("/v1/internal/model/unload")
    assert subject.info()["model_name"] == "None", subject.info()
    subject.load()
    assert subject.text() == before
    return "same text"


CHECKS: tuple[Callable[[Subject], str], ...] = (
    gptq_folder_chooses_our_loader,
    completion_is_repeatable,
    text_equals_generate_on_our_class,
    indentation_is_kept,
    stream_equals_completion,
    chat_and_its_stream_agree,
    logprobs_are_of_the_chosen_tokens,
    prompt_logprobs_are_given,
    logits_of_the_next_token,
    logit_bias_forces_a_token,
    grammar_is_kept,
    guidance_changes_the_text,
    prefix_is_reused,
    arguments_set_the_context,
    arguments_do_not_outlast_the_load,
    guessing_ahead_changes_no_text,
    stopping_ends_a_reply,
    loras_are_applied_and_removed,
    a_broken_lora_is_refused,
    broken_folders_are_refused,
    unsupported_folders_are_refused_without_being_asked_for,
    tokenizers_are_tried_before_the_model_is_unloaded,
    a_misspelt_argument_is_refused,
    the_console_names_our_loader,
    errors_of_other_loaders_are_their_own,
    messages_of_anthropic,
    unloading_and_loading_again,
)
