"""What a folder or file is, and which programs run it: for `info` and `list`, where ropewalk itself does not load it.

Only names and small JSON files are looked at. What cannot be read is passed over: this explains, it does not check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ropewalk.base.errors import CheckpointError, RopewalkError
from ropewalk.base.json import read_json_object, shown
from ropewalk.config.foreign import foreign_format
from ropewalk.families import FAMILIES
from ropewalk.files.foreign import MLX, foreign_format_of
from ropewalk.files.names import CACHED
from ropewalk.files.safetensors import SafetensorsFile, printable

LLAMA_CPP = "llama.cpp, Ollama, LM Studio or KoboldCpp"
TRANSFORMERS = "transformers, or vLLM and SGLang on a GPU"
CONVERT = "its model's safetensors version, or torch.load(..., weights_only=True) and safetensors.torch.save_file"

# (ending or name of a file that tells it, what it is, what runs it), the first that is there counts
TELLING_FILES = (
    ("model_index.json", "a pipeline of diffusers, which makes images", "diffusers or ComfyUI"),
    (".gguf", "a llama.cpp model (GGUF)", LLAMA_CPP),
    (".ggml", "an old llama.cpp model (GGML)", "KoboldCpp, or llama.cpp once it is converted to GGUF"),
    (".engine", "an engine of TensorRT-LLM, built for one kind of GPU", "TensorRT-LLM"),
    ("openvino_model.xml", "an OpenVINO model", "OpenVINO (optimum-intel)"),
    (".mlpackage", "a Core ML model", "Core ML on Apple's machines"),
    (".tflite", "a TensorFlow Lite model", "LiteRT"),
    (".task", "a MediaPipe model", "MediaPipe"),
    (".llamafile", "a llamafile, which brings its own program", "itself: start it"),
)
LATER_FILES = (
    (".onnx", "an ONNX model", "ONNX Runtime"),
    ("consolidated.00.pth", "a model in Meta's own files", "Meta's code, or transformers once it is converted"),
    (".pth", "a pickled torch checkpoint", CONVERT),
    (".pt", "a pickled torch checkpoint", CONVERT),
    (".safetensors", "weights without a config.json", "the same with the config.json of the model they belong to"),
    ("tokenizer.json", "a tokenizer without a model", "nothing: the weights are missing"),
)
# What runs a model of an unsupported family, by the way its weights are stored.
RUNNERS = {
    "gptq": "gptqmodel in transformers, or vLLM and SGLang on a GPU",
    "awq": "AutoAWQ in transformers, or vLLM and SGLang on a GPU",
    "compressed-tensors": "compressed-tensors in transformers, or vLLM on a GPU",
}
READ_HERE = (*RUNNERS.values(), TRANSFORMERS)
MEND = "ropewalk, once its files are whole: download them again"

LAYOUT_KEYS = ("format", "checkpoint_format", "version", "packing_format")


@dataclass(frozen=True, slots=True)
class Identity:
    """what: a phrase, "a llama.cpp model (GGUF)". runs_with: programs, or what to do. family: if config.json says."""

    what: str
    runs_with: str
    family: str | None = None


def identify(path: Path, error: RopewalkError | None = None) -> Identity | None:
    """What lies at a path; None if nothing tells. error: why it is not loaded, if that is known. Files of a family that
    ropewalk runs, in a format that it reads, are damaged if it is a `CheckpointError`: no other program runs them."""
    found = _identify(path)
    is_ours = found is not None and found.family in FAMILIES and found.runs_with in READ_HERE
    return replace(found, runs_with=MEND) if is_ours and isinstance(error, CheckpointError) else found


def _identify(path: Path) -> Identity | None:
    try:
        if path.is_file():
            return _by_names([path.name], TELLING_FILES + LATER_FILES)
        names = sorted(entry.name for entry in path.iterdir())
    except OSError:
        return None
    if CACHED.fullmatch(path.name) and "snapshots" in names:
        repo = path.name.removeprefix("models--").replace("--", "/")
        return Identity(f"the hub's cache of {repo}", f"the name {repo}, instead of this path")
    if "config.json" not in names and "adapter_config.json" in names:
        base = _json(path / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {shown(base)}" if isinstance(base, str) and base else ""
        return Identity(f"a LoRA adapter{of}", "ropewalk chat MODEL --adapter with this folder, MODEL its base model")
    found = _by_names(names, TELLING_FILES)
    if found is None and "config.json" in names:
        found = _by_config(path, names)
    return found or _by_names(names, LATER_FILES)


def _by_names(names: list[str], table: tuple[tuple[str, str, str], ...]) -> Identity | None:
    for ending, what, runs_with in table:
        if any(name == ending or (ending[0] == "." and name.lower().endswith(ending)) for name in names):
            return Identity(what, runs_with)
    return None


def _by_config(folder: Path, names: list[str]) -> Identity | None:
    config = _json(folder / "config.json")
    nested = config.get("text_config")
    family = config.get("model_type")
    family = printable(family) if isinstance(family, str) and family else None
    of = f"{'an' if family[0] in 'aeio' else 'a'} {family} model" if family else "a model of an unnamed family"
    if isinstance(nested, Mapping) and isinstance(nested.get("model_type"), str):
        of += f" (more than text; its language model is {printable(nested['model_type'])})"
    if isinstance(config.get("quantization"), Mapping):  # a key of MLX's files alone
        return Identity(f"{of} with {MLX.title}", MLX.runs, family)
    declared = _declared(folder, config, names)
    if not declared:
        return _by_tensors(folder, names, of, family)
    method = declared.get("quant_method", declared.get("method"))
    name = str(method or ("awq" if "version" in declared else "gptq")).lower()
    says = [declared[key] for key in LAYOUT_KEYS if key in declared] if name in RUNNERS else [name]
    layout = next((known for known in map(foreign_format, says) if known is not None), None)
    if layout is not None:
        return Identity(f"{of} with {layout.title}", layout.runs, family)
    if name in RUNNERS:
        title = {"gptq": "GPTQ", "awq": "AWQ"}.get(name, name)
        return Identity(f"{of} with {title} weights{_bits(declared)}", RUNNERS[name], family)
    return Identity(f"{of} quantised by {shown(method)}", TRANSFORMERS, family)


def _declared(folder: Path, config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """What says how the weights were quantised, from the first place that says anything."""
    found = config.get("quantization_config") or config.get("compression_config")
    for name in ("quantize_config.json", "quant_config.json"):
        if not found and name in names:
            found = _json(folder / name)
    return dict(found) if isinstance(found, Mapping) else {}


def _by_tensors(folder: Path, names: list[str], of: str, family: str | None) -> Identity:
    """A folder that declares no quantisation: by the names in the first weight file, if it can be read."""
    files = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    for name in files[:1]:
        try:
            tensors = SafetensorsFile(folder / name).tensors
        except RopewalkError:
            break
        found = next((known for known in map(foreign_format_of, tensors) if known is not None), None)
        if found is not None:
            return Identity(f"{of} with {found.title}", found.runs, family)
        if any(tensor.endswith(".qweight") for tensor in tensors):
            return Identity(f"{of} with GPTQ or AWQ weights that nothing declares", RUNNERS["gptq"], family)
    if not files and any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return Identity(f"{of} in pickled files, which can hold code", TRANSFORMERS, family)
    if not files:
        return Identity(f"{of} without its weights", "nothing: finish the download", family)
    return Identity(f"{of} with weights that are not quantised", TRANSFORMERS, family)


def _bits(declared: Mapping[str, Any]) -> str:
    bits = next((declared[key] for key in ("bits", "w_bit", "wbits") if isinstance(declared.get(key), int)), None)
    return "" if bits is None else f" of {bits} bits"


def _json(path: Path) -> dict[str, Any]:
    """The object that a file holds; empty if it holds none."""
    try:
        return read_json_object(path)
    except RopewalkError:
        return {}
