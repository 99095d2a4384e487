"""The commands that measure: by position, divergence, recommendations and reports, and going on from files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from ropewalk.faces.cli.main import main

SMALL = ["--max-tokens", "512"]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_perplexity_by_position_has_a_line_per_bin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "positions.svg"
    options = ["--by-position", "--lengths", "256", "--bin", "128", *SMALL, "--csv", "-", "--plot", str(plot)]
    assert main(["perplexity", *options]) == 0
    found = rows(capsys.readouterr().out)
    assert [(row["start"], row["end"], row["scored_tokens"]) for row in found] == [
        ("0", "128", "254"),
        ("128", "256", "256"),
    ]
    assert ">position in the context<" in plot.read_text()
    assert main(["perplexity", "--by-position", "--lengths", "256", "--json", *SMALL]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4  # bins of 64


def test_a_record_is_gone_on_from_and_the_results_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = ["--record", str(tmp_path / "record.json")]
    options = ["perplexity", "--lengths", "128,256", "--json", *SMALL]
    assert main([*options, *record]) == 0
    first = json.loads(capsys.readouterr().out)
    whole = json.loads((tmp_path / "record.json").read_text())
    kept = whole["parts"]["perplexity"]["kept"]
    assert list(kept) == ["128 0", "128 1", "128 2", "128 3", "256 0", "256 1"]
    for key in ("128 3", "256 1"):
        del kept[key]
    (tmp_path / "record.json").write_text(json.dumps(whole))
    assert main([*options, *record]) == 0
    again = json.loads(capsys.readouterr().out)
    for ours, theirs in zip(first, again, strict=True):
        assert (ours["mean_nll"], ours["error"]) == (theirs["mean_nll"], theirs["error"])
    assert main([*options, *record, "--compute", "exact"]) == 2
    assert "compute was cpu int8 when it was begun, and is cpu exact now" in capsys.readouterr().err
    assert main(["retrieval", "--lengths", "128", *record]) == 2
    assert "is a record of 'perplexity', not of 'retrieval'" in capsys.readouterr().err
    (tmp_path / "other.txt").write_text("def rope():\n    pass\n" * 200)
    assert main([*options, str(tmp_path / "other.txt"), *record]) == 2
    assert "text was" in capsys.readouterr().err


def test_divergence_compares_settings_with_the_one_that_the_options_describe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "divergence.svg"
    settings = [
        "compute=exact",
        "cache-type=fp32 compute=exact",
        'rope-scaling={"rope_type": "linear", "factor": 4} cache-type=fp32',
        "adapter=linear-4",
        "layer-order=0-3",
    ]
    words = [word for setting in settings for word in ("--versus", setting)]
    assert main(["divergence", *words, "--length", "128", "--csv", "-", "--plot", str(plot), *SMALL]) == 0
    found = {row["setting"]: row for row in rows(capsys.readouterr().out)}
    assert list(found) == settings
    near, far = found["compute=exact"], found[settings[2]]
    assert 0 < float(near["kl_mean"]) < 0.01 < 0.1 < float(far["kl_mean"])
    assert float(near["agreement"]) > 0.95 and float(near["base_perplexity"]) == float(far["base_perplexity"])
    assert ">layer-order=0-3<" in plot.read_text()


def test_retrieval_has_three_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lengths", "512", "--depths", "0,1", "--trials", "1", "--csv", "-"]
    for task in ("several", "pairs"):
        assert main(["retrieval", "--task", task, *options]) == 0
        found = rows(capsys.readouterr().out)
        assert [row["depth"] for row in found] == ["0", "1"] and all(row["all_found"] != "" for row in found)


def test_compare_recommends_a_scaling_and_says_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.csv"
    assert main(["compare", "--recommend", "--lengths", "1024", "--max-tokens", "1024", "--csv", str(table)]) == 0
    shown = capsys.readouterr()
    chosen = next(row for row in rows(table.read_text()) if row["chosen"])
    assert f"{chosen['scaling']} *" in shown.out and "The options: --max-seq-len 1024" in shown.out
    assert "The rule: the lowest perplexity" in shown.err


def test_scalings_may_have_factors_of_their_own_by_position(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--scalings", "yarn:2,yarn:4", "--lengths", "256", "--by-position", "--bin", "128", "--csv", "-"]
    assert main(["compare", *options, "--max-tokens", "256"]) == 0
    found = rows(capsys.readouterr().out)
    assert [row["variant"] for row in found] == ["yarn 2", "yarn 2", "yarn 4", "yarn 4"]
    assert found[0]["perplexity"] != found[2]["perplexity"]


def test_a_report_is_written_and_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "report"
    options = ["--lengths", "256,1024", "--max-tokens", "1024", "--trials", "1", "--tasks", "keys", "--formats", "fp32"]
    assert main(["report", "--out", str(out), *options]) == 0
    text = (out / "report.md").read_text()
    for said in (
        "## Long context",
        "### Recommended settings for 1,024 tokens",
        "ropewalk chat MODEL --max-seq-len 1024",
        "| RoPE scaling | 256 | 1,024 |",
        "### Perplexity by position in 1,024 tokens",
        "### Retrieval: one pass key",
        "### Cache of keys and values",
        "ropewalk report --lengths 256,1024 --max-tokens 1024",
        "The rule: the lowest perplexity",
    ):
        assert said in text
    assert str(tmp_path) not in text
    for name in ("perplexity", "positions", "scalings", "retrieval-keys", "cache"):
        assert (out / f"{name}.csv").stat().st_size > 20
        assert f"({name}.png)" in text and (out / f"{name}.png").stat().st_size > 1000
        assert "<svg" in (out / f"{name}.svg").read_text()
    (row,) = rows((out / "cache.csv").read_text())
    assert f"| fp32 | {float(row['kl_mean']):.2e} |" in text
    stamps = {path: path.stat().st_mtime_ns for path in (out / "measurements").iterdir()}
    assert len(stamps) == 3
    assert main(["report", "--out", str(out), *options]) == 0
    assert (out / "report.md").read_text() == text
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "measurements").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["divergence", "--versus", "q8"], "--versus 'q8': OPTION=VALUE is needed, such as cache-type=q8"),
        (["divergence", "--versus", "cache=q8"], "--versus 'cache=q8': unrecognized arguments: --cache q8"),
        (["divergence", "--versus", "cache-type=q5"], "there is no 'q5'"),
        (["divergence", "--versus", "model=/nowhere"], "/nowhere"),
        (["divergence", "--versus", "threads=many"], "--versus 'threads=many': argument --threads: invalid int"),
        (["perplexity", "--by-position", "--lengths", "256", "--bin", "100"], "a multiple of 64"),
        (["compare", "--scalings", "yarn:many"], "--scalings yarn:many: what follows the colon must be a factor"),
        (["compare", "--plot", "a.gif"], "must end in .svg, .png, .pdf"),
        (["retrieval", "--task", "needle", "--lengths", "256"], "task must be one of keys, several, pairs"),
        (["report", "--out", "x", "--formats", "q5"], "there is no 'q5'"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
