"""The card of the model that reads (README.md of its folder), written from what was measured and logged alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import corpus
from reading import tables
from reading.curriculum import PHASES
from reading.history import Fall, History, read_history
from reading.measure import (
    ADAPTERS,
    CACHES,
    LENGTHS,
    PERPLEXITY_TOKENS,
    SCALINGS,
    adapter_folder,
    long_documents,
    read_numbers,
)
from reading.network import ROPE_THETA, Network, Shape
from reading.tables import percent
from reading.trials import DEPTHS

TEMPLATE = """# The embedded model

A Llama of {parameters:.1f} million parameters that answers questions about a text in front of it, trained from nothing and
quantised to 4 bits. It is here so that everything in this project runs without a download, and so that a longer context
shows in answers: whoever lengthens it can see whether a fact far back is still found.

{example}

| | |
|---|---|
| architecture | Llama: {shape.num_layers} layers, hidden size {shape.hidden}, {shape.num_heads} heads of {shape.head_dim} ({shape.num_kv_heads} key/value heads), feed-forward {shape.intermediate}, tied embeddings, RoPE theta {theta:.0f} |
| context | {shape.context} tokens, and trained on nothing longer; the LoRAs beside it reach further |
| tokenizer | sentencepiece BPE, {shape.vocab} pieces, byte fallback, split digits, spaces kept; `tokenizer.model` is its only form |
| quantisation | GPTQ by gptqmodel 7.7.0: 4-bit, groups of 32, act-order, symmetric, checkpoint format `gptq` (v1); embeddings and norms float16 |
| size | {size_mb:.1f} MB in this folder |

## What it can do, and what it cannot

It finds what a text says of a thing and gives it back, word for word: a value ("Who built the Young Needle?"), the thing
that has a value ("Who lives in Belwick?"), the passage, or both. It is meant to say "Not in the text" where the text has
no answer. It has learned this on invented English alone: persons, ships, towns, inns, dishes, houses, books and guilds
with invented names, lists, and numbers hidden among sentences that say nothing. So:

- It knows nothing. Names and facts come from the text, or there is no right answer.
- It reads the simple English of its grammar. On other texts, and for questions in words of one's own, expect wrong answers
  as a rule and right ones as an exception; below is how it does with wordings that it was never trained on.
- It does not count, add, compare, sum up, translate or follow instructions, and takes no second step from one fact to another.
- It can be wrong and sound the same. The tables say how often.
- It has seen Python's library on the side, so it continues code a little, and means nothing by it.

## How to ask

Greedily (temperature 0), in one of three layouts. The chat template of `tokenizer_config.json` writes the marks.

| layout | user's turn |
|---|---|
| plain | the text, an empty line, the question |
| system | the question alone; the text is the system's turn |
| closed context | `BEGININPUT`, `BEGINCONTEXT`, metadata or nothing, `ENDCONTEXT`, the text, `ENDINPUT`, `BEGININSTRUCTION`, the question, `ENDINSTRUCTION`, a line each, as the page's documents tab writes it |

More questions follow in turns of their own. "Quote the passage." after a question asks for the passage, "Show the
passage as well." for the answer and the passage.

## Exact answers

Every number is the share of questions, in percent, whose answer is right to the last token and ends there. Texts are
made anew from the grammar, as long as fits, with {documents} documents at each length; **all names in them are held out**.
A standard error of a share p of n questions is sqrt(p (1 - p) / n): at most {error:.1f} points for the {answered} answers in a
cell of the first table.

{weights_table}

By what is asked, at {short} and {long} tokens (`int8`, which is what runs by default), and for pass keys and lists:

{kinds_table}

What else is held out, beside names: wordings of statements and questions (the last of each list), types of document
(gazettes, minutes, ledgers), or both:

{sides_table}

By layout:

{layouts_table}

By where in the text the passage stands, at {long} tokens:

{depths_table}

On plain English texts written by hand, with names of the world and in words that its grammar does not have
(`scripts/demo_model/reading/by_hand.txt`), {by_hand_all} short questions, right answers: {by_hand_right}.

With keys and values in other formats than float16:

{caches_table}

## Beyond {context} tokens

Exact answers about texts of each length, as trained, under scalings alone, and with the LoRAs of `adapters/`, each under the
scaling that its adapter_config.json notes, and trained on texts as many times as long as its name says; {long_documents}
documents of each length:

{lengths_table}

A number hidden among sentences that say nothing: at the beginning, after a quarter, in the middle, after three quarters,
and at the end:

{pass_keys_table}

Questions without an answer, refused; and questions with one, refused:

{refusals_table}

## Perplexity of held_out.txt

Python files that it was not trained on: {files}. The first
{perplexity_tokens:,} tokens, in windows that do not overlap, the first token of each not counted, as `ropewalk perplexity` does it.
At {context} tokens the float model has {float_ppl:.3f}, the GPTQ model {exact_ppl:.3f} in `exact`. Code was {library_share:.0%} of the
training text at most, so this measures context extension and rounding, not the model's work.

{perplexity_table}

## Training

- Text from the grammar in `scripts/demo_model/reading/`: no text comes from anywhere but it and the Python
  {python} standard library ({library_documents:,} documents, of which one in {held_out_one_in} is held out), as the table says.
- {tokens:,} tokens in {steps:,} steps, {hours:.1f} hours on two CPU cores; Muon for the layers' matrices and AdamW for the rest, bf16
  autocast. Answers weigh 1, everything else 0.1. {decay}

{phases_table}

{adapters_list}

## Making it again

`scripts/demo_model/README.md` has the commands, from training to this card. Times and rounding differ between machines, so the
weights will not be bit-identical; LoRAs fit the weights that they were trained on, and no others.

## Licence

The model and tokenizer carry the licence of this repository. `held_out.txt` is Python's own text, under `LICENSE-PYTHON.txt`.
"""  # noqa: E501 (table rows cannot be broken)


def model_card(run: Path, model: Path, size_bytes: int) -> str:
    """The card's Markdown. run: the folder with the run's log and numbers; size_bytes: of the model's other files.

    Raises:
        SystemExit: something was not measured, or was measured on other weights.
    """
    numbers, documents = read_numbers(run, model)
    history = read_history(run / "log.jsonl")
    shape = Shape.of(model)
    short, long = numbers["int8"]
    answered = numbers["int8"][short]["answered"]["questions"]
    _, held_out = corpus.split_documents(corpus.collect_documents())
    return TEMPLATE.format(
        parameters=sum(parameter.numel() for parameter in Network(shape).parameters()) / 1e6,
        example=tables.example(numbers["example"]),
        shape=shape,
        theta=ROPE_THETA,
        size_mb=size_bytes / 1e6,
        documents=documents,
        long_documents=long_documents(documents),
        error=50 / answered**0.5,
        answered=answered,
        short=short,
        long=long,
        context=shape.context,
        weights_table=_answers(numbers, {"float32": "float", "GPTQ, `exact`": "exact", "GPTQ, `int8`": "int8"}),
        kinds_table=_kinds(numbers["int8"]),
        sides_table=_answers(
            numbers,
            {"names": "int8", "names, wordings": "side wordings", "names, types": "side types", "all": "side all"},
        ),
        layouts_table=_answers(
            numbers, {"plain": "int8", "system": "layout system", "closed context": "layout closed"}
        ),
        depths_table=_depths(numbers["int8"][long]),
        caches_table=_answers(numbers, {"`fp16`": "int8", **{f"`{cache}`": f"cache {cache}" for cache in CACHES}}),
        by_hand_all=numbers["by hand"]["questions"],
        by_hand_right=_by_hand(numbers),
        lengths_table=_by_length(numbers, "answered"),
        pass_keys_table=_pass_keys(numbers),
        refusals_table=_refusals(numbers),
        files=", ".join(f"`{document.path}`" for document in corpus.held_out_sample(held_out)),
        perplexity_tokens=PERPLEXITY_TOKENS,
        float_ppl=numbers["perplexity"]["float"][str(shape.context)],
        exact_ppl=numbers["perplexity"]["exact"][str(shape.context)],
        perplexity_table=_perplexities(numbers["perplexity"]),
        python=corpus.python_version(),
        library_share=max(dict(phase.mix).get("library", 0.0) for phase in PHASES),
        held_out_one_in=corpus.HELD_OUT_ONE_IN,
        library_documents=len(corpus.collect_documents()),
        tokens=history.tokens,
        steps=history.steps,
        hours=history.hours,
        decay=_decay(history),
        phases_table=_phases(history),
        adapters_list="\n".join(_adapter(run, name) for name in ADAPTERS),
    )


def _answers(numbers: Mapping[str, Any], rows: Mapping[str, str]) -> str:
    """A row per setting, the first column a label; exact answers, refusals that are right, refusals that are wrong."""
    lengths = list(numbers["int8"])
    head = [""]
    for length in lengths:
        head += [f"{length} tokens: answers", "refusals", "false refusals"]
    lines = []
    for label, name in rows.items():
        cells = [label]
        for length in lengths:
            cells += [percent(numbers[name][length], group) for group in ("answered", "kind absent", "false refusals")]
        lines.append(cells)
    return tables.table(head, lines)


def _kinds(by_length: Mapping[str, Any]) -> str:
    labels = {
        "kind value": "the value",
        "kind reverse": "the thing that has a value",
        "kind quote": "the passage",
        "kind both": "the value and the passage",
        "kind absent": "what is not in the text",
        "key": "a line of a list of names and values",
        "pass key": "a hidden number",
    }
    head = ["", *(f"{length} tokens" for length in by_length)]
    return tables.table(
        head, [[label, *(percent(here, group) for here in by_length.values())] for group, label in labels.items()]
    )


def _depths(here: Mapping[str, Any]) -> str:
    starts = [place / DEPTHS for place in range(DEPTHS)]
    return tables.table(
        [f"{100 * start:.0f} to {100 * (start + 1 / DEPTHS):.0f} %" for start in starts],
        [[percent(here, f"depth {start:.1f}") for start in starts]],
    )


def _extended() -> dict[str, str]:
    """Label -> name of what was measured at every length."""
    plain = {label: f"length {label}" for label in SCALINGS}
    return plain | {f"LoRA `{name}`": f"lora {name}" for name in ADAPTERS}


def _by_hand(numbers: Mapping[str, Any]) -> str:
    with_lora = (f"{numbers[f'by hand {name}']['right']} with `{name}`" for name in ADAPTERS)
    return ", ".join([f"{numbers['by hand']['right']} as trained", *with_lora])


def _by_length(numbers: Mapping[str, Any], group: str) -> str:
    return tables.table(
        ["", *(f"{length:,}" for length in LENGTHS)],
        [
            [label, *(percent(numbers[name][str(length)], group) for length in LENGTHS)]
            for label, name in _extended().items()
        ],
    )


def _pass_keys(numbers: Mapping[str, Any]) -> str:
    places = [f"pass key at {place / (DEPTHS - 1):.2f}" for place in range(DEPTHS)]
    lines = []
    for label, name in _extended().items():
        here = [numbers[name][str(length)] for length in LENGTHS]
        lines.append([label, *(", ".join(percent(one, place) for place in places) for one in here)])
    return tables.table(["", *(f"{length:,}" for length in LENGTHS)], lines)


def _refusals(numbers: Mapping[str, Any]) -> str:
    lines = []
    for label, name in _extended().items():
        here = [numbers[name][str(length)] for length in LENGTHS]
        lines.append([label, *(f"{percent(one, 'kind absent')} / {percent(one, 'false refusals')}" for one in here)])
    return tables.table(["right / false refusals", *(f"{length:,}" for length in LENGTHS)], lines)


def _perplexities(rows: Mapping[str, Mapping[str, float]]) -> str:
    lines = []
    for label in (*SCALINGS, *(f"LoRA {name}" for name in ADAPTERS)):
        lines.append([label, *(f"{rows[label][str(length)]:.2f}" for length in LENGTHS)])
    return tables.table(["", *(f"{length:,}" for length in LENGTHS)], lines)


def _phases(history: History) -> str:
    """The phases of the curriculum that the run has reached."""
    lines: list[Sequence[str]] = []
    start = 0.0
    for phase in PHASES:
        if start >= history.tokens:
            break
        end = min(phase.until, history.tokens)
        mix = ", ".join(f"{name} {share:.0%}" for name, share in phase.mix)
        lines.append([f"{start / 1e6:.1f} to {end / 1e6:.1f}", str(phase.length), str(phase.rows), mix])
        start = phase.until
    return tables.table(["million tokens", "tokens a row", "rows a step", "exercises"], lines)


def _decay(history: History) -> str:
    if not history.falls:
        return "The rate never fell."
    falls = [
        f"from {fall.share:.0%} at {fall.start / 1e6:.1f} million tokens to {_left(fall)} at {fall.end / 1e6:.1f}"
        for fall in history.falls
    ]
    return f"The rate fell {', then '.join(falls)}."


def _left(fall: Fall) -> str:
    return f"{fall.left:.0%}" if fall.left else "nothing"


def _adapter(run: Path, name: str) -> str:
    history = read_history(run / name / "log.jsonl")
    config = json.loads((adapter_folder(run, name) / "adapter_config.json").read_text(encoding="utf-8"))
    targets = ", ".join(target.removesuffix("_proj") for target in config["target_modules"])
    return (
        f"- LoRA `{name}`: rank {config['r']} on {targets}; {history.tokens:,} tokens in {history.steps:,} steps, "
        f"{60 * history.hours:.0f} minutes."
    )
