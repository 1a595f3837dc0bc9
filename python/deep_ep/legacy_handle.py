# SPDX-License-Identifier: MIT
"""V1 handle tuples. A tuple may be taken apart, stored and put together again: its handle is found by the memory of one of
its tensors, and where that was copied it is made again from what the tuple says."""

from typing import Any, Optional, Tuple

from . import _core
from .errors import invalid, require

INTRANODE_ENTRIES = 6
INTERNODE_ENTRIES = 10


def recover(handle: Tuple[Any, ...], num_ranks: int, num_topk: Optional[int]) -> Any:
    """The library's handle. `num_topk` where top-k weights travel with it."""
    require(
        isinstance(handle, (tuple, list)), f"handle must be the tuple that dispatch returned: {type(handle).__name__}"
    )
    if len(handle) == INTRANODE_ENTRIES:
        key, rows, meta = handle[0], handle[5], handle[3]
    elif len(handle) == INTERNODE_ENTRIES:
        key, rows, meta = handle[6], handle[9], handle[7]
    else:
        raise invalid(f"handle must have {INTRANODE_ENTRIES} or {INTERNODE_ENTRIES} entries: {len(handle)}")
    found = _core.handle_of(key)
    if found is not None and num_topk in (None, found.num_topk) and found.num_rows == meta.size(0):
        return found
    return _core.handle_from_rows_by_rank(rows, num_ranks, meta.size(0), num_ranks if num_topk is None else num_topk)
