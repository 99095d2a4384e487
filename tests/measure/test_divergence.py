"""measure/divergence.py: against the definition on whole logits, of our models and of transformers'."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gptq_writer import write_checkpoint
from ropewalk.base.errors import CheckpointError, RequestError
from ropewalk.generate import evaluate
from ropewalk.measure.divergence import divergence, divergences_csv
from ropewalk.measure.settings import OpenSetting, Setting, open_base, open_beside
from ropewalk.model.loader import load_model
from ropewalk.model.options import LoadOptions

IDS = np.random.default_rng(5).integers(0, 64, 200).tolist()
OPTIONS = LoadOptions(backend="reference", compute="exact", cache_type="fp32", max_seq_len=64, head_bits="16")
LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.save(write_checkpoint(folder, {"vocab_size": 64, "max_position_embeddings": 64}), folder / "exact.pt")
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> OpenSetting:
    return open_base(Setting("base", folder, OPTIONS), load_model(folder, options=OPTIONS))


def beside(base: OpenSetting, **options) -> OpenSetting:
    return open_beside(base, Setting("other", base.setting.folder, replace(OPTIONS, **options)))


def logits_of(setting: OpenSetting) -> list[torch.Tensor]:
    """[LENGTH, V] of every whole window."""
    windows = [IDS[start : start + LENGTH] for start in range(0, 192, LENGTH)]
    return [setting.model.forward(ids, setting.model.new_cache(), logits="all").double() for ids in windows]


def defined(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> dict[str, float]:
    """The definition with numpy, in float64."""
    kl, same, change = [], [], []
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        window = IDS[number * LENGTH : (number + 1) * LENGTH]
        for i in range(LENGTH - 1):
            p, q = (np.exp(x[i].numpy()) / np.exp(x[i].numpy()).sum() for x in (a, b))
            kl.append(float((p * np.log(p / q)).sum()))
            same.append(p.argmax() == q.argmax())
            change.append(math.log(p[window[i + 1]] / q[window[i + 1]]))
    return {
        "kl_mean": float(np.mean(kl)),
        "kl_median": float(np.quantile(kl, 0.5)),
        "kl_99": float(np.quantile(kl, 0.99)),
        "agreement": float(np.mean(same)),
        "ratio": math.exp(np.mean(change)),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"cache_type": "q4"},
        {"compute": "int8"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"layer_order": "0-1,1"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_it_is_that_of_the_definition(base: OpenSetting, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 4 * 64 * 23)  # blocks of rows that windows do not consist of
    other = beside(base, **options)
    assert other.model.weights.embeddings is base.model.weights.embeddings  # one model in memory
    found = divergence(base, other, IDS, LENGTH)
    for name, value in defined(logits_of(base), logits_of(other)).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4, abs=1e-9), name
    assert found.num_tokens == 3 * 63 and found.kl_mean > 0


def test_it_is_that_from_the_logits_of_transformers(folder: Path, base: OpenSetting) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    theirs.load_state_dict(torch.load(folder / "exact.pt"))
    with torch.no_grad():
        exact = [theirs(torch.tensor([IDS[s : s + LENGTH]])).logits[0].double() for s in range(0, 192, LENGTH)]
    other = beside(base, cache_type="q4")
    found = divergence(base, other, IDS, LENGTH)
    expected = defined(exact, logits_of(other))
    assert found.kl_mean == pytest.approx(expected["kl_mean"], rel=0.02)
    assert found.ratio == pytest.approx(expected["ratio"], rel=1e-4)


def test_a_setting_is_not_far_from_itself(base: OpenSetting) -> None:
    found = divergence(base, beside(base), IDS, LENGTH)
    assert (found.kl_mean, found.kl_99, found.agreement, found.ratio, found.ratio_error) == (0, 0, 1, 1, None)


def test_other_arithmetic_of_another_backend_is_loaded_beside(base: OpenSetting) -> None:
    other = beside(base, backend="cpu")
    assert other.model.weights.embeddings is not base.model.weights.embeddings
    assert divergence(base, other, IDS, LENGTH).kl_mean < 1e-8


def test_what_was_kept_gives_the_same_result_as_running_through(base: OpenSetting) -> None:
    other, kept = beside(base, cache_type="q4"), {}
    whole = divergence(base, other, IDS, 32, kept=kept)
    seen: list[tuple[int, int]] = []
    half = dict(list(kept.items())[:3])
    again = divergence(base, other, IDS, 32, progress=lambda *step: seen.append(step), kept=half)
    assert again == whole and half == kept
    assert seen[-1] == (192, 192)


def test_cancelled_it_is_that_of_the_windows_so_far(base: OpenSetting) -> None:
    other, done = beside(base, cache_type="q4"), []
    found = divergence(base, other, IDS, 32, progress=lambda *step: done.append(step), cancelled=lambda: len(done) >= 2)
    assert found == divergence(base, other, IDS, 32, max_tokens=64)
    assert divergence(base, other, IDS, 32, cancelled=lambda: True) is None


def test_models_of_other_vocabularies_are_refused(base: OpenSetting, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"vocab_size": 96, "max_position_embeddings": 64})
    with pytest.raises(RequestError, match="a vocabulary of 96 tokens cannot be compared with one of 64"):
        open_beside(base, Setting("other", tmp_path, OPTIONS))


def test_lengths_that_do_not_fit_are_refused(base: OpenSetting) -> None:
    for length, said in ((65, "more than the 64 positions"), (1, "at least 2")):
        with pytest.raises(RequestError, match=said):
            divergence(base, beside(base), IDS, length)
    with pytest.raises(RequestError, match="the text has 20 tokens"):
        divergence(base, beside(base), IDS[:20], LENGTH)


def test_damaged_weights_are_named(base: OpenSetting, folder: Path) -> None:
    other = load_model(folder, options=OPTIONS)
    other.weights.final_norm["norm"].fill_(math.nan)
    with pytest.raises(CheckpointError, match="the logits under 'damaged' are not finite"):
        divergence(base, open_base(Setting("damaged", folder, OPTIONS), other), IDS, LENGTH)


def test_the_table_has_a_line_per_setting(base: OpenSetting) -> None:
    found = divergence(base, beside(base, cache_type="q4"), IDS, LENGTH)
    (row,) = csv.DictReader(io.StringIO(divergences_csv([found])))
    assert row["setting"] == "other" and row["ratio_standard_error"] == ""
    assert float(row["kl_mean"]) == pytest.approx(found.kl_mean, rel=1e-5)
    assert float(row["perplexity_ratio"]) == pytest.approx(found.ratio, rel=1e-5)
