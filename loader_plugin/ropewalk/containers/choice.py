"""Which container a checkpoint's quantised linears are in: the one that its configuration declares, or GPTQ's.

Tensors that speak for another container than the declared one are refused: nothing is guessed from them, because the
same shapes can be read in two ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ropewalk.base.errors import CheckpointError, UnsupportedError
from ropewalk.config.settings import QuantConfig, QuantSettings
from ropewalk.containers import awq, compressed_tensors
from ropewalk.containers.container import Container
from ropewalk.files.folder import Checkpoint
from ropewalk.files.safetensors import printable
from ropewalk.gptq.linear import read_gptq_linear
from ropewalk.gptq.shapes import infer_settings, shape_problems

GPTQ_PARTS = ("qweight", "qzeros", "zeros", "scales", "g_idx", "weight", "bias")


AWQ_UNDECLARED = (
    "codes packed along the outputs, as AWQ does, although nothing says AWQ (if it is AWQ, the quant_config.json of "
    "the model says so: put it beside the weights)"
)


def _gptq_infer(checkpoint: Checkpoint, name: str, in_features: int, template: QuantSettings | None) -> QuantSettings:
    shape = checkpoint.info(f"{name}.qweight").shape
    if shape and shape[0] == in_features:
        raise CheckpointError(f"{name}.qweight has shape {list(shape)}: {AWQ_UNDECLARED}")
    return infer_settings(checkpoint, name, in_features, template)


def _gptq_problems(
    checkpoint: Checkpoint, name: str, in_features: int, out_features: int, settings: QuantSettings
) -> list[str]:
    shape = checkpoint.info(f"{name}.qweight").shape
    if shape == (in_features, out_features // awq.PER_WORD):
        return [f"{name}.qweight has shape {list(shape)}: {AWQ_UNDECLARED}"]
    return shape_problems(checkpoint, name, in_features, out_features, settings)


GPTQ_FORMATS = MappingProxyType({"gptq": "GPTQ", "gptq_v2": "GPTQ v2", "gptq_p": "GPTQ planar"})
GPTQ = Container("GPTQ", GPTQ_FORMATS, "qweight", GPTQ_PARTS, _gptq_infer, _gptq_problems, read_gptq_linear)
CONTAINERS: Mapping[str, Container] = MappingProxyType(
    {name: one for one in (GPTQ, awq.AWQ, compressed_tensors.COMPRESSED_TENSORS) for name in one.formats}
)


CODES_OF = {"qweight": "GPTQ or AWQ", compressed_tensors.CODES: "compressed-tensors"}


def container_of(quant: QuantConfig | None) -> Container:
    """The container that is declared; GPTQ's where nothing is."""
    return GPTQ if quant is None else CONTAINERS[quant.default.format]


def refuse_other_containers(names: Iterable[str], quant: QuantConfig | None, folder: object) -> None:
    """Raise UnsupportedError if a tensor belongs to another container than the declared one."""
    ours = container_of(quant)
    for name in names:
        part = name.rpartition(".")[2]
        if part in CODES_OF and part != ours.codes:
            says = "no configuration file says so" if quant is None else f"{quant.source} says {ours.title}"
            raise UnsupportedError(
                f"{folder}: tensor {printable(name)} belongs to {CODES_OF[part]}, but {says}: take the configuration "
                "and the weights from one download"
            )


def format_title(name: str, bits: int | str) -> str:
    """What a line about a model calls a format, such as "GPTQ v2" or "W4A16".

    Raises:
        KeyError: no container has that format.
    """
    return CONTAINERS[name].formats[name].format(bits=bits)
