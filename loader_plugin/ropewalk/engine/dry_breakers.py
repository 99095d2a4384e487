"""Texts that end a repetition (see `generate/dry.py`), found in the bytes that tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.text.tokenizer.load import Tokenizer


class TextBreakers:
    """The breakers of a request. They may lie within one token or span several; they count where their last byte is."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._reach = max(map(len, self._texts), default=1) - 1  # bytes before a token in which a breaker may begin
        self._known: dict[int, bool] = {}

    def is_breaker(self, token_id: int) -> bool:
        """Whether this token by itself contains a breaker."""
        if token_id not in self._known:
            data = self._tokenizer.token_bytes(token_id)
            self._known[token_id] = any(text in data for text in self._texts)
        return self._known[token_id]

    def end_in_last(self, token_ids: Sequence[int]) -> bool:
        """Whether a breaker ends in the last of these tokens."""
        if not token_ids:
            return False
        if self.is_breaker(token_ids[-1]):
            return True
        before = b""
        for token_id in reversed(token_ids[:-1]):
            if len(before) >= self._reach:
                break
            before = self._tokenizer.token_bytes(token_id) + before
        data = before + self._tokenizer.token_bytes(token_ids[-1])
        return any(data.find(text, max(0, len(before) - len(text) + 1)) >= 0 for text in self._texts)
