"""Options that several commands share, and what they become: a loaded model, sampling settings, a text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
from ropewalk.files.embedded import demo_model_path, embedded_scaling
from ropewalk.files.local import local_folder
from ropewalk.files.names import ModelName, parse_name
from ropewalk.text.chat_formats import CONTINUED_TEXT, FALLBACK, NAMED_FORMATS

if TYPE_CHECKING:
    from ropewalk.model.options import LoadOptions
    from ropewalk.model.variants import AdapterUse

MODEL_OPTIONS = ("model", "second_folder", "draft_model")
MODEL_HELP = "model folder, or OWNER/MODEL[:REVISION], which is downloaded once"
ORDER_OPTIONS = ("layer_order", "recompute_n_layers", "rewind_n_layers", "second_folder")
SAMPLING_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("max_new_tokens", int, "end after N tokens"),
    ("temperature", float, "0: always the most likely token"),
    ("top_k", int, "choose among the k most likely (0: off)"),
    ("top_p", float, "choose among the most likely that together have this probability (1: off)"),
    ("min_p", float, "choose among those at least this likely, relative to the most likely (0: off)"),
    ("typical", float, "locally typical sampling (1: off)"),
    ("repetition_penalty", float, "above 1: avoid tokens that came before"),
    ("repetition_range", int, "look back N tokens for that (default: all)"),
    ("frequency_penalty", float, "lower a token's logit by this for each time it occurred in the reply"),
    ("presence_penalty", float, "lower a token's logit by this if it occurred in the reply"),
    ("dry_multiplier", float, "DRY: strength of a penalty against repeating sequences (0: off; usual: 0.8)"),
    ("dry_base", float, "DRY: the penalty grows by this with each token repeated (1.75)"),
    ("dry_allowed_length", int, "DRY: N tokens may be repeated at no cost (2)"),
    ("dry_range", int, "DRY: look back N tokens (default: all)"),
    ("xtc_probability", float, "XTC: how often the most likely tokens are excluded (0: off; usual: 0.5)"),
    ("xtc_threshold", float, "XTC: exclude tokens at least this likely, except the least likely of them (0.1)"),
    ("seed", int, "seed of the random draw, which makes replies repeatable"),
)


def model_argument(text: str) -> Path | ModelName:
    """A model on the command line: a folder, or a name that `fetch_named` turns into one."""
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


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """How the model runs: for the commands that run it."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--max-input-len", type=int, default=MAX_INPUT_LEN, metavar="N", help="tokens per chunk of a prompt"
    )
    group.add_argument("--max-attention-size", type=int, metavar="N", help="accepted for compatibility, has no effect")
    _add_choice(group, COMPUTE, "arithmetic of the linear layers")
    _add_choice(group, HEAD_BITS, "a head that is stored in floats")
    _add_choice(group, BACKEND, "what runs the layers")
    group.add_argument("--device", help="torch device: cuda, cuda:1, ... of the GPU backend, any of the reference")
    group.add_argument(
        "--gpu-layers", type=int, metavar="N", help="run N layer instances on the GPU, the others on the CPU"
    )
    group.add_argument(
        "--gpu-split", metavar="GIB,GIB,...", help="GiB of weights for each card, such as 10,20 (default: one card)"
    )
    group.add_argument(
        "--expert-memory",
        type=size_argument,
        metavar="SIZE",
        help="memory for the experts of a mixture, such as 8GiB; others are read when needed (default: all that fit)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="threads of the CPU backend (default: all cores)")
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
    """--context-shift, as `Engine` takes it."""
    return args.context_shift


def add_adapter_arguments(parser: argparse.ArgumentParser, routes: bool) -> None:
    """Which LoRAs are used. routes: the command has a prompt by which one can be chosen."""
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER[:WEIGHT][@INSTANCES]",
        help="use this LoRA (a PEFT folder, or the name of one that comes with the model), on these layer instances "
        "only (such as 10-11); may be repeated: all are added up",
    )
    if routes:
        group.add_argument(
            "--adapters",
            choices=("all", "auto"),
            default="all",
            help="auto: the one that fits the prompt best, or none",
        )


def add_template_argument(parser: argparse._ActionsContainer) -> None:
    """How conversations are written."""
    meanings = {FALLBACK: "lines User: and Assistant:", CONTINUED_TEXT: "the messages alone"}
    names = (f"{name} ({meanings[name]})" if name in meanings else name for name in NAMED_FORMATS)
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help=f"one of {', '.join(names)}; default: the model's own, or {FALLBACK} if it has none",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen; options left out keep the defaults of SamplingParams."""
    group = parser.add_argument_group("sampling")
    for name, kind, text in SAMPLING_OPTIONS:
        group.add_argument(_flag(name), type=kind, metavar="N" if kind is int else "X", help=text)
    group.add_argument(
        "--dry-sequence-breaker",
        action="append",
        metavar="TEXT",
        help='DRY: text that ends a repetition; may be repeated (default: line end : " *)',
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument(
        "--stop-token-id", action="append", type=int, metavar="ID", help="end at this token; may be repeated"
    )
    group.add_argument(
        "--logit-bias", action="append", type=_bias, metavar="ID=X", help="added to a token's logit (-inf: never)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="continue past the model's end token")


def model_folder(args: argparse.Namespace) -> Path:
    """The MODEL argument, or the embedded model."""
    return demo_model_path() if args.model is None else args.model


def load_options(args: argparse.Namespace) -> LoadOptions:
    """The loading options among those of a command; the rest keep their defaults."""
    from ropewalk.model.options import OPTION_NAMES, LoadOptions

    return LoadOptions(**{name: value for name, value in vars(args).items() if name in OPTION_NAMES})


def order_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the layer order, as arguments of `export_layers`."""
    return {name: getattr(args, name) for name in ORDER_OPTIONS}


def load(args: argparse.Namespace, to_talk: bool = False, options: LoadOptions | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), with a progress bar, and the RoPE decision on stderr.

    to_talk: the embedded model gets its longer context, unless a RoPE option or an adapter says otherwise. options:
    those of `options_for_adapters`, where they are known already.
    """
    from ropewalk.model.loader import load_model
    from ropewalk.text.tokenizer.load import load_tokenizer

    folder = model_folder(args)
    tokenizer = load_tokenizer(folder)
    if options is None:
        options = options_for_adapters(args, to_talk)
    with progress_bar("loading", "layer") as progress:
        model = load_model(folder, options=options, progress=progress)
    note(model.rope.describe())
    if not model.layer_order.is_plain(model.config.num_layers):
        note(f"layer order: {model.layer_order} ({len(model.layer_order)} layer instances)")
    return model, tokenizer


def _with_adapters_first(args: argparse.Namespace, folder: Path, options: LoadOptions) -> LoadOptions:
    """The automatic choice gives way to what an adapter was trained for, if the checkpoint covers too little itself."""
    from ropewalk.config.model import load_model_config
    from ropewalk.rope.automatic import covered_without

    config = load_model_config(folder)
    if covered_without(config.raw, options.max_seq_len, config.source):
        return options
    return replace(options, rope_scaling=_rope_of_adapters(args) or AUTO)


def options_for_adapters(args: argparse.Namespace, to_talk: bool = False) -> LoadOptions:
    """The options of loading; where none is about RoPE, with the scaling that the adapters given were trained for."""
    options = load_options(args)
    if options.rope_scaling == AUTO and getattr(args, "adapter", None):
        return _with_adapters_first(args, model_folder(args), options)
    if options.has_rope:
        return options
    scaling = _rope_of_adapters(args)
    if scaling is None and to_talk and args.model is None:
        scaling = embedded_scaling()
    return replace(options, rope_scaling=scaling)


def adapter_uses(args: argparse.Namespace) -> tuple[AdapterUse, ...]:
    """The adapters that --adapter names, for those who load them themselves."""
    from ropewalk.model.variants import AdapterUse

    given = [_adapter_option(args, text) for text in args.adapter]
    names = _adapter_names(list(dict.fromkeys(folder for folder, _, _ in given)))
    return tuple(
        AdapterUse(names[folder], folder, 1.0 if weight is None else weight, instances)
        for folder, weight, instances in given
    )


def load_adapters(args: argparse.Namespace, model: Any) -> str | list[tuple[str, float, tuple[int, ...] | None]]:
    """Load the adapters that --adapter names; returns the `adapters` for requests. A folder given twice is loaded once.

    Raises:
        RequestError: an invalid weight or invalid instances, or either of them with --adapters auto; a folder twice
            for the same instances. Other errors as for `Model.load_adapter`.
    """
    from ropewalk.adapters.request import checked_request

    auto = getattr(args, "adapters", "all") == "auto"
    if auto and not args.adapter:
        raise RequestError(
            "--adapters auto chooses among adapters, and none are given: name each with --adapter FOLDER"
        )
    given = [_adapter_option(args, text) for text in args.adapter]
    names = _adapter_names(list(dict.fromkeys(folder for folder, _, _ in given)))
    for text, (_, weight, instances) in zip(args.adapter, given, strict=True):
        if auto and not weight is instances is None:
            raise RequestError(
                f"--adapter {text}: --adapters auto runs each with weight 1 on all layers: give folders alone"
            )
    chosen = [(names[folder], 1.0 if weight is None else weight, instances) for folder, weight, instances in given]
    checked_request(chosen)
    for folder, name in names.items():
        model.load_adapter(folder, name)
    return "auto" if auto else chosen


def _adapter_names(folders: list[Path]) -> dict[Path, str]:
    """Each folder's last part, or as many parts as tell it from the others. Clients of the server see these names."""
    parts = {folder: [part for part in folder.parts if part != folder.anchor] for folder in folders}
    names = {}
    for folder in folders:
        others = [parts[other] for other in folders if other != folder]
        count = next((n for n in range(1, len(parts[folder])) if parts[folder][-n:] not in [o[-n:] for o in others]), 0)
        names[folder] = "/".join(parts[folder][-count:])
    return names


def _rope_of_adapters(args: argparse.Namespace) -> Mapping[str, Any] | None:
    """The RoPE scaling that the adapters given were trained for, with a line about it on stderr."""
    from ropewalk.adapters.config import rope_of_adapters

    scaling = rope_of_adapters(_adapter_option(args, text)[0] for text in args.adapter)
    if scaling is not None:
        note(f"RoPE scaling as the adapter asks: --rope-scaling '{json.dumps(scaling)}'")
    return scaling


def _adapter_option(args: argparse.Namespace, text: str) -> tuple[Path, float | None, tuple[int, ...] | None]:
    """FOLDER[:WEIGHT][@INSTANCES]. A folder's name may contain : and @: the longest folder that exists is taken."""
    from ropewalk.adapters.config import find_adapter
    from ropewalk.adapters.request import parse_suffix

    ends = [*(i for i in range(text.rfind("/") + 1, len(text)) if text[i] in ":@"), len(text)]
    found = ((find_adapter(model_folder(args), text[:end]), end) for end in reversed(ends))
    missing = (Path(text[: ends[0]]), ends[0])
    folder, end = next(((folder, end) for folder, end in found if folder is not None), missing)
    return folder, *parse_suffix(text, end, "--adapter")


def sampling_params(args: argparse.Namespace, **defaults: Any) -> Any:
    """SamplingParams from the options given, with the `defaults` of the command for the rest."""
    from ropewalk.generate.sampling import SamplingParams

    given = {name: getattr(args, name) for name, _, _ in SAMPLING_OPTIONS if getattr(args, name) is not None}
    if args.dry_sequence_breaker:
        given["dry_sequence_breakers"] = tuple(args.dry_sequence_breaker)
    return SamplingParams(
        **{**defaults, **given},
        stop=args.stop or (),
        stop_token_ids=args.stop_token_id or (),
        logit_bias=dict(args.logit_bias or ()),
        ignore_eos=args.ignore_eos,
    )


def read_text(path: str) -> str:
    """A UTF-8 text file; "-" is standard input.

    Raises:
        RequestError: it cannot be read, or is not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        name = "standard input" if path == "-" else path
        raise RequestError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def note(text: str) -> None:
    """Print a line for people, apart from the output."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(what: str, unit: str, at_least: int = 0) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (done, total) that draws a bar on stderr; None if stderr is not a terminal.

    at_least: nothing is drawn for smaller totals.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    bar = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and total >= at_least:
            bar = tqdm(desc=what, unit=f" {unit}", total=total, file=sys.stderr, leave=False)
        if bar is not None:
            bar.update(done - bar.n)
            if done >= total:
                bar.close()

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()


def _add_choice(group: argparse._ArgumentGroup, choice: Choice, what: str) -> None:
    text = f"{what} ({choice.help}; default: {choice.default})"
    values = {"metavar": "TYPE"} if choice.is_open else {"choices": choice.values}
    group.add_argument(_flag(choice.name), **values, default=choice.default, help=text)


def _flag(name: str) -> str:
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
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'a JSON object such as {{"type": "linear", "factor": 4}} is needed, got {text}'
        )
    return value


def _bias(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"ID=X is needed, a token id and a number, got {text!r}") from error
