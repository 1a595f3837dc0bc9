# SPDX-License-Identifier: MIT
"""Contract 1.9 to 1.11: the low-latency calls of V1."""

import itertools

import pytest
import torch
from deep_ep import Buffer, Error, _core
from deep_ep.utils.math import calc_diff, per_token_cast_back

from ranks import make_tokens, run_ranks

RANKS, EXPERTS, HIDDEN, TOPK, MAX_TOKENS = 4, 8, 512, 4, 16
LOCAL = EXPERTS // RANKS
FORMATS = [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]


def with_buffer(body, num_ranks=RANKS, sized=True, **options):
    def run(group):
        hint = Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, num_ranks, EXPERTS) if sized else 0
        tokens = make_tokens(group.rank(), 10 + group.rank(), HIDDEN, TOPK, EXPERTS)
        options.setdefault("timeout_secs", 20)
        with Buffer(group, 0, hint, low_latency_mode=True, num_qps_per_rank=2, **options) as buffer:
            return tokens, body(buffer, tokens)

    results = run_ranks(num_ranks, run)
    return [result for _, result in results], [tokens for tokens, _ in results]


def dequantised(recv, slot, count):
    if isinstance(recv, tuple):
        return per_token_cast_back(recv[0][slot, :count].contiguous(), recv[1][slot, :count].contiguous())
    return recv[slot, :count]


@pytest.mark.parametrize("use_fp8, round_scale, use_ue8m0", FORMATS)
@pytest.mark.parametrize("hook", [False, True], ids=["direct", "hook"])
def test_1_10_every_selection_arrives_in_its_experts_block(use_fp8, round_scale, use_ue8m0, hook):
    def body(buffer, tokens):
        stats = torch.full((LOCAL,), 3, dtype=torch.int32)
        waits = torch.zeros(RANKS, dtype=torch.int64)
        recv, count, handle, event, receive = buffer.low_latency_dispatch(
            tokens.x,
            tokens.topk_idx,
            MAX_TOKENS,
            EXPERTS,
            cumulative_local_expert_recv_stats=stats,
            dispatch_wait_recv_cost_stats=waits,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            return_recv_hook=hook,
        )
        assert (receive is not None) == hook and event.event is None
        views = recv[0][0] if use_fp8 else recv[0]  # taken before the hook: outputs are where they will be
        if hook:
            receive()
            receive()
        assert torch.equal(stats - 3, count)
        assert bool((waits >= 0).all())
        return recv, count, handle, views.data_ptr() == (recv[0] if use_fp8 else recv).data_ptr()

    results, sources = with_buffer(body)
    tolerance = 1e-2 if use_fp8 else 0
    for rank, (recv, count, (src_info, layout_range, *sizes), in_place) in enumerate(results):
        assert sizes == [MAX_TOKENS, HIDDEN, EXPERTS] and in_place
        assert src_info.shape == (LOCAL, RANKS * MAX_TOKENS) and src_info.dtype == torch.int32
        assert layout_range.shape == (LOCAL, RANKS) and layout_range.dtype == torch.int64
        data = recv[0] if use_fp8 else recv
        assert data.shape == (LOCAL, RANKS * MAX_TOKENS, HIDDEN)
        if use_fp8:
            width = HIDDEN // 512 if use_ue8m0 else HIDDEN // 128
            rows = RANKS * MAX_TOKENS
            assert recv[1].shape == (LOCAL, rows, width)
            assert recv[1].dtype == (torch.int32 if use_ue8m0 else torch.float32)
            assert recv[1].stride() == (width * rows, 1, rows)
        for slot, src in itertools.product(range(LOCAL), range(RANKS)):
            begin, rows = int(layout_range[slot, src]) >> 32, int(layout_range[slot, src]) & 0xFFFFFFFF
            chosen = (sources[src].topk_idx == rank * LOCAL + slot).any(dim=1).nonzero().flatten()
            assert sorted(src_info[slot, begin : begin + rows].tolist()) == chosen.tolist()
            got = dequantised(recv, slot, int(count[slot]))[begin : begin + rows]
            if rows > 0:
                wanted = sources[src].x[src_info[slot, begin : begin + rows].long()]
                assert calc_diff(got, wanted) <= tolerance
        assert int((layout_range & 0xFFFFFFFF).sum()) == int(count.sum())


def scaled_rows(recv, count, handle):
    """What experts give back: row times (expert + 1) / 4, in BF16."""
    rows = torch.zeros(handle[0].shape + (HIDDEN,), dtype=torch.bfloat16)
    for slot in range(LOCAL):
        n = int(count[slot])
        rows[slot, :n] = (dequantised(recv, slot, n).float() * (slot + 1) / 4).to(torch.bfloat16)
    return rows


@pytest.mark.parametrize("hook", [False, True], ids=["direct", "hook"])
@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize("with_out", [False, True])
def test_1_11_combine_is_one_weighted_sum_in_order_of_k(hook, zero_copy, with_out):
    def body(buffer, tokens):
        recv, count, handle, _, receive = buffer.low_latency_dispatch(
            tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False, return_recv_hook=hook
        )
        if hook:
            receive()
        rows = scaled_rows(recv, count, handle)
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = rows
        out = torch.empty_like(tokens.x) if with_out else None
        combined, event, receive = buffer.low_latency_combine(
            rows, tokens.topk_idx, tokens.topk_weights, handle, zero_copy=zero_copy, return_recv_hook=hook, out=out
        )
        if hook:
            receive()
        assert out is None or combined is out
        return combined

    results, sources = with_buffer(body)
    for tokens, combined in zip(sources, results):
        total = torch.zeros(tokens.x.shape, dtype=torch.float64)
        for k in range(TOPK):
            slot = tokens.topk_idx[:, k : k + 1] % LOCAL
            row = (tokens.x.float() * (slot + 1) / 4).to(torch.bfloat16).double()
            # A fused multiply-add rounds once: exact in double here, then to float.
            step = (total + tokens.topk_weights[:, k : k + 1].double() * row).float().double()
            total = torch.where(tokens.topk_idx[:, k : k + 1] >= 0, step, total)
        assert torch.equal(combined, total.to(torch.float32).to(torch.bfloat16))


def sent_to(buffer, call):
    """(result of the call, bytes that this rank wrote for each other one in it)"""
    before = [peer["bytes_sent"] for peer in buffer.statistics()["peers"]]
    result = call()
    return result, [peer["bytes_sent"] - b for peer, b in zip(buffer.statistics()["peers"], before)]


@pytest.mark.parametrize("where", ["in the fetched buffer", "where the dispatch left them", "in ordinary memory"])
def test_1_11_zero_copy_sends_no_row_and_gives_the_same_bits(where):
    def body(buffer, tokens):
        recv, count, handle, *_ = buffer.low_latency_dispatch(
            tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False
        )
        rows = scaled_rows(recv, count, handle)

        def combine(x, zero_copy):
            return buffer.low_latency_combine(x, tokens.topk_idx, tokens.topk_weights, handle, zero_copy=zero_copy)[0]

        copied, of_copies = sent_to(buffer, lambda: combine(rows, False))
        for _ in range(10):  # turn after turn, whoever is still reading the one before
            x = rows
            if where == "in the fetched buffer":
                x = buffer.get_next_low_latency_combine_buffer(handle)
                assert x.shape == rows.shape and x.dtype == rows.dtype and x.is_contiguous()
            elif where == "where the dispatch left them":
                x = buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False)[0]
            x.copy_(rows)
            in_place, of_numbers = sent_to(buffer, lambda x=x: combine(x, True))
            assert torch.equal(in_place, copied)
        per_source = [int((handle[1][:, src] & 0xFFFFFFFF).sum()) for src in range(RANKS)]
        return per_source, of_copies, of_numbers

    for rank, (per_source, of_copies, of_numbers) in enumerate(with_buffer(body)[0]):
        numbers = [rows * 4 for rows in per_source]
        copies = [rows * HIDDEN * 2 for rows in per_source]
        copies[rank] = numbers[rank]  # a rank reads its own rows where they are
        assert of_copies == copies and sum(per_source) > 0
        assert of_numbers == (copies if where == "in ordinary memory" else numbers)


def test_1_11_the_next_combine_buffer_is_each_handles_own_until_its_combine():
    def body(buffer, tokens):
        def dispatch():
            return buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False)

        def combine(made, x):
            return buffer.low_latency_combine(x, tokens.topk_idx, tokens.topk_weights, made[2], zero_copy=True)[0]

        first, second = dispatch(), dispatch()
        into_first = buffer.get_next_low_latency_combine_buffer(first[2])
        into_second = buffer.get_next_low_latency_combine_buffer(second[2])
        assert buffer.get_next_low_latency_combine_buffer(first[2]).data_ptr() == into_first.data_ptr()
        assert into_first.data_ptr() != into_second.data_ptr()
        into_first.copy_(first[0])
        into_second.copy_(second[0] * 2)
        # As upstream: what lies in the buffer counts, not what x holds.
        nothing = torch.zeros_like(first[0])
        once, twice = combine(first, nothing), combine(second, nothing)
        with pytest.raises(Error, match="zero_copy: x must be"):
            buffer.get_next_low_latency_combine_buffer(first[2])
            combine(first, nothing[:, :-1])
        again = buffer.get_next_low_latency_combine_buffer(first[2])
        return once, twice, again.data_ptr() == into_first.data_ptr()

    for once, twice, same in with_buffer(body)[0]:
        assert torch.equal(once * 2, twice) and float(once.float().abs().sum()) > 0
        assert not same  # the tensor of before is still ours, so its memory is not given out again


def test_1_11_a_full_arena_makes_zero_copy_a_copy():
    def body(buffer, tokens):
        made = buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False)
        kept = []
        with pytest.raises(Error, match="arena"):
            while len(kept) < 1000:
                kept.append(buffer.allocate((1 << 16,), torch.uint8))
        buffer.get_next_low_latency_combine_buffer(made[2]).copy_(made[0])

        def combine(zero_copy):
            return buffer.low_latency_combine(
                made[0], tokens.topk_idx, tokens.topk_weights, made[2], zero_copy=zero_copy
            )[0]

        (first, bytes_first), (second, bytes_second) = (
            sent_to(buffer, lambda: combine(True)),
            sent_to(buffer, lambda: combine(False)),
        )
        return torch.equal(first, second), bytes_first == bytes_second

    assert with_buffer(body, arena_bytes=8 << 20)[0] == [(True, True)] * RANKS


def through_logfmt(rows):
    """Rows after LogFMT-10, written from its definition (src/plan/logfmt.h); finite values only."""
    blocks = rows.float().contiguous().view(-1, 128)
    bits = blocks.abs().view(torch.int32).long()
    largest = bits.amax(dim=1, keepdim=True)
    smallest = torch.where(bits > 0, bits, 1 << 40).amin(dim=1, keepdim=True).clamp(max=largest)
    lowest = torch.maximum(smallest, largest - (16 << 23)) // 65536 * 65536
    step = (largest - lowest) // 508 // 8 * 8
    inverse = torch.where(step > 0, 1.0 / step.float(), 0.0)
    code = ((bits - lowest).float() * inverse).round().clamp(max=508).long()
    magnitude = torch.where(bits >= lowest, lowest + code * step, 0).int().view(torch.float32)
    return torch.copysign(magnitude, blocks).view(rows.shape).to(rows.dtype)


def through_fp8(rows):
    blocks = rows.float().contiguous().view(-1, 128)
    largest = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-4)
    factor = torch.full_like(largest, 448.0) / largest  # "448.0 / largest" would round twice
    codes = (blocks * factor).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (codes.float() * (largest * torch.tensor(1.0 / 448.0))).view(rows.shape).to(rows.dtype)


WIRES = [({"use_logfmt": True}, through_logfmt), ({"wire": "logfmt10"}, through_logfmt), ({"wire": "fp8"}, through_fp8)]


@pytest.mark.parametrize("hook", [False, True], ids=["direct", "hook"])
@pytest.mark.parametrize("keywords, through", WIRES, ids=["use_logfmt", "logfmt10", "fp8"])
def test_1_11_a_wire_format_gives_the_sum_of_the_rows_as_they_come_back(keywords, through, hook):
    def body(buffer, tokens):
        recv, count, handle, *_ = buffer.low_latency_dispatch(
            tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False
        )
        torch.manual_seed(buffer.rank)
        rows = recv * torch.exp(torch.randn(recv.shape)).to(recv.dtype)
        rows[:, :, ::7] = 0

        def combined(rows, **more):
            out, _, receive = buffer.low_latency_combine(
                rows, tokens.topk_idx, tokens.topk_weights, handle, return_recv_hook=hook, **more
            )
            if hook:
                receive()
            return out

        return combined(rows, **keywords), combined(through(rows)), combined(rows)

    for got, wanted, plain in with_buffer(body)[0]:
        assert torch.equal(got, wanted)
        assert not torch.equal(got, plain)


@pytest.mark.parametrize("use_fp8", [False, True])
def test_1_11_logfmt_is_as_exact_as_upstream_asks(use_fp8):
    def body(buffer, tokens):
        x = (torch.randn(tokens.x.shape, generator=torch.Generator().manual_seed(buffer.rank)) * 0.1).bfloat16()
        recv, count, handle, *_ = buffer.low_latency_dispatch(x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=use_fp8)
        rows = torch.zeros(handle[0].shape + (HIDDEN,), dtype=torch.bfloat16)
        for slot in range(LOCAL):
            rows[slot, : int(count[slot])] = dequantised(recv, slot, int(count[slot]))
        combined, _, _ = buffer.low_latency_combine(rows, tokens.topk_idx, tokens.topk_weights, handle, use_logfmt=True)
        weights = torch.where(tokens.topk_idx >= 0, tokens.topk_weights, 0.0).sum(dim=1, keepdim=True)
        return float(calc_diff(x.float() * weights, combined))

    for difference in with_buffer(body)[0]:
        assert difference < (9e-4 if use_fp8 else 1e-5)


def test_1_11_wire_formats_that_cannot_be_are_refused():
    def body(buffer, tokens):
        recv, _, handle, *_ = buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False)
        for keywords, text in (
            ({"wire": "fp4"}, "wire: 'fp4' vs 'logfmt10' or 'fp8'"),
            ({"wire": "fp8", "use_logfmt": True}, "use_logfmt and wire exclude each other"),
            ({"use_logfmt": True, "zero_copy": True}, "use_logfmt and zero_copy exclude each other"),
            ({"wire": "fp8" if buffer.rank == 0 else "logfmt10"}, "ranks differ in wire"),
        ):
            with pytest.raises(Error, match=text):
                buffer.low_latency_combine(recv, tokens.topk_idx, tokens.topk_weights, handle, **keywords)

    with_buffer(body)


@pytest.mark.parametrize("hook", [False, True])
def test_1_11_errors_name_the_arguments_of_this_api_on_every_rank(hook):
    def body(buffer, tokens):
        def dispatch(max_tokens):
            return buffer.low_latency_dispatch(
                tokens.x, tokens.topk_idx, max_tokens, EXPERTS, use_fp8=False, return_recv_hook=hook
            )

        def finished(made):
            if hook:
                made[-1]()
            return made

        with pytest.raises(Error, match=r"ranks differ in num_max_dispatch_tokens_per_rank"):
            finished(dispatch(MAX_TOKENS + buffer.rank))
        recv, _, handle, *_ = finished(dispatch(MAX_TOKENS))
        weights = tokens.topk_weights if buffer.rank > 0 else tokens.topk_weights[:, 1:].contiguous()
        with pytest.raises(Error, match=r"[ :]topk_weights(\W.*| must)") as caught:
            finished(buffer.low_latency_combine(recv, tokens.topk_idx, weights, handle, return_recv_hook=hook))
        return str(caught.value)

    for rank, message in enumerate(with_buffer(body)[0]):
        assert ("refused this" in message) == (rank > 0)


def test_1_11_handles_may_be_repacked_and_serve_after_other_dispatches():
    def body(buffer, tokens):
        made = [
            buffer.low_latency_dispatch(tokens.x * (i + 1), tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False)
            for i in range(2)
        ]
        results = []
        for recv, count, handle, *_ in made:
            src_info, layout_range, max_tokens, hidden, experts = handle
            packed = (src_info.detach(), layout_range.view(-1).view(layout_range.shape), max_tokens, experts)
            rows = scaled_rows(recv, count, handle)
            results.append(buffer.low_latency_combine(rows, tokens.topk_idx, tokens.topk_weights, packed)[0])
        return results

    for first, second in with_buffer(body)[0]:
        assert calc_diff(first * 2, second) < 1e-5 and float(first.float().abs().sum()) > 0


def test_1_11_a_rank_that_hosts_no_expert_dispatches_and_combines_too():
    def body(buffer, tokens):
        placement = _core.Placement.from_lists([list(range(EXPERTS)), []], EXPERTS)
        recv, count, handle, _, _ = buffer.low_latency_dispatch(
            tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False, placement=placement
        )
        combined, _, _ = buffer.low_latency_combine(recv, tokens.topk_idx, tokens.topk_weights, handle)
        return count.tolist(), combined

    results, sources = with_buffer(body, num_ranks=2)
    assert sum(results[0][0]) == sum(int((tokens.topk_idx >= 0).sum()) for tokens in sources) and results[1][0] == []
    for (_, combined), tokens in zip(results, sources):
        kept = (tokens.topk_weights * (tokens.topk_idx >= 0)).sum(dim=1, keepdim=True)
        assert calc_diff(combined, tokens.x.float() * kept) < 1e-5


def test_1_9_a_buffer_that_is_too_small_grows_with_the_call():
    def body(buffer, tokens):
        return [
            buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, m, EXPERTS, use_fp8=False)[1].sum().item()
            for m in (16, 64, 17)
        ]

    results, sources = with_buffer(body, sized=False)
    total = sum(int((tokens.topk_idx >= 0).sum()) for tokens in sources)
    assert [sum(column) for column in zip(*results)] == [total] * 3


def test_1_10_normal_and_low_latency_calls_mix_without_cleaning():
    def body(buffer, tokens):
        from ranks import dispatch_v1

        first = buffer.low_latency_dispatch(
            tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        normal = dispatch_v1(buffer, tokens, EXPERTS)
        buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, EXPERTS)
        first[4]()
        return int(first[1].sum()), int((normal[1] >= 0).sum())

    for low, normal in with_buffer(body)[0]:
        assert low == normal


def test_1_11_masked_ranks_are_left_out():
    def body(buffer, tokens):
        mask = torch.full((RANKS,), 7, dtype=torch.int32)
        if buffer.rank == 3:
            return None
        buffer.low_latency_update_mask_buffer(3, True)
        buffer.low_latency_query_mask_buffer(mask)
        recv, count, handle, *_ = buffer.low_latency_dispatch(
            tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False
        )
        rows = scaled_rows(recv, count, handle)
        combined = buffer.low_latency_combine(rows, tokens.topk_idx, tokens.topk_weights, handle)[0]
        buffer.low_latency_clean_mask_buffer()
        return mask.tolist(), int((handle[1][:, 3] & 0xFFFFFFFF).sum()), combined, buffer.masked_ranks()

    results, sources = with_buffer(body, enable_shrink=True)
    for tokens, (mask, rows_of_masked, combined, after) in zip(sources[:3], results[:3]):
        assert mask == [0, 0, 0, 1] and rows_of_masked == 0 and not any(after)
        nobody = ((tokens.topk_idx < 0) | (tokens.topk_idx >= 3 * LOCAL)).all(dim=1)
        assert bool((combined[nobody] == 0).all())


@pytest.mark.parametrize("hook", [False, True], ids=["direct", "hook"])
def test_1_11_a_silent_rank_is_masked_after_the_timeout_and_the_others_go_on(hook):
    def body(buffer, tokens):
        if buffer.rank == 1:
            return None
        recv, count, handle, _, receive = buffer.low_latency_dispatch(
            tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False, return_recv_hook=hook
        )
        if hook:
            receive()
        combined = buffer.low_latency_combine(
            scaled_rows(recv, count, handle), tokens.topk_idx, tokens.topk_weights, handle
        )
        return buffer.masked_ranks(), int(count.sum()), combined[0].isnan().any().item()

    results, sources = with_buffer(body, enable_shrink=True, timeout_secs=1)
    for rank in (0, 2, 3):
        masked, count, has_nan = results[rank]
        assert masked == [False, True, False, False] and not has_nan
        here = [t.topk_idx // LOCAL == rank for i, t in enumerate(sources) if i != 1]
        assert count == sum(
            int((h & (t.topk_idx >= 0)).sum()) for h, t in zip(here, [sources[0], sources[2], sources[3]])
        )


def test_1_10_the_rank_local_mistakes_are_clear_and_the_group_stays_usable():
    def body(buffer, tokens):
        def call(**changes):
            arguments = dict(use_fp8=False)
            arguments.update(changes)
            return buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, **arguments)

        messages = []
        for changes in (
            dict(async_finish=True, return_recv_hook=True),
            dict(use_fp8=True, use_ue8m0=True),
            dict(dispatch_wait_recv_cost_stats=torch.zeros((RANKS, RANKS), dtype=torch.int64)),
            dict(cumulative_local_expert_recv_stats=torch.zeros(LOCAL, dtype=torch.int64)),
        ):
            with pytest.raises(Error) as caught:
                call(**changes)
            messages.append(str(caught.value))
        with pytest.raises(Error, match="more than num_max_dispatch_tokens_per_rank: 4"):
            buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, 4, EXPERTS)
        return messages, int(call()[1].sum())

    results, sources = with_buffer(body)
    assert sum(count for _, count in results) == sum(int((t.topk_idx >= 0).sum()) for t in sources)
    assert "exclude each other" in results[0][0][0] and "ue8m0" in results[0][0][1]
    assert "wait_recv_cost_stats" in results[0][0][2] and "recv_stats" in results[0][0][3]


def test_1_11_selections_taken_back_before_combine_do_not_count():
    def body(buffer, tokens):
        recv, count, handle, *_ = buffer.low_latency_dispatch(
            tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False
        )
        rows = scaled_rows(recv, count, handle)
        kept = tokens.topk_idx.clone()
        kept[:, 1] = -1
        kept[0] = -1
        less = buffer.low_latency_combine(rows, kept, tokens.topk_weights, handle)[0]
        same_as = buffer.low_latency_combine(
            rows, tokens.topk_idx, torch.where(kept >= 0, tokens.topk_weights, 0.0), handle
        )[0]
        with pytest.raises(Error, match="topk_idx"):
            buffer.low_latency_combine(rows, kept[:-1], tokens.topk_weights[:-1], handle)
        # What experts left in the rows of such selections is not read, not even a NaN.
        poisoned = torch.full_like(rows, float("nan"))
        nothing = buffer.low_latency_combine(poisoned, torch.full_like(kept, -1), tokens.topk_weights, handle)[0]
        return less, same_as, nothing, buffer.low_latency_combine(rows, kept.int(), tokens.topk_weights, handle)[0]

    for less, same_as, nothing, narrow in with_buffer(body)[0]:
        assert torch.equal(less, same_as) and torch.equal(less, narrow)
        assert bool((less[0] == 0).all()) and bool((nothing == 0).all())


@pytest.mark.parametrize("shape", [(1, 8, 1), (16, 512, 4), (7, 136, 2), (128, 2048, 8)])
@pytest.mark.parametrize("experts", [1, 8, 40])
def test_1_9_a_buffer_of_the_hinted_size_serves_its_calls_as_it_is(shape, experts):
    max_tokens, hidden, num_ranks = shape
    hint = Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, num_ranks, experts)

    def body(group):
        with Buffer(group, 0, hint, low_latency_mode=True) as buffer:
            core = buffer._opened()
            return [
                core.supports_low_latency(hidden, max_tokens, k, experts)
                for k in (1, min(8, experts), min(32, experts))
            ]

    assert run_ranks(num_ranks, body) == [["", "", ""]] * num_ranks


@pytest.mark.parametrize("hook", [False, True], ids=["direct", "hook"])
def test_1_11_a_rank_that_falls_silent_before_combine_is_left_out_within_that_one_call(hook):
    def body(buffer, tokens):
        recv, count, handle, *_ = buffer.low_latency_dispatch(
            tokens.x, tokens.topk_idx, MAX_TOKENS, EXPERTS, use_fp8=False
        )
        if buffer.rank == 2:
            return None
        rows = scaled_rows(recv, count, handle)
        combined, _, receive = buffer.low_latency_combine(
            rows, tokens.topk_idx, tokens.topk_weights, handle, return_recv_hook=hook
        )
        if hook:
            receive()
        alive = torch.where(tokens.topk_idx // LOCAL == 2, -1, tokens.topk_idx)
        without = buffer.low_latency_combine(rows, alive, tokens.topk_weights, handle)[0]
        return buffer.masked_ranks(), buffer.statistics()["operations"], combined, without

    results, _ = with_buffer(body, enable_shrink=True, timeout_secs=1)
    for rank in (0, 1, 3):
        masked, operations, combined, without = results[rank]
        assert masked == [False, False, True, False] and operations == 3  # nothing was sent twice
        assert torch.equal(combined, without)
