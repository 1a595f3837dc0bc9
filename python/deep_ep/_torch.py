# SPDX-License-Identifier: MIT
"""What the extension must know of torch: it is built without it and works with any version."""

import os

import torch
from torch.utils.dlpack import from_dlpack

from . import _core

#: dtype of expert ids, by EP_NUM_TOPK_IDX_BITS as upstream's builds have it. Calls take int32 and int64 alike.
topk_idx_t = torch.int32 if os.environ.get("EP_NUM_TOPK_IDX_BITS", "64") == "32" else torch.int64

# Numbers as in include/deep_ep/tensor.h.
_DTYPES = {
    torch.uint8: 0,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float32: 4,
    torch.int32: 5,
    torch.int64: 6,
    torch.bool: 7,
}
if hasattr(torch, "float8_e4m3fn"):
    _DTYPES[torch.float8_e4m3fn] = 1

_core.use_torch(from_dlpack, _DTYPES, torch.Tensor)


def as_carried(x: torch.Tensor) -> torch.Tensor:
    """`x` itself, or its bytes where the library has no name for its dtype: rows are moved, not read."""
    return x if x.dtype in _DTYPES or x.dim() == 0 else x.view(torch.uint8)


def as_given(received: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The way back from `as_carried`."""
    return received if x.dtype in _DTYPES else received.view(x.dtype)
