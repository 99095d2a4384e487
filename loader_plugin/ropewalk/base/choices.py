"""Every option with a closed list of values, and its default: defined here once, for the library and all front ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ropewalk.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Choice:
    """An option of `load_model`: its name, its values with a short description of each, and the default.

    is_open: there are more values than those offered; what is made of them checks them.
    """

    name: str
    meanings: Mapping[str, str]
    default: str
    is_open: bool = False

    @property
    def values(self) -> tuple[str, ...]:
        """The accepted values, in the order in which they are shown."""
        return tuple(self.meanings)

    @property
    def help(self) -> str:
        """All values with their meanings, on one line."""
        return "; ".join(f"{value}: {meaning}" for value, meaning in self.meanings.items())

    def check(self, value: Any) -> None:
        """Raises:
        ConfigError: not one of the values.
        """
        if value not in self.values:
            accepted = ", ".join(map(repr, self.values))
            raise ConfigError(f"{self.name} must be one of {accepted}, got {value!r}")


COMPUTE = Choice(
    "compute",
    MappingProxyType(
        {
            "auto": "int8 on a CPU, fp16 on a GPU",
            "int8": "activations in 8 bits by blocks of 32",
            "fp16": "float16 activations, on a GPU",
            "exact": "activations to float32 precision, slower",
        }
    ),
    "auto",
)
HEAD_BITS = Choice(
    "head_bits",
    MappingProxyType(
        {
            "auto": "8 with compute int8, else as stored",
            "8": "codes of 8 bits by runs of 64 inputs",
            "4": "codes of 4 bits by runs of 32",
            "16": "as stored",
        }
    ),
    "auto",
)
CACHE_TYPE = Choice(
    "cache_type",
    MappingProxyType(
        {
            "fp16": "16 bits",
            "q8": "8.5 bits, hardly to be told from fp16",
            "q6": "6.5 bits",
            "q4": "4.5 bits",
            "q8_q4": "keys as q8, values as q4",
            "q4+256": "q4, and the last 256 positions in fp16 besides",
            "fp32": "as computed",
        }
    ),
    "fp16",
    is_open=True,
)
BACKEND = Choice(
    "backend",
    MappingProxyType(
        {
            "auto": "the GPU if this machine has what it needs, else the CPU",
            "cpu": "compiled kernels",
            "gpu": "Triton kernels",
            "reference": "plain torch on any device, slow",
        }
    ),
    "auto",
)
SPECULATION = Choice(
    "speculation",
    MappingProxyType(
        {
            "none": "each token is computed for itself",
            "ngram": "guess what followed the last words before, for code editing and questions about a text",
            "draft": "a smaller model guesses",
        }
    ),
    "none",
)
AUTO = "auto"  # of rope_scaling: chosen for the context asked for (rope/automatic.py)
ROTATE, RECOMPUTE = "rotate", "recompute"
RESCALE_MODE = Choice(
    "mode",
    MappingProxyType(
        {
            ROTATE: "cached keys are turned by the difference of angles, at once",
            RECOMPUTE: "all that is cached is computed anew: exact, and takes as long as reading it",
        }
    ),
    ROTATE,
)
ROPE_GROWTH = Choice("rope_growth", RESCALE_MODE.meanings, ROTATE)  # where frequencies follow the length
MAX_RUNNING = 8  # requests at once by default
MAX_INPUT_LEN = 2048  # tokens of a prompt that are computed at once by default
