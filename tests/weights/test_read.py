"""The weights of every kind of checkpoint, exactly as their writer meant them."""

from __future__ import annotations

import itertools
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_weights import (
    Q0,
    assert_reads_exactly,
    edit,
    first_layer,
    opened,
    read_state_dict,
    refusal,
)
from gptq_writer import write_checkpoint
from ropewalk.base.errors import CheckpointError
from ropewalk.gptq.linear import DenseLinear
from ropewalk.weights.read import check_tensors, read_embeddings, read_head, read_layer


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["gptq", "act-order", "dense", "sharded", "zero biases", "tied"])
def test_every_family_is_read_exactly(tmp_path, family, kind):
    arguments = {
        "gptq": {},
        "act-order": {"desc_act": True, "sym": False, "word_borrow": True, "zero_point_zero": True},
        "dense": {"dense": True, "dtype": torch.bfloat16},
        "sharded": {"shards": 3},
        "zero biases": {"bias": "zero"},
        "tied": {"config_overrides": {"tie_word_embeddings": True}},
    }[kind]
    assert_reads_exactly(tmp_path, write_checkpoint(tmp_path, family=family, **arguments))


@pytest.mark.parametrize(
    ("bits", "config_files", "era"),
    [
        (bits, files, era)
        for bits, files, era in itertools.product(
            (2, 3, 4, 8),
            ((), ("config.json",), ("quantize_config.json",), ("config.json", "quantize_config.json")),
            (1, 4),
        )
    ],
)
def test_settings_come_from_any_file_or_from_the_shapes(tmp_path, bits, config_files, era):
    expected = write_checkpoint(tmp_path, bits=bits, config_files=config_files, era=era, sym=False)
    assert_reads_exactly(tmp_path, expected)


def test_the_oldest_era_is_read_without_any_declaration(tmp_path):
    overrides = {"hidden_size": 256, "intermediate_size": 512}
    expected = write_checkpoint(tmp_path, overrides, era=0, group_size=-1, config_files=(), bias="zero")
    assert_reads_exactly(tmp_path, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_weights_are_read_as_they_are_stored(tmp_path, dtype):
    write_checkpoint(tmp_path, dense=True, dtype=dtype)
    config, quant, checkpoint = opened(tmp_path)
    layer = read_layer(config, quant, checkpoint, 0)
    assert quant is None
    assert layer.linears["q"].weight.dtype == dtype
    assert torch.equal(layer.linears["q"].weight, checkpoint.tensor(f"{Q0}.weight"))
    assert layer.norms["attn_norm"].dtype == torch.float32


def test_dynamic_rules_change_bits_skip_modules_and_reach_the_head(tmp_path):
    rules = {
        r"-:.*\.0\.mlp\.down_proj": {},
        r"+:.*self_attn\.q_proj": {"bits": 8, "group_size": 16},
        r".*v_proj": {"bits": 3, "sym": False},
        "lm_head": {"bits": 8, "group_size": 32},
    }
    expected = write_checkpoint(tmp_path, dynamic=rules, quantised_lm_head=True, desc_act=True)
    assert_reads_exactly(tmp_path, expected)
    linears = first_layer(tmp_path).linears
    assert isinstance(linears["down"], DenseLinear)
    assert (linears["q"].bits, linears["v"].bits, linears["k"].bits) == (8, 3, 4)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_a_quantised_head_that_nothing_declares_is_inferred_in_the_format_of_the_rest(tmp_path, format):
    expected = write_checkpoint(tmp_path, quantised_lm_head=True, sym=False, format=format)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_reads_exactly(tmp_path, expected)


def test_a_module_stored_dense_in_a_quantised_model_is_read_dense(tmp_path):
    expected = write_checkpoint(tmp_path, dynamic={"-:.*o_proj": {}})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["dynamic"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_reads_exactly(tmp_path, expected)


@pytest.mark.parametrize("sizes", [{"num_key_value_heads": 4}, {"head_dim": 32}, {"num_key_value_heads": 1}])
def test_head_sizes_need_not_follow_the_hidden_size(tmp_path, sizes):
    assert_reads_exactly(tmp_path, write_checkpoint(tmp_path, sizes, family="qwen3", bits=8))


def test_undeclared_biases_are_used_with_one_warning(tmp_path, caplog):
    expected = write_checkpoint(tmp_path, bias="random")
    with caplog.at_level(logging.WARNING):
        assert_reads_exactly(tmp_path, expected)
    assert len(caplog.messages) == 1
    assert f"{Q0}.bias is not zero although" in caplog.text


@pytest.mark.parametrize(
    "family_and_overrides",
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {"attention_bias": True})],
)
def test_declared_biases_are_used_silently_and_must_be_there(tmp_path, family_and_overrides, caplog):
    family, overrides = family_and_overrides
    assert_reads_exactly(tmp_path, write_checkpoint(tmp_path, overrides, family=family))
    assert not caplog.messages
    edit(tmp_path, **{f"{Q0}.bias": None})
    assert f"{Q0}.bias is missing: the configuration declares one" in refusal(tmp_path)


def test_a_bias_that_is_not_finite_is_refused(tmp_path):
    write_checkpoint(tmp_path, dense=True, family="qwen2")
    edit(tmp_path, **{f"{Q0}.bias": torch.full((64,), torch.nan)})
    with pytest.raises(CheckpointError, match=rf"{Q0}\.bias: 64 of 64 values are NaN"):
        first_layer(tmp_path)


def test_a_tied_head_shares_the_embeddings_also_where_the_file_repeats_them(tmp_path):
    write_checkpoint(tmp_path, {"tie_word_embeddings": True})
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    for stored in (None, table.clone()):
        edit(tmp_path, lm_head__weight=stored)
        config, quant, checkpoint = opened(tmp_path)
        check_tensors(config, quant, checkpoint)
        embeddings = read_embeddings(config, checkpoint)
        assert read_head(config, quant, checkpoint, embeddings)[1].weight is embeddings


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_head_that_differs_from_the_embeddings_it_is_tied_to_is_used_with_a_warning(tmp_path, caplog, dtype):
    expected = write_checkpoint(tmp_path, {"tie_word_embeddings": True})
    head = torch.randn(128, 64).to(dtype)
    edit(tmp_path, lm_head__weight=head)
    with caplog.at_level(logging.WARNING):
        assert_reads_exactly(tmp_path, expected | {"lm_head.weight": head.float()})
    assert "lm_head.weight differs from them" in caplog.text


def test_a_tied_model_may_store_its_table_as_the_head_only(tmp_path):
    expected = write_checkpoint(tmp_path, {"tie_word_embeddings": True})
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit(tmp_path, lm_head__weight=table, model__embed_tokens__weight=None)
    assert_reads_exactly(tmp_path, expected)


def test_a_quantised_head_is_used_even_where_the_config_ties(tmp_path):
    expected = write_checkpoint(tmp_path, quantised_lm_head=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert_reads_exactly(tmp_path, expected)


def test_a_missing_head_of_an_untied_model_is_an_error(tmp_path):
    write_checkpoint(tmp_path, drop=("lm_head.weight",))
    assert "lm_head: both .qweight and .weight are missing" in refusal(tmp_path)


def test_buffers_that_tools_add_are_ignored(tmp_path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(8),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "gptq_bits": torch.tensor(4),
        "gptq_groupsize": torch.tensor(32),
    }
    assert_reads_exactly(tmp_path, write_checkpoint(tmp_path, extra_tensors=extra))


def test_fixtures_without_their_configs_are_inferred_to_the_same_weights(gptq_fixture, tmp_path):
    """Where the file alone determines the weights: not for asymmetric v2 or word-borrowed zeros, which need a label."""
    config, quant, checkpoint = opened(gptq_fixture)
    labelled = quant.default.format != "gptq" or (quant.default.word_borrow and not quant.default.sym)
    if labelled:
        pytest.skip("this file's zero points cannot be read without its config")
    declared = read_state_dict(gptq_fixture)
    for path in checkpoint.files:
        shutil.copy(path, tmp_path / path.name)
    bare = {key: value for key, value in config.raw.items() if key != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    inferred = read_state_dict(tmp_path)
    assert set(declared) == set(inferred)
    assert all(torch.equal(declared[name], inferred[name]) for name in declared)
