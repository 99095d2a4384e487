"""model/options.py: options as one record or as keywords, with the same names, defaults and refusals everywhere."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import ropewalk
from gptq_writer import write_checkpoint
from ropewalk.base.choices import BACKEND, CACHE_TYPE, COMPUTE, Choice
from ropewalk.base.errors import ConfigError
from ropewalk.faces.cli.main import main
from ropewalk.faces.webui.parameters import PARAMETERS
from ropewalk.gradio_demo.model_bar.settings import FIELDS, LoadSettings
from ropewalk.model.info import model_info
from ropewalk.model.options import LoadOptions, options_with


def test_keywords_change_single_fields_of_given_options() -> None:
    options = options_with(LoadOptions(max_seq_len=64, compute="exact"), {"threads": 2, "max_seq_len": 128})
    assert options == LoadOptions(max_seq_len=128, compute="exact", threads=2)


def test_a_model_is_loaded_alike_by_options_and_by_keywords(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    keywords = {"max_seq_len": 48, "backend": "reference", "compute": "exact", "cache_type": "fp32"}
    by_options = ropewalk.load_model(tmp_path, options=ropewalk.LoadOptions(**keywords))
    by_keywords = ropewalk.load_model(tmp_path, **keywords)
    for model in (by_options, by_keywords, ropewalk.load_model(tmp_path, 48, options=LoadOptions(backend="reference"))):
        assert model.max_seq_len == 48 and model.backend.name == "reference"
    assert by_options.cache_type == by_keywords.cache_type == "fp32"


@pytest.mark.parametrize("call", [ropewalk.load_model, model_info])
def test_a_misspelt_option_is_refused_with_the_one_that_may_be_meant(tmp_path: Path, call: Any) -> None:
    with pytest.raises(TypeError, match="'compres_pos_emb' is not a loading option: did you mean compress_pos_emb"):
        call(tmp_path, compres_pos_emb=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("isa", 5), ("isa", []), ("rope_scaling", 5), ("alpha_value", "2"), ("rope_theta", True)),
        *(("compress_pos_emb", "x"), ("recompute_n_layers", 1.5), ("rewind_n_layers", "x"), ("second_folder", 5)),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_by_the_name_of_the_option(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be "):
        LoadOptions(**{name: value})


def test_the_signature_shows_every_option_with_its_default() -> None:
    parameters = inspect.signature(ropewalk.load_model).parameters
    assert {field.name: field.default for field in fields(LoadOptions)}.items() <= {
        name: parameter.default for name, parameter in parameters.items()
    }.items()


@pytest.mark.parametrize("choice", [COMPUTE, BACKEND], ids=lambda choice: choice.name)
def test_a_choice_is_checked_by_its_values(choice: Choice) -> None:
    assert choice.default in choice.values
    for value in choice.values:
        assert getattr(LoadOptions(**{choice.name: value}), choice.name) == value
    with pytest.raises(ConfigError, match=f"{choice.name} must be one of .*{choice.default!r}.*, got 'fp12'"):
        LoadOptions(**{choice.name: "fp12"})


def test_every_offered_cache_type_is_one_and_others_are_accepted_too() -> None:
    for value in (*CACHE_TYPE.values, "q6_q4+512"):
        assert str(LoadOptions(cache_type=value).cache_format) == value
    with pytest.raises(ConfigError, match="cache_type: there is no 'fp12'; accepted are fp32, fp16, q8, q6, q4, two"):
        LoadOptions(cache_type="fp12")


@pytest.mark.parametrize("name", ["max_seq_len", "max_input_len", "threads", "max_attention_size", "cache_memory"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8"])
def test_a_count_must_be_a_positive_integer(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got {value!r}"):
        LoadOptions(**{name: value})


def test_every_front_end_offers_the_same_choices_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    page, shown = {field.name: field for field in FIELDS}, LoadSettings()
    web_ui = {item.option: item for item in PARAMETERS if item.option is not None}
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    for choice in (COMPUTE, CACHE_TYPE, BACKEND):
        assert page[choice.name].choices == web_ui[choice.name].widget.choices == choice.values
        assert getattr(shown, choice.name) == web_ui[choice.name].default == choice.default
        values = "TYPE" if choice.is_open else f"{{{','.join(choice.values)}}}"
        assert f"--{choice.name.replace('_', '-')} {values}" in text
    assert shown.max_input_len == web_ui["max_input_len"].default == LoadOptions().max_input_len
