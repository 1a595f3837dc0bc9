# SPDX-License-Identifier: MIT
"""Any shape: what goes out comes back."""

import torch
from deep_ep import Buffer, ElasticBuffer, EPHandle, Placement
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranks import dispatch_v1, make_tokens, member_of, run_ranks

SHAPES = dict(
    num_ranks=st.integers(1, 4),
    tokens=st.integers(0, 20),
    hidden=st.sampled_from([8, 24, 128, 392]),
    local=st.integers(1, 3),
    topk=st.integers(1, 5),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
)
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@SETTINGS
@given(node=st.sampled_from([1, 2, 8]), **SHAPES)
def test_identity_experts_multiply_a_token_by_its_ranks(num_ranks, tokens, hidden, local, topk, dropped, node):
    experts = num_ranks * local

    def body(group):
        mine = make_tokens(group.rank(), tokens, hidden, min(topk, experts), experts, dropped)
        with Buffer(group, ranks_per_node=node, timeout_secs=20) as buffer:
            recv_x, ids, weights, counts, handle, _ = dispatch_v1(buffer, mine, experts)
            combined, home, _ = buffer.combine(recv_x, handle, topk_weights=weights)
            return mine, recv_x.size(0), sum(counts), combined, home

    results = run_ranks(num_ranks, body)
    members = [member_of(mine.topk_idx, experts, num_ranks) for mine, *_ in results]
    assert sum(rows for _, rows, *_ in results) == sum(int(member.sum()) for member in members)
    assert sum(r[2] for r in results) == sum(int((mine.topk_idx >= 0).sum()) for mine, *_ in results)
    for (mine, _, _, combined, home), member in zip(results, members):
        assert torch.allclose(combined.float(), mine.x.float() * member.sum(dim=1, keepdim=True), rtol=2e-2)
        assert torch.equal(home, torch.where(mine.topk_idx >= 0, mine.topk_weights, 0.0))


@SETTINGS
@given(
    alignment=st.sampled_from([1, 4]),
    expand=st.booleans(),
    sync=st.booleans(),
    node=st.sampled_from([1, 2, 8]),
    **SHAPES,
)
def test_elastic_round_trips(num_ranks, tokens, hidden, local, topk, dropped, alignment, expand, sync, node):
    experts = num_ranks * local

    def body(group):
        mine = make_tokens(group.rank(), tokens, hidden, min(topk, experts), experts, dropped)
        with ElasticBuffer(group, 2 << 20, num_gpu_timeout_secs=20, ranks_per_node=node) as buffer:
            recv_x, _, weights, handle, _ = buffer.dispatch(
                mine.x,
                mine.topk_idx,
                mine.topk_weights,
                num_experts=experts,
                num_max_tokens_per_rank=20,
                expert_alignment=alignment,
                do_cpu_sync=sync,
                do_expand=expand,
            )
            return mine, *buffer.combine(recv_x, handle, topk_weights=weights)[:2]

    for mine, combined, home in run_ranks(num_ranks, body):
        selections = (mine.topk_idx >= 0).sum(dim=1, keepdim=True)
        factor = selections if expand else member_of(mine.topk_idx, experts, num_ranks).sum(dim=1, keepdim=True)
        assert torch.allclose(combined.float(), mine.x.float() * factor, rtol=2e-2)
        assert torch.equal(home, torch.where(mine.topk_idx >= 0, mine.topk_weights, 0.0))


@SETTINGS
@given(dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), node=st.sampled_from([2, 8]), **SHAPES)
def test_combine_is_exact_where_rows_are_small_integers(num_ranks, tokens, hidden, local, topk, dropped, dtype, node):
    experts = num_ranks * local

    def body(group):
        mine = make_tokens(group.rank(), tokens, hidden, min(topk, experts), experts, dropped)
        mine = mine._replace(x=(torch.arange(tokens * hidden).view(tokens, hidden) % 13 - 6).to(dtype))
        with Buffer(group, ranks_per_node=node, timeout_secs=20) as buffer:
            recv_x, *_, handle, _ = dispatch_v1(buffer, mine, experts)
            return mine, [buffer.combine(recv_x, handle, bias=(mine.x, mine.x))[0] for _ in range(3)]

    for mine, combined in run_ranks(num_ranks, body):
        factor = member_of(mine.topk_idx, experts, num_ranks).sum(dim=1, keepdim=True) + 2
        for each in combined:
            assert torch.equal(each, (mine.x.float() * factor).to(dtype))


@SETTINGS
@given(data=st.data(), expand=st.booleans(), saved=st.booleans(), node=st.sampled_from([2, 8]), **SHAPES)
def test_any_placement_takes_every_selection_somewhere_and_back(
    data, num_ranks, tokens, hidden, local, topk, dropped, expand, saved, node
):
    experts = num_ranks * local
    hosted = [[] for _ in range(num_ranks)]
    for expert in data.draw(st.permutations(range(experts))):
        homes = data.draw(st.sets(st.integers(0, num_ranks - 1), min_size=1))
        for rank in sorted(homes):
            hosted[rank].append(expert)
    placement = Placement.from_lists(hosted, experts, local_first=data.draw(st.booleans()))

    def body(group):
        mine = make_tokens(group.rank(), tokens, hidden, min(topk, experts), experts, dropped)
        with ElasticBuffer(group, 2 << 20, num_gpu_timeout_secs=20, ranks_per_node=node) as buffer:
            options = dict(num_experts=experts, num_max_tokens_per_rank=20, do_expand=expand, placement=placement)
            recv_x, ids, weights, handle, _ = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights, **options)
            if saved:
                handle = EPHandle.from_state_dict(handle.state_dict())
            again = buffer.dispatch(mine.x, topk_weights=mine.topk_weights, handle=handle)
            assert torch.equal(again[0], recv_x) and torch.equal(again[2], weights)
            assert expand or torch.equal(again[1], ids)
            combined, home, _ = buffer.combine(recv_x, handle, topk_weights=weights)
            return mine, recv_x.size(0) if expand else int((ids >= 0).sum()), combined, home

    results = run_ranks(num_ranks, body)
    assert sum(count for _, count, *_ in results) == sum(int((mine.topk_idx >= 0).sum()) for mine, *_ in results)
    for mine, _, combined, home in results:
        assert torch.equal(home, torch.where(mine.topk_idx >= 0, mine.topk_weights, 0.0))
        if expand:
            wanted = mine.x.float() * (mine.topk_idx >= 0).sum(dim=1, keepdim=True)
            assert torch.allclose(combined.float(), wanted, rtol=2e-2)
