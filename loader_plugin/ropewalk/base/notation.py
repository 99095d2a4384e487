"""Reading a short notation (layer orders, adapter requests), with errors that point at the character."""

from __future__ import annotations

import re
from typing import NoReturn

from ropewalk.base.errors import RopewalkError
from ropewalk.base.json import shown

SHOWN_COLUMNS = 30  # to each side of a mistake
TOO_LARGE = 10**10  # stands for a number of too many digits; beyond every limit

_INTEGER = re.compile(r"[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class TextCursor:
    """A place in a text. name: what errors call the text; accepted: examples of what it may say."""

    def __init__(self, text: str, name: str, error: type[RopewalkError], accepted: str, position: int = 0) -> None:
        self.text, self.position = text, position
        self._name, self._error, self._accepted = name, error, accepted

    @property
    def at_end(self) -> bool:
        """True if nothing but white space is left."""
        self.skip_space()
        return self.position >= len(self.text)

    def accepts(self, character: str) -> bool:
        """Step over the character if it comes next, after any white space."""
        self.skip_space()
        found = self.text.startswith(character, self.position)
        self.position += len(character) if found else 0
        return found

    def skip_space(self) -> None:
        """Step over white space."""
        while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
            self.position += 1

    def integer(self, what: str) -> tuple[int, int]:
        """(its position, the number); TOO_LARGE if it has too many digits. what: as in "a layer number"."""
        at, digits = self._match(_INTEGER, f"{what} is needed")
        digits = digits.lstrip("0") or "0"
        return at, int(digits) if len(digits) < 10 else TOO_LARGE

    def decimal(self, problem: str) -> tuple[int, float]:
        """(its position, the number); infinite beyond the range of float64. problem: said if there is no number."""
        at, digits = self._match(_DECIMAL, problem)
        return at, float(digits)

    def fail(self, at: int, problem: str) -> NoReturn:
        """Raise the error, with a caret below the character at fault."""
        low, high = max(0, at - SHOWN_COLUMNS), at + SHOWN_COLUMNS
        left, right = "..." if low else "", "..." if high < len(self.text) else ""
        # One column for every character, so that the caret is below the right one.
        part = "".join(c if c.isascii() and c.isprintable() else "?" for c in self.text[low:high])
        found = shown(self.text[at]) if at < len(self.text) else "the end"
        caret = " " * (len(left) + at - low) + "^"
        raise self._error(
            f"{self._name}: {problem} at column {at + 1}, found {found} (accepted are {self._accepted})\n"
            f"  {left}{part}{right}\n  {caret}"
        )

    def _match(self, pattern: re.Pattern[str], problem: str) -> tuple[int, str]:
        self.skip_space()
        at, match = self.position, pattern.match(self.text, self.position)
        if match is None:
            self.fail(at, problem)
        self.position = match.end()
        return at, match[0]


def plain_number(value: float) -> str:
    """A number as these notations print it: the shortest text that reads back as the same number, without ".0"."""
    return repr(float(value)).removesuffix(".0")
