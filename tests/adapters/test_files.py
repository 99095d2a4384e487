"""What is read of an adapter folder, in all its spellings, and what is refused by name, with the model usable after."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ropewalk
from gptq_writer import write_checkpoint
from peft_writer import write_adapter
from ropewalk.adapters.files import PICKLED_NAMES
from ropewalk.base.errors import CheckpointError, ConfigError, RopewalkError, UnsupportedError
from ropewalk.model.model import Model
from variants import Variant

IDS = [3, 17, 99, 0, 127, 64, 5]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@dataclass
class Made:
    """A model with an adapter folder that tests copy and change."""

    model: Model
    adapter: Path
    logits: torch.Tensor  # with the adapter as PEFT wrote it

    def logits_of(self, folder: Path) -> torch.Tensor:
        self.model.load_adapter(folder, "tried")
        try:
            return self.model.forward(IDS, self.model.new_cache(), adapters=["tried"])
        finally:
            self.model.unload_adapter("tried")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("model")
    exact = write_checkpoint(folder, dense=True)
    adapter = write_adapter(folder / "adapter", folder, exact)
    made = Made(Variant("reference", "exact").load(folder), adapter, torch.empty(0))
    made.logits = made.logits_of(adapter)
    return made


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.adapter, tmp_path / "adapter"))


def edit_config(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def added(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {name: tensor}


BIAS = "base_model.model.model.layers.1.mlp.up_proj.bias"
SAME = {
    "the name of the adapter in the keys": renamed(".weight", ".default.weight"),
    "no prefix": renamed("base_model.model.", ""),
    "an adapter of the decoder alone": renamed("base_model.model.model.", "base_model.model."),
    "zero biases": added(BIAS, torch.zeros(96)),
    "zero biases of B": added(BIAS.replace("bias", "lora_B.bias"), torch.zeros(96)),
    "float16 of float16 values": lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("spelling", SAME)
def test_every_spelling_is_the_same_adapter(made: Made, folder: Path, spelling: str) -> None:
    if "float16" in spelling:
        edit_tensors(folder, lambda tensors: {name: tensor.half().float() for name, tensor in tensors.items()})
        expected = made.logits_of(folder)
    else:
        expected = made.logits
    edit_tensors(folder, SAME[spelling])
    torch.testing.assert_close(made.logits_of(folder), expected, rtol=0, atol=1e-5)


CONFIG_ERRORS = [
    ({"peft_type": "LOHA"}, UnsupportedError, "peft_type must be \"LORA\", found 'LOHA'"),
    ({"peft_type": None}, UnsupportedError, "peft_type"),
    ({"use_dora": True}, UnsupportedError, "use_dora is set: DoRA"),
    ({"layer_replication": [[0, 1]]}, UnsupportedError, "layer_replication"),
    ({"target_parameters": ["x"]}, UnsupportedError, "target_parameters"),
    ({"trainable_token_indices": [1]}, UnsupportedError, "trainable tokens"),
    ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": ["x"]}, UnsupportedError, "init_lora_weights"),
    ({"r": 5}, CheckpointError, rf"{Q0} has shape \[4, 64\], expected \[5, 64\] \(rank 5"),
    ({"r": 0}, ConfigError, "r must be an integer from 1"),
    ({"r": None}, ConfigError, "r must be an integer .* found nothing"),
    ({"r": 4.0}, ConfigError, "r must be an integer"),
    ({"lora_alpha": "16"}, ConfigError, "lora_alpha must be a number"),
    ({"lora_alpha": float("nan")}, ConfigError, "lora_alpha must be a number"),
    ({"use_rslora": "yes"}, ConfigError, "use_rslora must be true or false"),
    ({"target_modules": 7}, ConfigError, "target_modules must be a list"),
    ({"target_modules": [1]}, ConfigError, "target_modules must be a list"),
    ({"target_modules": "("}, ConfigError, "target_modules: '\\(' is not a regular expression"),
    (
        {"target_modules": ["q_proj"]},
        CheckpointError,
        r"down_proj\.lora_A\.weight is for a module that .* does not name",
    ),
    ({"target_modules": ["query_key_value"]}, CheckpointError, "does not name"),
    ({"layers_to_transform": [1]}, CheckpointError, r"layers\.0\..* does not name"),
    ({"layers_to_transform": ["1"]}, ConfigError, "layers_to_transform must be a layer number"),
    ({"layers_pattern": ["(a+)+"]}, ConfigError, "layers_pattern"),
    ({"rank_pattern": {"q_proj": 8}}, CheckpointError, r"expected \[8, 64\]"),
    ({"rank_pattern": {"q_proj": "8"}}, ConfigError, "rank_pattern.q_proj must be an integer"),
    ({"rank_pattern": [1]}, ConfigError, "rank_pattern must be an object"),
    ({"rank_pattern": {"(a+)+": 8}}, ConfigError, "rank_pattern: .* cannot be used"),
    ({"alpha_pattern": {"[": 8}}, ConfigError, "alpha_pattern: .* cannot be used|not a regular expression"),
    ({"modules_to_save": ["lm_head"]}, CheckpointError, "lacks the table of lm_head, which modules_to_save"),
    ({"rope_scaling": 4}, ConfigError, "rope_scaling must be an object"),
    ({"rope_scaling": {"rope_type": "spiral", "factor": 2}}, RopewalkError, "spiral"),
]


@pytest.mark.parametrize("settings, error, message", CONFIG_ERRORS)
def test_a_wrong_setting_is_refused_by_name(
    made: Made, folder: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    edit_config(folder, **settings)
    with pytest.raises(error, match=message):
        made.model.load_adapter(folder, "tried")
    assert made.model.adapters == ()
    assert torch.equal(made.logits_of(made.adapter), made.logits)


def spoiled(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][1, 2] = value
        return tensors

    return change


def without(*parts: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: t for name, t in tensors.items() if not all(part in name for part in parts)}


TENSOR_ERRORS = [
    (spoiled(Q0, float("nan")), CheckpointError, rf"{Q0}: 1 of 256 values are NaN or infinite"),
    (spoiled(Q0, float("inf")), CheckpointError, rf"{Q0}: 1 of 256 values"),
    (renamed("layers.1", "layers.9"), CheckpointError, r"layers\.9\..*llama, 2 layers.*made for another model"),
    (renamed("q_proj", "query"), CheckpointError, r"self_attn\.query\.lora_A.* does not have"),
    (without("layers.0.self_attn.q_proj.lora_B"), CheckpointError, rf"{Q0} has no counterpart"),
    (without("layers.1.mlp.up_proj"), CheckpointError, r"lacks the matrices of 1 modules .*layers\.1\.mlp\.up_proj"),
    (added(Q0, torch.zeros(4, 32)), CheckpointError, r"shape \[4, 32\], expected \[4, 64\]"),
    (added(Q0, torch.zeros(4, 64, dtype=torch.int32)), CheckpointError, "torch.int32, accepted: float32"),
    (added(BIAS, torch.ones(96)), UnsupportedError, rf"{BIAS} is not zero"),
    (added(Q0.replace("lora_A", "lora_A.other"), torch.zeros(4, 64)), CheckpointError, "holds two adapters"),
    (added("base_model.model.model.norm.weight", torch.ones(64)), UnsupportedError, r"model\.norm\.weight is not"),
    (added(Q0.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(64)), UnsupportedError, "DoRA"),
    (added("base_model.model.lm_head.weight", torch.ones(130, 64)), CheckpointError, r"expected \[128, 64\]"),
]


@pytest.mark.parametrize("change, error, message", TENSOR_ERRORS)
def test_a_wrong_tensor_is_refused_by_name(
    made: Made, folder: Path, change: Callable[..., Any], error: type[Exception], message: str
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(error, match=message):
        made.model.load_adapter(folder, "tried")
    assert torch.equal(made.logits_of(made.adapter), made.logits)


def test_an_adapter_for_a_model_of_another_size_is_refused_with_the_tensor(made: Made, tmp_path: Path) -> None:
    exact = write_checkpoint(tmp_path / "other", {"hidden_size": 128}, dense=True)
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "other", exact)
    with pytest.raises(CheckpointError, match=r"lora_A\.weight has shape \[4, 128\], expected \[4, 64\]"):
        made.model.load_adapter(adapter, "tried")


def test_folders_that_hold_no_adapter_are_refused(made: Made, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: give the folder that holds a PEFT adapter"):
        made.model.load_adapter(tmp_path / "nowhere", "tried")
    with pytest.raises(ConfigError, match="is a file"):
        made.model.load_adapter(folder / WEIGHTS, "tried")
    with pytest.raises(ConfigError, match="must be a path, got int"):
        made.model.load_adapter(7, "tried")
    with pytest.raises(ConfigError, match="rope_scaling"):
        made.model.load_adapter(folder, "tried", rope_scaling=4)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"has no {WEIGHTS}: finish the download"):
        made.model.load_adapter(folder, "tried")
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=f"has no {CONFIG}"):
        made.model.load_adapter(folder, "tried")


# As a well-known trainer writes it: too many choices to be evaluated on names, so the tensors decide.
LONG_EXPRESSION = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|"
    r"o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


@pytest.mark.parametrize("targets", [LONG_EXPRESSION, None, "all-linear", r"(.+)+_proj"])
def test_targets_that_are_not_evaluated_leave_it_to_the_tensors(made: Made, folder: Path, targets: Any) -> None:
    edit_config(folder, target_modules=targets)
    assert torch.equal(made.logits_of(folder), made.logits)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("loading ran code",))


@pytest.mark.parametrize("name", PICKLED_NAMES)
@pytest.mark.parametrize("content", [Harmful(), None, {Q0: torch.zeros(4, 64)}], ids=["harmful", "empty", "tensors"])
def test_a_pickled_adapter_is_refused_by_name_and_never_unpickled(
    made: Made, folder: Path, name: str, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / name)
    with pytest.raises(UnsupportedError, match=f"{name} is a pickled torch file, which is not read"):
        made.model.load_adapter(folder, "tried")
    assert capsys.readouterr().out == ""
    assert made.model.adapters == ()


def test_a_pickled_file_beside_safetensors_is_not_looked_at(made: Made, folder: Path) -> None:
    torch.save(Harmful(), folder / "adapter_model.bin")
    assert torch.equal(made.logits_of(folder), made.logits)


def test_the_conversion_that_the_refusal_tells_works(made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UnsupportedError, match="convert it in its folder") as refusal:
        made.model.load_adapter(folder, "tried")
    monkeypatch.chdir(folder)
    exec(str(refusal.value).split("\n\n")[1], {})
    assert torch.equal(made.logits_of(folder), made.logits)


def test_nothing_in_the_package_unpickles() -> None:
    package = Path(ropewalk.__file__).parent
    sources = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert sources
    for path, source in sources.items():
        imports = [line for line in source.splitlines() if line.lstrip().startswith(("import ", "from "))]
        assert not any(re.search(r"\b(pickle|dill|joblib|shelve|marshal)\b", line) for line in imports), path
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
        assert "torch.load" not in calls, path


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_files_are_refused(made: Made, folder: Path, name: str, share: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(RopewalkError, match=name):
        made.model.load_adapter(folder, "tried")


@pytest.mark.parametrize("tied_change", [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_replacing_one_of_two_tied_tables_is_refused(tmp_path: Path, tied_change: dict[str, Any]) -> None:
    exact = write_checkpoint(tmp_path, {"tie_word_embeddings": True}, dense=True)
    adapter = write_adapter(tmp_path / "adapter", tmp_path, exact, **tied_change)
    model = Variant("reference", "exact").load(tmp_path)
    with pytest.raises(UnsupportedError, match="ties the head to the embeddings"):
        model.load_adapter(adapter, "tried")
