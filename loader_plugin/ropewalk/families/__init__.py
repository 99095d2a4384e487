"""The supported architectures, one file each. `FAMILIES` maps `model_type` to them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ropewalk.families.family import Family
from ropewalk.families.llama import LLAMA
from ropewalk.families.mistral import MISTRAL
from ropewalk.families.qwen2 import QWEN2
from ropewalk.families.qwen3 import QWEN3

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)})
UNNAMED = LLAMA  # checkpoints of 2023 do not always name their architecture
