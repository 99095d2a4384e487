"""The long-context section of a model card: everything that this room measures, on one model and one text.

    recommend -> perplexity by length and by position -> retrieval -> cache formats        measurements/*.json
              -> report.md with tables, *.csv, and every plot as PNG and SVG

The scalings are those of measure/recommend.py for the longest length. Retrieval and the cache formats are measured
under the scaling that was recommended. Everything goes on from what measurements/ holds, so a run that was interrupted,
or one with more lengths, measures only what is missing. measure/report_text.py puts the findings into words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from ropewalk.base.errors import RequestError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.generate.generate import Progress
from ropewalk.measure.compare import (
    Curve,
    PositionCurve,
    compare_perplexity,
    compare_positions,
    curves_csv,
    positions_csv,
)
from ropewalk.measure.divergence import Divergence, divergence, divergences_csv
from ropewalk.measure.plots import (
    plot_curves,
    plot_divergence,
    plot_positions,
    plot_recommendation,
    plot_retrieval,
    save_plot,
)
from ropewalk.measure.positions import default_bin
from ropewalk.measure.recommend import Recommendation, candidates, recommend, recommendation_csv
from ropewalk.measure.record import Record, text_facts
from ropewalk.measure.retrieval import RetrievalCell, cells_csv, retrieval_map
from ropewalk.measure.settings import OpenSetting, Setting, facts_of, open_base, open_beside
from ropewalk.measure.tasks import TASKS, make_task
from ropewalk.model.model import Model
from ropewalk.model.variants import Variant, variant_model
from ropewalk.text.tokenizer.load import Tokenizer

FORMATS = ("q8", "q6", "q4", "q8_q4", "q4+256")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_LENGTHS = 5  # by default
EXTENDED = 4  # times the original length, by default

Bar = Callable[[str, str], AbstractContextManager[Progress | None]]  # (what, unit) -> a progress to report to


@dataclass(frozen=True, slots=True)
class ReportPlan:
    """What is measured. trials: of every cell of a retrieval map; formats: of the cache, besides fp16."""

    lengths: tuple[int, ...]
    max_tokens: int
    trials: int = 2
    tasks: tuple[str, ...] = ("keys", "pairs")
    formats: tuple[str, ...] = FORMATS


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured."""

    curves: tuple[Curve, ...]
    positions: tuple[PositionCurve, ...]
    recommendation: Recommendation
    maps: dict[str, tuple[RetrievalCell, ...]]
    formats: tuple[Divergence, ...]


def default_lengths(model: Model, num_tokens: int) -> tuple[int, ...]:
    """Up to what the checkpoint's RoPE covers, or four times its original length, as far as the text reaches: five
    lengths, each half of the next.

    Raises:
        RequestError: the text is too short for any.
    """
    rope = candidates(model, 1)[0].rope
    covered = max(rope.covers or 0, rope.original_length)
    longest = covered if covered > rope.original_length else EXTENDED * rope.original_length
    while longest > num_tokens:
        longest //= 2
    found = [longest >> halvings for halvings in reversed(range(MOST_LENGTHS))]
    lengths = tuple(length for length in found if length >= min(128, longest))
    if longest < 2:
        raise RequestError(f"a text of {num_tokens} tokens is too short for a report")
    return lengths


def measure_report(
    base: OpenSetting, tokenizer: Tokenizer, token_ids: Sequence[int], plan: ReportPlan, out: Path, bar: Bar
) -> Findings:
    """Measure what `out`/measurements lacks, and write tables and plots to `out`, which must exist.

    base: the model as it was loaded. Errors are those of the measurements.
    """
    kept = out / "measurements"
    kept.mkdir(exist_ok=True)
    text, model, longest = text_facts(token_ids), base.model, max(plan.lengths)
    record = Record(kept / "perplexity.json", "perplexity", text)
    with bar("finding a scaling", "token") as progress:
        recommendation = recommend(model, token_ids, longest, plan.max_tokens, progress, record=record)
    assert recommendation.chosen is not None  # nothing cancels it
    variants = [Variant(one.name, one.rope) for one in candidates(model, longest)]
    chosen = recommendation.chosen.candidate
    if all(variant.name != chosen.name for variant in variants):
        variants.append(Variant(chosen.name, chosen.rope))
    with bar("perplexity", "token") as progress:
        curves = compare_perplexity(model, token_ids, plan.lengths, variants, plan.max_tokens, progress, record=record)
    with bar("by position", "token") as progress:
        positions = compare_positions(
            model, token_ids, longest, default_bin(longest), variants, plan.max_tokens, progress, record=record
        )
    scaled = _under(base, recommendation, longest)
    maps = _maps(scaled.model, tokenizer, token_ids, plan, Record(kept / "retrieval.json", "retrieval", text), bar)
    formats = _formats(scaled, token_ids, plan, Record(kept / "formats.json", "divergence", text), bar)
    found = Findings(tuple(curves), tuple(positions), recommendation, maps, formats)
    _write_all(found, out, model.rope.original_length)
    return found


def _under(base: OpenSetting, recommendation: Recommendation, length: int) -> OpenSetting:
    """The weights under the scaling that was recommended, with a cache in float16."""
    assert recommendation.chosen is not None
    chosen = recommendation.chosen.candidate
    options = replace(
        base.setting.options,
        rope_scaling=chosen.rope_scaling,
        compress_pos_emb=None,
        alpha_value=None,
        max_seq_len=length,
        cache_type="fp16",
    )
    model = variant_model(base.model, chosen.rope, length, cache_format=CacheFormat.parse("fp16"))
    return open_base(Setting("fp16", base.setting.folder, options), model)


def _maps(
    model: Model, tokenizer: Tokenizer, token_ids: Sequence[int], plan: ReportPlan, record: Record, bar: Bar
) -> dict[str, tuple[RetrievalCell, ...]]:
    maps = {}
    for name in plan.tasks:
        task = make_task(name, tokenizer, token_ids, plan.trials)
        lengths = [length for length in plan.lengths if length >= task.least(DEPTHS)]
        kept = record.part(name, {**facts_of(model), **task.facts, "depths": list(DEPTHS)})
        with bar(f"retrieval: {TASKS.meanings[name]}", "question") as progress:
            cells = retrieval_map(model, task, lengths, DEPTHS, progress, kept=kept) if lengths else []
        maps[name] = tuple(cells)
    return maps


def _formats(
    base: OpenSetting, token_ids: Sequence[int], plan: ReportPlan, record: Record, bar: Bar
) -> tuple[Divergence, ...]:
    found = []
    for name in plan.formats:
        setting = replace(base.setting, name=name, options=replace(base.setting.options, cache_type=name))
        other = open_beside(base, setting)
        kept = record.part(name, {"base": base.facts, "other": other.facts})
        with bar(f"cache {name}", "token") as progress:
            one = divergence(base, other, token_ids, max(plan.lengths), plan.max_tokens, progress, kept=kept)
        found += [] if one is None else [one]
    return tuple(found)


def _write_all(found: Findings, out: Path, trained: int) -> None:
    """Tables as CSV, plots as PNG and SVG."""
    tables = {
        "perplexity": curves_csv(found.curves),
        "positions": positions_csv(found.positions),
        "scalings": recommendation_csv(found.recommendation),
        "cache": divergences_csv(found.formats),
        **{f"retrieval-{name}": cells_csv(cells) for name, cells in found.maps.items()},
    }
    plots = {
        "perplexity": plot_curves(found.curves, trained),
        "positions": plot_positions(found.positions, trained),
        "scalings": plot_recommendation(found.recommendation),
        **{
            f"retrieval-{name}": plot_retrieval(cells, TASKS.meanings[name])
            for name, cells in found.maps.items()
            if cells
        },
    }
    if found.formats:
        plots["cache"] = plot_divergence(found.formats, "a cache in fp16")
    for name, table in tables.items():
        write_file(out / f"{name}.csv", table)
    for name, figure in plots.items():
        save_plot(figure, out / f"{name}.png")
        save_plot(figure, out / f"{name}.svg")


def write_file(path: Path, text: str) -> None:
    """Raises:
    RequestError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error
