"""What is wrong with a checkpoint's tensors is told all at once, by name and with its cause."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoint_weights import (
    CONFIG_FILES,
    FIELDS,
    Q0,
    edit,
    first_layer,
    opened,
    read_state_dict,
    refusal,
    weight_of,
)
from gptq_writer import write_checkpoint
from ropewalk.base.errors import CheckpointError, RopewalkError, UnsupportedError
from ropewalk.gptq.linear import DenseLinear, GptqLinear
from ropewalk.weights.read import check_tensors, read_embeddings, read_head, read_layer


def test_all_problems_are_listed_in_one_error(tmp_path):
    write_checkpoint(
        tmp_path,
        drop=("model.norm.weight", f"{Q0}.scales"),
        extra_tensors={"model.layers.0.surprise": torch.ones(1)},
    )
    edit(
        tmp_path,
        model__embed_tokens__weight=torch.ones(127, 64),
        model__layers__1__input_layernorm__weight=torch.ones(64, dtype=torch.int32),
    )
    message = refusal(tmp_path)
    for part in (
        "model.norm.weight is missing",
        f"{Q0}.scales is missing",
        "model.layers.0.surprise is unexpected",
        "model.embed_tokens.weight has shape [127, 64], expected [128, 64]",
        "model.layers.1.input_layernorm.weight has dtype I32, accepted F16/BF16/F32",
        "config.json",
    ):
        assert part in message


def test_long_lists_are_cut_and_the_number_of_layers_is_compared(tmp_path):
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    message = refusal(tmp_path)
    assert "and 43 more" in message
    assert message.count("\n") == 22
    assert "The files hold 2 layers, num_hidden_layers is 9" in message
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "model.layers.1.mlp.down_proj.qweight is unexpected" in refusal(tmp_path)


def test_names_with_another_prefix_are_explained(tmp_path):
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({f"language_model.{name}": tensor for name, tensor in load_file(path).items()}, path)
    assert "begin with 'language_model.model.' instead of 'model.'" in refusal(tmp_path)


def test_wrong_bits_in_the_config_are_explained(tmp_path):
    write_checkpoint(tmp_path, bits=8)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bits"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "it holds 8-bit codes, the configuration says 4" in refusal(tmp_path)


def test_shapes_that_allow_no_inference_are_listed_with_the_rest(tmp_path):
    write_checkpoint(tmp_path, config_files=())
    edit(tmp_path, **{f"{Q0}.qweight": torch.zeros(7, 64, dtype=torch.int32)}, model__norm__weight=None)
    message = refusal(tmp_path)
    assert "3.5 bits per weight" in message and "model.norm.weight is missing" in message


def test_a_module_stored_twice_is_refused(tmp_path):
    write_checkpoint(tmp_path, extra_tensors={f"{Q0}.weight": torch.ones(64, 64)})
    assert f"{Q0} is stored twice" in refusal(tmp_path)


def test_dense_weights_of_other_types_are_refused(tmp_path):
    write_checkpoint(tmp_path, dense=True)
    edit(tmp_path, **{f"{Q0}.weight": torch.ones(64, 64, dtype=torch.int8)})
    assert f"{Q0}.weight has dtype I8, accepted F16/BF16/F32" in refusal(tmp_path)


def test_norms_that_are_not_finite_are_refused(tmp_path):
    write_checkpoint(tmp_path)
    edit(tmp_path, model__layers__0__input_layernorm__weight=torch.full((64,), torch.inf))
    with pytest.raises(CheckpointError, match=r"input_layernorm\.weight: 64 of 64 values are NaN or infinite"):
        first_layer(tmp_path)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (f"{Q0}.B", "repacked for one kernel"),
        (f"{Q0}.q_weight", "EXL2"),
        (f"{Q0}.trellis", "EXL3"),
        (f"{Q0}.weight.absmax", "bitsandbytes"),
        (f"{Q0}.weight_scale_2", "NVFP4"),
        (f"{Q0}.biases", "MLX"),
        (f"{Q0}.weight_scale_inv", "FP8"),
        (f"{Q0}.W_q", "HQQ"),
        ("model.layers.0.self_attn.qkv_proj.qweight", "fused projections"),
        ("model.layers.0.mlp.gate_up_proj.weight", "fused projections"),
        ("model.layers.0.self_attn.W_pack.weight", "fused projections"),
        ("layers.0.attention.wq.weight", "original"),
    ],
)
def test_foreign_layouts_are_refused_by_name(tmp_path, name, layout):
    write_checkpoint(tmp_path, extra_tensors={name: torch.ones(2)})
    config, quant, checkpoint = opened(tmp_path)
    with pytest.raises(UnsupportedError, match=f"layout of .*{layout}") as caught:
        check_tensors(config, quant, checkpoint)
    assert name in str(caught.value)


def test_fixtures_pass_the_check_and_decide_zeros_and_order_as_documented(gptq_fixture):
    facts = json.loads((gptq_fixture / "fixture.json").read_text())
    config, quant, checkpoint = opened(gptq_fixture)
    check_tensors(config, quant, checkpoint)
    permuted, num_quantised = False, 0
    for index in range(config.num_layers):
        layer = read_layer(config, quant, checkpoint, index)
        for field in FIELDS:
            linear = layer.linears[field]
            assert bool(torch.isfinite(weight_of(linear)).all())
            if isinstance(linear, DenseLinear):
                continue
            num_quantised += 1
            permuted |= linear.order is not None
            if facts["quant"]["sym"] and linear.bits == facts["quant"]["bits"]:
                assert linear.zeros.unique().tolist() == [1 << (linear.bits - 1)]
    assert permuted == (facts["g_idx"] == "permuted")
    head = read_head(config, quant, checkpoint, read_embeddings(config, checkpoint))[1]
    assert num_quantised + isinstance(head, GptqLinear) == facts["modules_quantized"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_checkpoints_with_any_tensor_replaced_are_read_or_refused_by_a_typed_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mutated")
    write_checkpoint(folder, {"num_hidden_layers": 1}, desc_act=True, config_files=data.draw(CONFIG_FILES), bias="zero")
    tensors = load_file(folder / "model.safetensors")
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        shape = list(tensors[name].shape)
        if data.draw(st.booleans()):
            shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 32, 64, 96]), max_size=3))
        dtype = data.draw(
            st.sampled_from([tensors[name].dtype, torch.int32, torch.int64, torch.float16, torch.float64])
        )
        value = data.draw(st.sampled_from([0, 1, -1, 3, 2**31 - 1, -(2**31)]))
        tensors[name] = torch.full(shape, value).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    try:
        state = read_state_dict(folder)
    except RopewalkError:
        return
    layers = [tensor for name, tensor in state.items() if ".layers." in name]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in layers)
