"""How linears were quantised: the settings of one, the rules for single modules, and all that a checkpoint declares."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ropewalk.base.errors import ConfigError

MAX_GROUP_SIZE = 2**20
# Limits of a regular expression in a declaration; published ones have three repetitions and 40 characters.
MAX_REPETITIONS = 5
MAX_PATTERN = 4096


@dataclass(frozen=True, slots=True)
class QuantSettings:
    """How one linear layer was quantised."""

    bits: int
    group_size: int  # rows per group; -1: one group for all rows
    desc_act: bool  # informational: the order of the rows is in g_idx
    sym: bool
    # "gptq" (zero points stored minus one) | "gptq_v2" (stored as they are) | "gptq_p" (v2, bit planes) | "awq" |
    # "pack-quantized" (compressed-tensors)
    format: str
    word_borrow: bool  # the minus one was subtracted from whole words (gptqmodel's v1 files), not from each field


@dataclass(frozen=True, slots=True)
class QuantRule:
    """Settings of the modules whose full name begins with a match of the pattern; None: they are dense."""

    pattern: re.Pattern[str]
    settings: QuantSettings | None


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """What a checkpoint declares. `declared` is False if it was inferred from tensor shapes instead."""

    source: str
    default: QuantSettings
    rules: tuple[QuantRule, ...]
    lm_head: bool
    model_file_base_name: str | None
    declared: bool

    def for_module(self, name: str) -> QuantSettings | None:
        """The settings of a linear such as "model.layers.0.mlp.up_proj"; None: it is dense. The first match wins."""
        for rule in self.rules:
            if rule.pattern.match(name):
                return rule.settings
        return None if name == "lm_head" and not self.lm_head else self.default


def quick_pattern(pattern: str, source: str, key: str) -> re.Pattern[str]:
    """A regular expression out of a file, compiled.

    Raises:
        ConfigError: it is none, or one that could take hours.
    """
    try:
        require_quick_pattern(pattern)
        return re.compile(pattern)
    except (ValueError, re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{source}: {key:.200} is not a regular expression that can be used ({error})") from error


def require_quick_pattern(source: str) -> None:
    """Refuse a regular expression that could take hours on a name: files are untrusted, and `re` knows no time limit.

    Time is exponential if a repeated group holds a repetition or a choice, as in `(.+)+`. Otherwise it is polynomial,
    and the degree is the number of repetitions and choices: with five, a name of 50 characters takes 1 to 3 ms.

    Raises:
        ValueError: for either of the two, or an expression that is too long to be searched for them.
    """
    if len(source) > MAX_PATTERN:
        raise ValueError(f"{len(source)} characters, at most {MAX_PATTERN} are accepted")
    # Escapes and character classes stand for one character each; a lazy repetition counts like a greedy one.
    rest = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "a", source, flags=re.DOTALL)
    rest = re.sub(r"([*+?}])[?+]", r"\1", rest)
    num_choices = 0
    while group := re.search(r"\(([^()]*)\)([*+{]?)", rest):
        body = group[1].removeprefix("?")
        if group[2] and re.search(r"[*+{?|]", body):
            raise ValueError("a repeated group holds repetitions or choices")
        num_choices += "|" in body
        rest = rest[: group.start()] + body.replace("|", "") + group[2] + rest[group.end() :]
    if len(re.findall(r"[*+{?]", rest)) + num_choices > MAX_REPETITIONS:
        raise ValueError(f"more than {MAX_REPETITIONS} repetitions and choices")
