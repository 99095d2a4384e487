"""The hand-written `_core.pyi` says what the compiled module says: names, arguments, their order and types."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import ropewalk
from ropewalk import _core

STUB = Path(ropewalk.__file__).with_name("_core.pyi")

# How pybind11 spells a type in a signature, which depends on its version, and how the stub does.
SPELLINGS = {
    r"typing\.SupportsInt( \| typing\.SupportsIndex)?": "int",
    r"typing\.SupportsFloat( \| typing\.SupportsIndex)?": "float",
    r"(collections\.abc|typing)\.Sequence": "Sequence",
    r"\bSequence\[object\]|\blist\[object\]": "Sequence[object]",
    r"ropewalk\._core\.": "",
    r"typing\.Annotated\[Sequence\[int\], 'FixedSize\(4\)'\]": "Columns",
    r"\bList\[": "list[",
}


def normalised(arguments: list[tuple[str, str]], result: str) -> tuple:
    def plain(type_name: str) -> str:
        for pattern, spelling in SPELLINGS.items():
            type_name = re.sub(pattern, spelling, type_name)
        return type_name.strip()

    return tuple((name, plain(type_name)) for name, type_name in arguments if name != "self"), plain(result)


def stub_function(node: ast.FunctionDef) -> tuple:
    arguments = [(a.arg, ast.unparse(a.annotation) if a.annotation else "") for a in node.args.args]
    return normalised(arguments, ast.unparse(node.returns))


def module_function(function) -> tuple:
    """From the first line of a pybind11 docstring: `name(a: int, b: list[str]) -> None`."""
    head = ast.parse(f"def {function.__doc__.splitlines()[0]}: ...").body[0]
    assert isinstance(head, ast.FunctionDef) and head.name == function.__name__
    return stub_function(head)


def is_property(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "property" for d in node.decorator_list)


def described_by_stub() -> dict[str, object]:
    described: dict[str, object] = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            described[node.name] = stub_function(node)
        elif isinstance(node, ast.ClassDef):
            described[node.name] = "class"
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    described[f"{node.name}.{member.name}"] = (
                        "property" if is_property(member) else stub_function(member)
                    )
    return described


def described_by_module() -> dict[str, object]:
    described: dict[str, object] = {}
    for name, value in vars(_core).items():
        if isinstance(value, type):
            described[name] = "class"
            for member_name, member in vars(value).items():
                if isinstance(member, property):
                    described[f"{name}.{member_name}"] = "property"
                elif not member_name.startswith("_") or (
                    member_name == "__init__" and "(self:" in (member.__doc__ or "")
                ):
                    described[f"{name}.{member_name}"] = module_function(member)
        elif callable(value) and not name.startswith("_"):
            described[name] = module_function(value)
    return described


def test_the_stub_describes_the_module():
    stub, module = described_by_stub(), described_by_module()
    assert len(module) > 20
    assert stub == module
