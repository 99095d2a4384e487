"""A loaded model, for whatever takes a transformers model: `generate`, its streamers, samplers and stopping criteria.

    model = ropewalk.hf.from_pretrained(folder, max_seq_len=16384)
    model.generate(input_ids, max_new_tokens=100, do_sample=True)

Needs transformers, which `import ropewalk` does not.
"""

from __future__ import annotations

try:
    import transformers  # noqa: F401  (imported here so that its absence is reported in one sentence)
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('ropewalk.hf needs transformers: pip install "ropewalk[hf]"', name=error.name) from error

from ropewalk.faces.hf.causal_lm import RopewalkForCausalLM, from_pretrained
from ropewalk.faces.hf.history import TokenHistory

__all__ = ["RopewalkForCausalLM", "TokenHistory", "from_pretrained"]
