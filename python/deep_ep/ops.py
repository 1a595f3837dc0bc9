# SPDX-License-Identifier: MIT
"""Dispatch and combine as torch operators, for torch.compile, activation checkpointing and autograd (torch >= 2.4).

A handle travels as a list of tensors, so that a graph can hold it; a buffer travels as the number that `register_buffer`
gives it. dispatch and combine are each other's gradient.

    number = deep_ep.ops.register_buffer(buffer)
    rows, ids, weights, counts, *handle = torch.ops.deep_ep.dispatch(number, x, topk_idx, topk_weights, num_experts, bound, 1)
    y = torch.ops.deep_ep.combine(number, experts(rows), handle, x.size(0))
"""

import threading
import weakref
from typing import Any, List, Optional, Tuple

import torch

from . import _core
from .session import Session

if not hasattr(torch.library, "custom_op"):
    raise ImportError(f"deep_ep.ops needs torch 2.4 or newer: this is {torch.__version__}")

_buffers: "weakref.WeakValueDictionary[int, Session]" = weakref.WeakValueDictionary()
_lock = threading.Lock()
_next_number = 0

#: Tensors of a saved handle.
NUM_HANDLE_TENSORS = 11


def register_buffer(buffer: Session) -> int:
    """The buffer's number for the operators. It does not keep the buffer alive."""
    global _next_number
    with _lock:
        number = buffer.__dict__.get("_operator_number")
        if number is None:
            number = buffer.__dict__["_operator_number"] = _next_number
            _next_number += 1
        _buffers[number] = buffer
    return number


def _core_of(number: int, x: torch.Tensor) -> Any:
    return _buffers[number]._use(x, "x")


def _clear_behind(rows: torch.Tensor, last: torch.Tensor) -> None:
    """Zeroes what lies behind row `last`: it must not reach a gradient. On a GPU without a look at the number, for which the
    host would have to wait."""
    if rows.is_cuda:
        behind = torch.arange(rows.size(0), device=rows.device) >= last
        rows.masked_fill_(behind.view(-1, *(1 for _ in rows.shape[1:])), 0)
    else:
        rows[int(last) :] = 0


def _order_of(number: int) -> Any:
    return _buffers[number]._rank_order()


def _given(tensor: torch.Tensor) -> Optional[torch.Tensor]:
    """Operators have no optional outputs: an empty vector says "none"."""
    return None if tensor.dim() == 1 and tensor.numel() == 0 else tensor


@torch.library.custom_op("deep_ep::dispatch", mutates_args=())
def dispatch(
    buffer: int,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    max_rows: int,
    expert_alignment: int,
) -> List[torch.Tensor]:
    """[rows, local ids or -1, weights, counts per expert, handle ...]. `max_rows` > 0 fixes the number of rows, so that
    shapes do not depend on data; 0 gives exactly those that came."""
    received, _, ids, weights, _, handle = _core_of(buffer, x).dispatch(
        x=x.contiguous(),
        topk_idx=topk_idx.contiguous(),
        topk_weights=topk_weights.contiguous(),
        num_experts=num_experts,
        max_rows=max_rows,
        expert_alignment=expert_alignment,
    )
    if max_rows > 0:
        _clear_behind(received, handle.first_arrival[-1])
        _clear_behind(weights, handle.first_arrival[-1])
    return [received, ids, weights, handle.slot_rows.clone(), *handle.save()]


@dispatch.register_fake
def _(
    buffer: int,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    max_rows: int,
    expert_alignment: int,
) -> List[torch.Tensor]:
    rows = max_rows if max_rows > 0 else torch.library.get_ctx().new_dynamic_size()
    session = _buffers[buffer]
    ranks, slots = session._num_ranks, _core.Placement.even(num_experts, session._num_ranks).num_slots(session._rank)
    tokens, topk = topk_idx.shape
    word = lambda *shape: x.new_empty(shape, dtype=torch.int32)  # noqa: E731
    handle = [
        x.new_empty((13,), dtype=torch.int64, device="cpu"),
        x.new_empty((ranks + num_experts,), dtype=torch.int32, device="cpu"),
        word(tokens, topk),
        word(tokens, topk),
        word(tokens, topk),
        word(ranks + 1),
        word(rows),
        x.new_empty((0,), dtype=torch.int32, device="cpu"),
        word(slots),
        word(slots + 1),
        word(ranks, ranks),
    ]
    return [
        x.new_empty((rows, x.size(1))),
        topk_idx.new_empty((rows, topk)),
        topk_weights.new_empty((rows, topk)),
        word(slots),
        *handle,
    ]


@torch.library.custom_op("deep_ep::combine", mutates_args=())
def combine(buffer: int, x: torch.Tensor, handle: List[torch.Tensor], num_tokens: int) -> torch.Tensor:
    """[num_tokens, hidden]: unweighted sums of the rows over the tokens' ranks."""
    saved = _core.Handle.restore(handle)
    return _core_of(buffer, x).combine(x=x.contiguous(), handle=saved, order=_order_of(buffer))[0]


@combine.register_fake
def _(buffer: int, x: torch.Tensor, handle: List[torch.Tensor], num_tokens: int) -> torch.Tensor:
    return x.new_empty((num_tokens, x.size(1)))


@torch.library.custom_op("deep_ep::dispatch_gradient", mutates_args=())
def dispatch_gradient(
    buffer: int, grad_rows: torch.Tensor, grad_weights: torch.Tensor, handle: List[torch.Tensor], num_tokens: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Gradients of dispatch's x and topk_weights."""
    saved = _core.Handle.restore(handle)
    grad, weights = _core_of(buffer, grad_rows).combine(
        x=grad_rows.contiguous(),
        handle=saved,
        topk_weights=grad_weights.contiguous(),
        weights_from_owner=True,
        order=_order_of(buffer),
    )
    return grad, weights


@dispatch_gradient.register_fake
def _(
    buffer: int, grad_rows: torch.Tensor, grad_weights: torch.Tensor, handle: List[torch.Tensor], num_tokens: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    return (
        grad_rows.new_empty((num_tokens, grad_rows.size(1))),
        grad_weights.new_empty((num_tokens, grad_weights.size(1))),
    )


@torch.library.custom_op("deep_ep::combine_gradient", mutates_args=())
def combine_gradient(buffer: int, grad: torch.Tensor, handle: List[torch.Tensor], num_rows: int) -> torch.Tensor:
    """Gradient of combine's rows: every row gets its token's."""
    saved = _core.Handle.restore(handle)
    rows = _core_of(buffer, grad).dispatch(x=grad.contiguous(), handle=saved)[0]
    _clear_behind(rows, saved.first_arrival[-1])
    return rows


@combine_gradient.register_fake
def _(buffer: int, grad: torch.Tensor, handle: List[torch.Tensor], num_rows: int) -> torch.Tensor:
    return grad.new_empty((num_rows, grad.size(1)))


def _keep_for_dispatch(ctx: Any, inputs: Tuple[Any, ...], output: List[torch.Tensor]) -> None:
    ctx.buffer, ctx.num_tokens = inputs[0], inputs[1].size(0)
    ctx.save_for_backward(*output[4:])
    ctx.like = output[0].dtype


def _dispatch_backward(ctx: Any, grads: List[Any]) -> Tuple[Any, ...]:
    grad_rows, grad_weights = grads[0], grads[2]
    grad_x, grad_topk = torch.ops.deep_ep.dispatch_gradient(
        ctx.buffer, grad_rows, grad_weights, list(ctx.saved_tensors), ctx.num_tokens
    )
    return None, grad_x, None, grad_topk, None, None, None


def _keep_for_combine(ctx: Any, inputs: Tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.buffer, ctx.num_rows = inputs[0], inputs[1].size(0)
    ctx.save_for_backward(*inputs[2])


def _combine_backward(ctx: Any, grad: torch.Tensor) -> Tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    rows = torch.ops.deep_ep.combine_gradient(ctx.buffer, grad, saved, ctx.num_rows)
    return None, rows, [None] * len(saved), None


dispatch.register_autograd(_dispatch_backward, setup_context=_keep_for_dispatch)
combine.register_autograd(_combine_backward, setup_context=_keep_for_combine)
