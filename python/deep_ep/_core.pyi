# SPDX-License-Identifier: MIT
# Written by tools/make_stub.py. Tensors are torch's: Any, because the extension is built without torch.
from typing import Any, Optional
from collections.abc import Sequence
import enum

__version__: str

class Error(RuntimeError):
    """The only exception type that the library raises on purpose."""

    code: "ErrorCode"
    wait: Optional["WaitRecord"]

def use_torch(from_dlpack: Any, dtypes: dict, tensor_type: Any) -> None: ...

class ErrorCode(enum.Enum):
    """What the caller can do about an error."""

    invalid_argument = 1

    unsupported = 2

    system = 3

    timeout = 4

class WaitRecord:
    """One wait that ended at its deadline."""

    @property
    def rank(self) -> int: ...

    @property
    def phase(self) -> str: ...

    @property
    def peer(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    @property
    def expected(self) -> int: ...

    @property
    def seen(self) -> int: ...

    @property
    def peer_gone(self) -> bool: ...

class Group:
    """Ranks that can exchange small blobs while a Buffer opens."""

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def all_gather(self, mine: bytes, timeout_secs: float = 60.0) -> list: ...

def in_process_group(num_ranks: int) -> list[Group]: ...

def callback_group(rank: int, num_ranks: int, all_gather: Any) -> Group: ...

def tcp_group_from_environment() -> Group:
    """
    Meets the ranks that MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE name.
    """

class Placement:
    """Which ranks host which experts."""

    @staticmethod
    def even(num_experts: int, num_ranks: int) -> Placement: ...

    @staticmethod
    def from_lists(hosted: Sequence[Sequence[int]], num_experts: int, local_first: bool = False) -> Placement: ...

    @property
    def num_experts(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    @property
    def fingerprint(self) -> int: ...

    def num_slots(self, rank: int) -> int: ...

    def expert_at(self, rank: int, slot: int) -> int: ...

class OutputLayout(enum.Enum):
    by_rank = 0

    by_expert = 1

    padded = 2

class Handle:
    """What one dispatch made that combine and cached dispatches need."""

    @property
    def dst_rank(self) -> Any: ...

    @property
    def dst_row(self) -> Any: ...

    @property
    def dst_arrival(self) -> Any: ...

    @property
    def first_arrival(self) -> Any: ...

    @property
    def src_token(self) -> Any: ...

    @property
    def arrival_row(self) -> Any: ...

    @property
    def slot_rows(self) -> Any: ...

    @property
    def slot_first_row(self) -> Any: ...

    @property
    def tokens_between(self) -> Any: ...

    @property
    def layout(self) -> OutputLayout: ...

    @property
    def num_ranks(self) -> int: ...

    @property
    def num_topk(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    @property
    def expert_alignment(self) -> int: ...

    @property
    def max_tokens_per_rank(self) -> int: ...

    @property
    def low_latency(self) -> bool: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def num_arrivals(self) -> int: ...

    @property
    def num_slots(self) -> int: ...

    @property
    def placement(self) -> Placement: ...

    def aligned_counts(self) -> list[int]:
        """Rows of each hosted expert, each rounded up to expert_alignment."""

    def with_rows(self, num_rows: int) -> Handle: ...

    def with_dst_rank(self, dst_rank: Any) -> Handle: ...

    @property
    def source_range_ptr(self) -> int: ...

    def save(self) -> list:
        """As a list of tensors, for Handle.restore."""

    @staticmethod
    def make(layout: OutputLayout, placement: Placement, num_topk: int, expert_alignment: int, num_rows: int, num_arrivals: int, tensors: dict) -> Handle:
        """A handle over tensors with the names of its properties."""

    @staticmethod
    def restore(tensors: Sequence) -> Handle: ...

def handle_of(tensor: Any, topk_idx: Any = None) -> Any:
    """
    The handle that a tensor of a handle tuple stands for, or None. With topk_idx, for a low-latency dispatch: without the selections that are negative there now.
    """

class DispatchTicket:
    """A low-latency dispatch on its way."""

    def promised(self) -> tuple: ...

    def finish(self, wait_stats: Any = None, count_stats: Any = None) -> None: ...

    def receive(self) -> tuple: ...

class CombineTicket:
    """A low-latency combine on its way."""

    def finish(self) -> None: ...

    def receive(self, wait_stats: Any = None) -> tuple: ...

class LowLatencyCapacity:
    def __init__(self) -> None: ...

    @property
    def max_tokens_per_rank(self) -> int: ...

    @max_tokens_per_rank.setter
    def max_tokens_per_rank(self, arg: int, /) -> None: ...

    @property
    def row_bytes(self) -> int: ...

    @row_bytes.setter
    def row_bytes(self, arg: int, /) -> None: ...

    @property
    def num_topk(self) -> int: ...

    @num_topk.setter
    def num_topk(self, arg: int, /) -> None: ...

    @property
    def side_bytes(self) -> int: ...

    @side_bytes.setter
    def side_bytes(self, arg: int, /) -> None: ...

class BufferConfig:
    """What all ranks of a buffer agree on."""

    def __init__(self) -> None: ...

    @property
    def max_experts(self) -> int: ...

    @max_experts.setter
    def max_experts(self, arg: int, /) -> None: ...

    @property
    def ranks_per_node(self) -> list[int]: ...

    @ranks_per_node.setter
    def ranks_per_node(self, arg: Sequence[int], /) -> None: ...

    @property
    def low_latency(self) -> LowLatencyCapacity: ...

    @low_latency.setter
    def low_latency(self, arg: LowLatencyCapacity, /) -> None: ...

    @property
    def arena_bytes(self) -> int: ...

    @arena_bytes.setter
    def arena_bytes(self, arg: int, /) -> None: ...

    @property
    def num_tickets(self) -> int: ...

    @num_tickets.setter
    def num_tickets(self, arg: int, /) -> None: ...

    @property
    def timeout_secs(self) -> float: ...

    @timeout_secs.setter
    def timeout_secs(self, arg: float, /) -> None: ...

    @property
    def open_timeout_secs(self) -> float: ...

    @open_timeout_secs.setter
    def open_timeout_secs(self, arg: float, /) -> None: ...

    def plan(self, num_ranks: int) -> int:
        """Bytes of each rank's window."""

    def describe_plan(self, num_ranks: int) -> str: ...

    def __str__(self) -> str: ...

class SumOrder:
    """The order in which combine adds."""

    def __init__(self, by_topk: bool = False, round_per_rank: bool = False, round_per_node: bool = False, bias_first: bool = True) -> None: ...

def has_cuda() -> bool: ...

class CoreBuffer:
    """One rank's end of a group that exchanges tokens."""

    @staticmethod
    def open(group: Group, config: BufferConfig, num_workers: int = 0, device: int = -1) -> CoreBuffer: ...

    def use_streams(self, calls: int, user: int) -> None:
        """
        CUDA: operations from now on are enqueued on the stream `calls`, their results used on `user`.
        """

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    @property
    def num_nodes(self) -> int: ...

    def node_of(self, rank: int) -> int: ...

    def dispatch_layout(self, topk_idx: Any, num_experts: int, placement: Placement | None = None) -> tuple: ...

    def dispatch(self, **kwargs) -> tuple: ...

    def combine(self, **kwargs) -> tuple: ...

    def low_latency_dispatch(self, **kwargs) -> DispatchTicket: ...

    def low_latency_dispatch_padded(self, with_hook: bool, wait_stats: Any, count_stats: Any, **keywords) -> tuple: ...

    def low_latency_combine(self, **kwargs) -> CombineTicket: ...

    def weighted_combine_gradient(self, handle: Handle, grad_out: Any, weights: Any, rows: Any) -> tuple: ...

    def refuse(self, operation: str, why: str) -> None: ...

    def allocate(self, like: Any, shape: Sequence[int]) -> Any: ...

    def supports_low_latency(self, hidden: int, max_tokens: int, num_topk: int, num_experts: int) -> str:
        """Empty where BF16 rows of this shape fit; else what stands in the way."""

    def set_masked(self, rank: int, masked: bool) -> None: ...

    def masked(self, rank: int) -> bool: ...

    def statistics(self) -> dict: ...

    def reset_statistics(self) -> None: ...

    def check(self) -> None:
        """Waits for what was enqueued and raises what it found out."""

    def close(self) -> None: ...

class GpuInfo:
    """A GPU, as this process numbers it."""

    @property
    def device(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def pci_address(self) -> str: ...

    @property
    def compute_capability(self) -> int: ...

    @property
    def num_sms(self) -> int: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def sharing(self) -> str: ...

    @property
    def peers(self) -> list[int]: ...

    @property
    def atomic_peers(self) -> list[int]: ...

class InterfaceInfo:
    """A network interface, as a provider of libfabric names it."""

    @property
    def provider(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def address(self) -> str: ...

class Machine:
    """What this machine has for a buffer, and what is missing."""

    @property
    def version(self) -> str: ...

    @property
    def num_cores(self) -> int: ...

    @property
    def row_arithmetic(self) -> str: ...

    @property
    def gpus(self) -> list[GpuInfo]: ...

    @property
    def interfaces(self) -> list[InterfaceInfo]: ...

    @property
    def missing(self) -> list[str]: ...

    def __str__(self) -> str: ...

def inspect_machine() -> Machine:
    """Looks at CPU, GPUs and network without opening a buffer."""
