"""Markdown of what was measured: tables of shares, and a conversation."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

LINE = 110  # characters


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells under a head; all but the first column to the right."""
    return "\n".join([_row(head), "|---" + "|--:" * (len(head) - 1) + "|", *map(_row, lines)])


def percent(groups: Mapping[str, Any], name: str) -> str:
    """The share of a group of `evaluate.summary`, in percent; a dash where nothing was asked."""
    return f"{100 * groups[name]['share']:.0f}" if name in groups else "-"


def example(found: Mapping[str, Any]) -> str:
    """A conversation of `example.converse`, with what would have been right where the model was wrong."""
    lines = ["```", *(textwrap.fill(line, LINE) for line in found["document"].split("\n")), ""]
    for asked in found["asked"]:
        verdict = "" if asked["written"] == asked["right"] else f"      (wrong; right: {asked['right']})"
        lines += [f"> {asked['question']}", f"{asked['written']}{verdict}"]
    return "\n".join([*lines, "```"])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
