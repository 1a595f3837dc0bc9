# SPDX-License-Identifier: MIT
"""ElasticBuffer and the operators on CUDA tensors: the same bits as on CPU tensors."""

import pytest
import torch
from deep_ep import Buffer, ElasticBuffer, EPHandle, ops
from deep_ep.elastic_fields import Fields

from gpu import SMALL, moved, needs_gpu, on_both
from ranks import make_tokens

pytestmark = needs_gpu
RANKS, EXPERTS, HIDDEN, TOPK, MAX_TOKENS = 4, 16, 256, 4, 24
EXPAND = pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
CPU_SYNC = pytest.mark.parametrize("cpu_sync", [True, False], ids=["exact", "bounded"])


def exchange(body, **options):
    def run(group, device):
        tokens = moved(make_tokens(group.rank(), MAX_TOKENS - group.rank(), HIDDEN, TOPK, EXPERTS), device)
        with ElasticBuffer(
            group,
            num_max_tokens_per_rank=MAX_TOKENS,
            hidden=HIDDEN,
            num_gpu_timeout_secs=20,
            arena_bytes=SMALL["arena_bytes"],
            device=device,
            **options,
        ) as buffer:
            return body(buffer, tokens)

    return on_both(RANKS, run)


def valid_rows(handle, expand):
    last = int(handle.psum_num_recv_tokens_per_expert[-1]) if expand else None
    return int(handle.psum_num_recv_tokens_per_scaleup_rank[-1]), last


@EXPAND
@CPU_SYNC
@pytest.mark.parametrize("ranks_per_node", [8, 2], ids=["direct", "hybrid"])
def test_3_4_dispatch_combine_and_handle(expand, cpu_sync, ranks_per_node):
    def body(buffer, tokens):
        stats = torch.ones(EXPERTS // RANKS, dtype=torch.int32, device=tokens.x.device)
        x, ids, weights, handle, event = buffer.dispatch(
            tokens.x,
            tokens.topk_idx,
            tokens.topk_weights,
            stats,
            num_experts=EXPERTS,
            expert_alignment=8,
            do_cpu_sync=cpu_sync,
            do_expand=expand,
        )
        arrivals, last = valid_rows(handle, expand)
        rows = last if expand else arrivals
        again = buffer.dispatch(tokens.x, topk_weights=tokens.topk_weights, handle=handle)
        assert again[3] is handle and event.event is None
        fields = [getattr(handle, name) for name in Fields.MAKERS]
        fields[3] = fields[3][:arrivals]
        combined = buffer.combine(x, handle, topk_weights=weights, bias=torch.ones_like(tokens.x))[:2]
        return (
            stats,
            x[:rows],
            None if ids is None else ids[:rows],
            weights[:rows],
            fields,
            handle.num_recv_tokens_per_expert_list,
            again[0][:rows],
            None if expand else again[1][:rows],
            again[2][:rows],
            combined,
        )

    exchange(body, ranks_per_node=ranks_per_node)


@EXPAND
def test_3_5_a_saved_handle(expand):
    def body(buffer, tokens):
        x, _, weights, handle, _ = buffer.dispatch(
            tokens.x, tokens.topk_idx, tokens.topk_weights, num_experts=EXPERTS, do_expand=expand
        )
        saved = EPHandle.from_state_dict(handle.state_dict())
        again = buffer.dispatch(tokens.x, topk_weights=tokens.topk_weights, handle=saved)
        return again[0], again[2], buffer.combine(x, saved, topk_weights=weights)[:2]

    exchange(body)


def test_3_7_engram_and_gathers():
    def body(buffer, tokens):
        storage = tokens.x[:8].contiguous() + buffer.rank_idx
        buffer.engram_write(storage)
        wanted = (torch.arange(12, dtype=torch.int32) * 5 % (8 * RANKS)).view(6, 2).to(tokens.x.device)
        fetched = buffer.engram_fetch(wanted)()[0]
        buffer.agrs_set_config(1 << 20, 4)
        with buffer.agrs_new_session():
            gathered = buffer.all_gather(storage)[0]
        return fetched, gathered

    exchange(body)


def layer(number, x, topk_idx, weights, bound):
    rows, ids, here, _, *handle = torch.ops.deep_ep.dispatch(number, x, topk_idx, weights, EXPERTS, bound, 1)
    # In double these sums are exact, whatever order CPU and GPU take.
    share = torch.where(ids >= 0, here, torch.zeros_like(here)).double().sum(dim=1, keepdim=True).float()
    return torch.ops.deep_ep.combine(number, 2 * rows * share, handle, x.size(0))


@pytest.mark.parametrize("bound", [0, 120], ids=["exact", "bounded"])
def test_operators_and_their_gradients(bound):
    def run(group, device):
        tokens = moved(make_tokens(group.rank(), 9 + group.rank(), HIDDEN, TOPK, EXPERTS), device)
        with Buffer(group, device=device, **SMALL) as buffer:
            number = ops.register_buffer(buffer)
            x, weights = tokens.x.float().requires_grad_(), tokens.topk_weights.clone().requires_grad_()
            y = layer(number, x, tokens.topk_idx, weights, bound)
            torch.autograd.backward(y, 0.5 * torch.ones_like(y))
            return y.detach(), x.grad

    on_both(RANKS, run)
