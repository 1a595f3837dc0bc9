# SPDX-License-Identifier: MIT
"""Contract 1.6 to 1.8: dispatch and combine of V1, inside a node and between nodes."""

import deep_ep
import pytest
import torch
from deep_ep import Buffer, Config, EventHandle, EventOverlap
from deep_ep.utils.math import per_token_cast_to_fp8

from ranks import dispatch_v1, expected_rows, make_tokens, run_ranks

EXPERTS, HIDDEN, TOPK = 16, 256, 4
NODES = pytest.mark.parametrize("ranks_per_node", [8, 2], ids=["intranode", "internode"])


def exchange(body, num_ranks=4, num_tokens=24, ranks_per_node=8):
    """body(buffer, tokens) on every rank; ranks bring different numbers of tokens. Gives results and inputs."""

    def run(group):
        tokens = make_tokens(group.rank(), num_tokens + 3 * group.rank(), HIDDEN, TOPK, EXPERTS)
        with Buffer(group, 1 << 20, ranks_per_node=ranks_per_node, timeout_secs=20) as buffer:
            return tokens, body(buffer, tokens)

    results = run_ranks(num_ranks, run)
    return [result for _, result in results], [tokens for tokens, _ in results]


def aligned(count, alignment):
    return -(-count // alignment) * alignment


@NODES
@pytest.mark.parametrize("alignment", [1, 8])
def test_1_6_rows_come_in_order_of_source_rank_and_token(ranks_per_node, alignment):
    results, sources = exchange(
        lambda b, t: dispatch_v1(b, t, EXPERTS, expert_alignment=alignment), ranks_per_node=ranks_per_node
    )
    for rank, (recv_x, ids, weights, counts, handle, event) in enumerate(results):
        expected = expected_rows(rank, sources, EXPERTS)
        assert torch.equal(recv_x, expected.rows)
        assert torch.equal(ids, expected.topk_idx) and ids.dtype == deep_ep.topk_idx_t
        assert torch.equal(weights, expected.topk_weights)
        per_expert = [int((expected.topk_idx == e).sum()) for e in range(4)]
        assert counts == [aligned(count, alignment) for count in per_expert]
        assert event.event is None


def test_1_6_the_intranode_handle_has_upstreams_six_entries():
    results, sources = exchange(lambda b, t: dispatch_v1(b, t, EXPERTS, config=Config(24, 8, 256)))
    for rank, (recv_x, *_, handle, _) in enumerate(results):
        expected = expected_rows(rank, sources, EXPERTS)
        prefix, sent, received, src_idx, member, head = handle
        tokens = sources[rank].x.size(0)
        assert prefix[:, rank].tolist() == torch.tensor(expected.per_source).cumsum(0).tolist()
        assert torch.equal(src_idx, expected.src_token)
        assert sent.shape == received.shape == (4, 12)
        assert member.shape == head.shape == (tokens, 4) and member.dtype == torch.bool
        assert torch.equal(head >= 0, member)
        assert torch.equal(sent[:, -1], member.sum(dim=0).to(torch.int32))


def test_1_6_the_internode_handle_has_upstreams_ten_entries():
    results, sources = exchange(lambda b, t: dispatch_v1(b, t, EXPERTS, config=Config(24, 8, 256)), ranks_per_node=2)
    for rank, (recv_x, *_, handle, _) in enumerate(results):
        expected = expected_rows(rank, sources, EXPERTS)
        assert len(handle) == 10
        assert handle[-4].tolist() == torch.tensor(expected.per_source).cumsum(0).tolist()
        assert [tuple(handle[i].shape) for i in (1, 2, 3, 4, 5)] == [(2, 12), (4, 12), (2, 12), (2,), (4, 12)]
        meta = handle[7].view(torch.int32)
        assert handle[7].shape == (recv_x.size(0), 8) and handle[7].dtype == torch.uint8
        nodes = torch.repeat_interleave(torch.tensor([0, 0, 1, 1]), torch.tensor(expected.per_source))
        assert torch.equal(meta[:, 0], nodes.to(torch.int32))
        assert bool((meta[:, 1] >> (rank % 2) & 1).all())
        assert handle[8].shape == (sources[rank].x.size(0), 2)


@NODES
def test_1_6_num_worst_tokens_gives_that_many_rows_and_an_empty_list(ranks_per_node):
    bound = 4 * 40

    def body(buffer, tokens):
        exact = dispatch_v1(buffer, tokens, EXPERTS)
        bounded = dispatch_v1(buffer, tokens, EXPERTS, num_worst_tokens=bound)
        combined = [buffer.combine(each[0], each[4], topk_weights=each[2])[:2] for each in (exact, bounded)]
        return exact, bounded, combined

    results, _ = exchange(body, ranks_per_node=ranks_per_node)
    for exact, bounded, combined in results:
        rows = exact[0].size(0)
        assert bounded[3] == []
        for i in range(3):
            assert bounded[i].size(0) == bound
            assert torch.equal(bounded[i][:rows], exact[i])
        assert bool((bounded[1][rows:] == -1).all())
        assert torch.equal(combined[0][0], combined[1][0]) and torch.equal(combined[0][1], combined[1][1])


@NODES
def test_1_6_without_topk_rows_and_expert_counts_come_all_the_same(ranks_per_node):
    def body(buffer, tokens):
        received = dispatch_v1(buffer, tokens, EXPERTS, with_topk=False, expert_alignment=4)
        again = buffer.dispatch(tokens.x, handle=received[4])
        return received, again, buffer.combine(received[0], received[4])

    results, sources = exchange(body, ranks_per_node=ranks_per_node)
    for rank, (received, again, (combined, weights, _)) in enumerate(results):
        expected = expected_rows(rank, sources, EXPERTS)
        assert torch.equal(received[0], expected.rows)
        assert received[1] is None and received[2] is None
        assert received[3] == [aligned(int((expected.topk_idx == e).sum()), 4) for e in range(4)]
        assert torch.equal(again[0], received[0]) and again[1:5] == (None, None, None, None)
        assert weights is None and combined.shape == sources[rank].x.shape


@NODES
def test_1_6_cached_dispatch_takes_other_dtypes_and_refuses_ids(ranks_per_node):
    def body(buffer, tokens):
        received = dispatch_v1(buffer, tokens, EXPERTS)
        q, scales = per_token_cast_to_fp8(tokens.x)
        with pytest.raises(AssertionError):
            buffer.dispatch(tokens.x, handle=received[4], topk_idx=tokens.topk_idx, topk_weights=tokens.topk_weights)
        again = buffer.dispatch((q, scales), handle=received[4])
        return received[4], (q, scales), again

    results, sources = exchange(body, ranks_per_node=ranks_per_node)
    quantised = [tokens._replace(x=cast[0].view(torch.uint8)) for tokens, (_, cast, _) in zip(sources, results)]
    scales = [tokens._replace(x=cast[1]) for tokens, (_, cast, _) in zip(sources, results)]
    for rank, (_, _, again) in enumerate(results):
        assert torch.equal(again[0][0].view(torch.uint8), expected_rows(rank, quantised, EXPERTS).rows)
        assert torch.equal(again[0][1], expected_rows(rank, scales, EXPERTS).rows)


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["fp32", "int32"])
def test_1_6_fp8_rows_bring_their_scales_row_major(column_major, packed):
    def body(buffer, tokens):
        q, scales = per_token_cast_to_fp8(tokens.x)
        scales = scales.view(torch.int32) if packed else scales
        scales = scales.t().contiguous().t() if column_major else scales
        return (q, scales), dispatch_v1(buffer, tokens, EXPERTS, x=(q, scales))

    results, sources = exchange(body)
    scales = [tokens._replace(x=cast[1]) for tokens, (cast, _) in zip(sources, results)]
    for rank, (_, ((data, recv_scales), *_)) in enumerate(results):
        assert data.dtype == torch.float8_e4m3fn
        assert torch.equal(recv_scales, expected_rows(rank, scales, EXPERTS).rows)
        assert recv_scales.is_contiguous()


@NODES
@pytest.mark.parametrize("num_biases", [0, 1, 2])
def test_1_7_combine_adds_biases_then_ranks_in_order_with_upstreams_roundings(ranks_per_node, num_biases):
    def body(buffer, tokens):
        recv_x, _, weights, _, handle, _ = dispatch_v1(buffer, tokens, EXPERTS)
        biases = tuple(torch.full_like(tokens.x, 0.37 * (i + 1)) for i in range(num_biases))
        bias = None if num_biases == 0 else biases[0] if num_biases == 1 else biases
        processed = (recv_x.float() * (1 + buffer.rank / 3)).to(torch.bfloat16)
        combined, home, _ = buffer.combine(processed, handle, topk_weights=weights, bias=bias)
        return handle, combined, home, biases

    results, sources = exchange(body, ranks_per_node=ranks_per_node)
    for tokens, (handle, combined, home, biases) in zip(sources, results):
        member = handle[4] if len(handle) == 6 else handle[0]
        total = torch.zeros(tokens.x.shape)
        for bias in biases:
            total += bias.float()
        for node in range(0, 4, ranks_per_node):
            ranks = range(node, min(node + ranks_per_node, 4))
            partial = total if ranks_per_node >= 4 else torch.zeros(tokens.x.shape)
            for rank in ranks:
                row = (tokens.x.float() * (1 + rank / 3)).to(torch.bfloat16).float()
                partial += torch.where(member[:, rank : rank + 1], row, torch.zeros(()))
            if ranks_per_node < 4:
                total += partial.to(torch.bfloat16).float()
        assert torch.equal(combined, total.to(torch.bfloat16))
        assert torch.equal(home, torch.where(tokens.topk_idx >= 0, tokens.topk_weights, 0.0))


@NODES
def test_1_6_a_handle_may_be_taken_apart_or_copied(ranks_per_node):
    def body(buffer, tokens):
        recv_x, _, weights, _, handle, _ = dispatch_v1(buffer, tokens, EXPERTS)
        first = buffer.combine(recv_x, handle, topk_weights=weights)
        packed_again = tuple(each.detach() for each in handle)
        second = buffer.combine(recv_x, packed_again, topk_weights=weights)
        copied = tuple(each.clone() for each in handle)
        third = buffer.combine(recv_x, copied, topk_weights=weights)
        again = buffer.dispatch(tokens.x, handle=copied)[0]
        return recv_x, first, second, third, again

    for recv_x, first, second, third, again in exchange(body, ranks_per_node=ranks_per_node)[0]:
        assert torch.equal(first[0], second[0]) and torch.equal(first[0], third[0])
        assert torch.equal(first[1], second[1]) and torch.equal(first[1], third[1])
        assert torch.equal(again, recv_x)


def test_1_6_ranks_without_tokens_and_tokens_without_experts_work():
    def run(group):
        num_tokens = 0 if group.rank() == 1 else 5
        tokens = make_tokens(group.rank(), num_tokens, HIDDEN, TOPK, EXPERTS)
        tokens.topk_idx[:2] = -1
        with Buffer(group) as buffer:
            recv_x, _, weights, _, handle, _ = dispatch_v1(buffer, tokens, EXPERTS)
            combined, _, _ = buffer.combine(recv_x, handle, topk_weights=weights, bias=torch.ones_like(tokens.x))
            return num_tokens, combined

    for num_tokens, combined in run_ranks(2, run):
        assert combined.shape == (num_tokens, HIDDEN)
        assert bool((combined[:2] == 1).all())


def test_q7_previous_event_may_be_either_kind_and_async_needs_none():
    def body(buffer, tokens):
        events = [None, buffer.capture(), EventHandle(), EventOverlap()]
        results = [
            dispatch_v1(buffer, tokens, EXPERTS, previous_event=e, async_finish=True, allocate_on_comm_stream=True)
            for e in events
        ]
        with results[0][5]:
            pass
        results[0][5].current_stream_wait()
        return results

    for results in exchange(body)[0]:
        assert all(isinstance(result[5].event, EventHandle) for result in results)
        assert all(torch.equal(result[0], results[0][0]) for result in results)


def test_1_8_internode_calls_take_a_config_and_worst_tokens():
    def body(buffer, tokens):
        per_rank, per_node, per_expert, member, _ = buffer.get_dispatch_layout(tokens.topk_idx, EXPERTS)
        config = Config(20, 8, 256, 16, 128)
        received = buffer.internode_dispatch(
            tokens.x,
            None,
            per_rank,
            per_node,
            member,
            per_expert,
            tokens.topk_idx,
            tokens.topk_weights,
            1,
            config,
            num_worst_tokens=200,
        )
        combined = buffer.internode_combine(received[0], received[4], received[2], config=config)
        return received[0].size(0), combined[0].shape == tokens.x.shape

    assert exchange(body, ranks_per_node=2)[0] == [(200, True)] * 4


def test_1_6_without_topk_experts_that_do_not_divide_evenly_are_counted_too():
    experts = 6  # on 4 ranks: 2, 2, 1, 1

    def run(group):
        ids = torch.tensor([[0, 5], [3, 1], [group.rank(), -1]])
        x = torch.ones((3, HIDDEN), dtype=torch.bfloat16)
        with Buffer(group, timeout_secs=20) as buffer:
            per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(ids, experts)
            layout = dict(num_tokens_per_rank=per_rank, is_token_in_rank=member, num_tokens_per_expert=per_expert)
            counts = buffer.dispatch(x, **layout)[3]
            weights = torch.ones((3, 2))
            with_ids = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **layout)[3]
            with pytest.raises(deep_ep.Error, match="placement"):
                buffer.dispatch(x, placement=deep_ep.Placement.even(experts, 4), **layout)
            return counts, with_ids

    results = run_ranks(4, run)
    assert [len(counts) for counts, _ in results] == [2, 2, 1, 1]
    assert all(counts == with_ids for counts, with_ids in results)
    assert sum(sum(counts) for counts, _ in results) == 4 * 5
