"""Weight formats that are not read: what each is called, and which programs run it. For refusals, and for `info`."""

from __future__ import annotations

from dataclasses import dataclass

REQUANTISE = "quantise the original model with gptqmodel (format gptq), or take a GPTQ, AWQ or W4A16 copy of it"


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """A format: words that its declarations contain, what it is, and what runs it."""

    words: tuple[str, ...]  # any of them within quant_method, format or the like, in lower case
    title: str
    runs: str

    @property
    def advice(self) -> str:
        """What to do, as the end of a message."""
        return f"{self.runs} runs it; here, {REQUANTISE}"


MARLIN = ForeignFormat(
    ("marlin", "bitblas", "qqq"),
    "GPTQ weights that were repacked for one kernel of a GPU",
    "vLLM or gptqmodel on such a GPU (or use the checkpoint that this one was repacked from)",
)
FP8 = ForeignFormat(
    ("fp8", "float-quantized"),
    "8-bit floating-point (FP8) weights",
    "vLLM, SGLang or transformers on a GPU that computes in FP8",
)
FP4 = ForeignFormat(
    ("mxfp4", "mxfp8", "nvfp4", "modelopt", "fp4"),
    "4- or 8-bit floating-point weights (MXFP4, NVFP4)",
    "vLLM or TensorRT-LLM on a recent GPU, and of MXFP4 also llama.cpp (as GGUF)",
)
BITSANDBYTES = ForeignFormat(
    ("bitsandbytes", "bnb", "load_in_4bit", "load_in_8bit"),
    "bitsandbytes weights",
    "transformers with bitsandbytes",
)
HQQ = ForeignFormat(("hqq",), "HQQ weights", "transformers with hqq")
EXL2 = ForeignFormat(("exl2",), "EXL2 weights", "exllamav2 (in TabbyAPI or text-generation-webui) on a GPU")
EXL3 = ForeignFormat(("exl3",), "EXL3 weights", "exllamav3 (in TabbyAPI or text-generation-webui) on a GPU")
AQLM = ForeignFormat(("aqlm",), "AQLM weights", "transformers with aqlm")
QUIP = ForeignFormat(("quip",), "QuIP# weights", "the QuIP# authors' code on a GPU")
SQUEEZE = ForeignFormat(("squeezellm", "owq"), "SqueezeLLM or OWQ weights", "their authors' code on a GPU")
AWQ_OTHER = ForeignFormat(
    ("gemv", "llm-awq", "awq"),
    "AWQ weights in a layout other than gemm",
    "AutoAWQ on a GPU (or vLLM, from the gemm copy that most AWQ models come as)",
)
AUTO_ROUND = ForeignFormat(
    ("auto-round", "auto_round"),
    "auto-round weights in a layout of its own",
    "auto-round (or export it again with its format auto_gptq)",
)
INT_QUANTIZED = ForeignFormat(
    ("int-quantized", "naive-quantized"),
    "8-bit integer weights for 8-bit activations (W8A8)",
    "vLLM on a GPU",
)
SPARSE = ForeignFormat(("sparse", "bitmask"), "compressed-tensors weights with zeros left out", "vLLM on a GPU")
TORCHAO = ForeignFormat(("torchao",), "torchao weights", "transformers with torchao")
QUANTO = ForeignFormat(("quanto",), "quanto weights", "transformers with optimum-quanto")
EETQ = ForeignFormat(("eetq",), "EETQ weights", "transformers with eetq on a GPU")
VPTQ = ForeignFormat(("vptq",), "VPTQ weights", "transformers with vptq on a GPU")
HIGGS = ForeignFormat(("higgs",), "HIGGS weights", "transformers with flute on a GPU")
SPQR = ForeignFormat(("spqr",), "SpQR weights", "transformers with spqr_quant on a GPU")
BITNET = ForeignFormat(("bitnet",), "ternary BitNet weights", "bitnet.cpp or transformers")
QUARK = ForeignFormat(("quark",), "AMD Quark weights", "vLLM, or transformers with amd-quark")

# The order matters: the first whose word is contained counts.
FORMATS = (
    *(MARLIN, SPARSE, FP4, FP8, BITSANDBYTES, HQQ, EXL2, EXL3, AQLM, QUIP, SQUEEZE, AWQ_OTHER, AUTO_ROUND),
    *(INT_QUANTIZED, TORCHAO, QUANTO, EETQ, VPTQ, HIGGS, SPQR, BITNET, QUARK),
)


def foreign_format(declared: object) -> ForeignFormat | None:
    """The format that a declared name belongs to; None for one that nobody has told us of."""
    text = str(declared).lower()
    return next((known for known in FORMATS if any(word in text for word in known.words)), None)
