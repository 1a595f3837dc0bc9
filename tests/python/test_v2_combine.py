# SPDX-License-Identifier: MIT
"""Contract 3.6: combine of ElasticBuffer, bit for bit."""

import pytest
import torch
from deep_ep import Error
from deep_ep.utils import refs

from v2 import EXPERTS, HIDDEN, MAX_TOKENS, RANKS, TOPK, exchange


def pre_combine(metadata, tokens_index):
    return refs.generate_pre_combine_data(tokens_index, MAX_TOKENS, TOPK, HIDDEN, RANKS)


@pytest.mark.parametrize("num_biases", [0, 1, 2])
@pytest.mark.parametrize("multiple", [True, False], ids=["multiple", "single"])
@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
@pytest.mark.parametrize("ranks_per_node", [8, 2], ids=["direct", "hybrid"])
def test_3_6_combine_is_bitwise_the_ordered_reference(num_biases, multiple, expand, ranks_per_node):
    def body(buffer, tokens):
        recv_x, ids, weights, handle, _ = buffer.dispatch(
            tokens.x, tokens.topk_idx, tokens.topk_weights, num_experts=EXPERTS, do_expand=expand
        )
        metadata = handle.recv_src_metadata
        y = pre_combine(metadata, metadata[:, 0])
        if expand:
            rows = torch.zeros_like(recv_x)
            here = metadata[:, 2:] >= 0
            rows[metadata[:, 2:][here].long()] = y[here]
        else:
            rows = refs.ordered_accumulate(torch.where((ids >= 0).unsqueeze(2), y, torch.zeros_like(y)))
        biases = tuple(torch.full_like(tokens.x, 0.25 + i) for i in range(num_biases))
        bias = None if num_biases == 0 else biases[0] if num_biases == 1 else biases
        give = weights if (multiple or not expand) else None
        combined, home, _ = buffer.combine(rows, handle, topk_weights=give, bias=bias)
        mine = torch.arange(tokens.x.size(0), dtype=torch.int32) + buffer.rank_idx * MAX_TOKENS
        nodes = buffer.num_scaleout_ranks
        wanted = refs.combine(
            pre_combine(None, mine),
            tokens.topk_idx,
            nodes,
            RANKS // nodes,
            EXPERTS,
            bias,
            reduce_in_local=multiple or not expand,
            reduce_in_scaleup=multiple and nodes > 1,
        )
        return combined, wanted, home

    results, sources = exchange(body, allow_multiple_reduction=multiple, ranks_per_node=ranks_per_node)
    for tokens, (combined, wanted, home) in zip(sources, results):
        assert torch.equal(combined, wanted)
        if home is not None:
            assert torch.equal(home, torch.where(tokens.topk_idx >= 0, tokens.topk_weights, 0.0))


def test_3_6_rows_sorted_together_with_their_metadata_combine_alike():
    def body(buffer, tokens):
        recv_x, _, weights, handle, _ = buffer.dispatch(
            tokens.x, tokens.topk_idx, tokens.topk_weights, num_experts=EXPERTS
        )
        first = buffer.combine(recv_x, handle, topk_weights=weights)
        order = torch.randperm(recv_x.size(0))
        handle.recv_src_metadata = handle.recv_src_metadata[order]
        second = buffer.combine(recv_x[order], handle, topk_weights=weights[order])
        return first[0], first[1], second[0], second[1]

    for x_1, w_1, x_2, w_2 in exchange(body)[0]:
        assert torch.equal(x_1, x_2) and torch.equal(w_1, w_2)


def test_3_6_rows_behind_the_last_one_may_be_cut_off():
    def body(buffer, tokens):
        recv_x, _, _, handle, _ = buffer.dispatch(tokens.x, tokens.topk_idx, num_experts=EXPERTS, do_cpu_sync=False)
        first = buffer.combine(recv_x, handle)[0]
        rows = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        handle.recv_src_metadata = handle.recv_src_metadata[:rows]
        return first, buffer.combine(recv_x[:rows], handle)[0]

    for first, second in exchange(body)[0]:
        assert torch.equal(first, second)


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_3_6_too_few_rows_are_refused_and_the_group_goes_on(expand):
    def body(buffer, tokens):
        recv_x, _, _, handle, _ = buffer.dispatch(
            tokens.x, tokens.topk_idx, num_experts=EXPERTS, do_expand=expand, expert_alignment=1
        )
        with pytest.raises(Error, match="x: .* rows"):
            buffer.combine(recv_x[:-1], handle)
        return buffer.combine(recv_x, handle)[0].shape == tokens.x.shape

    assert all(exchange(body)[0])
