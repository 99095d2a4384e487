"""`ropewalk divergence`: how far other settings are from the one that the options describe, token by token."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, NoReturn

from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.adapter_options import adapter_uses, add_adapter_arguments
from ropewalk.faces.cli.loading import options_for_adapters
from ropewalk.faces.cli.measuring import (
    add_result_arguments,
    add_text_arguments,
    check_results,
    count_argument,
    measured_text,
    open_model,
    open_record,
    write_results,
)
from ropewalk.faces.cli.options import (
    ORDER_OPTIONS,
    ROPE_OPTIONS,
    add_load_arguments,
    add_model_arguments,
    model_folder,
)
from ropewalk.faces.cli.terminal import note, progress_bar
from ropewalk.files.local import local_folder

if TYPE_CHECKING:
    from ropewalk.measure.settings import Setting

LONGEST = 2048  # by default
FORMATS = ("q8", "q6", "q4", "q4+256")  # of the cache: what is measured if nothing is asked for
ORDER_WORDS = tuple(name for name in ORDER_OPTIONS if name != "second_folder")


def add_divergence_command(commands: argparse._SubParsersAction) -> None:
    """Register it."""
    parser = commands.add_parser(
        "divergence",
        help="KL divergence and agreement of settings",
        description=run_divergence.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument(
        "--versus",
        action="append",
        default=[],
        metavar="OPTION=VALUE ...",
        help="a setting to compare: options of this command that differ, without dashes, such as cache-type=q8 or "
        "'compute=exact layer-order=0-4'; model=FOLDER is another model; may be repeated (default: cache types)",
    )
    parser.add_argument(
        "--length", type=count_argument, metavar="N", help="tokens of a window (default: the context, at most 2048)"
    )
    parser.add_argument(
        "--max-tokens",
        type=count_argument,
        default=16384,
        metavar="N",
        help="use at most N tokens of the text (default: %(default)s)",
    )
    add_result_arguments(parser)
    add_load_arguments(parser)
    add_adapter_arguments(parser, routes=False)
    parser.set_defaults(run=run_divergence)


def run_divergence(args: argparse.Namespace) -> int:
    """How far other settings are from the one that the options describe: KL divergence, agreement, perplexity.

    ropewalk divergence MODEL --versus cache-type=q8 --versus "cache-type=q4 compute=exact"
    ropewalk divergence MODEL --compute exact --versus compute=int8
    ropewalk divergence MODEL --versus 'rope-scaling={"type": "yarn", "factor": 4}'
    ropewalk divergence MODEL --versus adapter=storm --versus layer-order=0-15,8-31 --versus model=OTHER-BITS
    """
    from ropewalk.measure.divergence import divergence, divergence_rows, divergences_csv
    from ropewalk.measure.plots import plot_divergence
    from ropewalk.measure.settings import open_beside

    text = measured_text(args)
    check_results(args)
    args.max_seq_len = args.max_seq_len or args.length
    settings = [versus(args, words) for words in args.versus or _formats(args)]
    base, _, token_ids = open_model(args, text, args.length)
    length = args.length or min(LONGEST, base.model.max_seq_len)
    record = open_record(args, "divergence", token_ids)
    found = []
    for setting in settings:
        with progress_bar(f"loading {setting.name}", "layer") as progress:
            other = open_beside(base, setting, progress)
        kept = record.part(setting.name, {"base": base.facts, "other": other.facts})
        with progress_bar(setting.name, "token") as progress:
            one = divergence(base, other, token_ids, length, args.max_tokens, progress, kept=kept)
        if one is not None:
            found.append(one)
        del other  # its model goes before the next one is loaded
    columns, rows = divergence_rows(found)
    note(f"base: {base.model.cache_type} cache, compute {base.model.backend.compute}; windows of {length} tokens")
    write_results(args, columns, rows, divergences_csv(found), lambda: plot_divergence(found, "the base"))
    return 0


def versus(args: argparse.Namespace, text: str) -> Setting:
    """What `--versus text` means beside the other options: each counts unless the text replaces it.

    Raises:
        RequestError: it is not OPTION=VALUE, or not what the option takes.
    """
    from ropewalk.measure.settings import Setting

    # A value may hold spaces and "=" (JSON), so a word begins where a name and "=" follow a space.
    words = re.split(r"(?:^|\s+)(?=[a-z][a-z-]*=)", text.strip())
    pairs = [word.partition("=") for word in words if word]
    if not pairs or any(not equals for _, equals, _ in pairs):
        raise RequestError(f"--versus {text!r}: OPTION=VALUE is needed, such as cache-type=q8")
    given = {name.replace("-", "_") for name, _, _ in pairs}
    other = argparse.Namespace(**vars(args))
    for group in (ROPE_OPTIONS, ORDER_WORDS):
        if given.intersection(group):
            for name in group:
                setattr(other, name, None)
    if "adapter" in given:
        other.adapter = []
    words = [word for name, _, value in pairs if name != "model" for word in (f"--{name}", value)]
    _parser(text).parse_args(words, other)
    folder = next((local_folder(value) for name, _, value in pairs if name == "model"), None)
    if folder is not None:
        other.model = folder
    return Setting(text, model_folder(other), options_for_adapters(other), adapter_uses(other))


class _Words(argparse.ArgumentParser):
    """Reads the options of a setting; what is wrong becomes an error of ours."""

    text = ""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"--versus {self.text!r}: {message}")


def _parser(text: str) -> argparse.ArgumentParser:
    parser = _Words(prog="--versus", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.text = text
    _add_options(parser)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Those that a setting may have, but MODEL, which has no name."""
    whole = argparse.ArgumentParser(add_help=False)
    add_model_arguments(whole)
    add_load_arguments(whole)
    add_adapter_arguments(whole, routes=False)
    for action in whole._actions:
        if action.option_strings:
            parser._add_action(action)


def _formats(args: argparse.Namespace) -> list[str]:
    return [f"cache-type={name}" for name in FORMATS if name != args.cache_type]
