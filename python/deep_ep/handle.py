# SPDX-License-Identifier: MIT
"""`EPHandle`: what a V2 dispatch leaves for combine and for cached dispatches, as tensors that may be read and written."""

from typing import Any, Dict, List, Optional

import torch

from . import _core, row_order
from .elastic_fields import Fields, handle_from_fields

_TENSORS = (
    "topk_idx",
    "psum_num_recv_tokens_per_scaleup_rank",
    "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert",
    "recv_src_metadata",
    "dst_buffer_slot_idx",
    "token_metadata_at_forward",
    "channel_linked_list",
)


class EPHandle:
    # Of a handle that a dispatch made these are not there until somebody asks for them, see `__getattr__`.
    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    psum_num_recv_tokens_per_expert: torch.Tensor
    num_unaligned_recv_tokens_per_expert: torch.Tensor
    recv_src_metadata: torch.Tensor
    dst_buffer_slot_idx: torch.Tensor

    def __init__(
        self,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: torch.Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: List[int],
        psum_num_recv_tokens_per_scaleup_rank: torch.Tensor,
        psum_num_recv_tokens_per_expert: torch.Tensor,
        num_unaligned_recv_tokens_per_expert: torch.Tensor,
        recv_src_metadata: torch.Tensor,
        dst_buffer_slot_idx: torch.Tensor,
        token_metadata_at_forward: Optional[torch.Tensor] = None,
        channel_linked_list: Optional[torch.Tensor] = None,
    ) -> None:
        self.do_expand = do_expand
        self.num_experts = num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        self.num_recv_tokens = num_recv_tokens
        self.num_expanded_tokens = num_expanded_tokens
        self.num_recv_tokens_per_expert_list = num_recv_tokens_per_expert_list
        self.psum_num_recv_tokens_per_scaleup_rank = psum_num_recv_tokens_per_scaleup_rank
        self.psum_num_recv_tokens_per_expert = psum_num_recv_tokens_per_expert
        self.num_unaligned_recv_tokens_per_expert = num_unaligned_recv_tokens_per_expert
        self.recv_src_metadata = recv_src_metadata
        self.dst_buffer_slot_idx = dst_buffer_slot_idx
        self.token_metadata_at_forward = token_metadata_at_forward
        self.channel_linked_list = channel_linked_list
        self.cached_recv_src_metadata_before_sort: Optional[torch.Tensor] = None
        # Experts placed by the caller: which routes they gave, the fields above cannot tell.
        self._routes: Any = None
        # The metadata as the library made it, where its rows are in the library's order.
        self._metadata_in_order: Optional[torch.Tensor] = None
        self._fields: Optional[Fields] = None

    @classmethod
    def of_dispatch(cls, fields: Fields, **known: Any) -> "EPHandle":
        """With the constructor's arguments but those that `fields` makes when they are asked for."""
        handle = cls(**known, **dict.fromkeys(Fields.MAKERS))  # type: ignore[arg-type]
        for name in Fields.MAKERS:
            del handle.__dict__[name]
        handle._fields = fields
        return handle

    def __getattr__(self, name: str) -> torch.Tensor:
        """What is not there yet."""
        fields = self.__dict__.get("_fields")
        if fields is None or name not in Fields.MAKERS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        value = self.__dict__[name] = fields.make(name)
        if name == "recv_src_metadata":
            self._metadata_in_order = value
        return value

    def make_fields(self) -> None:
        """All of them, now."""
        for name in Fields.MAKERS:
            getattr(self, name)

    def deterministic_sort(
        self,
        do_cpu_sync: bool,
        is_cached_dispatch: bool,
        recv_x: torch.Tensor,
        recv_sf: Optional[torch.Tensor] = None,
        recv_topk_idx: Optional[torch.Tensor] = None,
        recv_topk_weights: Optional[torch.Tensor] = None,
        channel_linked_list: Optional[torch.Tensor] = None,
    ) -> None:
        """Sorts compact rows by (source rank, source token), in place, and the metadata unless the dispatch was a cached
        one. Buffers made with `deterministic=True`, and all expanded rows, are in that order already."""
        order = None if self.do_expand else self.row_order()
        if order is None:
            return
        back = row_order.inverse(order)
        for rows in (recv_x, recv_sf, recv_topk_idx, recv_topk_weights):
            if rows is not None:
                rows.copy_(row_order.taken(rows, back))  # type: ignore[arg-type]
        if not is_cached_dispatch:
            self.recv_src_metadata.copy_(self.recv_src_metadata[back])

    def row_order(self, num_rows: Optional[int] = None) -> Optional[torch.Tensor]:
        """The library's row of each compact row; None where that is the row itself."""
        if "recv_src_metadata" not in self.__dict__:
            return None  # nobody has seen it, so nobody has changed it
        metadata = self.recv_src_metadata
        if metadata.is_cuda and metadata is self._metadata_in_order:
            return None  # what the GPU holds is not read for it: graphs cannot be captured through a read
        num_valid = min(int(self.psum_num_recv_tokens_per_scaleup_rank[-1]), metadata.size(0))
        return row_order.of_metadata(metadata, num_valid, metadata.size(0) if num_rows is None else num_rows)

    def placement(self, num_ranks: int) -> Any:
        """Who hosts which expert."""
        return _core.Placement.even(self.num_experts, num_ranks) if self._routes is None else self._routes.placement

    def tensors(self) -> List[torch.Tensor]:
        """Those that are there."""
        there = [self.__dict__.get(name) for name in _TENSORS]
        return [tensor for tensor in there if tensor is not None] + (self._fields.tensors() if self._fields else [])

    @property
    def num_rows(self) -> int:
        return self.num_expanded_tokens if self.do_expand else self.num_recv_tokens

    def core_handle(self, rank: int, num_ranks: int) -> Any:
        """The library's handle: found by the memory of one of its tensors, or made again from what they say."""
        if self._fields is not None and "num_unaligned_recv_tokens_per_expert" not in self.__dict__:
            found = self._fields.core_handle
        else:
            found = _core.handle_of(self.num_unaligned_recv_tokens_per_expert)
        if found is not None and found.num_rows == self.num_rows and found.num_experts == self.num_experts:
            return found
        if self._routes is not None:
            return self._routes
        return handle_from_fields(self, rank, num_ranks)

    # Above upstream -------------------------------------------------------------------------------------------------

    def state_dict(self) -> Dict[str, Any]:
        """Everything, as tensors and numbers, for `from_state_dict`: torch.save writes it."""
        state = dict(self.__getstate__(), _metadata_in_order=None)
        for name in _TENSORS:
            if state[name] is not None:
                state[name] = state[name].clone()
        if self._routes is not None:
            state["_routes"] = self._routes.save()
        return state

    def __getstate__(self) -> Dict[str, Any]:
        self.make_fields()
        return dict(self.__dict__, _fields=None)

    @classmethod
    def from_state_dict(cls, state: Dict[str, Any]) -> "EPHandle":
        handle = cls.__new__(cls)
        handle.__dict__.update(state)
        if handle._routes is not None:
            handle._routes = _core.Handle.restore(handle._routes)
        return handle
