"""Our extension in a checkout: written, removed, and its traces cleaned up."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ropewalk.base.errors import ConfigError
from ropewalk.faces.webui.checkout import Checkout
from ropewalk.faces.webui.parameters import PARAMETERS

# loader_plugin/script.py, which a test keeps equal.
SCRIPT = '''"""The ropewalk model loader, as an extension of text-generation-webui."""

from modules.logging_colors import logger  # of the web UI, which silences every other

params = {"display_name": "ropewalk"}

try:
    from ropewalk.webui import register
except ImportError as error:  # the server would end
    logger.error("the ropewalk loader is not installed in this Python environment: %s", error)
else:
    register()
'''

_OUR_LOADER = re.compile(r"""^(\s+)loader:\s*['"]?ropewalk['"]?\s*$""", re.IGNORECASE)
_OUR_ITEM = re.compile(r"""^\s*-\s*['"]?ropewalk['"]?\s*$""")
_OUR_PARAMS = re.compile(r"^ropewalk-[\w-]+:")
_MENTION = re.compile(r"\bropewalk\b", re.IGNORECASE)
# Keys in config-user.yaml that no loader of the web UI has had.
_OUR_KEYS = {"rope_method", "rope_factor", "chunk_size", "compute_mode", "layer_order"} & {p.name for p in PARAMETERS}


def install(checkout: Checkout) -> Path:
    """Write the extension; its script.

    Raises:
        ConfigError: the folder has a script of someone else, or cannot be written.
    """
    script = checkout.extension / "script.py"
    if script.exists() and "ropewalk" not in script.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{script} exists and is not ours: it was left as it is")
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(SCRIPT, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{script} cannot be written: {error.strerror or error}") from error
    return script


def uninstall(checkout: Checkout) -> list[str]:
    """Remove the extension and what names our loader in the yaml files, where the web UI would fail over it. What was
    done, line by line, and what is left to the person."""
    done = []
    if checkout.extension.is_dir():
        if {path.name for path in checkout.extension.iterdir()} <= {"script.py", "__pycache__"}:
            shutil.rmtree(checkout.extension)
            done.append(f"removed {checkout.extension}")
        else:
            done.append(f"{checkout.extension} has files of someone else and was left: remove it if you do not need it")
    for path in checkout.settings_files:
        before = path.read_text(encoding="utf-8")
        after = clean_yaml(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            done.append(f"cleaned {path}")
    return [*done, *(f"{place} still names ropewalk: edit it" for place in mentions(checkout))]


def mentions(checkout: Checkout) -> list[str]:
    """Lines of yaml and flag files that name our loader, as FILE:LINE."""
    found = []
    for path in (*checkout.settings_files, *checkout.flag_files):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found += [f"{path}:{number}" for number, line in enumerate(lines, 1) if _names_loader(line)]
    return found


def _names_loader(line: str) -> bool:
    code = line.split("#")[0]
    named = _OUR_ITEM.match(code) or re.search(r"loader\W+ropewalk\b|extensions\W.*\bropewalk\b", code, re.IGNORECASE)
    return bool(named)


def clean_yaml(text: str) -> str:
    """A settings file of the web UI without our loader: the models that it was chosen for choose theirs anew, keeping
    their other settings. Lines that are not ours stay as they are.
    """
    blocks: list[list[str]] = []
    for line in text.splitlines(keepends=True):
        starts = line.strip() and not line[0].isspace() and not line.startswith(("-", "#"))
        if starts or not blocks:
            blocks.append([])
        blocks[-1].append(line)
    return "".join(line for block in blocks for line in _clean_block(block))


def _clean_block(block: list[str]) -> list[str]:
    """One top-level key with what is below it. A key left with nothing below gets an empty value, as the web UI fails
    over one without."""
    head, body = block[0], block[1:]
    if _OUR_PARAMS.match(head):
        return []
    ours = any(_OUR_LOADER.match(line) for line in body)
    kept = [line for line in body if not (_OUR_LOADER.match(line) or _OUR_ITEM.match(line))]
    if ours:
        kept = [line for line in kept if line.split(":")[0].strip() not in _OUR_KEYS]
    if kept == body or any(line.strip() and not line.lstrip().startswith("#") for line in kept):
        return [head, *kept]
    empty = "[]" if any(_OUR_ITEM.match(line) for line in body) else "{}"
    return [f"{head.rstrip()} {empty}\n", *kept]
