"""The stand-in of the web UI, imported into this process with our hooks, and removed again."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from ropewalk.faces.webui import register
from ropewalk.faces.webui.import_hook import WebuiFinder
from ropewalk.files.embedded import demo_model_path

STAND_IN = Path(__file__).resolve().parents[1] / "faces" / "webui" / "stand_in"
FOREIGN = ("modules", "gradio")
# In an order in which the real server imports them.
NAMES = (
    *("logging_colors", "shared", "utils", "loaders", "models_settings", "models", "LoRA", "text_generation"),
    *("training", "ui", "ui_model_menu", "extensions", "api.models", "api.script", "transformers_loader"),
)


def make_folders(root: Path) -> Path:
    """models/ with the embedded model ("demo"), one without weights ("cut"), a dense one ("dense") and what
    `make_unreadable` makes; loras/."""
    models = root / "models"
    shutil.copytree(demo_model_path(), models / "demo")
    shutil.copytree(demo_model_path(), models / "cut", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(models / "cut", models / "dense", ignore=shutil.ignore_patterns("quantize_config.json"))
    config = json.loads((models / "dense" / "config.json").read_text())
    config.pop("quantization_config", None)
    (models / "dense" / "config.json").write_text(json.dumps(config))
    make_unreadable(models)
    for seed, name in enumerate(("storm", "poet")):
        write_adapter(root / "loras" / name, config, seed)
    (root / "loras" / "bad").mkdir()
    (root / "loras" / "bad" / "adapter_config.json").write_text("{}")
    return root


def make_unreadable(models: Path) -> None:
    """Models that our loader does not read ("falcon" in GPTQ, "awq" of version gemv), without a tokenizer ("mute"), or
    with one that transformers cannot load ("garbled")."""
    config = json.loads((models / "demo" / "config.json").read_text())
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    for name, changes in {
        "falcon": {"model_type": "falcon", "architectures": ["FalconForCausalLM"], "quantization_config": gptq},
        "awq": {"quantization_config": {**gptq, "quant_method": "awq", "version": "gemv", "zero_point": True}},
    }.items():
        shutil.copytree(models / "demo", models / name, ignore=shutil.ignore_patterns("quantize_config.json"))
        (models / name / "config.json").write_text(json.dumps(config | changes))
    shutil.copytree(models / "demo", models / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(models / "demo", models / "garbled")
    (models / "garbled" / "tokenizer.model").write_bytes(b"not a tokenizer")


def write_adapter(folder: Path, config: dict[str, Any], seed: int) -> None:
    """A LoRA of random matrices on all query projections, in PEFT's files."""
    folder.mkdir(parents=True)
    generator, hidden = torch.Generator().manual_seed(seed), config["hidden_size"]
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, hidden, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(hidden, 4, generator=generator)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _forget() -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in FOREIGN:
            del sys.modules[name]


@contextmanager
def running_webui(
    root: Path,
    *flags: str,
    late: bool = False,
    change: Callable[[SimpleNamespace], None] | None = None,
) -> Iterator[SimpleNamespace]:
    """The modules of the stand-in by name, as after the start of a server with these flags and our loader. `console`:
    what was said there.

    late: we come when everything is imported, as an extension does. change: applied to the modules before we come, to
    give them the shape of another version (with `late`).
    """
    ours = logging.getLogger("ropewalk")
    logging_before = ours.handlers, ours.level, ours.propagate
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] in FOREIGN}
    arguments, path, finders = sys.argv, list(sys.path), list(sys.meta_path)
    _forget()
    sys.argv = ["server.py", "--model-dir", str(root / "models"), "--lora-dir", str(root / "loras"), *flags]
    sys.path.insert(0, str(STAND_IN))
    console: list[str] = []
    theirs = logging.getLogger("webui-stand-in")
    theirs.addHandler(_Recorder(console))
    try:
        if not late:
            register()
        webui = SimpleNamespace(**{name.replace(".", "_"): _import(name) for name in NAMES}, console=console)
        if late:
            if change is not None:
                change(webui)
            register()
        yield webui
    finally:
        if (shared := sys.modules.get("modules.shared")) is not None and shared.model is not None:
            sys.modules["modules.models"].unload_model()
        _forget()
        sys.modules.update(saved)
        sys.argv, sys.path[:], sys.meta_path[:] = arguments, path, finders
        ours.handlers, ours.level, ours.propagate = logging_before
        theirs.handlers = []


class _Recorder(logging.Handler):
    """Keeps what is said on the console of the web UI."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))


def _import(name: str) -> ModuleType:
    return importlib.import_module(f"modules.{name}")


def start(webui: SimpleNamespace) -> None:
    """The part of server.py between the imports and the page."""
    shared = webui.shared
    if shared.args.model is not None:
        metadata = webui.models_settings.get_model_metadata(shared.args.model)
        webui.models_settings.update_model_parameters(metadata, initial=True)
        shared.model, shared.tokenizer = webui.models.load_model(shared.args.model)
    shared.generation_lock = object()


def build_page(webui: SimpleNamespace) -> tuple[list[Any], list[Any]]:
    """Build the Model tab and connect its events; the components shown per loader and those gathered."""
    gradio = sys.modules["gradio"]
    with gradio.Column():
        webui.ui_model_menu.create_ui()
    return webui.ui_model_menu.create_event_handlers()


def select(webui: SimpleNamespace, name: str) -> str:
    """What the page says once a model is selected."""
    *_, text = webui.ui_model_menu.load_model_wrapper(name, "llama.cpp", autoload=False)
    return text


def press_load(webui: SimpleNamespace, name: str, loader: str) -> str:
    """What the page says last once Load is pressed."""
    *_, text = webui.ui_model_menu.load_model_wrapper(name, loader, autoload=True)
    return text


def registered_finders() -> list[WebuiFinder]:
    """Our import hooks in this process."""
    return [finder for finder in sys.meta_path if isinstance(finder, WebuiFinder)]


def reply(webui: SimpleNamespace, prompt: list[int] | None = None) -> list[int]:
    """The tokens of a reply through the web UI's generation, with those of the prompt."""
    return list(webui.text_generation.generate_reply(prompt or [1, 5, 6, 7], {"max_new_tokens": 4}))[-1]
