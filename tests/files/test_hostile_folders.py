"""Damaged folders end in an error that says what and where, or in finite results: the corpus, and single findings."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile_declarations  # noqa: F401  (registers the kinds)
import ropewalk
from fixtures import REPOSITORY
from front_door import Unacceptable, attempt, walk
from gptq_writer import write_checkpoint
from hostile_folders import (
    KINDS,
    TOKENIZER_FILES,
    TOKENIZER_SOURCE,
    edit_json,
    edit_tensors,
    make_case,
    replace_file,
    write_base,
)
from ropewalk.base.errors import CheckpointError, ConfigError, RopewalkError
from ropewalk.config.settings import require_quick_pattern
from ropewalk.generate.evaluate import perplexity
from ropewalk.text.chat import load_chat_template
from ropewalk.text.tokenizer.sentencepiece import SentencePieceTokenizer
from ropewalk.text.tokenizer.settings import TokenizerSettings

sys.path.insert(0, str(REPOSITORY / "scripts" / "press"))
import fuzz_checkpoints  # noqa: E402

SEED = 2024
CASES_PER_KIND = 6  # of 40 kinds; scripts/press/fuzz_checkpoints.py runs more of them
TIME_LIMIT_S = 30

quick = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextmanager
def time_limit() -> Iterator[None]:
    """A hang is a failure here, and not the end of the whole run."""

    def fail(*_: object) -> None:
        raise TimeoutError(f"not finished after {TIME_LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(TIME_LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small undamaged checkpoint with both kinds of tokenizer."""
    write_base(tmp_path / "model", 0)
    return tmp_path / "model"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that hypothesis damages and repairs."""
    path = tmp_path_factory.mktemp("hostile") / "model"
    write_checkpoint(path, {"vocab_size": 512}, config_files=("quantize_config.json",))
    for name in TOKENIZER_FILES:
        (path / name).write_bytes((TOKENIZER_SOURCE / name).read_bytes())
    return path


@contextmanager
def written(path: Path, data: bytes) -> Iterator[None]:
    """The file with other bytes, for a while."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        with time_limit():
            yield
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_ends_in_a_named_error_or_finite_results(kind: str, tmp_path: Path) -> None:
    position = list(KINDS).index(kind)
    for repetition in range(CASES_PER_KIND):
        case = tmp_path / str(repetition)
        assert make_case(position + repetition * len(KINDS), SEED, case) == kind
        with time_limit():
            ends = walk(case)
        assert kind != "nothing" or ends == ["results"]


def test_a_case_of_the_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    for number in range(len(KINDS)):
        first, second = (tmp_path / f"{number}-{copy}" for copy in "ab")
        make_case(number, SEED, first)
        make_case(number, SEED, second)
        names = sorted(os.listdir(first))
        assert names == sorted(os.listdir(second))
        for name in names:
            if (first / name).is_file() and not (first / name).is_symlink():
                assert (first / name).read_bytes() == (second / name).read_bytes()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
CONFIG_KEYS = (
    *("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("rope_scaling", "rope_parameters", "sliding_window", "layer_types", "quantization_config", "eos_token_id"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "auto_map", "partial_rotary_factor"),
)


@quick
@given(changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), VALUES, min_size=1, max_size=3))
def test_any_values_in_config_json_are_read_or_refused(scratch: Path, changes: dict[str, Any]) -> None:
    path = scratch / "config.json"
    with written(path, json.dumps({**json.loads(path.read_text()), **changes}).encode()):
        walk(scratch)


@quick
@given(document=st.dictionaries(st.sampled_from(["bits", "group_size", "format", "dynamic", "meta", "sym"]), VALUES))
def test_any_values_in_quantize_config_json_are_read_or_refused(scratch: Path, document: dict[str, Any]) -> None:
    with written(scratch / "quantize_config.json", json.dumps({"bits": 4, "group_size": 32, **document}).encode()):
        walk(scratch)


@quick
@given(header=st.dictionaries(st.text(max_size=10), VALUES, max_size=3) | VALUES, data=st.binary(max_size=64))
def test_any_header_of_a_weight_file_is_refused(scratch: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    with written(scratch / "model.safetensors", len(text).to_bytes(8, "little") + text + data):
        assert walk(scratch) == ["CheckpointError"]


@quick
@given(data=st.binary(max_size=200))
def test_any_bytes_for_weights_are_refused(scratch: Path, data: bytes) -> None:
    with written(scratch / "model.safetensors", data):
        assert walk(scratch) == ["CheckpointError"]


@quick
@given(cut=st.integers(0, 7000), noise=st.binary(min_size=1, max_size=30))
def test_any_bytes_in_tokenizer_model_are_read_or_refused(scratch: Path, cut: int, noise: bytes) -> None:
    path = scratch / "tokenizer.model"
    data = path.read_bytes()
    settings_of_no_file = TokenizerSettings({}, False, None, {}, True)
    with written(path, data[:cut] + noise + data[cut + len(noise) :]):
        attempt([], scratch, lambda: SentencePieceTokenizer(path, settings_of_no_file).encode("The answer"))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
)
def test_a_pipe_or_device_among_the_files_is_refused_unread(folder: Path, name: str, make: Callable) -> None:
    (folder / name).touch()
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    replace_file(folder / name, make)
    with time_limit(), pytest.raises(RopewalkError, match=f"{name} .*(pipe|device)"):
        ropewalk.load_tokenizer(folder)
        load_chat_template(folder, {})
        ropewalk.load_model(folder, threads=1)


@pytest.mark.parametrize("load", [ropewalk.load_model, ropewalk.load_tokenizer])
def test_a_path_that_no_system_has_is_refused(load: Callable) -> None:
    with pytest.raises(ConfigError, match="model folder 'xxx.*cannot be read"):
        load("x" * 5000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("load", [ropewalk.load_model, ropewalk.load_tokenizer])
def test_a_folder_without_permission_is_refused(folder: Path, load: Callable) -> None:
    folder.chmod(0)
    try:
        with pytest.raises(ConfigError, match="no permission"):
            load(folder)
    finally:
        folder.chmod(0o700)


def test_an_added_token_with_thousands_of_digits_is_refused(folder: Path) -> None:
    table = {"9" * 5000: {"content": "a"}}
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(added_tokens_decoder=table))
    with pytest.raises(ConfigError, match="added_tokens_decoder must map token ids"):
        ropewalk.load_tokenizer(folder)


@pytest.mark.parametrize(
    "pattern, message",
    [
        (r"(.+)+!", "a repeated group"),
        (r"(?:a|ab)*!", "a repeated group"),
        (r"((\w{1,9})x){1,9999}", "a repeated group"),
        (r"(?P<name>.?)*", "a repeated group"),
        (".*" * 6 + "!", "more than 5 repetitions"),
        (".?" * 40 + "!", "more than 5 repetitions"),
        ("(.|.)" * 40 + "!", "more than 5 repetitions"),
        ("a" * 5000, "5000 characters"),
    ],
)
def test_a_dynamic_rule_that_could_take_hours_is_refused(folder: Path, pattern: str, message: str) -> None:
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(dynamic={f"-:{pattern}": {}}))
    with time_limit(), pytest.raises(ConfigError, match="quantization_config.dynamic") as caught:
        ropewalk.load_model(folder, threads=1)
    assert message in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.18\..*gate.*",
        r"model\.layers\.(?:1[0-9]|2\d|30)\..*(?:q|k|v)_proj",
        r"^lm_head$",
        r".*?\.(?:[0-3])\.mlp\.(?:up|gate)_proj",
        r"[*+(|]+\(\*\+\|",
        r"(?:ab)+",
        "(",  # not valid, but that is for `re` to say
    ],
)
def test_ordinary_dynamic_rules_are_not_called_slow(pattern: str) -> None:
    require_quick_pattern(pattern)


def test_the_slowest_accepted_dynamic_rule_is_quick() -> None:
    pattern = ".*" * 5 + "!"
    require_quick_pattern(pattern)
    started = time.perf_counter()
    assert re.match(pattern, "model.layers.10.self_attn.q_proj.and.twenty.more") is None
    assert time.perf_counter() - started < 1


def test_perplexity_of_a_model_that_computes_nan_is_refused(folder: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][:] = float("nan")

    edit_tensors(folder / "model.safetensors", spoil)
    model = ropewalk.load_model(folder, threads=1)
    with pytest.raises(CheckpointError, match="config.json: the logits of this model are not finite"):
        perplexity(model, [1, 2, 3, 4], [4])


def run_fake(source: str, number: int = 3) -> list[fuzz_checkpoints.Result]:
    return list(fuzz_checkpoints.run_cases(0, number, lambda first: [sys.executable, "-c", source, str(first)]))


WORKER = """
import json, os, sys, time
for n in range(int(sys.argv[1]), 3):
    print(json.dumps({"started": "kind"}), flush=True)
    if n == 1: END
    end = {"number": n, "kind": "kind", "ends": [], "seconds": 0, "grown_bytes": 0, "failure": None}
    print(json.dumps(end), flush=True)
"""


def test_the_fuzzer_reports_a_crash_and_goes_on() -> None:
    results = run_fake(WORKER.replace("END", "os.abort()"))
    assert [result.number for result in results] == [0, 1, 2]
    assert [result.failure is None for result in results] == [True, False, True]
    assert "status -6" in results[1].failure


@pytest.mark.parametrize(
    "walk_of_case, options, failure",
    [
        (lambda folder: ["results"], {}, None),
        (lambda folder: 1 / 0, {}, "ZeroDivisionError"),
        (lambda folder: np.ones(2**24).sum(), {"memory_limit_mib": 64}, "memory grew by"),
    ],
    ids=["accepted", "exception", "memory"],
)
def test_the_fuzzer_tells_failures_from_accepted_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk_of_case: Callable, options: dict, failure: str | None
) -> None:
    monkeypatch.setattr("front_door.walk", walk_of_case)
    watched = SimpleNamespace(**{"time_limit_s": 60, "memory_limit_mib": 0, **options})
    found = fuzz_checkpoints.run_case(tmp_path, watched)["failure"]
    assert found is None if failure is None else failure in found


def test_the_fuzzer_ends_a_case_that_hangs() -> None:
    hang = f"sys.path.insert(0, {str(REPOSITORY / 'scripts' / 'press')!r}); import argparse, fuzz_checkpoints, types; "
    hang += "sys.modules['front_door'] = types.SimpleNamespace(walk=lambda folder: time.sleep(60)); "
    hang += "fuzz_checkpoints.run_case(None, argparse.Namespace(time_limit_s=0.2, memory_limit_mib=0))"
    results = run_fake(WORKER.replace("END", hang))
    assert [result.failure is None for result in results] == [True, False, True]
    assert "Timeout" in results[1].failure


def test_the_fuzzer_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_checkpoints.main(["--count=3", "--seed=5"]) == 0
    printed = capsys.readouterr().out
    assert "weights: cut off anywhere" in printed and "3 cases, 0 failures" in printed


def test_a_message_must_name_something_of_the_folder(folder: Path) -> None:
    def fail() -> None:
        raise ConfigError("something went wrong")

    with pytest.raises(Unacceptable, match="names nothing"):
        attempt([], folder, fail)
