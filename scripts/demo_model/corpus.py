"""The text that the embedded model learns from: what every machine with Python has.

Documents are the standard library's sources (docstrings and comments included), its tests where they are installed,
pydoc's language reference, idlelib's help and the licence. Order and held-out choice depend only on relative paths, so
one Python version always gives the same corpus.
"""

from __future__ import annotations

import hashlib
import html
import importlib
import os
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".py", ".pyi", ".txt", ".rst", ".html")
# Tables and generated text teach nothing: character maps, pydoc's topics (read as text below), and what pip put there.
SKIPPED_FOLDERS = ("encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__", "ensurepip")
# One document in this many is held out, by the hash of its path: about 2 % of the text.
HELD_OUT_ONE_IN = 50
MIN_CHARACTERS = 200
# What of the held-out text goes into the model folder.
SAMPLE_BYTES = 200_000


@dataclass(frozen=True, slots=True)
class Document:
    """One text: `path` is relative to the standard library's folder (or `pydoc:TOPIC`), with forward slashes."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        return any(part in ("test", "tests", "idle_test") for part in self.path.split("/"))

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.path.encode("utf-8")).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def collect_documents() -> list[Document]:
    """All documents in order of their paths, without exact duplicates and without files that are mostly data."""
    folder = Path(sysconfig.get_path("stdlib"))
    documents, seen = [], set()
    for path in sorted(_source_paths(folder), key=lambda p: p.relative_to(folder).as_posix()):
        text = _read_text(path)
        if text is not None and len(text) >= MIN_CHARACTERS and text not in seen and not _is_mostly_data(text):
            seen.add(text)
            documents.append(Document(path.relative_to(folder).as_posix(), text))
    topics = importlib.import_module("pydoc_data.topics").topics
    documents += [Document(f"pydoc:{name}", _tidy(text)) for name, text in sorted(topics.items())]
    return documents


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out) documents, both in order of path."""
    return [d for d in documents if not d.held_out], [d for d in documents if d.held_out]


def held_out_sample(held_out: list[Document]) -> list[Document]:
    """The longest held-out library documents that together fit in SAMPLE_BYTES: long ones, to measure long context."""
    chosen, total = [], 0
    library = [d for d in held_out if not d.is_test]
    for document in sorted(library, key=lambda d: (-len(d.text), d.path)):
        size = len(document.text.encode("utf-8"))
        if total + size <= SAMPLE_BYTES:
            chosen.append(document)
            total += size
    return chosen


def held_out_text(held_out: list[Document]) -> str:
    """The documents of `held_out_sample`, as held_out.txt has them."""
    return "\n\n".join(document.text for document in held_out_sample(held_out))


def licence(documents: list[Document]) -> str:
    """Python's licence, which goes with every copy of its text.

    Raises:
        SystemExit: this Python has none beside its library.
    """
    found = [document.text for document in documents if document.path == "LICENSE.txt"]
    if not found:
        raise SystemExit("this Python has no LICENSE.txt beside its library, which must go with held_out.txt")
    return found[0]


def python_version() -> str:
    """The version whose standard library is read, for the manifest."""
    return ".".join(str(part) for part in sys.version_info[:3])


def _source_paths(folder: Path) -> list[Path]:
    found = []
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith("config-"))
        found += [Path(current) / name for name in files if name.endswith(SUFFIXES)]
    return found


def _read_text(path: Path) -> str | None:
    """The file as text with `\\n` line ends and HTML tags removed, or None if it is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    if path.suffix == ".html":
        text = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"(?s)<(style|script|head).*?</\1>", "", text)))
    return _tidy(text)


def _tidy(text: str) -> str:
    """One kind of line end, no spaces before it, at most two blank lines in a row."""
    text = re.sub(r"[ \f\v]+\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def _is_mostly_data(text: str) -> bool:
    """Tables: more than 15 % digits, more than 5 % outside ASCII, or lines of over 120 characters on average."""
    size = len(text)
    digits = sum(map(text.count, "0123456789"))
    foreign = size - len(text.encode("ascii", "ignore"))
    return digits > 0.15 * size or foreign > 0.05 * size or size > 120 * (text.count("\n") + 1)
