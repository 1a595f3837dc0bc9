# SPDX-License-Identifier: MIT
"""The tensors of V2's `EPHandle`, made from the library's handle, and a handle made again from them."""

from typing import Any, Callable, Dict, List

import torch

from . import _core


class Fields:
    """The fields of one dispatch, each made when it is first asked for: few callers read any."""

    #: Their names, and what makes each.
    MAKERS: Dict[str, Callable[["Fields"], torch.Tensor]]

    def __init__(
        self, core_handle: Any, recv_topk_idx: torch.Tensor, arrivals: int, max_tokens: int, num_scaleup: int
    ) -> None:
        """`recv_topk_idx`: ids of the arrivals, local or -1, of which the first `arrivals` count."""
        self.core_handle = core_handle
        self._arrivals, self._max_tokens, self._num_scaleup = arrivals, max_tokens, num_scaleup
        self._expanded = core_handle.layout != _core.OutputLayout.by_rank
        # Which selections are here: an expanded dispatch's handle knows it. The ids themselves would keep the rows' memory.
        self._here = None if self._expanded else recv_topk_idx >= 0

    def make(self, name: str) -> torch.Tensor:
        return self.MAKERS[name](self)

    def tensors(self) -> List[torch.Tensor]:
        """What torch made for them."""
        return [] if self._here is None else [self._here]

    def _per_scaleup_rank(self) -> torch.Tensor:
        first = self.core_handle.first_arrival
        rows = first[1:] - first[:-1]
        padding = rows.new_zeros(-rows.size(0) % self._num_scaleup)
        per_scaleup = torch.cat([rows, padding]).view(-1, self._num_scaleup).sum(dim=0)
        return per_scaleup.cumsum(0, dtype=torch.int32)

    def _per_expert(self) -> torch.Tensor:
        slot_first = self.core_handle.slot_first_row
        return slot_first[:-1] + self.core_handle.slot_rows if self._expanded else slot_first[1:].clone()

    def _unaligned_per_expert(self) -> torch.Tensor:
        return self.core_handle.slot_rows

    def _source_metadata(self) -> torch.Tensor:
        """[arrivals, 2 + topk]: source (rank * max_tokens + token) | source rank * topk + highest selection here | rows of
        the selections, -1 where there is none. Behind the last arrival of a bounded dispatch: -1."""
        handle, arrivals = self.core_handle, self._arrivals
        first, topk = handle.first_arrival, handle.num_topk
        arrival = torch.arange(arrivals, dtype=torch.int32, device=first.device)
        source = torch.searchsorted(first[1:].contiguous(), arrival, right=True, out_int32=True)
        selection = torch.arange(topk, dtype=torch.int32, device=first.device)
        here = handle.arrival_row >= 0 if self._here is None else self._here
        highest = torch.where(here[:arrivals], selection, -1).amax(dim=1)
        columns = [source * self._max_tokens + handle.src_token[:arrivals], source * topk + highest]
        metadata = torch.full((arrivals, topk + 2), -1, dtype=torch.int32, device=first.device)
        metadata[:, :2] = torch.stack(columns, dim=1)
        if self._expanded:
            metadata[:, 2:] = handle.arrival_row[:arrivals]
        return torch.where((arrival < first[-1]).unsqueeze(1), metadata, -1)

    def _slot_idx(self) -> torch.Tensor:
        return self.core_handle.dst_row


Fields.MAKERS = {
    "psum_num_recv_tokens_per_scaleup_rank": Fields._per_scaleup_rank,
    "psum_num_recv_tokens_per_expert": Fields._per_expert,
    "num_unaligned_recv_tokens_per_expert": Fields._unaligned_per_expert,
    "recv_src_metadata": Fields._source_metadata,
    "dst_buffer_slot_idx": Fields._slot_idx,
}


def handle_from_fields(handle: Any, rank: int, num_ranks: int) -> Any:
    """From the tensors of an `EPHandle` whose own handle is gone, as after a checkpoint."""
    ids, dst_row = handle.topk_idx, handle.dst_buffer_slot_idx.contiguous()
    counts = handle.num_unaligned_recv_tokens_per_expert.contiguous()
    placement = _core.Placement.even(handle.num_experts, num_ranks)
    rank_of = _rank_of_expert(placement, ids)
    dst_rank = torch.where((dst_row >= 0) & (ids >= 0), rank_of, -1).to(torch.int32)
    alignment = handle.expert_alignment
    ends = ((counts + alignment - 1) // alignment * alignment).cumsum(0, dtype=torch.int32)
    between = counts.new_zeros((num_ranks, num_ranks))
    member = dst_rank.new_zeros((dst_rank.size(0), num_ranks + 1))
    member.scatter_(1, torch.where(dst_rank < 0, num_ranks, dst_rank).long(), 1)
    between[rank] = member[:, :num_ranks].sum(dim=0, dtype=torch.int32)
    tensors = dict(
        dst_rank=dst_rank,
        dst_row=dst_row,
        dst_arrival=dst_row,  # a cached dispatch grouped by expert sends nothing by arrival
        slot_rows=counts,
        slot_first_row=torch.cat([ends.new_zeros(1), ends]),
        tokens_between=between,
    )
    layout = _core.OutputLayout.by_expert if handle.do_expand else _core.OutputLayout.by_rank
    return _core.Handle.make(
        layout, placement, ids.size(1), alignment, handle.num_rows, handle.num_recv_tokens, tensors
    )


def _rank_of_expert(placement: Any, ids: torch.Tensor) -> torch.Tensor:
    """Experts in order, as an even placement has them: the first ranks may host one more."""
    each, more = divmod(placement.num_experts, placement.num_ranks)
    split = more * (each + 1)
    return torch.where(ids < split, ids // (each + 1), more + (ids - split) // max(each, 1))
