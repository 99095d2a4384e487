"""The supported architectures, one file each. `FAMILIES` maps `model_type` to them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ropewalk.families.cohere import COHERE
from ropewalk.families.cohere2 import COHERE2
from ropewalk.families.family import Family
from ropewalk.families.gemma import GEMMA
from ropewalk.families.gemma2 import GEMMA2
from ropewalk.families.gemma3_text import GEMMA3
from ropewalk.families.glm4 import GLM4
from ropewalk.families.gpt_neox import GPT_NEOX
from ropewalk.families.granite import GRANITE
from ropewalk.families.llama import LLAMA
from ropewalk.families.mistral import MISTRAL
from ropewalk.families.mixtral import MIXTRAL
from ropewalk.families.olmo2 import OLMO2
from ropewalk.families.phi3 import PHI3
from ropewalk.families.qwen2 import QWEN2
from ropewalk.families.qwen2_moe import QWEN2_MOE
from ropewalk.families.qwen3 import QWEN3
from ropewalk.families.qwen3_moe import QWEN3_MOE
from ropewalk.families.stablelm import STABLELM
from ropewalk.families.starcoder2 import STARCODER2

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            *(LLAMA, MISTRAL, QWEN2, QWEN3),
            *(QWEN3_MOE, QWEN2_MOE, MIXTRAL),
            *(GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2, GRANITE),
            *(COHERE, COHERE2, STARCODER2, GLM4, STABLELM, GPT_NEOX),
        )
    }
)
UNNAMED = LLAMA  # checkpoints of 2023 do not always name their architecture
