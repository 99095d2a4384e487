"""Imports point one way, room by room; few modules know other libraries; `import ropewalk` costs next to nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import ropewalk
from ropewalk.families import FAMILIES

PACKAGE = Path(ropewalk.__file__).parent

# The rooms, each after all that it may import.
ROOMS = (
    *("base", "families", "config", "rope", "files", "gptq", "containers", "weights", "native", "backends", "adapters"),
    *("model", "generate", "text", "engine", "measure", "tour", "faces", "cluster"),
)
PUBLIC = {"errors", "hf", "native", "webui", "__main__"}  # paths that people import; they only point into a room
PAGE = "gradio_demo"  # above all of these; tests/gradio_demo looks at its own order
STARTED = {("faces.cli.demo", PAGE), ("faces.cli.replicas", "cluster")}  # what the command line starts from above it

EVERYWHERE = {"numpy", "torch"}
LIBRARIES = {  # a room, or a module where the others of its room need nothing
    "backends.gpu": {"triton"},
    "cluster": {"aiohttp", "fastapi", "prometheus_client", "ray", "starlette", "uvicorn", "yarl"},
    "files": {"safetensors"},
    "files.hub": {"huggingface_hub"},
    "files.remote_headers": {"huggingface_hub"},
    "model.export": {"safetensors"},
    "text.chat": {"jinja2"},
    "text.template_worker": {"jinja2"},
    "text.tokenizer.json": {"tokenizers"},
    "text.tokenizer.sentencepiece": {"sentencepiece"},
    "measure.plots": {"matplotlib"},
    "faces.cli.list": {"huggingface_hub"},
    "faces.cli.measuring": {"matplotlib"},
    "faces.cli.terminal": {"tqdm"},
    "faces.hf": {"transformers"},
    "faces.server": {"fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"},
    "faces.webui.hooks.model_tab": {"gradio"},
}
# Those that start fast by importing the rest when it is needed, and the choice of a backend, which needs one alone: the
# compiled core or Triton.
IMPORT_WHEN_CALLED = {
    *("__main__", "cluster"),
    *(
        "faces.cli.adapter_options",
        "faces.cli.bench",
        "faces.cli.cache",
        "faces.cli.demo",
        "faces.cli.gpu",
        "faces.cli.lab",
        "faces.cli.list",
        "faces.cli.loading",
        "faces.cli.main",
        "faces.cli.options",
        "faces.cli.replicas",
        "faces.cli.sampling_options",
        "faces.cli.serve",
        "faces.cli.terminal",
        "faces.cli.torchrun",
        "faces.cli.tour",
    ),
    *("faces.cli.divergence", "faces.cli.measuring", "faces.cli.perplexity", "faces.cli.report"),
    *("faces.cli.webui", "files.local", "measure.plots", "model.backend_choice", "model.backends"),
    *("faces.webui.hooks.loading", "faces.webui.hooks.model_tab", "faces.webui.registration"),
}
# Text, files and token ids stay apart: nothing in these rooms may reach one of those, even through others.
APART = {
    "the decoder knows no text": (["model", "backends"], ["text"]),
    "kernels know no checkpoints": (["native"], ["files", "config"]),
    "generation knows token ids only": (["generate"], ["text"]),
    "reading knows no kernels": (["weights", "rope", "model.info"], ["native", "model.model"]),
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
        if parts[0] != PAGE:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imports_of(module: str) -> list[Import]:
    """What a module imports, with whether it does so at once, only when called, or only for types."""
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
                add(whole if whole.removeprefix("ropewalk.") in MODULES else node.module, when_called, for_types)
        inner_called = when_called or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        inner_types = for_types or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            visit(child, inner_called, inner_types)

    visit(MODULES[module], False, False)
    return found


def room_of(module: str) -> str:
    """The room of a module; the faces count each for itself."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "faces" else parts[0]


INSIDE = [name for name in MODULES if name.split(".")[0] in ROOMS]


def test_every_module_is_in_a_room() -> None:
    assert {name.split(".")[0] for name in MODULES} == {"", *ROOMS, *PUBLIC}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_the_rooms_before_it(room: str) -> None:
    before = ROOMS[: ROOMS.index(room) + 1]
    for module in (name for name in INSIDE if name.split(".")[0] == room):
        for found in imports_of(module):
            if found.ours and found.name:
                top = found.name.split(".")[0]
                allowed = top in before or top == "_core" or (module, top) in STARTED
                assert allowed, f"{module} imports {found.name}, which may import it"


def test_no_module_imports_one_that_imports_it() -> None:
    """Not even when called: only the faces, which the command line starts, may wait for each other."""
    imported = {
        module: {found.name for found in imports_of(module) if found.ours and found.name and not found.for_types}
        for module in MODULES
        if module
    }

    def reached(module: str, on_the_way: tuple[str, ...]) -> None:
        assert module not in on_the_way, f"a cycle: {' -> '.join((*on_the_way, module))}"
        for name in imported.get(module, set()) - done:
            reached(name, (*on_the_way, module))
        done.add(module)

    done: set[str] = set()
    for module in imported:
        if module not in done:
            reached(module, ())


BUILT_ON = ("faces.webui", "faces.hf")  # the web UI is given a transformers model


def test_a_family_is_known_by_name_to_its_own_file_alone() -> None:
    names = set(FAMILIES)
    for module, tree in MODULES.items():
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in names}
        assert strings == ({module.split(".")[1]} if module in {f"families.{name}" for name in names} else set()), (
            module
        )


def test_faces_do_not_import_each_other_unless_the_command_line_starts_them() -> None:
    for module in (name for name in MODULES if name.startswith("faces.")):
        for found in imports_of(module):
            if found.name.startswith("faces.") and not found.for_types and room_of(found.name) != room_of(module):
                started = room_of(module) == "faces.cli" or (room_of(module), room_of(found.name)) == BUILT_ON
                assert started and found.when_called, f"{module} imports {found.name}"


@pytest.mark.parametrize("module", INSIDE)
def test_other_libraries_are_known_to_few(module: str) -> None:
    others = {found.name for found in imports_of(module) if not found.ours} - set(sys.stdlib_module_names)
    known = {place for place in LIBRARIES if module == place or module.startswith(f"{place}.")}
    assert others <= EVERYWHERE.union(*(LIBRARIES[place] for place in known))


def test_only_named_modules_import_when_called() -> None:
    def imports_when_called(module: str) -> bool:
        return any(found.when_called and found.name not in sys.stdlib_module_names for found in imports_of(module))

    assert {module for module in MODULES if imports_when_called(module)} == IMPORT_WHEN_CALLED


@pytest.mark.parametrize(
    "place", [*LIBRARIES, *(place for sides in APART.values() for side in sides for place in side)]
)
def test_the_rules_speak_of_modules_that_there_are(place: str) -> None:
    assert any(module == place or module.startswith(f"{place}.") for module in MODULES)


@pytest.mark.parametrize("rule", APART)
def test_concerns_stay_apart(rule: str) -> None:
    upper, lower = APART[rule]

    def inside(module: str, places: list[str]) -> bool:
        return any(module == place or module.startswith(f"{place}.") for place in places)

    reached: set[str] = set()
    waiting = [module for module in MODULES if inside(module, upper)]
    while waiting:
        for found in imports_of(waiting.pop()):
            if found.ours and not found.for_types and found.name in MODULES and found.name not in reached:
                reached.add(found.name)
                waiting.append(found.name)
    assert not {module for module in reached if inside(module, lower)}


def loaded_by(source: str) -> set[str]:
    """The top packages in memory after `source` has run in a fresh process."""
    program = f"{source}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_imports_no_other_library() -> None:
    loaded = loaded_by("import ropewalk")
    assert "ropewalk" in loaded
    heavy = {"torch", "numpy", "tokenizers", "sentencepiece", "jinja2", "safetensors", "tqdm", "transformers", "gradio"}
    heavy |= {"huggingface_hub"}
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
