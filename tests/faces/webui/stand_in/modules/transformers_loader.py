from pathlib import Path

import modules.shared as shared
from modules.text_generation import get_reply_from_output_ids  # noqa: F401  (held by name, as there)
from transformers import AutoTokenizer


def load_model_HF(model_name):
    raise ImportError("Loading a GPTQ quantized model requires optimum")


def load_tokenizer(model_name):
    folder = Path(f"{shared.args.model_dir}/{model_name}")
    return AutoTokenizer.from_pretrained(folder) if folder.exists() else None
