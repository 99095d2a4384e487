"""The largest sizes that are accepted, wherever they come from: files, arguments or arrays.

They lie far above any existing model (the largest have 2^14 hidden features, 126 layers, 2^18 tokens, 10^7 positions)
and keep absurd values from becoming absurd allocations. Values from files and options are checked against them before
any weight is read, so the compiled core must accept everything up to them: native/include/ropewalk/limits.hpp has the
same numbers, and tests/native/test_limits.py compares the two.
"""

from __future__ import annotations

MAX_FEATURES = 2**20  # of the hidden size and the intermediate size
MAX_LAYERS = 4096
MAX_HEADS = 2**14
MAX_HEAD_DIM = 2**13
MAX_VOCAB = 2**24
MAX_SEQ_LEN = 2**24  # keeps arithmetic on positions exact in float32
MAX_POSITIONS = 2**31  # that a file or a RoPE option may declare; a cache has at most MAX_SEQ_LEN
MAX_EXPERTS = 1024  # of a layer
MAX_RANK = 2**16  # of one adapter
MAX_THREADS = 1024
