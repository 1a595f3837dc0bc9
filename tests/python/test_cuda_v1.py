# SPDX-License-Identifier: MIT
"""V1's high-throughput calls on CUDA tensors: the same bits as on CPU tensors, inside a node and between nodes."""

import pytest
import torch
from deep_ep import Buffer, Config
from deep_ep.utils.math import per_token_cast_to_fp8

from gpu import SMALL, needs_gpu, on_both
from ranks import dispatch_v1, make_tokens
from gpu import moved

pytestmark = needs_gpu
EXPERTS, HIDDEN, TOPK = 16, 256, 4
NODES = pytest.mark.parametrize("ranks_per_node", [8, 2], ids=["intranode", "internode"])


def exchange(body, ranks_per_node=8, num_ranks=4, num_tokens=40):
    def run(group, device):
        tokens = moved(make_tokens(group.rank(), num_tokens + 3 * group.rank(), HIDDEN, TOPK, EXPERTS), device)
        with Buffer(group, 1 << 20, ranks_per_node=ranks_per_node, device=device, **SMALL) as buffer:
            return body(buffer, tokens)

    return on_both(num_ranks, run)


@NODES
def test_1_5_layout(ranks_per_node):
    exchange(lambda b, t: b.get_dispatch_layout(t.topk_idx, EXPERTS)[:4], ranks_per_node)
    exchange(lambda b, t: b.get_dispatch_layout(t.topk_idx.int(), EXPERTS)[:4], ranks_per_node)


@NODES
@pytest.mark.parametrize("alignment", [1, 8])
def test_1_6_rows_ids_weights_counts_and_handles(ranks_per_node, alignment):
    def body(buffer, tokens):
        received = dispatch_v1(buffer, tokens, EXPERTS, expert_alignment=alignment, config=Config(24, 8, 256))
        assert received[0].is_cuda == tokens.x.is_cuda
        return received[:4], list(received[4])

    exchange(body, ranks_per_node)


@NODES
def test_1_6_without_topk(ranks_per_node):
    def body(buffer, tokens):
        received = dispatch_v1(buffer, tokens, EXPERTS, with_topk=False, expert_alignment=4)
        again = buffer.dispatch(tokens.x, handle=received[4])
        return received[0], received[3], again[0], buffer.combine(received[0], received[4])[0]

    exchange(body, ranks_per_node)


@NODES
def test_1_6_worst_tokens(ranks_per_node):
    bound = 4 * 60

    def body(buffer, tokens):
        exact = dispatch_v1(buffer, tokens, EXPERTS)
        bounded = dispatch_v1(buffer, tokens, EXPERTS, num_worst_tokens=bound)
        rows = exact[0].size(0)
        assert bounded[3] == [] and all(each.size(0) == bound for each in bounded[:3])
        combined = [buffer.combine(each[0], each[4], topk_weights=each[2])[:2] for each in (exact, bounded)]
        return bounded[0][:rows], bounded[1], bounded[2][:rows], combined

    exchange(body, ranks_per_node)


@NODES
@pytest.mark.parametrize("packed", [False, True], ids=["fp32", "int32"])
def test_1_6_fp8_rows_with_column_major_scales(ranks_per_node, packed):
    def body(buffer, tokens):
        q, scales = per_token_cast_to_fp8(tokens.x.cpu())
        q, scales = q.to(tokens.x.device), scales.to(tokens.x.device)
        scales = (scales.view(torch.int32) if packed else scales).t().contiguous().t()
        (data, received_scales), *_, handle, _ = dispatch_v1(buffer, tokens, EXPERTS, x=(q, scales))
        assert data.dtype == torch.float8_e4m3fn and received_scales.is_contiguous()
        again = buffer.dispatch((q, scales), handle=handle)[0]
        return data.view(torch.uint8), received_scales, again[0].view(torch.uint8), again[1]

    exchange(body, ranks_per_node)


@NODES
@pytest.mark.parametrize("num_biases", [0, 1, 2])
def test_1_7_combine(ranks_per_node, num_biases):
    def body(buffer, tokens):
        recv_x, _, weights, _, handle, _ = dispatch_v1(buffer, tokens, EXPERTS)
        biases = tuple(torch.full_like(tokens.x, 0.37 * (i + 1)) for i in range(num_biases))
        bias = None if num_biases == 0 else biases[0] if num_biases == 1 else biases
        processed = (recv_x.float() * (1 + buffer.rank / 3)).to(torch.bfloat16)
        return buffer.combine(processed, handle, topk_weights=weights, bias=bias)[:2]

    exchange(body, ranks_per_node)


@NODES
def test_1_6_a_handle_may_be_taken_apart_or_copied(ranks_per_node):
    def body(buffer, tokens):
        recv_x, _, weights, _, handle, _ = dispatch_v1(buffer, tokens, EXPERTS)
        handles = handle, tuple(each.detach() for each in handle), tuple(each.clone() for each in handle)
        combined = [buffer.combine(recv_x, each, topk_weights=weights)[:2] for each in handles]
        return combined, [buffer.dispatch(tokens.x, handle=each)[0] for each in handles]

    exchange(body, ranks_per_node)


def test_1_6_no_tokens_and_no_selections():
    def run(group, device):
        tokens = moved(make_tokens(group.rank(), 0 if group.rank() == 1 else 5, HIDDEN, TOPK, EXPERTS), device)
        tokens.topk_idx[:2] = -1
        with Buffer(group, device=device, **SMALL) as buffer:
            recv_x, ids, weights, counts, handle, _ = dispatch_v1(buffer, tokens, EXPERTS)
            bias = torch.ones_like(tokens.x)
            return recv_x, ids, weights, counts, buffer.combine(recv_x, handle, topk_weights=weights, bias=bias)[:2]

    on_both(2, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.uint8])
def test_1_6_rows_of_any_dtype(dtype):
    def body(buffer, tokens):
        x = (tokens.x.float() * 10).to(dtype)
        recv_x, _, _, _, handle, _ = dispatch_v1(buffer, tokens, EXPERTS, x=x)
        return recv_x, buffer.combine(recv_x, handle)[0] if dtype.is_floating_point else None

    exchange(body)


def test_one_rank_alone_on_the_default_stream():
    def run(group, device):
        tokens = moved(make_tokens(0, 9, HIDDEN, TOPK, EXPERTS), device)
        with Buffer(group, device=device, **SMALL) as buffer, torch.cuda.stream(torch.cuda.default_stream()):
            recv_x, _, weights, counts, handle, _ = dispatch_v1(buffer, tokens, EXPERTS)
            return recv_x.cpu(), counts, buffer.combine(recv_x, handle)[0].cpu()

    on_both(1, run)
