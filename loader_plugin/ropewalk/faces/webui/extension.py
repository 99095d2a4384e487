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

from modules.logging_colors import logger  # the web UI's own: it silences all others

params = {"display_name": "ropewalk"}

try:
    from ropewalk.webui import register
except ImportError as error:  # it would end the server
    logger.error("the ropewalk loader is not installed in this Python environment: %s", error)
else:
    register()
'''

_OUR_LOADER = re.compile(r"""^(\s+)loader:\s*['"]?ropewalk['"]?\s*$""", re.IGNORECASE)
_OUR_ITEM = re.compile(r"""^\s*-\s*['"]?ropewalk['"]?\s*$""")
_OUR_PARAMS = re.compile(r"^ropewalk-[\w-]+:")
# Under all names: settings saved for a model belong to the loader that is saved with them.
_SETTINGS = frozenset(name for item in PARAMETERS for name in (item.name, *item.former_names))


def install(checkout: Checkout) -> Path:
    """Write the extension, and return the path of its script.

    Raises:
        ConfigError: there is a script that is not ours, or the folder cannot be written.
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
    """Remove the extension, and from the yaml files what names our loader, as the web UI would fail on it. Returns what
    was done and what is left to do by hand, one line each."""
    done = []
    if checkout.extension.is_dir():
        if {path.name for path in checkout.extension.iterdir()} <= {"script.py", "__pycache__"}:
            shutil.rmtree(checkout.extension)
            done.append(f"removed {checkout.extension}")
        else:
            done.append(f"{checkout.extension} has other files and was left: remove it if you do not need it")
    only_ours = settings_only_ours(checkout)
    for path in checkout.settings_files:
        before = path.read_text(encoding="utf-8")
        after = clean_yaml(before, only_ours)
        if after != before:
            path.write_text(after, encoding="utf-8")
            done.append(f"cleaned {path}")
    return [*done, *(f"{place} still names ropewalk: edit it" for place in mentions(checkout))]


def mentions(checkout: Checkout) -> list[str]:
    """The lines of yaml and flag files that name our loader or a flag that only it has, as FILE:LINE."""
    flags = [name.replace("_", "[-_]") for name in settings_only_ours(checkout)]
    found = []
    for path in (*checkout.settings_files, *checkout.flag_files):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            code = line.split("#")[0]
            has_flag = path in checkout.flag_files and re.search(rf"--({'|'.join(flags)})\b", code)
            if has_flag or _names_loader(code):
                found.append(f"{path}:{number}")
    return found


def _names_loader(code: str) -> bool:
    named = _OUR_ITEM.match(code) or re.search(r"loader\W+ropewalk\b|extensions\W.*\bropewalk\b", code, re.IGNORECASE)
    return bool(named)


def settings_only_ours(checkout: Checkout) -> frozenset[str]:
    """Our settings that this version of the web UI does not know."""
    return frozenset(item.name for item in PARAMETERS if not any(map(checkout.knows, (item.name, *item.former_names))))


def clean_yaml(text: str, only_ours: frozenset[str] = frozenset()) -> str:
    """A settings file of the web UI with our loader removed, and the settings that were saved with it: the web UI then
    chooses a loader anew for those models. Other lines stay as they are.

    only_ours: settings that this version of the web UI does not know; they are removed from every model.
    """
    blocks: list[list[str]] = []
    for line in text.splitlines(keepends=True):
        starts = line.strip() and not line[0].isspace() and not line.startswith(("-", "#"))
        if starts or not blocks:
            blocks.append([])
        blocks[-1].append(line)
    return "".join(line for block in blocks for line in _clean_block(block, only_ours))


def _clean_block(block: list[str], only_ours: frozenset[str]) -> list[str]:
    """One top-level key and the lines below it, cleaned. If nothing is left below, the key gets an empty value: the web
    UI fails on a key without one."""
    head, body = block[0], block[1:]
    if _OUR_PARAMS.match(head):
        return []
    settings = _SETTINGS if any(_OUR_LOADER.match(line) for line in body) else only_ours
    kept = [line for line in _without(body, settings) if not (_OUR_LOADER.match(line) or _OUR_ITEM.match(line))]
    if kept == body or any(line.strip() and not line.lstrip().startswith("#") for line in kept):
        return [head, *kept]
    empty = "[]" if any(_OUR_ITEM.match(line) for line in body) else "{}"
    return [f"{head.rstrip()} {empty}\n", *kept]


def _without(body: list[str], settings: frozenset[str]) -> list[str]:
    """The lines below a model, without those that set one of `settings`; a value may continue in deeper lines."""
    kept, depth = [], None
    for line in body:
        text = line.lstrip(" ")
        indent = len(line) - len(text)
        if depth is not None and (not text.strip() or indent > depth):
            continue
        depth = indent if indent and text.partition(":")[0].strip() in settings else None
        if depth is None:
            kept.append(line)
    return kept
