"""Imports point one way, few modules know other libraries, and `import ropewalk` costs next to nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import ropewalk

PACKAGE = Path(ropewalk.__file__).parent

# Every module, each after all that it may import: a new one gets its line here. From files to text to the user.
ORDER = [
    *("errors", "memory", "json_config", "text_cursor"),
    *("config", "quant_config", "layer_order", "adapter_request"),
    *("rope_methods", "rope_spellings", "rope_config", "rope"),
    *("safetensors_file", "weight_files", "checkpoint", "foreign_layouts"),
    *("gptq_bits", "gptq_groups", "gptq_zeros", "gptq_shapes", "gptq"),
    *("tensor_table", "tensor_check", "tensors"),
    *("_core", "native", "backends", "backends.protocol", "backends.reference", "backends.cpu"),
    *("second_model", "load_plan", "export_config", "export_layers"),
    *("lora_config", "adapter_folders", "lora_files", "lora", "low_rank"),
    *("cache", "layers", "adapters", "model", "loader", "info"),
    *("sampling", "generate", "evaluate", "routing"),
    *("tokenizer_base", "tokenizer_settings", "tokenizer_json", "tokenizer_sentencepiece", "tokenizer"),
    *("chat_formats", "chat", "stops", "turn_queue", "cache_pool", "text_stream", "engine"),
    *("variants", "compare", "retrieval", "plots"),
    *("hf.history", "hf.reply_clock", "hf.runner", "hf.refusals", "hf.hf_config", "hf.causal_lm", "hf"),
    *("webui.patching", "webui.hook", "webui.import_hook", "webui.parameters", "webui.model_settings", "webui.running"),
    *("webui.hooks.console", "webui.hooks.arguments", "webui.hooks.loader_table", "webui.hooks.model_defaults"),
    *("webui.hooks.lora", "webui.hooks.loading", "webui.hooks.device", "webui.hooks.report", "webui.hooks.model_tab"),
    *("webui.hooks.messages", "webui.hooks.training", "webui.hooks.api_load", "webui.hooks"),
    *("webui.registration", "webui", "webui.autostart", "webui.launch"),
    "demo",
    *("webui.checkout", "webui.extension", "webui.embedded_model", "webui.startup_file", "cli_webui"),
    *("cli_options", "cli_chat", "cli_lab", "cli_demo"),
    *("server", "server.notes", "server.errors", "server.schema", "server.refusals", "server.model_names"),
    *("server.requests", "server.jobs", "server.replies", "server.metrics", "server.middleware", "server.answers"),
    *("server.app", "server.uvicorn_server", "server.launch"),
    *("cli_serve", "cli", "__main__"),
]
PAGE = "gradio_demo"  # above all of these; test_demo_session.py looks at its own order

EVERYWHERE = {"numpy", "torch"}
LIBRARIES = {
    "chat": {"jinja2"},
    "cli_options": {"tqdm"},
    "cli_lab": {"matplotlib"},
    "export_layers": {"safetensors"},
    "hf": {"transformers"},
    "hf.causal_lm": {"transformers"},
    "hf.hf_config": {"transformers"},
    "hf.history": {"transformers"},
    "plots": {"matplotlib"},
    "safetensors_file": {"safetensors"},
    "server.answers": {"starlette"},
    "server.app": {"fastapi", "prometheus_client"},
    "server.errors": {"fastapi", "starlette"},
    "server.launch": {"uvicorn"},
    "server.metrics": {"prometheus_client"},
    "server.middleware": {"starlette"},
    "server.schema": {"pydantic"},
    "server.uvicorn_server": {"uvicorn"},
    "tokenizer_json": {"tokenizers"},
    "tokenizer_sentencepiece": {"sentencepiece"},
    "webui.hooks.model_tab": {"gradio"},
}
# Those that start fast by importing the rest when it is needed, and the loader, which runs without a compiled core.
IMPORT_WHEN_CALLED = {
    *("cli", "cli_demo", "cli_lab", "cli_options", "cli_serve", "cli_webui", "loader", "plots"),
    *("webui.registration", "webui.hooks.loading", "webui.hooks.model_tab"),
}
# Text, files and token ids stay apart: none of these modules may import one of those, even through others.
APART = {
    "the decoder knows no text": (["model", "layers", "backends.cpu", "loader"], ["tokenizer_base", "chat"]),
    "kernels know no checkpoints": (["native"], ["checkpoint", "config"]),
    "generation knows token ids only": (["generate", "sampling", "evaluate"], ["tokenizer_base", "chat"]),
    "reading knows no kernels": (["tensors", "rope", "info"], ["native", "model"]),
}


@dataclass(frozen=True)
class Import:
    """One imported module; ours by its name within the package, others by that of their top package."""

    name: str
    ours: bool
    when_called: bool
    for_types: bool


def modules() -> dict[str, ast.Module]:
    """Every Python file of the package, by its name within it ("" is the package itself)."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == PAGE:
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imports_of(module: str) -> list[Import]:
    found: list[Import] = []

    def add(full: str, when_called: bool, for_types: bool) -> None:
        top, _, rest = full.partition(".")
        found.append(Import(rest if top == "ropewalk" else top, top == "ropewalk", when_called, for_types))

    def visit(node: ast.AST, when_called: bool, for_types: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, when_called, for_types)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                add(whole if whole.removeprefix("ropewalk.") in ORDER else node.module, when_called, for_types)
        inner_called = when_called or isinstance(node, (ast.FunctionDef, ast.Lambda))
        inner_types = for_types or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            visit(child, inner_called, inner_types)

    visit(MODULES[module], False, False)
    return found


def test_every_module_has_its_place_in_the_order() -> None:
    assert len(set(ORDER)) == len(ORDER)
    assert set(MODULES) - {""} == set(ORDER) - {"_core"}


@pytest.mark.parametrize("module", [name for name in ORDER if name in MODULES])
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    ours = {found.name for found in imports_of(module) if found.ours and found.name}
    ours = {name for name in ours if name.split(".")[0] != PAGE}
    later = {name for name in ours if ORDER.index(name) >= ORDER.index(module)}
    assert not later, f"{module} imports {sorted(later)}, which may import it"


@pytest.mark.parametrize("module", [name for name in ORDER if name in MODULES])
def test_other_libraries_are_known_to_few(module: str) -> None:
    others = {found.name for found in imports_of(module) if not found.ours} - set(sys.stdlib_module_names)
    assert others <= EVERYWHERE | LIBRARIES.get(module, set())


def test_only_named_modules_import_when_called() -> None:
    def imports_when_called(module: str) -> bool:
        return any(found.when_called and found.name not in sys.stdlib_module_names for found in imports_of(module))

    assert {module for module in MODULES if imports_when_called(module)} == IMPORT_WHEN_CALLED


@pytest.mark.parametrize("rule", APART)
def test_concerns_stay_apart(rule: str) -> None:
    upper, lower = APART[rule]
    for module in upper:
        reached, waiting = set(), [module]
        while waiting:
            for found in imports_of(waiting.pop()):
                if found.ours and not found.for_types and found.name in MODULES and found.name not in reached:
                    reached.add(found.name)
                    waiting.append(found.name)
        assert not reached & set(lower), f"{module}: {rule}"


def loaded_by(source: str) -> set[str]:
    """The top packages in memory after `source` has run in a fresh process."""
    program = f"{source}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_imports_no_other_library() -> None:
    loaded = loaded_by("import ropewalk")
    assert "ropewalk" in loaded
    heavy = {"torch", "numpy", "tokenizers", "sentencepiece", "jinja2", "safetensors", "tqdm", "transformers", "gradio"}
    assert not loaded & heavy


def test_everything_public_works_without_optional_libraries() -> None:
    loaded = loaded_by(f"from ropewalk import {', '.join(ropewalk.__all__)}")
    assert {"torch", "numpy"} <= loaded
    assert not loaded & {"transformers", "gradio", "matplotlib", "psutil", "pandas", "accelerate"}


@pytest.mark.parametrize("name", ropewalk.__all__)
def test_a_public_name_resolves_and_says_what_it_is(name: str) -> None:
    assert getattr(ropewalk, name).__doc__


def test_the_names_of_the_documented_interface_are_public() -> None:
    assert set(ropewalk.__all__) >= {
        "load_model",
        "resolve_rope",
        "Engine",
        "load_tokenizer",
        "SamplingParams",
        "native",
    }


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        _ = ropewalk.load_modle
