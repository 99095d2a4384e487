"""The findings of measure/report.py as Markdown: what a person pastes into a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ropewalk.base.memory import format_bytes
from ropewalk.config.cache_format import CacheFormat
from ropewalk.measure.divergence import divergence_rows
from ropewalk.measure.recommend import RULE, recommendation_rows
from ropewalk.measure.report import Findings, ReportPlan
from ropewalk.measure.retrieval import RetrievalCell
from ropewalk.measure.tables import markdown_table, with_error
from ropewalk.measure.tasks import TASKS
from ropewalk.model.model import Model
from ropewalk.model.pages import planned_bytes


@dataclass(frozen=True, slots=True)
class Source:
    """What is said about how it was measured. model: its name; text: that of the file; command: what measures the same;
    versions: of the programs."""

    model: str
    text: str
    num_tokens: int
    command: str
    versions: str


def report_text(found: Findings, plan: ReportPlan, model: Model, source: Source) -> str:
    """The whole section."""
    return "\n".join(
        [
            "## Long context\n",
            _summary(found, plan, source),
            _recommended(found),
            _perplexity(found, plan),
            _positions(found),
            *(_map(name, cells, plan) for name, cells in found.maps.items() if cells),
            _cache(found, plan, model),
            _reproduce(plan, model, source),
        ]
    )


def _summary(found: Findings, plan: ReportPlan, source: Source) -> str:
    return (
        f"Measured on `{source.model}` with the first {min(plan.max_tokens, source.num_tokens):,} tokens of "
        f"`{source.text}`, at context lengths up to {max(plan.lengths):,}. Errors are standard errors over stretches "
        "of 512 tokens; differences between settings are surer than they say, since all read the same text.\n"
    )


def _recommended(found: Findings) -> str:
    chosen = found.recommendation.chosen
    assert chosen is not None
    columns, rows = recommendation_rows(found.recommendation)
    return (
        f"### Recommended settings for {found.recommendation.length:,} tokens\n\n"
        f"```sh\nropewalk chat MODEL {found.recommendation.options}\n```\n\n"
        f"{_capital(found.recommendation.reason)} The rule: {RULE}.\n\n"
        f"![Perplexity of the scalings that were tried](scalings.png)\n\n{markdown_table(columns, rows)}\n"
        "`*` is the recommended one; the last column is the distance from the best, in nats per token.\n"
    )


def _perplexity(found: Findings, plan: ReportPlan) -> str:
    columns = ("RoPE scaling", *(f"{length:,}" for length in plan.lengths))
    rows = [(curve.name, *(with_error(row.perplexity, row.error) for row in curve.rows)) for curve in found.curves]
    return (
        "### Perplexity by context length\n\n![Perplexity by context length](perplexity.png)\n\n"
        f"{markdown_table(columns, rows)}\n"
        "Windows that do not overlap, of each length, over the same tokens; the first token of each is not scored.\n"
    )


def _positions(found: Findings) -> str:
    rows = found.positions[0].rows
    picked = sorted({0, len(rows) // 4, len(rows) // 2, 3 * len(rows) // 4, len(rows) - 1})
    columns = ("RoPE scaling", *(f"{rows[i].start:,}-{rows[i].end - 1:,}" for i in picked))
    table = [(c.name, *(with_error(c.rows[i].perplexity, c.rows[i].error) for i in picked)) for c in found.positions]
    return (
        f"### Perplexity by position in {rows[-1].end:,} tokens\n\n"
        f"![Perplexity by position](positions.png)\n\n{markdown_table(columns, table)}"
    )


def _map(name: str, cells: Sequence[RetrievalCell], plan: ReportPlan) -> str:
    depths, lengths = (sorted({getattr(cell, key) for cell in cells}) for key in ("depth", "length"))
    by_place = {(cell.depth, cell.length): cell for cell in cells}
    rows = [(f"{100 * depth:.0f}%", *(_found(by_place.get((depth, length))) for length in lengths)) for depth in depths]
    return (
        f"### Retrieval: {TASKS.meanings[name]}\n\n"
        f"![Retrieval by depth and length: {TASKS.meanings[name]}](retrieval-{name}.png)\n\n"
        f"{markdown_table(('depth', *(f'{length:,}' for length in lengths)), rows)}\n"
        f"Whole answers found, and in brackets the share of their tokens; {plan.trials} trials per cell, under the "
        "recommended scaling.\n"
    )


def _found(cell: RetrievalCell | None) -> str:
    return "" if cell is None else f"{100 * cell.found:.0f}% ({100 * cell.tokens_found:.0f}%)"


def _cache(found: Findings, plan: ReportPlan, model: Model) -> str:
    lengths = plan.lengths[-3:]
    names = dict.fromkeys(["fp16", *(one.name for one in found.formats)])
    memory = [
        (name, *(format_bytes(_cache_bytes(model, length, CacheFormat.parse(name))) for length in lengths))
        for name in names
    ]
    parts = ["### Cache of keys and values\n"]
    if found.formats:
        columns, rows = divergence_rows(found.formats)
        parts += [
            "![Divergence of the cache formats](cache.png)\n",
            markdown_table(("cache", *columns[1:]), rows),
            f"Beside a cache in fp16, in windows of {max(plan.lengths):,} tokens under the recommended scaling; KL in "
            "nats.\n",
        ]
    parts += [
        markdown_table(("memory for", *(f"{length:,} tokens" for length in lengths)), memory),
        f"The weights take {format_bytes(model.weight_bytes)} besides.\n",
    ]
    return "\n".join(parts)


def _cache_bytes(model: Model, length: int, cache_format: CacheFormat) -> int:
    """Of one context, with the recent positions that are kept in float16 besides."""
    instances = len(model.instances)
    codes = planned_bytes(model.config, instances, length, cache_format)
    recent = min(cache_format.recent, length)
    return codes + (planned_bytes(model.config, instances, recent, cache_format.exact) if recent else 0)


def _reproduce(plan: ReportPlan, model: Model, source: Source) -> str:
    return (
        f"### How to measure it again\n\n```sh\n{source.command}\n```\n\n"
        f"{source.versions}; backend {model.backend.name}, compute {model.backend.compute}. The tables are beside "
        "this file as CSV, the plots as PNG and SVG, and what was measured in `measurements/`, from where the command "
        "goes on."
    ) + "\n"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
