"""The commands that measure: by position, divergence, recommendations and reports, and going on from files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from ropewalk.base.errors import RequestError
from ropewalk.faces.cli.main import main
from ropewalk.files.embedded import demo_model_path

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
    assert "tokens of `held_out.txt`" in text
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
        (["report", "--out", "x", "--tasks", "keys,foo"], "task must be one of keys, several, pairs, got 'foo'"),
        (["report", "--out", "x", "--rope-theta", "500"], "chooses the scalings that it measures by itself: leave out"),
        (["compare", "--scalings", "none", "--alpha-value", "2"], "--alpha-value change the model as it is loaded"),
        (
            ["report", "--out", "OUT", "--lengths", "256", "--max-tokens", "100"],
            "at least the longest length, 256",
        ),
        (["compare", "--recommend", "--scalings", "foo"], "chooses what it measures by itself: leave out --scalings"),
        (["compare", "--recommend", "--lora", "x", "--factor", "3"], "leave out --lora and --factor"),
        (["compare", "--recommend", "--alpha-value", "2"], "leave out --alpha-value"),
        (["compare", "--factor", "0"], "--factor must be at least 1, got 0"),
        (["compare", "--scalings", "none:4"], "--scalings none:4: none takes no factor"),
        (["compare", "--bin", "64"], "--bin 64 has no effect without --by-position"),
        (["perplexity", "--bin", "64"], "--bin 64 has no effect without --by-position"),
        (["perplexity", "--max-tokens", "100"], "max_tokens is 100, but one window of the longest length needs 2048"),
        (["perplexity", "--csv", "nodir/a.csv"], "--csv nodir/a.csv cannot be written: its folder does not"),
        (["retrieval", "--plot", "nodir/a.png"], "--plot nodir/a.png cannot be written: its folder does not"),
        (["bench", "--csv", "."], "--csv . cannot be written: it is a folder"),
        (["divergence", "--record", "."], "--record . cannot be written: it is a folder"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path) if argument == "OUT" else argument for argument in arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["perplexity", "--lengths", "0"], "argument --lengths: lengths of at least 2 tokens are needed, got 0"),
        (["bench", "--lengths", "128,-3"], "argument --lengths: lengths of at least 2 tokens are needed, got -3"),
        (["divergence", "--length", "0"], "argument --length: a number of at least 1 is needed, got '0'"),
        (["compare", "--max-tokens", "-5"], "argument --max-tokens: a number of at least 1 is needed, got '-5'"),
        (["retrieval", "--trials", "0"], "argument --trials: a number of at least 1 is needed, got '0'"),
        (["perplexity", "MODEL", "TEXT", "--lengths", "64", "MORE"], "unrecognized arguments: MORE"),
    ],
)
def test_numbers_and_words_without_a_meaning_are_wrong_usage(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_text_may_stand_after_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("The rope is long. " * 60)
    model, text = str(demo_model_path()), str(tmp_path / "text.txt")
    tables = []
    for arguments in ([model, text], [text, model], [model, "--text", text], [text]):
        assert main(["perplexity", *arguments, "--lengths", "64", "--csv", "-"]) == 0
        tables.append(rows(capsys.readouterr().out)[0]["perplexity"])
    assert main(["perplexity", model, "--lengths", "64", "--csv", "-", text]) == 0
    tables.append(rows(capsys.readouterr().out)[0]["perplexity"])
    assert len(set(tables)) == 1


def test_the_text_is_never_overwritten_by_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, link = tmp_path / "text.txt", tmp_path / "link.csv"
    text.write_text("The rope is long. " * 60)
    link.symlink_to(text)
    for arguments in ([str(text), "--csv", str(text)], ["--text", str(text), "--csv", str(link)]):
        assert main(["perplexity", *arguments, "--lengths", "64"]) == 2
        assert "is the text itself, which would be overwritten" in capsys.readouterr().err
    assert main(["perplexity", "--lengths", "64", "--record", str(text)]) == 2
    assert "name another file" in capsys.readouterr().err
    assert text.read_text() == "The rope is long. " * 60


def test_json_changes_standard_output_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for place in ([], ["--by-position"]):
        table, plot = tmp_path / "a.csv", tmp_path / "a.svg"
        files = ["--csv", str(table), "--plot", str(plot)]
        assert main(["perplexity", "--lengths", "256", "--max-tokens", "256", "--json", *place, *files]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert len(rows(table.read_text())) == len(shown) and plot.stat().st_size > 1000
        table.unlink()
        plot.unlink()


def test_a_file_that_cannot_be_written_spares_the_other_and_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from ropewalk.faces.cli import measuring

    def full(path: Path, text: str) -> None:
        raise RequestError(f"{path} cannot be written: No space left on device")

    monkeypatch.setattr(measuring, "write_text", full)
    files = ["--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.svg")]
    assert main(["perplexity", "--lengths", "256", "--max-tokens", "256", *files]) == 2
    shown = capsys.readouterr()
    assert "tokens/s" in shown.out and "No space left" in shown.err
    assert (tmp_path / "a.svg").stat().st_size > 1000


def test_a_csv_on_standard_output_is_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--recommend", "--lengths", "512", "--max-tokens", "512", "--csv", "-"]) == 0
    shown = capsys.readouterr()
    assert [row["chosen"] for row in rows(shown.out)].count("yes") == 1 and None not in rows(shown.out)[-1].values()
    assert "The options:" in shown.err and "The options:" not in shown.out


def test_options_of_rope_add_a_curve_of_the_model_as_it_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["compare", "--lengths", "64", "--max-tokens", "64", "--csv", "-"]
    assert main([*options, "--alpha-value", "4", "--scalings", "as loaded,none"]) == 0
    loaded, plain = rows(capsys.readouterr().out)
    assert loaded["variant"] == "as loaded" and loaded["perplexity"] != plain["perplexity"]
    assert main([*options, "--alpha-value", "4"]) == 0
    assert rows(capsys.readouterr().out)[0]["perplexity"] == loaded["perplexity"]


def test_a_base_goes_with_every_scaling_that_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["compare", "--lengths", "64", "--max-tokens", "64", "--csv", "-", "--scalings", "none,yarn:4"]
    assert main(options) == 0
    own = rows(capsys.readouterr().out)
    assert main([*options, "--rope-theta", "500"]) == 0
    given = rows(capsys.readouterr().out)
    assert all(one["perplexity"] != other["perplexity"] for one, other in zip(own, given, strict=True))


def test_a_report_names_its_text_and_says_how_it_was_run(tmp_path: Path) -> None:
    from ropewalk.faces.cli import report
    from ropewalk.faces.cli.main import _parse
    from ropewalk.measure.report import ReportPlan

    text = tmp_path / "walk.txt"
    text.write_text("The rope is long.")
    model = str(demo_model_path())
    running = ["--cache-type", "q8", "--layer-order", "0-4", "--compute", "exact", "--second-model", model]
    for places in ([model, str(text)], [str(text), model], [model, "--text", str(text)]):
        args = _parse(["report", *places, "--out", "report", *running])
        report.measured_text(args)
        command = report._command(args, ReportPlan((256,), 512), report._running(args))
        assert command.startswith("ropewalk report MODEL --text walk.txt --lengths 256 --max-tokens 512")
        assert command.endswith(
            "--cache-type q8 --layer-order 0-4 --second-model demo_model --compute exact --out report"
        )
        assert report._name(args.text) == "walk.txt"
    assert (report._name(None), report._name("-")) == ("held_out.txt", "standard input")
