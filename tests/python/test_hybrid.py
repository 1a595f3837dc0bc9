# SPDX-License-Identifier: MIT
"""`HybridEPBuffer`: users.md's calls of Megatron's hybridep backend, rows and gradients."""

import pytest
import torch

from deep_ep import Error, HybridEPBuffer
from ranks import make_tokens, run_ranks

RANKS, EXPERTS, HIDDEN, TOPK = 4, 8, 64, 3
LOCAL = EXPERTS // RANKS


def with_buffer(body, **options):
    def run(group):
        tokens = make_tokens(group.rank(), 7 + group.rank(), HIDDEN, TOPK, EXPERTS)
        routing_map = torch.zeros((tokens.x.size(0), EXPERTS + 1), dtype=torch.bool)
        routing_map.scatter_(1, torch.where(tokens.topk_idx >= 0, tokens.topk_idx, EXPERTS), True)
        routing_map = routing_map[:, :EXPERTS].contiguous()
        probs = torch.rand(routing_map.shape, generator=torch.Generator().manual_seed(group.rank())) * routing_map
        with HybridEPBuffer(
            group=group,
            hidden_dim=HIDDEN,
            max_num_of_tokens_per_rank=64,
            num_local_experts=LOCAL,
            use_fp8=False,
            num_sms_dispatch_api=16,
            num_sms_combine_api=16,
            num_blocks_permute=None,
            num_blocks_unpermute=None,
            num_sms_preprocessing_api=108,
            timeout_secs=20,
            **options,
        ) as buffer:
            return (tokens, routing_map, probs), body(buffer, tokens, routing_map, probs)

    results = run_ranks(RANKS, run)
    return [result for _, result in results], [given for given, _ in results]


@pytest.mark.parametrize("pad_multiple", [None, 8])
@pytest.mark.parametrize("form", ["map", "topk"])
def test_rows_are_grouped_by_expert_with_their_probs(pad_multiple, form):
    def body(buffer, tokens, routing_map, probs):
        routes = dict(routing_map=routing_map, probs=probs)
        if form == "topk":
            weights = probs.gather(1, tokens.topk_idx.clamp(min=0))
            routes = dict(topk_idx=tokens.topk_idx, topk_weights=weights, num_of_experts=EXPERTS)
        return buffer.dispatch_with_permute(
            hidden=tokens.x,
            scaling_factor=None,
            num_of_experts_per_rank=LOCAL,
            pad_multiple=pad_multiple,
            num_permuted_tokens=None,
            non_blocking=False,
            **routes,
        )

    results, given = with_buffer(body)
    for rank, (rows, row_probs, scales, tokens_per_expert, handle) in enumerate(results):
        assert scales is None and int(handle[-1]) == 0 and rows.size(0) == int(tokens_per_expert.sum())
        begin = 0
        for slot in range(LOCAL):
            expert = rank * LOCAL + slot
            chosen = [map_[:, expert] for _, map_, _ in given]
            wanted = torch.cat([tokens.x[each] for (tokens, _, _), each in zip(given, chosen)])
            wanted_probs = torch.cat([probs[each, expert] for (_, _, probs), each in zip(given, chosen)])
            padded = -(-wanted.size(0) // (pad_multiple or 1)) * (pad_multiple or 1)
            assert int(tokens_per_expert[slot]) == padded
            end = begin + wanted.size(0)
            assert torch.equal(rows[begin:end], wanted) and torch.equal(row_probs[begin:end], wanted_probs)
            assert bool((rows[end : begin + padded] == 0).all())
            begin += padded


class Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, routing_map, probs, buffer, pad_multiple):
        rows, row_probs, _, counts, handle = buffer.dispatch_with_permute(
            hidden=x, routing_map=routing_map, probs=probs, num_of_experts_per_rank=LOCAL, pad_multiple=pad_multiple
        )
        ctx.buffer, ctx.handle, ctx.pad_multiple = buffer, handle, pad_multiple
        return rows, row_probs, counts, handle

    @staticmethod
    def backward(ctx, grad_rows, grad_probs, grad_counts, grad_handle):
        grad_x, grad_probs = ctx.buffer.combine_with_unpermute(
            hidden=grad_rows, probs=grad_probs, handle=ctx.handle, pad_multiple=ctx.pad_multiple
        )
        return grad_x, None, grad_probs, None, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, handle, buffer, pad_multiple):
        combined, _ = buffer.combine_with_unpermute(hidden=rows, handle=handle, pad_multiple=pad_multiple)
        ctx.buffer, ctx.handle, ctx.pad_multiple, ctx.rows = buffer, handle, pad_multiple, rows.size(0)
        return combined

    @staticmethod
    def backward(ctx, grad):
        rows, _, _, _, _ = ctx.buffer.dispatch_with_permute(
            hidden=grad,
            scaling_factor=None,
            handle=ctx.handle,
            pad_multiple=ctx.pad_multiple,
            num_permuted_tokens=ctx.rows,
        )
        return rows, None, None, None


def test_megatrons_hybridep_pair_has_the_gradients_of_the_layer():
    def body(buffer, tokens, routing_map, probs):
        x = tokens.x.float().requires_grad_()
        probs = probs.clone().requires_grad_()
        rows, row_probs, counts, handle = Dispatch.apply(x, routing_map, probs, buffer, 4)
        y = Combine.apply(2 * rows * row_probs.unsqueeze(1), handle, buffer, 4)
        (y * y).sum().backward()
        return y.detach(), x.grad, probs.grad

    results, given = with_buffer(body)
    for (y, grad_x, grad_probs), (tokens, routing_map, probs) in zip(results, given):
        x, p = tokens.x.float().requires_grad_(), probs.clone().requires_grad_()
        wanted = 2 * x * (p * routing_map).sum(dim=1, keepdim=True)
        (wanted * wanted).sum().backward()
        for got, expected in ((y, wanted.detach()), (grad_x, x.grad), (grad_probs, p.grad)):
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_bounded_output_has_that_many_rows_and_too_many_are_refused():
    def body(buffer, tokens, routing_map, probs):
        call = dict(hidden=tokens.x, routing_map=routing_map, probs=probs, pad_multiple=2, non_blocking=True)
        rows, row_probs, _, counts, handle = buffer.dispatch_with_permute(num_permuted_tokens=200, **call)
        with pytest.raises(Error, match="num_permuted_tokens: rank"):
            buffer.dispatch_with_permute(num_permuted_tokens=2, **call)
        with pytest.raises(Error, match="routing_map"):
            buffer.dispatch_with_permute(hidden=tokens.x)
        back, dense = buffer.combine_with_unpermute(hidden=rows, probs=row_probs, handle=handle)
        return rows.size(0), back, dense

    results, given = with_buffer(body)
    for (num_rows, back, dense), (tokens, routing_map, probs) in zip(results, given):
        assert num_rows == 200 and torch.equal(dense, probs)
        assert torch.allclose(back.float(), tokens.x.float() * routing_map.sum(dim=1, keepdim=True), rtol=2e-2)
