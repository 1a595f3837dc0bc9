# SPDX-License-Identifier: MIT
"""V1 handle tuples: what their tensors say, and the way back from a tuple to the library's handle. This library moves rows
without channels; where the tuples speak of channels, all tokens are in channel 0."""

from typing import Any, Callable, Iterator, Optional, Tuple

import torch

from . import _core
from .errors import require

INTRANODE_ENTRIES = 6
INTERNODE_ENTRIES = 10


class HandleTuple(tuple):
    """A handle tuple whose tensors are made when somebody looks at them: most callers only pass it on."""

    core_handle: Any
    _make: Optional[Callable[[], Tuple[Any, ...]]]

    @classmethod
    def of(cls, core_handle: Any, entries: int, make: Callable[[], Tuple[Any, ...]]) -> "HandleTuple":
        made = cls((None,) * entries)
        made.core_handle, made._make, made._entries = core_handle, make, ()
        return made

    _entries: Tuple[Any, ...]

    def _all(self) -> Tuple[Any, ...]:
        if self._make is not None:
            self._entries, self._make = self._make(), None
        return self._entries

    def __getitem__(self, index: Any) -> Any:
        return self._all()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def __add__(self, other: Any) -> Tuple[Any, ...]:
        return self._all() + tuple(other)

    def __repr__(self) -> str:
        return repr(self._all())

    def __reduce__(self) -> Any:
        return tuple, (list(self._all()),)


# Out ----------------------------------------------------------------------------------------------------------------


def intranode_tuple(core_handle: Any, is_token_in_rank: Any, rank: int, channels: int) -> HandleTuple:
    def make() -> Tuple[Any, ...]:
        between, first = core_handle.tokens_between, core_handle.first_arrival
        return (
            between.cumsum(0, dtype=torch.int32),
            _channels(between[rank], channels),
            _starts(torch.zeros_like(first[1:]), first[1:] - first[:-1], channels),
            core_handle.src_token,
            is_token_in_rank,
            _rows_by_rank(core_handle),
        )

    return HandleTuple.of(core_handle, INTRANODE_ENTRIES, make)


def internode_tuple(
    core_handle: Any, is_token_in_rank: Any, members: torch.Tensor, rank: int, channels: int, node_size: int
) -> HandleTuple:
    """`members`: the words that `membership_words` made, as they came with the rows."""

    def make() -> Tuple[Any, ...]:
        ranks = core_handle.num_ranks
        between, first = core_handle.tokens_between, core_handle.first_arrival
        up_to_node = torch.cat([first[node_size:ranks:node_size], first[ranks:]])
        heads = _rows_by_rank(core_handle)
        node_heads, to_node = _heads_by_node(heads, node_size)
        if ranks % node_size == 0:
            heads = heads.view(-1, node_size)
        return (
            is_token_in_rank,
            _channels(to_node, channels),
            _channels(between[rank], channels),
            _channels(torch.diff(up_to_node, prepend=torch.zeros_like(up_to_node[:1])), channels),
            up_to_node,
            _starts(first[:-1], first[1:], channels),
            first[1:],
            _source_meta(core_handle, members, rank, node_size),
            node_heads,
            heads,
        )

    return HandleTuple.of(core_handle, INTERNODE_ENTRIES, make)


def _channels(totals: torch.Tensor, channels: int) -> torch.Tensor:
    """[entries, channels], an inclusive prefix over channels: everything is in the first."""
    return totals.unsqueeze(1).expand(-1, channels).contiguous()


def _starts(begin: torch.Tensor, end: torch.Tensor, channels: int) -> torch.Tensor:
    """[entries, channels]: where each channel begins; all but the first are empty."""
    starts = _channels(end, channels)
    starts[:, :1] = begin.unsqueeze(1)
    return starts


def _rows_by_rank(core_handle: Any) -> torch.Tensor:
    """[tokens, ranks]: the row of each token on each rank, -1 where it does not go."""
    dst_rank, ranks = core_handle.dst_rank, core_handle.num_ranks
    rows = dst_rank.new_full((dst_rank.size(0), ranks + 1), -1)
    rows.scatter_(1, torch.where(dst_rank < 0, ranks, dst_rank).long(), core_handle.dst_row)
    return rows[:, :ranks].contiguous()


def _heads_by_node(rows: torch.Tensor, node_size: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """[tokens, nodes]: number of the token among those that go to the node, -1 where it does not; and how many go."""
    goes = torch.stack([part.ge(0).any(dim=1) for part in rows.split(node_size, dim=1)], dim=1)
    numbers = goes.cumsum(0, dtype=torch.int32) - 1
    return torch.where(goes, numbers, -1), goes.sum(0, dtype=torch.int32)


def _source_meta(core_handle: Any, members: torch.Tensor, rank: int, node_size: int) -> torch.Tensor:
    """[rows, 8] bytes: node of the source, and a mask of this node's ranks that the token goes to."""
    first, rows, ranks = core_handle.first_arrival, core_handle.num_rows, core_handle.num_ranks
    row = torch.arange(rows, device=first.device, dtype=torch.int32)
    source = torch.searchsorted(first[1:].contiguous(), row, right=True, out_int32=True)
    here = torch.arange(rank // node_size * node_size, ranks, device=first.device)[: min(node_size, 32)]
    bits = (members[:, here // 32].long() >> (here % 32)) & 1
    mask = (bits << (here - here[0])).sum(dim=1).to(torch.int32)
    valid = row < first[-1]
    node = source.div(node_size, rounding_mode="floor").to(torch.int32)
    return torch.stack([torch.where(valid, node, -1), torch.where(valid, mask, 0)], dim=1).view(torch.uint8)


# In -----------------------------------------------------------------------------------------------------------------


def ranks_as_experts(is_token_in_rank: torch.Tensor) -> torch.Tensor:
    """Ids for tokens whose ranks alone are known: "expert" r is rank r."""
    ranks = torch.arange(is_token_in_rank.size(1), dtype=torch.int32, device=is_token_in_rank.device)
    return torch.where(is_token_in_rank, ranks, -1)


def membership_words(is_token_in_rank: torch.Tensor) -> torch.Tensor:
    """int32 [tokens, ranks / 32]: a bit for each rank that a token goes to."""
    tokens, ranks = is_token_in_rank.shape
    bits = torch.zeros((tokens, -(-ranks // 32) * 32), dtype=torch.int64, device=is_token_in_rank.device)
    bits[:, :ranks] = is_token_in_rank
    places = torch.arange(32, device=bits.device)
    return (bits.view(tokens, -1, 32) << places).sum(dim=2).to(torch.int32)


def recover(handle: Tuple[Any, ...], rank: int, num_ranks: int, num_topk: Optional[int]) -> Any:
    """The library's handle: that of a tuple as dispatch made it, else found by the memory of one of its tensors; and where
    that was copied, made again from what the tuple says. `num_topk` where top-k weights travel with it."""
    require(
        isinstance(handle, (tuple, list)), f"handle must be the tuple that dispatch returned: {type(handle).__name__}"
    )
    require(
        len(handle) in (INTRANODE_ENTRIES, INTERNODE_ENTRIES),
        f"handle must have {INTRANODE_ENTRIES} or {INTERNODE_ENTRIES} entries: {len(handle)}",
    )
    if isinstance(handle, HandleTuple) and num_topk in (None, handle.core_handle.num_topk):
        return handle.core_handle
    key, meta, rows = (3, 3, 5) if len(handle) == INTRANODE_ENTRIES else (6, 7, 9)
    found = _core.handle_of(handle[key])
    if found is not None and num_topk in (None, found.num_topk) and found.num_rows == handle[meta].size(0):
        return found
    return _from_rows_by_rank(handle[rows], rank, num_ranks, handle[meta].size(0), num_topk or num_ranks)


def _from_rows_by_rank(rows: torch.Tensor, rank: int, num_ranks: int, num_rows: int, num_topk: int) -> Any:
    """From the matrix that `_rows_by_rank` made. Good for combine and for cached dispatch."""
    require(
        rows.dtype == torch.int32 and rows.is_contiguous() and rows.numel() % num_ranks == 0,
        f"handle: its last tensor must be a contiguous int32 matrix of rows on {num_ranks} ranks: it is {rows.dtype} "
        f"{list(rows.shape)}",
    )
    rows = rows.view(-1, num_ranks)
    count = (rows >= 0).sum(dim=1, keepdim=True)
    if not rows.is_cuda and count.numel() > 0:
        most = int(count.max())
        require(most <= num_topk, f"handle: a token went to {most} ranks, more than top-{num_topk}")
    # Which selection took which rank is not known; all entries of a token's weights travel, so every selection names one
    # of its ranks: the first ones each its own, the others the last.
    ranks = torch.argsort((rows < 0).to(torch.int8), dim=1, stable=True)
    wanted = torch.arange(num_topk, device=rows.device).expand(rows.size(0), -1)
    ranks = ranks.gather(1, torch.minimum(wanted, (count - 1).clamp(min=0)))
    dst_rank = torch.where(count > 0, ranks, -1).to(torch.int32)
    dst_row = torch.where(count > 0, rows.gather(1, ranks), -1)
    between = rows.new_zeros((num_ranks, num_ranks))
    between[rank] = (rows >= 0).sum(dim=0)
    tensors = dict(dst_rank=dst_rank, dst_row=dst_row, dst_arrival=dst_row, tokens_between=between)
    tensors.update(slot_rows=rows.new_full((1,), num_rows), slot_first_row=_zero_and(rows, num_rows))
    placement = _core.Placement.even(num_ranks, num_ranks)
    return _core.Handle.make(_core.OutputLayout.by_rank, placement, num_topk, 1, num_rows, num_rows, tensors)


def _zero_and(like: torch.Tensor, value: int) -> torch.Tensor:
    pair = like.new_zeros(2)
    pair[1] = value
    return pair
