"""Token ids as they are given to a model: of several types, all checked here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ropewalk.base.errors import RequestError

INTEGER_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TokenIds = Sequence[int] | np.ndarray | torch.Tensor


def checked_token_ids(token_ids: Any, vocab_size: int) -> list[int]:
    """Token ids as a list of ints, each in 0..vocab_size.

    token_ids: a list, tuple or range of integers, a 1-D integer numpy array or a 1-D integer torch tensor.

    Raises:
        RequestError: of another type or shape, empty, or out of range (names position and id).
    """
    if isinstance(token_ids, (np.ndarray, torch.Tensor)):
        if token_ids.ndim != 1 or str(token_ids.dtype).removeprefix("torch.") not in INTEGER_DTYPES:
            raise RequestError(
                f"token ids must be one-dimensional integers, got {token_ids.dtype} of shape {list(token_ids.shape)}"
            )
        token_ids = token_ids.tolist()
    if not isinstance(token_ids, (list, tuple, range)):
        raise RequestError(
            "token ids must be a list, tuple, 1-D numpy array or 1-D tensor of integers, "
            f"got {type(token_ids).__name__}"
        )
    if not len(token_ids):
        raise RequestError("there are no token ids; at least one is needed")
    for position, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
            raise RequestError(f"token id {token_id!r} at position {position} is not an integer")
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"token id {token_id} at position {position} is out of range: the model knows ids 0 to {vocab_size - 1}"
            )
    return [int(token_id) for token_id in token_ids]
