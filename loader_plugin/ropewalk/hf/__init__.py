"""A loaded model for everything that takes a transformers model: `generate`, streamers, samplers, pipelines.

    model = ropewalk.hf.from_pretrained(folder, max_seq_len=16384)
    model.generate(input_ids, max_new_tokens=100, do_sample=True)

Needs transformers, which `import ropewalk` does not.
"""

from __future__ import annotations

from ropewalk.hf.causal_lm import RopewalkForCausalLM, from_pretrained
from ropewalk.hf.history import TokenHistory

__all__ = ["RopewalkForCausalLM", "TokenHistory", "from_pretrained"]
