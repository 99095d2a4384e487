"""A loaded model as a transformers model, under its public path; see `faces/hf`.

    model = ropewalk.hf.from_pretrained(folder, max_seq_len=16384)
    model.generate(input_ids, max_new_tokens=100, do_sample=True)

Needs transformers, which `import ropewalk` does not.
"""

from __future__ import annotations

from ropewalk.faces.hf import RopewalkForCausalLM, TokenHistory, from_pretrained

__all__ = ["RopewalkForCausalLM", "TokenHistory", "from_pretrained"]
