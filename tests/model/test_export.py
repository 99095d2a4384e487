"""Exported layer orders: transformers and we compute of the written folder what the order computes in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hostile_declarations  # noqa: F401  (registers the kinds)
from accuracy import assert_as_accurate
from gptq_writer import write_checkpoint
from hostile_folders import KINDS, make_case
from ropewalk.base.errors import ConfigError, RopewalkError, UnsupportedError
from ropewalk.config.model import load_model_config
from ropewalk.config.quantisation import load_quant_config
from ropewalk.faces.cli.main import main
from ropewalk.model.export import layers as export_module
from ropewalk.model.export.layers import export_layers
from ropewalk.model.loader import load_model
from ropewalk.model.model import Model
from tokenizer_writer import write_sentencepiece
from transformers_model import Logits, their_logits
from variants import Variant, variants

IDS = [(37 * i) % 96 for i in range(60)]
FOUR = {"num_hidden_layers": 4}


def reference(folder: Path, **options) -> Model:
    return load_model(folder, backend="reference", compute="exact", cache_type="fp32", **options)


def run(model: Model) -> torch.Tensor:
    return model.forward(IDS, model.new_cache(), logits="all")


def transformers_logits(folder: Path) -> Logits:
    """transformers loads the folder itself."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return their_logits(folder, loaded.state_dict(), IDS)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 words [rows, N] -> codes [rows * 32 / bits, N]: a column is one little-endian stream of bits."""
    columns = np.ascontiguousarray(words.T).view(np.uint8)  # [N, bytes]
    stream = np.unpackbits(columns, axis=1, bitorder="little").reshape(len(columns), -1, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(2).T


def dequantised(folder: Path, bits: int, added_to_zeros: int) -> dict[str, torch.Tensor]:
    """The weights of a GPTQ file as a transformers model has them, [N, K] float32, read without code of ours."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    weights = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            codes, scales = unpacked(tensor.numpy(), bits), tensors[f"{module}.scales"].double()
            zeros = unpacked(tensors[f"{module}.qzeros"].numpy().T, bits).T + added_to_zeros
            groups = tensors[f"{module}.g_idx"].long()
            weights[f"{module}.weight"] = (scales[groups] * torch.from_numpy(codes - zeros[groups])).T.float()
        elif part not in ("qzeros", "scales", "g_idx"):
            weights[name] = tensor.float()
    return weights


def bits_of_modules(folder: Path, num_layers: int, module: str) -> list[int | None]:
    """What the written files declare for a module of each layer; None: dense."""
    quant = load_quant_config(folder, load_model_config(folder).raw)
    settings = [quant.for_module(f"model.layers.{index}.{module}") for index in range(num_layers)]
    return [None if each is None else each.bits for each in settings]


@pytest.mark.parametrize("order", ["0-3,0-3", "2,0", "0-1,2*4@0.25,3", "0-3,1@-0.5"])
@pytest.mark.parametrize(
    "family, overrides",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 17}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
        ("qwen3", {}),
    ],
)
def test_transformers_loads_it_and_computes_the_same(tmp_path: Path, family: str, overrides: dict, order: str) -> None:
    write_checkpoint(tmp_path / "in", FOUR | overrides, family=family, dense=True, dtype=torch.bfloat16)
    expected = run(reference(tmp_path / "in", layer_order=order))
    exported = export_layers(tmp_path / "in", tmp_path / "out", order)
    assert exported.num_layers == load_model_config(tmp_path / "out").num_layers
    theirs = transformers_logits(tmp_path / "out")
    assert_as_accurate(expected, *theirs)
    assert_as_accurate(run(reference(tmp_path / "out")), *theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"desc_act": True, "sym": False},
        {"bits": 3, "bias": "random"},
        {"bits": 8, "word_borrow": True, "quantised_lm_head": True, "config_files": ("quantize_config.json",)},
        {"format": "gptq_v2", "scales_dtype": torch.bfloat16},
        {"era": 0, "group_size": -1, "config_files": ()},
    ],
)
def test_gptq_weights_are_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "in", FOUR, **options)
    order = "0-3,1*2,2@0.5,0@-1"
    export_layers(tmp_path / "in", tmp_path / "out", order)
    ours, written = run(reference(tmp_path / "in", layer_order=order)), run(reference(tmp_path / "out"))
    assert torch.equal(written, ours)
    plain = "3,0-3,1*2"
    export_layers(tmp_path / "in", tmp_path / "plain", plain)
    assert torch.equal(run(reference(tmp_path / "plain")), run(reference(tmp_path / "in", layer_order=plain)))


@pytest.mark.parametrize(
    "bits, added_to_zeros, options",
    [
        (4, 1, {"desc_act": True, "sym": False}),
        (4, 0, {"format": "gptq_v2", "sym": False}),
        (8, 1, {"group_size": 16}),
        (2, 1, {"desc_act": True}),
    ],
)
def test_transformers_computes_the_same_of_exported_gptq_weights(
    tmp_path: Path, bits: int, added_to_zeros: int, options: dict[str, Any]
) -> None:
    """The quantised files, dequantised as their format says and nothing of ours knows, in transformers' own model."""
    write_checkpoint(tmp_path / "in", FOUR, bits=bits, **options)
    order = "0-3,1*2,2@0.5,0@-1"
    export_layers(tmp_path / "in", tmp_path / "out", order)
    assert load_model_config(tmp_path / "out").num_layers == 8
    expected = their_logits(tmp_path / "out", dequantised(tmp_path / "out", bits, added_to_zeros), IDS)
    assert_as_accurate(run(reference(tmp_path / "in", layer_order=order)), *expected)


@pytest.mark.parametrize("variant", variants(backend="cpu")[-2:], ids=str)
def test_checkpoints_of_real_quantisers_run_the_same_bits_when_exported(
    tmp_path: Path, gptq_fixture: Path, variant: Variant
) -> None:
    for number, order in enumerate(("0-1,0-1", "1,0*2@0.5")):
        out = tmp_path / str(number)
        export_layers(gptq_fixture, out, order)
        assert torch.equal(run(variant.load(out)), run(variant.load(gptq_fixture, layer_order=order)))


DYNAMIC = {
    r"-:model\.layers\.0\.mlp\.down_proj": {},
    r"+:.*\.1\.mlp.*": {"bits": 8},
    r"model\.layers\.[23]\.self_attn\.o_proj": {"bits": 2, "sym": False},
}


@pytest.mark.parametrize("config_files", [("config.json",), ("quantize_config.json",), ("config.json",) * 2])
def test_rules_that_name_layers_follow_them(tmp_path: Path, config_files: tuple[str, ...]) -> None:
    write_checkpoint(tmp_path / "in", FOUR, dynamic=DYNAMIC, config_files=config_files, desc_act=True)
    order = [1, 0, 0, 3, 2, 1, 3, 1, 0, 3, 1, 2]
    export_layers(tmp_path / "in", tmp_path / "out", order)
    assert bits_of_modules(tmp_path / "out", 12, "mlp.down_proj") == [{0: None, 1: 8}.get(i, 4) for i in order]
    assert bits_of_modules(tmp_path / "out", 12, "mlp.up_proj") == [8 if i == 1 else 4 for i in order]
    assert bits_of_modules(tmp_path / "out", 12, "self_attn.o_proj") == [2 if i > 1 else 4 for i in order]
    expected = run(reference(tmp_path / "in", layer_order=order))
    assert torch.equal(run(reference(tmp_path / "out")), expected)


def test_rules_that_still_hold_are_left_as_they_are(tmp_path: Path) -> None:
    dynamic = {r".*\.down_proj": {"bits": 8}}
    write_checkpoint(tmp_path / "in", FOUR, dynamic=dynamic)
    export_layers(tmp_path / "in", tmp_path / "out", "0-3,0-3")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["dynamic"] == dynamic
    assert written["num_hidden_layers"] == 8


def test_rules_by_name_are_renamed(tmp_path: Path) -> None:
    """auto-round's extra_config: full names of modules."""
    dynamic = {r".*layers\.1\.mlp\.down_proj$": {"bits": 8}}
    write_checkpoint(tmp_path / "in", FOUR, dynamic=dynamic)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["quantization_config"].pop("dynamic")
    extra = {"model.layers.1.mlp.down_proj": {"bits": 8}, "lm_head": {"bits": 16}}
    config["quantization_config"]["extra_config"] = extra
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    export_layers(tmp_path / "in", tmp_path / "out", "1,0,1")
    assert bits_of_modules(tmp_path / "out", 3, "mlp.down_proj") == [8, 4, 8]
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["extra_config"]
    assert set(written) == {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"}
    expected = run(reference(tmp_path / "in", layer_order="1,0,1"))
    assert torch.equal(run(reference(tmp_path / "out")), expected)


def test_windows_follow_their_layers(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 3}
    write_checkpoint(tmp_path / "in", FOUR | windows, family="qwen2", dense=True)
    export_layers(tmp_path / "in", tmp_path / "out", [3, 0, 3])
    assert load_model_config(tmp_path / "out").sliding_windows == (24, None, 24)
    export_layers(tmp_path / "out", tmp_path / "again", [1, 2])
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["layer_types"] == ["full_attention", "sliding_attention"]


def test_the_order_in_config_json_is_written_out_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", FOUR | {"layer_order": "0-3,3"}, dense=True)
    assert export_layers(tmp_path / "in", tmp_path / "out").num_layers == 5
    assert "layer_order" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(reference(tmp_path / "out").instances) == 5


@pytest.mark.parametrize(
    "first, second",
    [
        ({"dense": True}, {"dense": True}),
        ({"bits": 4}, {"bits": 8, "group_size": 64, "desc_act": True}),
        ({"bits": 4}, {"dense": True}),
        ({"bits": 4, "dynamic": DYNAMIC}, {"bits": 4, "dynamic": {r".*\.0\..*": {"bits": 8}}}),
    ],
)
def test_layers_of_two_models_become_one_checkpoint(tmp_path: Path, first: dict, second: dict) -> None:
    write_checkpoint(tmp_path / "a", FOUR, **first)
    write_checkpoint(tmp_path / "b", {"num_hidden_layers": 3, "vocab_size": 96}, seed=3, **second)
    order = "0-1,b:1-2,a:3,b:0*2"
    export_layers(tmp_path / "a", tmp_path / "out", order, second_folder=tmp_path / "b")
    expected = run(reference(tmp_path / "a", layer_order=order, second_folder=tmp_path / "b"))
    assert torch.equal(run(reference(tmp_path / "out")), expected)


@pytest.mark.parametrize(
    "first, second, message",
    [
        ({"dense": True}, {}, "exchange the two models"),
        ({}, {"format": "gptq_v2"}, "format of zero points"),
        ({}, {"word_borrow": True}, "writer of zero points"),
        ({}, {"config_files": ()}, "without a declaration"),
    ],
)
def test_models_that_one_checkpoint_cannot_hold_are_refused(tmp_path: Path, first, second, message: str) -> None:
    write_checkpoint(tmp_path / "a", **first)
    write_checkpoint(tmp_path / "b", seed=3, **second)
    with pytest.raises(UnsupportedError, match=message):
        export_layers(tmp_path / "a", tmp_path / "out", "0-1,b:0", second_folder=tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_windows_that_one_config_cannot_say_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", {"sliding_window": 16}, family="mistral", dense=True)
    write_checkpoint(tmp_path / "b", {"sliding_window": 24}, family="mistral", dense=True)
    write_checkpoint(tmp_path / "c", {"sliding_window": None}, family="mistral", dense=True)
    with pytest.raises(UnsupportedError, match=r"sliding windows of \[16, 24\]"):
        export_layers(tmp_path / "a", tmp_path / "out", "0-1,b:0", second_folder=tmp_path / "b")
    with pytest.raises(UnsupportedError, match="some of its layers only"):
        export_layers(tmp_path / "a", tmp_path / "out", "0-1,b:0", second_folder=tmp_path / "c")


@pytest.mark.parametrize("weight", [0.3, 1e-3, 0.7071])
def test_a_weight_that_scales_cannot_take_exactly_is_refused_and_nothing_is_left(tmp_path: Path, weight) -> None:
    write_checkpoint(tmp_path / "in")
    with pytest.raises(UnsupportedError, match=r"layers\.1\..*_proj\.scales: times .*power of two"):
        export_layers(tmp_path / "in", tmp_path / "out", f"0,1@{weight}")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_dense_weights_take_any_weight_within_their_rounding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", FOUR, dense=True, dtype=torch.float32)
    export_layers(tmp_path / "in", tmp_path / "out", "0-3,1@0.3,2@0.7071")
    expected = run(reference(tmp_path / "in", layer_order="0-3,1@0.3,2@0.7071"))
    theirs = transformers_logits(tmp_path / "out")
    assert_as_accurate(expected, *theirs)
    assert_as_accurate(run(reference(tmp_path / "out")), *theirs)


def test_a_dense_weight_that_overflows_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", dense=True)
    model = tmp_path / "in" / "model.safetensors"
    tensors = load_file(model)
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 4] = 6e4
    save_file(tensors, model)
    with pytest.raises(UnsupportedError, match=r"o_proj\.weight: times 2 some of its values do not fit float16"):
        export_layers(tmp_path / "in", tmp_path / "out", "0@2")


def test_a_large_model_is_written_in_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", FOUR, shards=3, dense=True)
    seen = []
    exported = export_layers(
        tmp_path / "in", tmp_path / "out", "0-3,0-3", max_shard_bytes=100_000, progress=lambda *step: seen.append(step)
    )
    shards = [name for name in exported.files if name.endswith(".safetensors")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert seen[-1][0] == seen[-1][1] and len(seen) == len(shards)
    sizes = []
    for name in shards:
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 (not a dict)
            sizes.append(sum(t.numel() * t.element_size() for t in tensors))
    assert max(sizes) <= 100_000 and sum(sizes) == exported.num_bytes
    expected = run(reference(tmp_path / "in", layer_order="0-3,0-3"))
    assert_as_accurate(expected, *transformers_logits(tmp_path / "out"))


def test_the_text_side_of_the_model_comes_along_and_its_name_does_not(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_checkpoint(source, file_name="gptq_model-4bit-32g.safetensors", config_files=("quantize_config.json",))
    write_sentencepiece(source)
    for name in ("generation_config.json", "LICENSE", "README.md", "special_tokens_map.json"):
        (source / name).write_text("{}")
    declared = json.loads((source / "quantize_config.json").read_text())
    declared["model_file_base_name"] = "gptq_model-4bit-32g"
    (source / "quantize_config.json").write_text(json.dumps(declared))
    (tmp_path / "out").mkdir()
    exported = export_layers(source, tmp_path / "out", "0-1,1")
    expected = {path.name for path in source.iterdir()} - {"README.md", "gptq_model-4bit-32g.safetensors"}
    assert set(exported.files) == expected | {"model.safetensors"}
    assert "model_file_base_name" not in json.loads((tmp_path / "out" / "quantize_config.json").read_text())


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "new.partial").mkdir()
    for out, message in (("full", "there already"), ("file", "there already"), ("in", "there already")):
        with pytest.raises(ConfigError, match=message):
            export_layers(tmp_path / "in", tmp_path / out, "0")
    with pytest.raises(ConfigError, match="new.partial is there already.*delete it"):
        export_layers(tmp_path / "in", tmp_path / "new", "0")
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "new.partial").is_dir()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_order": "0-9"}, "from 0 to 1"),
        ({"layer_order": "b:0"}, "no second model"),
        ({"out": 7}, "must be a path, got 7"),
        ({"out": "a\0b"}, "must be a path"),
        ({"folder": "nowhere"}, "does not exist"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be a positive integer"),
        ({"second_folder": "nowhere", "layer_order": "0"}, "does not exist"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path / "in")
    arguments = {"folder": tmp_path / "in", "out": tmp_path / "out", "layer_order": "0"} | change
    with pytest.raises(RopewalkError, match=message):
        export_layers(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_is_an_error_of_ours_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    write_checkpoint(tmp_path / "in")
    monkeypatch.setattr(export_module, "save_file", fail)
    with pytest.raises(ConfigError, match="out cannot be written.*No space left"):
        export_layers(tmp_path / "in", tmp_path / "out", "0")
    monkeypatch.undo()
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ConfigError, match="10 bytes are free"):
        export_layers(tmp_path / "in", tmp_path / "out", "0")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_is_refused_or_written_and_leaves_nothing_else(tmp_path: Path, kind: str) -> None:
    assert make_case(list(KINDS).index(kind), 11, tmp_path / "in") == kind
    try:
        export_layers(tmp_path / "in", tmp_path / "out", "0*2@0.5", max_shard_bytes=50_000)
    except RopewalkError:
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
        return
    assert load_model_config(tmp_path / "out").num_layers == 2


# The command line


def test_the_command_writes_a_model_that_the_other_commands_run(tmp_path: Path, capsys) -> None:
    write_checkpoint(tmp_path / "in", {"vocab_size": 400})
    write_sentencepiece(tmp_path / "in")
    folder, out = str(tmp_path / "in"), str(tmp_path / "out")
    assert main(["export-layers", folder, out, "--layer-order", "0-1,0-1"]) == 0
    assert capsys.readouterr().out.strip() == out
    modes = {path.name: path.stat().st_mode for path in Path(out).iterdir()}
    assert len(set(modes.values())) == 1, modes  # who may read the configuration may read the weights
    prompt = ["--prompt", "rope", "--temperature", "0", "--max-new-tokens", "8", "--backend", "reference"]
    assert main(["generate", out, *prompt]) == 0
    written = capsys.readouterr().out
    pattern = ["--recompute-n-layers", "2", "--rewind-n-layers", "0"]
    assert main(["generate", folder, *prompt, "--layer-order", "0-1,b:0-1", "--second-model", folder]) == 0
    done = capsys.readouterr()
    assert done.out == written and "layer order: 0-1,b:0-1 (4 layer instances)" in done.err
    assert main(["generate", folder, *prompt, *pattern]) == 0
    assert "layer order" not in capsys.readouterr().err
    assert main(["info", folder, "--layer-order", "0,1*3"]) == 0
    assert "0,1*3: 4 layer instances" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "generate", "perplexity", "chat", "export-layers"])
def test_a_wrong_order_ends_every_command_with_a_message(tmp_path: Path, capsys, command: str) -> None:
    write_checkpoint(tmp_path, {"vocab_size": 400})
    write_sentencepiece(tmp_path)
    (tmp_path / "text").write_text("rope " * 50)
    more = {"perplexity": [str(tmp_path / "text")], "export-layers": [str(tmp_path / "out")]}
    extra = ["--prompt", "rope"] if command == "generate" else []
    assert main([command, str(tmp_path), *more.get(command, []), *extra, "--layer-order", "0-1,7"]) == 2
    said = capsys.readouterr()
    assert "layer numbers of this model go from 0 to 1 at column 5" in said.err
    assert said.err.endswith("\n  0-1,7\n      ^\n")  # below it the place that is meant
    assert not said.out  # the model is as good as before: nothing is said of other programs


@pytest.mark.parametrize("command", ["info", "generate", "export-layers"])
def test_a_second_model_whose_layers_no_order_names_is_refused(tmp_path: Path, capsys, command: str) -> None:
    write_checkpoint(tmp_path, {"vocab_size": 400})
    write_sentencepiece(tmp_path)
    extra = {"export-layers": [str(tmp_path / "out")], "generate": ["--prompt", "rope"]}.get(command, [])
    assert main([command, str(tmp_path), *extra, "--layer-order", "0-1", "--second-model", str(tmp_path)]) == 2
    assert "has no effect: name its layers in --layer-order" in capsys.readouterr().err
