"""Drive a real text-generation-webui with our loader on the embedded model, and print a table of what passed.

    python scripts/webui/e2e.py --webui DIR --python DIR/installer_files/env/bin/python
    TEXTGEN_WEBUI_DIR=DIR python scripts/webui/e2e.py --page screenshots/     # its page too, in Chromium (playwright)

The server runs in a copy of the folder and an environment of its own: DIR and its Python stay as they are. The Python
needs what the web UI needs (with --page also its gradio), torch and what ropewalk needs; ropewalk itself is taken from
this checkout, compiled in place. What differs between versions is read from the server: its flags and its endpoints.
The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import long_context
from checks import CHECKS, LORAS, MODEL, PROMPT, Skip, Subject, add_models
from server import NotRunning, Refused, WebuiCopy, WebuiServer, traces

IDLE_LIMIT_S = 200


@dataclass(slots=True)
class Table:
    """The results: (scene, check, pass | fail | skip, what was seen)."""

    only: str = ""
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def check(self, scene: str, name: str, action: Callable[[], str], needed: bool = False) -> bool:
        """Run one check and note what came of it; True if it did not fail. needed: others rest on it, so it is made
        whatever `only` says."""
        if not needed and self.only not in f"{scene}: {name}":
            return True
        start = time.monotonic()
        try:
            status, seen = "pass", action()
        except Skip as reason:
            status, seen = "skip", str(reason)
        except Exception as error:  # whatever a check meets is its result
            status, seen = "fail", f"{type(error).__name__}: {error}".split("Call log:")[0]
            traceback.print_exc()
        self.rows.append((scene, name, status, seen))
        print(f"{status}  {scene}: {name} ({time.monotonic() - start:.1f} s)  {seen}", flush=True)
        return status != "fail"

    @property
    def failed(self) -> bool:
        """True if a check failed, or none was made."""
        return not self.rows or any(status == "fail" for _, _, status, _ in self.rows)

    def print_table(self, title: str) -> None:
        """The whole table, as markdown."""
        print(f"\n| {title}: check | result | seen |\n|---|---|---|")
        for scene, name, status, seen in self.rows:
            flat = " ".join(seen.split()).replace("|", "\\|")
            print(f"| {scene}: {name} | {status} | {flat[:160]} |")
        counts = {status: sum(row[2] == status for row in self.rows) for status in ("pass", "skip", "fail")}
        print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()), flush=True)


def title(check: Callable) -> str:
    """A check's name as words."""
    return check.__name__.replace("_", " ")


@contextmanager
def served(
    table: Table, scene: str, copy: WebuiCopy, *flags: str, command: tuple[str, ...] = ("server.py",)
) -> Iterator:
    """A running server as Subject; or None, with a row that says why."""
    server = WebuiServer(copy, flags, command)
    try:
        if table.check(scene, "the server starts", lambda: str(server.__enter__().alive), needed=True):
            yield Subject(copy, server)
        else:
            yield None
    finally:
        (copy.scratch / f"console {scene}.txt").write_text(server.console(), encoding="utf-8")
        server.stop()


def context_name(copy: WebuiCopy) -> str:
    """What this version calls the context length in its API and its yaml files."""
    known = copy.run("server.py", "--help").replace("-", "_")
    return next(name for name in ("ctx_size", "max_seq_len") if f"__{name}" in known)


def flag(copy: WebuiCopy, name: str) -> str:
    """A flag as this version spells it; one that only our loader has knows both spellings."""
    return f"--{name}" if f"--{name}" in copy.run("server.py", "--help") else f"--{name.replace('_', '-')}"


def extension_scene(table: Table, copy: WebuiCopy) -> None:
    """`ropewalk webui install` without the startup file, the extension active, everything through the API."""
    scene = "extension"
    install = ("webui", "install", "--no-startup", copy.webui)
    table.check(scene, "ropewalk webui install --no-startup", lambda: _first_line(copy, install), needed=True)
    table.check(scene, "ropewalk webui status", lambda: _all_hooks_attach(copy))
    with served(table, scene, copy, "--extensions", "ropewalk") as subject:
        if subject is None:
            return
        subject.noted["context"] = context_name(copy)
        for check in (*CHECKS, *long_context.CHECKS):
            table.check(scene, title(check), partial(check, subject))
        table.check(scene, "nothing failed to attach", lambda: _no_complaints(subject.server))
    table.check(scene, "ropewalk webui uninstall", lambda: _uninstalled(copy))


def launcher_scene(table: Table, copy: WebuiCopy) -> None:
    """`ropewalk webui run`: --model with our loader and flags, a LoRA, unloading when idle."""
    scene, context = "launcher", flag(copy, context_name(copy))
    command = ("-m", "ropewalk", "webui", "run", str(copy.webui), "--")
    flags = ["--model", MODEL, "--loader", "ropewalk", context, "1024", flag(copy, "alpha_value"), "2.5"]
    flags += ["--compute-mode", "exact", "--lora", LORAS[0], "--idle-timeout", "1"]
    with served(table, scene, copy, *flags, command=command) as subject:
        if subject is None:
            return
        table.check(scene, "--model with our loader, flags and --lora", lambda: _loaded(subject, 1024, [LORAS[0]]))
        table.check(scene, "unloaded when idle and loaded again", lambda: _idle(subject))
        table.check(scene, "nothing failed to attach", lambda: _no_complaints(subject.server))


def startup_file_scene(table: Table, copy: WebuiCopy) -> None:
    """`ropewalk webui install`, then a plain server.py with our flags, in CMD_FLAGS.txt if it reads that."""
    scene, flag_file = "startup file", copy.user_data / "CMD_FLAGS.txt"
    flags = ["--loader", "ropewalk", flag(copy, context_name(copy)), "768", flag(copy, "alpha_value"), "2"]
    reads_file = "CMD_FLAGS" in (copy.webui / "modules" / "shared.py").read_text(encoding="utf-8")
    table.check(scene, "ropewalk webui install", lambda: _installed(copy))
    if reads_file:
        flag_file.write_text(" ".join(flags) + "\n")
    with served(table, scene, copy, "--model", MODEL, *([] if reads_file else flags)) as subject:
        if subject is not None:
            table.check(
                scene, f"--model, our flags{' in CMD_FLAGS.txt' * reads_file}", lambda: _loaded(subject, 768, [])
            )
            table.check(scene, "nothing failed to attach", lambda: _no_complaints(subject.server))
    flag_file.unlink(missing_ok=True)


def uninstalled_scene(table: Table, copy: WebuiCopy) -> None:
    """A model saved with our loader, first with `ropewalk webui enable` and then after `uninstall`; and `enable` in the
    underlying Python, which must not matter here."""
    scene, saved = "uninstalled", copy.models(MODEL).parent / "config-user.yaml"
    context = context_name(copy)
    saved.write_text(f"{MODEL}$:\n  loader: ropewalk\n  {context}: 640\n  alpha_value: 2\n  rope_method: config\n")
    copy.ropewalk("webui", "install", copy.webui)
    with served(table, f"{scene}, before", copy, "--model", MODEL) as subject:
        if subject is not None:
            table.check(scene, "before that, a saved model starts", lambda: _loaded(subject, 640, []))
    table.check(scene, "ropewalk webui uninstall", lambda: _uninstalled(copy))
    table.check(
        scene, "the name of our loader, saved for a model, does not end the server", lambda: _starts_without_us(copy)
    )
    copy.ropewalk("webui", "enable", python=copy.base_python)
    with served(table, scene, copy) as subject:
        if subject is not None:
            table.check(scene, "nothing of ours is left, whatever the Python below has", lambda: _gone(subject, copy))
    copy.ropewalk("webui", "disable", python=copy.base_python)


def _first_line(copy: WebuiCopy, command: Sequence[str | Path]) -> str:
    return copy.ropewalk(*command).splitlines()[0]


def _installed(copy: WebuiCopy) -> str:
    printed = copy.ropewalk("webui", "install", copy.webui)
    assert copy.startup_files("venv") and not copy.startup_files("base"), printed
    return "; ".join(printed.splitlines()[:2]).replace(str(copy.scratch), "")


def _all_hooks_attach(copy: WebuiCopy) -> str:
    printed = copy.ropewalk("webui", "status", copy.webui)
    assert "extension     installed" in printed, printed
    assert "missing " not in printed, printed
    return printed.splitlines()[-1]


def _no_complaints(server: WebuiServer) -> str:
    found = [
        line
        for line in server.console().splitlines()
        if "is not available in this version" in line or "the hook for" in line
    ]
    assert not found, found
    return "no such line on the console"


def _uninstalled(copy: WebuiCopy) -> str:
    printed = copy.ropewalk("webui", "uninstall", copy.webui)
    assert (left := traces(copy)) == [], left
    return printed.splitlines()[0]


def _starts_without_us(copy: WebuiCopy) -> str:
    """With a GPTQ model and without us, some versions fail on the model, but none may fail on our name."""
    server = WebuiServer(copy, ("--model", MODEL))
    try:
        with server:
            said = "it is up"
    except NotRunning:
        said = server.console().strip().splitlines()[-1].strip()
    assert "KeyError" not in server.console() and "ropewalk" not in said, said
    return said[:100]


def _loaded(subject: Subject, context: int, loras: list[str]) -> str:
    info = subject.info()
    assert (info["model_name"], info["loader"], info["lora_names"]) == (MODEL, "ropewalk", loras), info
    assert subject.text(), "no text"
    size = subject.replies_on_console()[-1][-1]
    assert size == context, f"context {size}, not {context}"
    return f"context {size}, LoRAs {loras}"


def _idle(subject: Subject) -> str:
    before, start = subject.text(), time.monotonic()
    while "for inactivity" not in subject.server.console():
        assert time.monotonic() - start < IDLE_LIMIT_S, "it was not unloaded"
        time.sleep(1)
    waited = time.monotonic() - start
    assert subject.text(PROMPT) == before, "another text after the model was loaded again"
    return f"unloaded after {waited:.0f} s; the next request has the same text, LoRAs {subject.info()['lora_names']}"


def _gone(subject: Subject, copy: WebuiCopy) -> str:
    assert copy.startup_files("base") and not copy.startup_files("venv")
    try:
        subject.load(loader="ropewalk")
    except Refused as error:
        assert subject.server.alive and "ropewalk: " not in subject.server.console()
        return f"our loader is unknown to it: HTTP {error.status}"
    raise AssertionError(f"it loaded: {subject.info()}")


SCENES = (extension_scene, launcher_scene, startup_file_scene, uninstalled_scene)


def main() -> int:
    """Run the scenes; 1 if a check failed."""
    args = _arguments()
    table = Table(args.only)
    scratch = Path(args.keep) if args.keep else Path(tempfile.mkdtemp(prefix="ropewalk-webui-"))
    copy = WebuiCopy.make(scratch, Path(args.webui), Path(args.python))
    try:
        add_models(copy)
        for scene in SCENES:
            if args.scene in scene.__name__:
                scene(table, copy)
        if args.page:
            from page import page_scene

            page_scene(table, copy, Path(args.page))
    finally:
        if not args.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    table.print_table(args.label or Path(args.webui).name)
    return int(table.failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    webui = os.environ.get("TEXTGEN_WEBUI_DIR")
    parser.add_argument(
        "--webui", default=webui, required=webui is None, help="folder of the web UI (TEXTGEN_WEBUI_DIR)"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter that has what it needs (default: this one)"
    )
    parser.add_argument("--label", help="what the table calls it (default: the folder's name)")
    parser.add_argument("--page", metavar="DIR", help="drive the page too, and put screenshots there")
    parser.add_argument("--scene", default="", help="only scenes whose name contains this")
    parser.add_argument("--only", default="", help="only checks whose name contains this")
    parser.add_argument("--keep", metavar="DIR", help="run in this new folder and keep it, with the consoles")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
