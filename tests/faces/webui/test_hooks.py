"""Every hook on the stand-in of the web UI, which has the names and calls of the real one (stand_in/)."""

from __future__ import annotations

import argparse
import gc
import logging
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from ropewalk.base.errors import ConfigError, RopewalkError
from ropewalk.faces.webui import register
from ropewalk.faces.webui.hook import Hook
from ropewalk.faces.webui.hooks import HOOKS, loading
from ropewalk.faces.webui.hooks.arguments import add_flags
from ropewalk.faces.webui.hooks.training import REFUSAL
from ropewalk.faces.webui.parameters import PARAMETERS
from ropewalk.faces.webui.patching import is_patched
from webui_support import registered_finders, reply, running_webui, start

OWN_NAMES = {item.name for item in PARAMETERS} - {"ctx_size", "cache_type", "threads"}


def contents(webui: SimpleNamespace) -> dict[str, dict]:
    return {name: dict(vars(module)) for name, module in vars(webui).items() if name != "console"}


def test_registering_again_changes_nothing(webui: SimpleNamespace) -> None:
    before = contents(webui)
    register()
    register()
    assert len(registered_finders()) == 1
    assert contents(webui) == before


def test_every_hook_attaches_to_the_stand_in(webui: SimpleNamespace) -> None:
    assert webui.console == []


def test_the_loader_is_listed_with_the_samplers_of_one_like_it(webui: SimpleNamespace) -> None:
    assert "ropewalk" in webui.loaders.loaders_and_params
    assert webui.loaders.loaders_samplers["ropewalk"] == {"temperature", "top_p", "prompt_lookup_num_tokens"}
    assert webui.loaders.loaders_samplers["ExLlamav3_HF"] == {"temperature", "top_p"}


def test_the_settings_are_model_settings(webui: SimpleNamespace) -> None:
    elements = webui.loaders.list_model_elements()
    assert set(elements) >= OWN_NAMES
    assert len(elements) == len(set(elements))


def test_flags_are_parsed_and_count_as_given(root: Path) -> None:
    flags = ("--loader", "RopeWalk", "--rope-method", "yarn", "--rope_factor", "2.5", "--layer-order", "0-2")
    with running_webui(root, *flags) as modules:
        args = modules.shared.args
        assert (args.loader, args.rope_method, args.rope_factor, args.layer_order) == ("ropewalk", "yarn", 2.5, "0-2")
        assert {"rope_method", "rope_factor", "layer_order"} <= set(modules.shared.provided_arguments)
        assert modules.shared.args_defaults.rope_factor == 1.0
        assert modules.shared.original_args.loader == "ropewalk"


def test_flags_that_the_web_ui_has_get_our_spellings_and_take_fractions() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loader")
    parser.add_argument("--compress_pos_emb", type=int, default=1)
    parser.add_argument("--max_seq_len", type=int, default=2048)
    add_flags(parser)
    add_flags(parser)
    assert parser.parse_args(["--compress_pos_emb", "2.5"]).compress_pos_emb == 2.5
    found = parser.parse_args(["--compress-pos-emb", "3", "--ctx-size", "512"])
    assert (found.compress_pos_emb, found.max_seq_len) == (3.0, 512)


def test_a_context_in_the_spelling_of_another_version_counts_as_given(root: Path) -> None:
    with running_webui(root, "--model", "demo", "--max-seq-len=320") as modules:
        start(modules)
        assert "ctx_size" in modules.shared.provided_arguments
        assert modules.shared.model.ropewalk_model.max_seq_len == 320


def test_no_flag_is_added_to_other_parsers(root: Path) -> None:
    with running_webui(root):
        parser = argparse.ArgumentParser()
        with pytest.raises(SystemExit):
            parser.parse_args(["--rope-method", "yarn"])


def test_after_the_parser_the_arguments_have_our_defaults(root: Path) -> None:
    with running_webui(root, late=True) as modules:
        for namespace in (modules.shared.args, modules.shared.args_defaults, modules.shared.original_args):
            assert {item.name: getattr(namespace, item.name) for item in PARAMETERS} == {
                item.name: item.default for item in PARAMETERS
            }


def test_a_gptq_folder_chooses_our_loader_and_others_do_not(webui: SimpleNamespace) -> None:
    metadata = webui.models_settings.get_model_metadata
    assert metadata("demo")["loader"] == "ropewalk"
    assert metadata("dense")["loader"] == "Transformers"
    assert metadata("nowhere")["loader"] is None


def test_selecting_a_model_fills_the_settings_as_it_declares_them(webui: SimpleNamespace) -> None:
    settings = webui.models_settings.get_model_metadata("demo")
    assert (settings["ctx_size"], settings["truncation_length"], settings["truncation_length_info"]) == (512, 512, 512)
    assert (settings["compress_pos_emb"], settings["rope_method"], settings["rope_freq_base"]) == (1.0, "config", 10000)


def test_settings_that_were_saved_win(webui: SimpleNamespace) -> None:
    webui.shared.user_config = {"demo$": {"ctx_size": 128, "rope_method": "yarn", "rope_factor": 2.0}}
    settings = webui.models_settings.get_model_metadata("demo")
    assert (settings["ctx_size"], settings["rope_method"], settings["rope_factor"]) == (128, "yarn", 2.0)


def test_our_settings_of_the_model_before_do_not_stay_with_one_of_another_loader(webui: SimpleNamespace) -> None:
    settings = webui.models_settings.get_model_metadata("dense")
    assert (settings["rope_method"], settings["layer_order"], settings["ctx_size"]) == ("config", "", 512)


def test_a_model_of_the_command_line_is_loaded_with_its_flags(root: Path) -> None:
    flags = ("--model", "demo", "--loader", "ropewalk", "--ctx-size", "384", "--alpha-value", "2")
    with running_webui(root, *flags) as modules:
        start(modules)
        model = modules.shared.model.ropewalk_model
        assert (model.max_seq_len, model.rope.describe().split(",")[:2]) == (384, ["RoPE scaling: ntk", " alpha 2"])
        assert modules.shared.settings["truncation_length"] == 384
        assert modules.shared.args.loader == "ropewalk"
        assert modules.shared.tokenizer.name_or_path.endswith("demo")


def test_a_model_that_cannot_be_loaded_does_not_end_the_start(root: Path) -> None:
    with running_webui(root, "--model", "cut", "--loader", "ropewalk") as modules:
        start(modules)
        assert modules.shared.model is None
        assert modules.shared.model_name == "None"
        assert '"cut" was not loaded' in modules.console[-1]


def test_functions_that_others_imported_by_name_are_ours_too(webui: SimpleNamespace) -> None:
    model, _ = webui.ui_model_menu.load_model("demo", "ropewalk")
    webui.shared.model = model
    webui.ui_model_menu.unload_model()
    with pytest.raises(RopewalkError):
        model.get_prompt_logits([1, 2])


def test_other_loaders_load_as_before(webui: SimpleNamespace) -> None:
    with pytest.raises(ImportError, match="optimum"):
        webui.models.load_model("dense", "Transformers")
    webui.models.transformers_loader = lambda name: f"transformers' {name}"
    assert webui.models.load_model("dense", "Transformers")[0] == "transformers' dense"


def test_the_console_says_which_loader_it_was(loaded: SimpleNamespace) -> None:
    assert 'LOADER: "ropewalk"' in loaded.console and 'LOADER: "Transformers"' not in loaded.console
    assert type(loaded.shared.args.loader) is str


def test_a_context_of_zero_is_what_the_model_declares(webui: SimpleNamespace) -> None:
    webui.shared.args.ctx_size = 0
    webui.shared.model, _ = webui.models.load_model("demo", "ropewalk")
    assert webui.shared.model.ropewalk_model.max_seq_len == 512
    assert (webui.shared.args.ctx_size, webui.shared.settings["truncation_length"]) == (512, 512)


def test_a_failure_restores_arguments_and_settings(webui: SimpleNamespace) -> None:
    webui.shared.args.loader = "Transformers"
    before = dict(vars(webui.shared.args)), dict(webui.shared.settings)
    with pytest.raises(RopewalkError, match="cut"):
        webui.models.load_model("cut", "ropewalk")
    assert (vars(webui.shared.args), webui.shared.settings) == before
    assert webui.models.transformers_loader.__module__ == "modules.models"


def test_unloading_frees_the_model(loaded: SimpleNamespace) -> None:
    weights = weakref.ref(loaded.shared.model.ropewalk_model)
    held_by_someone = loaded.shared.model
    loaded.models.unload_model()
    gc.collect()
    assert loaded.shared.model is None and weights() is None
    assert held_by_someone is not None


def test_loras_come_back_after_a_model_slept(loaded: SimpleNamespace) -> None:
    loaded.LoRA.add_lora_to_model(["storm"])
    before = reply(loaded)
    loaded.models.unload_model(keep_model_name=True)
    loaded.shared.model, loaded.shared.tokenizer = loaded.models.load_model(loaded.shared.model_name)
    assert loaded.shared.lora_names == ["storm"]
    assert reply(loaded) == before
    loaded.models.unload_model()
    loaded.shared.model, loaded.shared.tokenizer = loaded.models.load_model("demo")
    assert loaded.shared.lora_names == []


def test_loras_are_applied_added_and_removed(loaded: SimpleNamespace) -> None:
    plain = reply(loaded)
    loaded.LoRA.add_lora_to_model(["storm", "poet"])
    assert loaded.shared.model.used_adapters == (("storm", 1.0), ("poet", 1.0))
    assert loaded.shared.lora_names == ["storm", "poet"]
    loaded.LoRA.add_lora_to_model(["poet"])
    assert loaded.shared.model.adapters == ("poet",)
    assert reply(loaded) != plain
    loaded.LoRA.add_lora_to_model([])
    assert reply(loaded) == plain


def test_adapters_that_a_model_asks_for_are_used_until_others_are_chosen(
    webui: SimpleNamespace, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = root / "models" / "demo" / "adapters" / "linear-4"
    monkeypatch.setattr(loading, "default_adapters", lambda folder: [wanted])
    webui.shared.model, webui.shared.tokenizer = webui.models.load_model("demo", "ropewalk")
    assert webui.shared.model.used_adapters == (("linear-4", 1.0),)
    webui.LoRA.add_lora_to_model(["storm"])
    assert webui.shared.model.adapters == ("storm",)
    webui.shared.args.alpha_value = 2.0
    webui.shared.model, webui.shared.tokenizer = webui.models.load_model("demo", "ropewalk")
    assert webui.shared.model.used_adapters == ()


def test_loras_may_have_weights_and_layers(loaded: SimpleNamespace) -> None:
    plain = reply(loaded)
    loaded.LoRA.add_lora_to_model(["storm:0.5@1-2", "poet"])
    assert loaded.shared.model.used_adapters == (("storm", 0.5, (1, 2)), ("poet", 1.0))
    assert loaded.shared.lora_names == ["storm:0.5@1-2", "poet"]
    loaded.LoRA.add_lora_to_model(["storm:0"])
    assert reply(loaded) == plain
    with pytest.raises(RopewalkError, match="LoRAs"):
        loaded.LoRA.add_lora_to_model(["storm:heavy"])
    with pytest.raises(RopewalkError, match="nowhere"):
        loaded.LoRA.add_lora_to_model(["poet", "nowhere"])
    assert loaded.shared.model.adapters == ("storm",)


def test_the_api_sets_our_settings(webui: SimpleNamespace) -> None:
    arguments = {
        "ctx_size": 320,
        "compute_mode": "exact",
        "chunk_size": 128,
        "cache_type": "fp32",
        "layer_order": "0,0-4",
    }
    webui.api_models._load_model({"model_name": "demo", "args": arguments})
    model = webui.shared.model.ropewalk_model
    assert (model.max_seq_len, model.cache_type, model.backend.compute) == (320, "fp32", "exact")
    assert str(model.layer_order) == "0*2,1-4"
    webui.api_models._load_model({"model_name": "demo"})
    assert webui.shared.model.ropewalk_model.max_seq_len == 512


@pytest.mark.parametrize(
    ("name", "arguments"), [("cut", {}), ("demo", {"cache_type": "q5"}), ("demo", {"rope_method": "bent"})]
)
def test_the_api_refuses_what_cannot_be_loaded_and_the_model_before_still_runs(
    loaded: SimpleNamespace, name: str, arguments: dict[str, str]
) -> None:
    before = reply(loaded)
    with pytest.raises(RopewalkError):
        loaded.api_models._load_model({"model_name": name, "args": arguments})
    assert reply(loaded) == before
    assert loaded.shared.model_name == "demo"


def test_training_is_refused_on_our_model_only(loaded: SimpleNamespace) -> None:
    assert list(loaded.training.do_train("mine")) == [REFUSAL]
    loaded.models.unload_model()
    assert list(loaded.training.do_train("mine"))[-1] == "trained mine"


def test_a_line_after_each_reply_says_what_was_reused(loaded: SimpleNamespace) -> None:
    reply(loaded)
    reply(loaded, [1, 5, 6, 8])
    lines = [line for line in loaded.console if "prompt" in line]
    assert "prompt 4 tokens (0 reused)" in lines[0] and "prompt 4 tokens (3 reused)" in lines[1]
    assert "new 4 tokens" in lines[1] and "of 256" in lines[1]
    assert loaded.shared.model.last_prompt_token_count == 4


def test_tokens_stay_in_main_memory_for_our_model_only(loaded: SimpleNamespace) -> None:
    assert loaded.text_generation.encode([1, 2]).tolist() == [[1, 2]]
    assert loaded.shared.args.cpu is False
    loaded.models.unload_model()
    with pytest.raises(RuntimeError, match="cuda"):
        loaded.text_generation.encode([1, 2])


def test_tokens_follow_our_model_to_its_card(loaded: SimpleNamespace) -> None:
    loaded.shared.model._device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="cuda"):
        loaded.text_generation.encode([1, 2])


def test_our_messages_go_where_those_of_the_web_ui_go(webui: SimpleNamespace) -> None:
    ours = logging.getLogger("ropewalk")
    assert ours.handlers == webui.logging_colors.logger.handlers and not ours.propagate


def test_an_extension_that_came_too_late_for_model_says_so(root: Path) -> None:
    def load_with_transformers(modules: SimpleNamespace) -> None:
        modules.shared.model = "a model of transformers"

    with running_webui(root, "--loader", "ropewalk", late=True, change=load_with_transformers) as modules:
        assert "comes too late" in modules.console[-1]
        modules.shared.model = None


def older(modules: SimpleNamespace) -> None:
    """The shape of versions up to v3.0 (huggingface_loader, list_model_elements in modules.ui, other names)."""
    modules.ui.list_model_elements = modules.loaders.list_model_elements
    del modules.loaders.list_model_elements
    modules.models_settings.loaders = modules.ui
    for namespace in (modules.shared.args, modules.shared.args_defaults, modules.shared.original_args):
        namespace.max_seq_len = namespace.__dict__.pop("ctx_size")
        namespace.compress_pos_emb = 1
    for names in modules.loaders.loaders_and_params.values():
        names[:] = ["max_seq_len" if name == "ctx_size" else name for name in names if name != "cache_type"]
    modules.loaders.loaders_and_params["ExLlamav3_HF"].append("compress_pos_emb")


def test_names_of_older_versions_are_used(root: Path) -> None:
    with running_webui(root, late=True, change=older) as modules:
        assert "max_seq_len" in modules.loaders.loaders_and_params["ropewalk"]
        assert not hasattr(modules.shared.args, "ctx_size")
        settings = modules.models_settings.get_model_metadata("demo")
        assert settings["max_seq_len"] == 512
        assert OWN_NAMES | {"cache_type"} <= set(modules.ui.list_model_elements())


@pytest.mark.parametrize(
    "hook", [hook for hook in HOOKS if hook.names and hook.module.startswith("modules.")], ids=lambda hook: hook.concern
)
def test_a_hook_that_finds_nothing_says_so_and_the_others_work(root: Path, hook: Hook) -> None:
    name = hook.names[0]

    def remove(modules: SimpleNamespace) -> None:
        delattr(vars(modules)[hook.module.removeprefix("modules.").replace(".", "_")], name)

    with running_webui(root, late=True, change=remove) as modules:
        console = modules.console
        assert all(
            is_patched(getattr(modules.models, other)) for other in ("load_model", "unload_model") if other != name
        )
    if name != "logger":  # without that we have no way to say so
        assert console == [
            f"ropewalk: {hook.concern} is not available in this version of the web UI: {hook.module} has no {name}"
        ]


def test_values_that_are_none_are_refused_by_name(webui: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="ctx_size must be a whole number, got 'many'"):
        webui.api_models._load_model({"model_name": "demo", "args": {"ctx_size": "many"}})
