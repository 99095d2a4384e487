"""How tokens are chosen: the options of the commands that write."""

from __future__ import annotations

import argparse
from typing import Any

from ropewalk.faces.cli.options import flag

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


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen; options left out keep the defaults of SamplingParams."""
    group = parser.add_argument_group("sampling")
    for name, kind, text in SAMPLING_OPTIONS:
        group.add_argument(flag(name), type=kind, metavar="N" if kind is int else "X", help=text)
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


def _bias(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"ID=X is needed, a token id and a number, got {text!r}") from error
