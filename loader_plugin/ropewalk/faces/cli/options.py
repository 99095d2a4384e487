"""Options that several commands share: which model, in what context and order of layers, and how it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.base.choices import (
    AUTO,
    BACKEND,
    CACHE_TYPE,
    COMPUTE,
    HEAD_BITS,
    MAX_INPUT_LEN,
    ROPE_GROWTH,
    SPECULATION,
    Choice,
)
from ropewalk.base.errors import RequestError
from ropewalk.base.memory import parse_bytes
from ropewalk.files.embedded import demo_model_path
from ropewalk.files.local import local_folder
from ropewalk.files.names import ModelName, parse_name
from ropewalk.text.chat_formats import CONTINUED_TEXT, FALLBACK, NAMED_FORMATS

if TYPE_CHECKING:
    from ropewalk.model.options import LoadOptions

MODEL_OPTIONS = ("model", "second_folder", "draft_model")
MODEL_HELP = "model folder, or OWNER/MODEL[:REVISION], which is downloaded once"
ROPE_OPTIONS = ("rope_scaling", "compress_pos_emb", "alpha_value", "rope_theta")
ORDER_OPTIONS = ("layer_order", "recompute_n_layers", "rewind_n_layers", "second_folder")


def model_argument(text: str) -> Path | ModelName:
    """A model on the command line: a folder, or a name that `fetch_named` turns into one."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is an address: give a folder, or a name such as TheBloke/Llama-2-7B-GPTQ (OWNER/MODEL[:REVISION])"
        )
    return parse_name(text) or Path(text)


def fetch_named(args: argparse.Namespace) -> None:
    """Download the models that are given by name; from then on they are folders like the others.

    A command with `by_name` takes the names themselves, as texts: it asks for less than all of a model.
    """
    for name in MODEL_OPTIONS:
        value = getattr(args, name, None)
        if isinstance(value, ModelName):
            setattr(args, name, str(value) if getattr(args, "by_name", False) else local_folder(str(value)))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and the options that decide the context: for every command."""
    parser.add_argument(
        "model", nargs="?", type=model_argument, metavar="MODEL", help=f"{MODEL_HELP} (default: the embedded model)"
    )
    group = parser.add_argument_group("context")
    group.add_argument("--max-seq-len", type=int, metavar="N", help="longest context (default: as the model declares)")
    _add_choice(group, CACHE_TYPE, "type of cached keys and values")
    group.add_argument(
        "--cache-memory",
        type=size_argument,
        metavar="SIZE",
        help="memory for cached keys and values, such as 4GiB (default: half of what is free, within a sensible bound)",
    )
    group.add_argument(
        "--rope-scaling",
        type=_scaling,
        metavar="JSON",
        help='such as \'{"type": "yarn", "factor": 4}\', or auto: chosen for --max-seq-len',
    )
    group.add_argument("--compress-pos-emb", type=float, metavar="X", help="linear position interpolation")
    group.add_argument("--alpha-value", type=float, metavar="X", help="NTK-aware scaling")
    group.add_argument("--rope-theta", type=float, metavar="X", help="base of the rotary frequencies")
    _add_choice(group, ROPE_GROWTH, "cached keys, where frequencies follow the length (dynamic, longrope)")
    add_order_arguments(parser)


def add_order_arguments(parser: argparse.ArgumentParser) -> None:
    """Which layers are run, in which order."""
    group = parser.add_argument_group("layers")
    group.add_argument("--layer-order", metavar="ORDER", help='such as "0-15,8-23,16-31" or "0-9,10*4@0.25,11-31"')
    group.add_argument("--recompute-n-layers", type=int, metavar="N", help="run N layers, rewind, run N layers, ...")
    group.add_argument("--rewind-n-layers", type=int, metavar="N", help="how many layers to go back each time")
    group.add_argument(
        "--second-model",
        type=model_argument,
        dest="second_folder",
        metavar="MODEL",
        help='a model of the same shapes, whose layers an order names as "b:10-29"',
    )


def add_load_arguments(parser: argparse.ArgumentParser, backend: str = BACKEND.default) -> None:
    """How the model runs: for the commands that run it. backend: the default."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--max-input-len", type=int, default=MAX_INPUT_LEN, metavar="N", help="tokens per chunk of a prompt"
    )
    group.add_argument("--max-attention-size", type=int, metavar="N", help="accepted for compatibility, has no effect")
    _add_choice(group, COMPUTE, "arithmetic of the linear layers")
    _add_choice(group, HEAD_BITS, "a head that is stored in floats")
    _add_choice(group, BACKEND, "what runs the layers", backend)
    group.add_argument("--device", help="torch device: cuda, cuda:1, ... of the GPU backend, any of the reference")
    group.add_argument(
        "--gpu-layers", type=int, metavar="N", help="run N layer instances on the GPU, the others on the CPU"
    )
    group.add_argument(
        "--gpu-split", metavar="GIB,GIB,...", help="GiB of weights for each card, such as 10,20 (default: one card)"
    )
    group.add_argument(
        "--pipeline",
        metavar="N",
        help="spread the layers over N processes of this machine, or so many of them each, such as 6,10,10; under "
        "torchrun: over its processes",
    )
    group.add_argument(
        "--expert-memory",
        type=size_argument,
        metavar="SIZE",
        help="memory for the experts of a mixture, such as 8GiB; others are read when needed (default: all that fit)",
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of the CPU backend, of each process of a pipeline (default: all cores)",
    )
    group.add_argument("--isa", help="instruction set of the CPU backend (default: the best there is)")


def add_speculation_arguments(parser: argparse.ArgumentParser) -> None:
    """Whether tokens are guessed ahead, which changes the time and never the text."""
    group = parser.add_argument_group("speculation")
    group.add_argument(
        "--speculation",
        choices=SPECULATION.values,
        help=f"guess tokens ahead and check several at once; the text stays the same ({SPECULATION.help}; default: "
        f"{SPECULATION.default}, or draft with --draft-model)",
    )
    group.add_argument(
        "--draft-model",
        type=model_argument,
        metavar="MODEL",
        help="a smaller model with the same tokenizer, which guesses",
    )


def speculation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of speculation, as arguments of `Engine`.

    Raises:
        RequestError: they contradict each other.
    """
    kind = args.speculation
    if args.draft_model is not None and kind not in (None, "draft"):
        raise RequestError(f"--draft-model has no effect with --speculation {kind}: leave one of them out")
    if kind == "draft" and args.draft_model is None:
        raise RequestError("--speculation draft needs --draft-model MODEL")
    return {"speculation": None if kind == "none" else kind, "draft_model": args.draft_model}


def add_shift_argument(parser: argparse._ActionsContainer, whose: str = "") -> None:
    """Whether the oldest turns go at the end of the window."""
    parser.add_argument(
        "--context-shift",
        nargs="?",
        type=int,
        const=True,
        default=False,
        metavar="N",
        help="when the window is full, drop the oldest turns and move the rest down, without reading it again; keep N "
        f"tokens at the start (default: the system prompt){whose}",
    )


def shift_option(args: argparse.Namespace) -> bool | int:
    """--context-shift, as `Engine` takes it.

    Raises:
        RequestError: a negative number.
    """
    if args.context_shift < 0:
        raise RequestError(f"--context-shift must be at least 0 (tokens to keep), got {args.context_shift}")
    return args.context_shift


def add_template_argument(parser: argparse._ActionsContainer) -> None:
    """How conversations are written."""
    meanings = {FALLBACK: "lines User: and Assistant:", CONTINUED_TEXT: "the messages alone"}
    names = (f"{name} ({meanings[name]})" if name in meanings else name for name in NAMED_FORMATS)
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help=f"one of {', '.join(names)}; default: the model's own, or {FALLBACK} if it has none",
    )


def model_folder(args: argparse.Namespace) -> Path:
    """The MODEL argument, or the embedded model."""
    return demo_model_path() if args.model is None else args.model


def load_options(args: argparse.Namespace) -> LoadOptions:
    """The loading options among those of a command; the rest keep their defaults."""
    from ropewalk.model.options import OPTION_NAMES, LoadOptions

    _check_second_model(args)
    return LoadOptions(**{name: value for name, value in vars(args).items() if name in OPTION_NAMES})


def given_rope_options(args: argparse.Namespace) -> list[str]:
    """Those that decide the RoPE scaling, as they are typed."""
    return [flag(name) for name in ROPE_OPTIONS if getattr(args, name) is not None]


def order_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the layer order, as arguments of `export_layers`."""
    _check_second_model(args)
    return {name: getattr(args, name) for name in ORDER_OPTIONS}


def _check_second_model(args: argparse.Namespace) -> None:
    """Raises:
    RequestError: a second model is given, and no order names its layers: it would be read for nothing.
    """
    if getattr(args, "second_folder", None) is not None and "b" not in (args.layer_order or ""):
        raise RequestError(
            f'--second-model {args.second_folder} has no effect: name its layers in --layer-order, as in "0-9,b:10-19"'
        )


def _add_choice(group: argparse._ArgumentGroup, choice: Choice, what: str, default: str | None = None) -> None:
    default = default or choice.default
    text = f"{what} ({choice.help}; default: {default})"
    values = {"metavar": "TYPE"} if choice.is_open else {"choices": choice.values}
    group.add_argument(flag(choice.name), **values, default=default, help=text)


def flag(name: str) -> str:
    """The option of that name."""
    return "--" + name.replace("_", "-")


def size_argument(text: str) -> int:
    """Bytes, for argparse."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _scaling(text: str) -> dict[str, Any] | str:
    return text if text == AUTO else _json_object(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} is not JSON ({error}); accepted are {AUTO} and objects such as "
            '{"type": "yarn", "factor": 4}'
        ) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'a JSON object such as {{"type": "linear", "factor": 4}} is needed, got {text}'
        )
    return value
