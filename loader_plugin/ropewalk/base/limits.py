"""The largest sizes that are accepted, wherever they come from: files, arguments or arrays.

Far above any model there is (the largest known have 2^14 hidden features, 126 layers, 2^18 tokens, 10^7 positions).
They keep absurd values from becoming absurd allocations. What a file or an option says is refused by them before a
weight is read, so the compiled core must take everything up to them: native/include/ropewalk/limits.hpp has the same
numbers, and tests/native/test_limits.py compares them.
"""

from __future__ import annotations

MAX_FEATURES = 2**20  # of the hidden size and the intermediate size
MAX_LAYERS = 4096
MAX_HEADS = 2**14
MAX_HEAD_DIM = 2**13
MAX_VOCAB = 2**24
MAX_SEQ_LEN = 2**24  # keeps arithmetic on positions exact in float32
MAX_POSITIONS = 2**31  # that a file or a RoPE option may speak of; a cache has at most MAX_SEQ_LEN
MAX_RANK = 2**16  # of one adapter
MAX_THREADS = 1024
