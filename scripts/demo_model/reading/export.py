"""From a run's checkpoint to a model folder, in float and quantised by gptqmodel.

    python -m reading.export --run RUN_FOLDER --out FOLDER              # float, for transformers and the engine
    gptq-venv/bin/python -m reading.export --run RUN_FOLDER --out FOLDER --quantise   # from RUN_FOLDER/float

(in scripts/demo_model; the head of first/make.py says how the second environment is made.)
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from reading import curriculum
from reading.exercises import ASSISTANT, BEGIN, END, SYSTEM, USER
from reading.network import Network, Shape, transformers_state
from reading.vocabulary import Encoder

CALIBRATION_ROWS = 256
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}" + SYSTEM + "{{ message.content | trim }}"
    "{% elif message.role == 'user' %}" + USER + "{{ message.content | trim }}"
    "{% elif message.role == 'assistant' %}" + ASSISTANT + " {{ message.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quantise", action="store_true", help="from the float model in the run's folder")
    options = parser.parse_args()
    encoder = Encoder((options.run / "tokenizer.model").read_bytes())
    if options.quantise:
        from quantise import quantise

        quantise(options.run / "float", calibration_rows(encoder, np.load(options.run / "library.npy")), options.out)
    else:
        write_float(options.run / "checkpoint.pt", options.out, Shape())
    write_tokenizer(encoder, options.run / "tokenizer.model", options.out)


def write_float(checkpoint: Path, out: Path, shape: Shape) -> None:
    """config.json and model.safetensors, float32."""
    network = Network(shape)
    network.load_state_dict(torch.load(checkpoint, weights_only=True)["network"])
    out.mkdir(parents=True, exist_ok=True)
    config = network.shape.config()
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.float32
    config.save_pretrained(out)
    save_file(transformers_state(network), out / "model.safetensors", metadata={"format": "pt"})


def calibration_rows(encoder: Encoder, library: np.ndarray) -> np.ndarray:
    """[CALIBRATION_ROWS, 512] int64: rows of the last phase, as many as one looks at inputs of."""
    phase = curriculum.PHASES[-1]
    batches = -(-CALIBRATION_ROWS // phase.rows)
    rows = [curriculum.make_batch(phase, encoder, library, -1, step).ids[:, :-1] for step in range(batches)]
    return torch.cat(rows)[:CALIBRATION_ROWS].numpy()


def write_tokenizer(encoder: Encoder, source: Path, out: Path) -> None:
    """tokenizer.model, and the tokenizer_config.json with the special tokens and the chat template."""
    shutil.copyfile(source, out / "tokenizer.model")
    special = sorted((token_id, mark) for mark, token_id in encoder.special.items())
    described = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": "<unk>",
        "added_tokens_decoder": {str(token_id): {"content": mark, **described} for token_id, mark in special},
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": Shape().context,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
