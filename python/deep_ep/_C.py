# SPDX-License-Identifier: MIT
"""Names that DeepEP's compiled module has, for code that imports them from there."""

from typing import Tuple

from ._core import Error
from ._torch import topk_idx_t
from .buffer import Buffer
from .config import Config
from .elastic import ElasticBuffer
from .elastic_sizes import PAGE
from .elastic_sizes import buffer_size_hint as calculate_elastic_buffer_size
from .event import EventHandle
from .topology import get_logical_domain_size, get_physical_domain_size

get_low_latency_rdma_size_hint = Buffer.get_low_latency_rdma_size_hint
is_sm90_compiled = Buffer.is_sm90_compiled


def get_elastic_buffer_alignment() -> int:
    return PAGE


def init_jit(*_: str) -> None:
    """Nothing is compiled at run time."""


def create_cpu_handle(*_: int) -> None:
    """No handle: CPU memory needs no export."""


def get_local_nccl_unique_id() -> bytes:
    """Empty: there is no NCCL."""
    return b""


def create_nccl_comm(*_: object) -> int:
    return 0


def destroy_nccl_comm(*_: object) -> None:
    """There is none."""


__all__: Tuple[str, ...] = (
    "Buffer",
    "Config",
    "ElasticBuffer",
    "Error",
    "EventHandle",
    "calculate_elastic_buffer_size",
    "create_cpu_handle",
    "create_nccl_comm",
    "destroy_nccl_comm",
    "get_elastic_buffer_alignment",
    "get_local_nccl_unique_id",
    "get_logical_domain_size",
    "get_low_latency_rdma_size_hint",
    "get_physical_domain_size",
    "init_jit",
    "is_sm90_compiled",
    "topk_idx_t",
)
