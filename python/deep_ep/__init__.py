# SPDX-License-Identifier: MIT
"""Expert-parallel dispatch and combine: a drop-in for DeepSeek's `deep_ep`, on CPU tensors with any process group.

`Buffer` is the first generation of the API, `ElasticBuffer` the second; both run on the same C++ library.
"""

import torch

from . import _torch  # noqa: F401  (teaches the extension torch's dtypes; must come first)
from ._core import Error, ErrorCode, Placement, WaitRecord, __version__
from ._torch import topk_idx_t
from .buffer import Buffer
from .config import Config
from .elastic import ElasticBuffer
from .event import EventHandle, EventOverlap
from .group import in_process_group
from .handle import EPHandle
from .hybrid import HybridEPBuffer
from .topology import get_logical_domain_size, get_physical_domain_size

if hasattr(torch.library, "custom_op"):  # torch >= 2.4
    from . import ops  # noqa: F401

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "Error",
    "ErrorCode",
    "EventHandle",
    "EventOverlap",
    "HybridEPBuffer",
    "Placement",
    "WaitRecord",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "in_process_group",
    "topk_idx_t",
]
