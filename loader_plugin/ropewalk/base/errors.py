"""Every error that ropewalk raises on purpose.

A message names the file, tensor or option, what was found, what is accepted and, where known, what to do.
"""

from __future__ import annotations


class RopewalkError(Exception):
    """Base class: catch this to catch everything that ropewalk raises on purpose."""


class ConfigError(RopewalkError, ValueError):
    """A key of a JSON file, or an option given as an argument, is missing, of the wrong type or out of range."""


class CheckpointError(RopewalkError, ValueError):
    """The files of a model folder are missing, damaged, or disagree with its configuration."""


class UnsupportedError(RopewalkError, ValueError):
    """Something was recognised by name and is not implemented (an architecture, a weight format, a RoPE type)."""


class ShapeError(RopewalkError, ValueError):
    """A tensor handed to a public function has the wrong shape, dtype, device or memory layout."""


class RequestError(RopewalkError, ValueError):
    """A generation request cannot be served: empty or too long a prompt, token ids or settings out of range."""


class ContextLengthError(RequestError):
    """A prompt has more tokens than the context."""

    @classmethod
    def of(cls, num_tokens: int, context_size: int, at_least: bool = False) -> ContextLengthError:
        """The error for a prompt of (at least) so many tokens; says by how much it is too long and what to do."""
        return cls(
            f"the prompt has {'at least ' if at_least else ''}{num_tokens} tokens, {num_tokens - context_size} more "
            f"than the context of {context_size}: shorten it, or load the model with max_seq_len={num_tokens + 256} "
            "or more (and RoPE scaling that covers it)"
        )


class CacheFullError(RequestError):
    """The pages of keys and values do not suffice, even without those that are only kept for later."""


class SavedCacheError(RopewalkError, ValueError):
    """A file with keys and values is missing or damaged, or belongs to another model or other settings of it."""


class QueueFullError(RopewalkError, RuntimeError):
    """As many requests as allowed wait already; the same request can succeed later."""


class NativeError(RopewalkError, RuntimeError):
    """The compiled core is missing, or the asked-for instruction set does not exist on this machine."""


class RankError(RopewalkError, RuntimeError):
    """A rank of a pipeline has ended, hangs or failed; says which, its layers, and what happened. No rank goes on."""


def brief(error: object, most: int = 300) -> str:
    """What another library says of a mistake, for a message of ours: on one line, and no longer than people read.

    Libraries quote what they could not read, which may be a whole file.
    """
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
