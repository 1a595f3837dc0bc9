# SPDX-License-Identifier: MIT
"""Contract 1.5: get_dispatch_layout."""

import pytest
import torch
from deep_ep import Buffer

from ranks import make_tokens, member_of, run_ranks

EXPERTS = 16


def layouts(num_ranks, ranks_per_node=None, dtype=torch.int64):
    def body(group):
        tokens = make_tokens(group.rank(), 33, 16, 4, EXPERTS)
        with Buffer(group, ranks_per_node=ranks_per_node) as buffer:
            return tokens.topk_idx, buffer.get_dispatch_layout(tokens.topk_idx.to(dtype), EXPERTS)

    return run_ranks(num_ranks, body)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_1_5_counts_and_membership_equal_a_reference(dtype):
    for topk_idx, (per_rank, per_node, per_expert, member, event) in layouts(4, dtype=dtype):
        expected = member_of(topk_idx, EXPERTS, 4)
        assert torch.equal(member, expected) and member.dtype == torch.bool
        assert torch.equal(per_rank, expected.sum(dim=0).to(torch.int32)) and per_rank.dtype == torch.int32
        assert torch.equal(per_expert, torch.bincount(topk_idx[topk_idx >= 0], minlength=EXPERTS).to(torch.int32))
        assert per_node is None
        assert event.event is None


def test_1_5_tokens_per_node_are_given_between_nodes():
    for topk_idx, (_, per_node, _, member, _) in layouts(4, ranks_per_node=2):
        assert torch.equal(per_node, member.view(-1, 2, 2).any(dim=2).sum(dim=0).to(torch.int32))


def test_1_5_duplicate_selections_count_once_per_rank_and_twice_per_expert():
    def body(group):
        with Buffer(group) as buffer:
            return buffer.get_dispatch_layout(torch.tensor([[1, 1, -1]]), 4)

    per_rank, _, per_expert, _, _ = run_ranks(2, body)[0]
    assert per_rank.tolist() == [1, 0]
    assert per_expert.tolist() == [0, 2, 0, 0]


def test_1_4_an_asynchronous_call_returns_an_event_and_a_synchronous_one_none():
    def body(group):
        with Buffer(group) as buffer:
            ids = torch.tensor([[0]])
            return [buffer.get_dispatch_layout(ids, 2, async_finish=flag)[4].event for flag in (False, True)]

    synchronous, asynchronous = run_ranks(1, body)[0]
    assert synchronous is None
    asynchronous.current_stream_wait()
