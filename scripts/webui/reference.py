"""What the web UI's text is compared with, run by its own Python: replies of transformers' `generate` on our HF class,
and LoRAs made by PEFT. Prints JSON.

    python scripts/webui/reference.py reply FOLDER '{"max_seq_len": 512}' '[{"ids": [1, 2], "max_new_tokens": 8}]'
    python scripts/webui/reference.py lora FOLDER NEW_FOLDER SEED
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def replies(folder: Path, options: dict[str, Any], requests: list[dict[str, Any]]) -> list[str]:
    """The text that each request adds to its prompt. A request: ids, seed, and arguments of `generate`;
    negative_prompt_ids as a list."""
    import torch
    from transformers import AutoTokenizer

    import ropewalk.hf

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = ropewalk.hf.from_pretrained(folder, **options)
    texts = []
    for request in requests:
        ids, seed = request.pop("ids"), request.pop("seed", 0)
        if "negative_prompt_ids" in request:
            request["negative_prompt_ids"] = torch.tensor([request["negative_prompt_ids"]])
        torch.manual_seed(seed)
        new = model.generate(torch.tensor([ids]), **request)[0].tolist()
        prompt = tokenizer.decode(ids, skip_special_tokens=True)
        texts.append(tokenizer.decode(new, skip_special_tokens=True)[len(prompt) :])
    return texts


def write_lora(base: Path, folder: Path, seed: int) -> None:
    """A LoRA of random matrices for a model of this shape, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(str(folder))


def main(action: str, *arguments: str) -> None:
    """One of the two actions."""
    if action == "reply":
        folder, options, requests = arguments
        print(json.dumps(replies(Path(folder), json.loads(options), json.loads(requests))))
    else:
        base, folder, seed = arguments
        write_lora(Path(base), Path(folder), int(seed))
        print(json.dumps("written"))


if __name__ == "__main__":
    main(*sys.argv[1:])
