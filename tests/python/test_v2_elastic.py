# SPDX-License-Identifier: MIT
"""Contract section 3: ElasticBuffer and EPHandle."""

import copy
import pickle

import deep_ep
import pytest
import torch
from deep_ep import ElasticBuffer, EPHandle, Error, EventHandle, Placement
from deep_ep.elastic_fields import Fields
from deep_ep.utils import refs
from deep_ep.utils.math import per_token_cast_to_fp8

from ranks import expected_rows, make_tokens, run_ranks

RANKS, EXPERTS, HIDDEN, TOPK, MAX_TOKENS = 4, 16, 256, 4, 24
LOCAL = EXPERTS // RANKS


def exchange(body, num_ranks=RANKS, **options):
    def run(group):
        tokens = make_tokens(group.rank(), MAX_TOKENS - group.rank(), HIDDEN, TOPK, EXPERTS)
        with ElasticBuffer(
            group, num_max_tokens_per_rank=MAX_TOKENS, hidden=HIDDEN, num_gpu_timeout_secs=20, **options
        ) as b:
            return tokens, body(b, tokens)

    results = run_ranks(num_ranks, run)
    return [result for _, result in results], [tokens for tokens, _ in results]


def align(value, to):
    return -(-value // to) * to


def slot_counts(expected):
    return [int((expected.topk_idx == e).sum()) for e in range(LOCAL)]


@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize("cpu_sync", [True, False])
def test_3_4_compact_rows_ids_and_unmasked_weights(alignment, cpu_sync):
    def body(buffer, tokens):
        stats = torch.ones(LOCAL, dtype=torch.int32)
        out = buffer.dispatch(
            tokens.x,
            tokens.topk_idx,
            tokens.topk_weights,
            stats,
            num_experts=EXPERTS,
            expert_alignment=alignment,
            do_cpu_sync=cpu_sync,
        )
        return out, stats

    results, sources = exchange(body)
    for rank, ((recv_x, ids, weights, handle, event), stats) in enumerate(results):
        expected = expected_rows(rank, sources, EXPERTS, masked_weights=False)
        rows = expected.rows.size(0)
        counts = slot_counts(expected)
        assert recv_x.size(0) == (rows if cpu_sync else RANKS * MAX_TOKENS)
        assert torch.equal(recv_x[:rows], expected.rows)
        assert torch.equal(ids[:rows], expected.topk_idx) and torch.equal(weights[:rows], expected.topk_weights)
        assert event.event is None
        assert (stats - 1).tolist() == counts == handle.num_unaligned_recv_tokens_per_expert.tolist()
        aligned = [align(count, alignment) for count in counts]
        assert handle.num_recv_tokens_per_expert_list == (aligned if cpu_sync else [])
        assert handle.psum_num_recv_tokens_per_expert.tolist() == torch.tensor(aligned).cumsum(0).tolist()
        assert (
            handle.psum_num_recv_tokens_per_scaleup_rank.tolist()
            == torch.tensor(expected.per_source).cumsum(0).tolist()
        )
        assert handle.num_recv_tokens == recv_x.size(0)
        metadata = handle.recv_src_metadata
        assert metadata.shape == (recv_x.size(0), TOPK + 2)
        src_rank = torch.repeat_interleave(torch.arange(RANKS), torch.tensor(expected.per_source))
        assert torch.equal(metadata[:rows, 0], (src_rank * MAX_TOKENS + expected.src_token).to(torch.int32))
        assert bool((metadata[:, 2:] == -1).all())


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("cpu_sync", [True, False])
def test_3_4_expanded_rows_are_grouped_by_expert_and_padded_with_zeros(alignment, cpu_sync):
    results, sources = exchange(
        lambda b, t: b.dispatch(
            t.x,
            t.topk_idx,
            t.topk_weights,
            num_experts=EXPERTS,
            expert_alignment=alignment,
            do_cpu_sync=cpu_sync,
            do_expand=True,
            do_zero_padding=True,
        )
    )
    for rank, (recv_x, ids, weights, handle, _) in enumerate(results):
        expected = expected_rows(rank, sources, EXPERTS, masked_weights=False)
        counts = slot_counts(expected)
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + align(count, alignment))
        bound = align(RANKS * MAX_TOKENS * min(TOPK, LOCAL) + (alignment - 1) * LOCAL, alignment)
        assert ids is None and weights.dim() == 1
        assert recv_x.size(0) == weights.size(0) == handle.num_expanded_tokens == (starts[-1] if cpu_sync else bound)
        assert handle.psum_num_recv_tokens_per_expert.tolist() == [s + c for s, c in zip(starts, counts)]
        rows = expected.rows.size(0)
        metadata = handle.recv_src_metadata[:rows, 2:].long()
        assert torch.equal(metadata >= 0, expected.topk_idx >= 0)
        used = torch.zeros(starts[-1], dtype=torch.bool)
        for i in range(rows):
            for k in range(TOPK):
                at, slot = int(metadata[i, k]), int(expected.topk_idx[i, k])
                if at < 0:
                    continue
                assert starts[slot] <= at < starts[slot] + counts[slot]
                assert torch.equal(recv_x[at], expected.rows[i]) and weights[at] == expected.topk_weights[i, k]
                used[at] = True
        assert int(used.sum()) == sum(counts)
        assert bool((recv_x[: starts[-1]][~used] == 0).all()) and bool((weights[: starts[-1]][~used] == 0).all())


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_3_4_scale_factors_row_major_or_for_tma(expand):
    def body(buffer, tokens):
        q, scales = per_token_cast_to_fp8(tokens.x)
        return [
            buffer.dispatch(
                (q, scales), tokens.topk_idx, num_experts=EXPERTS, do_expand=expand, use_tma_aligned_col_major_sf=tma
            )
            for tma in (False, True)
        ]

    for plain, tma in exchange(body)[0]:
        rows = plain[0][0].size(0)
        assert torch.equal(plain[0][1], tma[0][1]) and plain[0][1].is_contiguous()
        assert tma[0][1].stride() == (1, align(rows, 4))
        assert torch.equal(plain[0][0].view(torch.uint8), tma[0][0].view(torch.uint8))
        assert plain[2] is None


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
@pytest.mark.parametrize("cpu_sync", [True, False])
@pytest.mark.parametrize("rebuilt", [False, True], ids=["kept", "rebuilt"])
def test_3_4_cached_dispatch_returns_the_same_handle_and_the_same_rows(expand, cpu_sync, rebuilt):
    def body(buffer, tokens):
        first = buffer.dispatch(
            tokens.x,
            tokens.topk_idx,
            tokens.topk_weights,
            num_experts=EXPERTS,
            do_expand=expand,
            do_cpu_sync=cpu_sync,
            expert_alignment=4,
            do_handle_copy=False,
        )
        handle = first[3]
        assert handle.topk_idx.data_ptr() == tokens.topk_idx.data_ptr()
        if rebuilt:
            handle = EPHandle.from_state_dict(handle.state_dict())
        again = buffer.dispatch(tokens.x, topk_weights=tokens.topk_weights, handle=handle, do_expand=expand)
        assert again[3] is handle
        combined = [buffer.combine(each[0], each[3], topk_weights=each[2])[:2] for each in (first, again)]
        return first, again, combined

    for first, again, combined in exchange(body)[0]:
        handle = first[3]
        rows = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        if expand:
            rows = int(handle.recv_src_metadata[:rows, 2:].max()) + 1
        assert torch.equal(first[0][:rows], again[0][:rows]) and torch.equal(first[2][:rows], again[2][:rows])
        assert (again[1] is None) if expand else torch.equal(first[1], again[1])
        assert torch.equal(combined[0][0], combined[1][0]) and torch.equal(combined[0][1], combined[1][1])


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


def test_3_4_previous_events_of_both_kinds_and_asynchronous_calls():
    def body(buffer, tokens):
        from deep_ep import EventOverlap

        results = []
        for event in (None, buffer.capture(), EventOverlap(EventHandle())):
            out = buffer.dispatch(
                tokens.x,
                tokens.topk_idx,
                num_experts=EXPERTS,
                previous_event=event,
                allocate_on_comm_stream=True,
                async_with_compute_stream=True,
                previous_event_before_epilogue=event,
            )
            out[4].current_stream_wait()
            results.append(out[0])
        return results

    for results in exchange(body)[0]:
        assert all(torch.equal(each, results[0]) for each in results)


def test_q8_cached_dispatch_needs_no_numbers_and_checks_those_that_are_given():
    def body(buffer, tokens):
        handle = buffer.dispatch(tokens.x, tokens.topk_idx, num_experts=EXPERTS)[3]
        for wrong in (
            dict(num_experts=8),
            dict(expert_alignment=2),
            dict(do_cpu_sync=True),
            dict(topk_idx=tokens.topk_idx),
        ):
            with pytest.raises(Error):
                buffer.dispatch(tokens.x, handle=handle, **wrong)
        return buffer.dispatch(tokens.x, handle=handle, num_sms=0)[3] is handle

    assert all(exchange(body)[0])


def test_3_1_attributes_and_domains():
    def body(buffer, tokens):
        assert buffer.num_bytes == ElasticBuffer.get_buffer_size_hint(buffer.group, MAX_TOKENS, HIDDEN)
        return (
            buffer.rank_idx,
            buffer.num_ranks,
            buffer.num_scaleout_ranks,
            buffer.num_scaleup_ranks,
            buffer.scaleout_rank_idx,
            buffer.scaleup_rank_idx,
            buffer.get_physical_domain_size(),
            buffer.num_allocated_qps,
        )

    results, _ = exchange(body, ranks_per_node=2)
    assert results[3] == (3, 4, 2, 2, 1, 1, (2, 2), 129)
    results, _ = exchange(body, ranks_per_node=2, allow_hybrid_mode=False)
    assert results[3] == (3, 4, 1, 4, 0, 3, (2, 2), 17)


class _Group:
    def __init__(self, size):
        self._size = size

    def rank(self):
        return 0

    def size(self):
        return self._size


@pytest.mark.parametrize(
    "tokens, topk, fp8, expected",
    [
        (4096, 0, False, 484442112),
        (4096, 8, False, 473956352),
        (4096, 8, True, 471859200),
        (8192, 8, True, 943718400),
        (8192, 8, False, 947912704),
    ],
)
def test_appendix_a_direct_sizes(tokens, topk, fp8, expected):
    assert ElasticBuffer.get_buffer_size_hint(_Group(8), tokens, 7168, topk, fp8) == expected


def test_appendix_a_hybrid_size():
    assert ElasticBuffer.get_buffer_size_hint(_Group(16), 4096, 7168, 8) == 1218445312


def test_3_2_hints_of_engram_and_pipeline_buffers():
    page = 2 << 20
    # An entry of 100 BF16 channels takes 224 bytes: 200, rounded up to 32.
    assert ElasticBuffer.get_engram_storage_size_hint(20_000, 100, 1_000) == (page, 3 * page)
    assert ElasticBuffer.get_pp_buffer_size_hint(1_000_000, 3) == 6 * page


def test_3_3_queue_pairs_follow_the_sms():
    with ElasticBuffer(deep_ep.in_process_group(1)[0], num_bytes=2 << 20) as buffer:
        assert [buffer.get_theoretical_num_qps(sms) for sms in (4, 64)] == [4, 9]
    with ElasticBuffer(deep_ep.in_process_group(1)[0], num_bytes=2 << 20, num_allocated_qps=2) as buffer:
        assert buffer.get_theoretical_num_qps(64) == 2


def test_3_5_a_handles_arguments_come_in_upstreams_order():
    names = (
        "do_expand num_experts expert_alignment num_max_tokens_per_rank num_sms topk_idx num_recv_tokens num_expanded_tokens "
        "num_recv_tokens_per_expert_list psum_num_recv_tokens_per_scaleup_rank psum_num_recv_tokens_per_expert "
        "num_unaligned_recv_tokens_per_expert recv_src_metadata dst_buffer_slot_idx token_metadata_at_forward channel_linked_list"
    ).split()
    handle = EPHandle(*range(len(names)))
    assert [getattr(handle, name) for name in names] == list(range(len(names)))
    assert handle.cached_recv_src_metadata_before_sort is None
    with pytest.raises(AttributeError, match="no attribute nothing"):
        _ = handle.nothing


def test_3_5_a_handles_fields_are_made_when_they_are_read_and_do_not_keep_the_rows():
    def run(group):
        tokens = make_tokens(0, 12, 128, 2, 8)
        with ElasticBuffer(group, num_max_tokens_per_rank=16, hidden=128) as buffer:
            rows, _, _, handle, _ = buffer.dispatch(tokens.x, tokens.topk_idx, tokens.topk_weights, num_experts=8)
            assert not set(vars(handle)) & set(Fields.MAKERS)
            with_rows = buffer.statistics()["arena_bytes_in_use"]
            del rows, _
            assert buffer.statistics()["arena_bytes_in_use"] < with_rows
            copied, saved = copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))
            for name in Fields.MAKERS:
                assert torch.equal(getattr(copied, name), getattr(handle, name)), name
                assert torch.equal(getattr(saved, name), getattr(handle, name)), name

    run_ranks(1, run)


@pytest.mark.parametrize("ranks, expected", [(2, 22), (4, 16), (8, 14)])
def test_appendix_a_theoretical_sms(ranks, expected):
    from deep_ep.elastic_sizes import theoretical_num_sms

    assert theoretical_num_sms(ranks, 256, 8, 18 * 26.562 * 0.9, (200, 50), True) == expected
    assert theoretical_num_sms(ranks, 256, 8, 18 * 26.562 * 0.9, (200, 50), False) == 64


def test_3_7_all_gather_sessions():
    def body(buffer, tokens):
        size = ElasticBuffer.get_agrs_num_max_session_bytes(buffer.group, [(2, 3), (5,)], torch.bfloat16)
        buffer.agrs_set_config(size, 2)
        with buffer.agrs_new_session():
            a, b = buffer.agrs_get_inplace_tensor([(2, 3), (5,)], torch.bfloat16)
            a.fill_(buffer.rank_idx), b.fill_(-buffer.rank_idx)
            all_a, all_b, wait = buffer.all_gather((a, b))
            wait()
        with pytest.raises(Error, match="session"):
            buffer.all_gather(a)
        return all_a, all_b

    for all_a, all_b in exchange(body)[0]:
        assert all_a.shape == (RANKS, 2, 3) and all_b.shape == (RANKS, 5)
        assert all_a[:, 0, 0].tolist() == [0, 1, 2, 3] and all_b[:, 4].tolist() == [0, -1, -2, -3]


def test_3_7_engram_fetches_entries_of_all_ranks():
    def body(buffer, tokens):
        entries = 6
        table = (
            torch.arange(entries * 4, dtype=torch.float32).view(entries, 4).to(torch.bfloat16) + 100 * buffer.rank_idx
        )
        buffer.engram_write(table)
        wanted = torch.randint(0, RANKS * entries, (3 + buffer.rank_idx, 2), dtype=torch.int32)
        data, sf = buffer.engram_fetch(wanted)()
        assert sf is None
        flat = wanted.flatten().long()
        expected = (flat % entries * 4).unsqueeze(1) + torch.arange(4) + (flat // entries * 100).unsqueeze(1)
        return data, expected.view(wanted.size(0), -1).to(torch.bfloat16)

    for data, expected in exchange(body)[0]:
        assert torch.equal(data, expected)


def test_3_8_wrong_arguments_are_clear_and_the_group_stays_usable():
    def body(buffer, tokens):
        for wrong in (
            dict(num_experts=None),
            dict(do_zero_padding=True),
            dict(num_max_tokens_per_rank=3),
            dict(num_sms=-1),
            dict(topk_idx=tokens.topk_idx + EXPERTS),
        ):
            arguments = dict(topk_idx=tokens.topk_idx, num_experts=EXPERTS)
            arguments.update(wrong)
            with pytest.raises(Error):
                buffer.dispatch(tokens.x, **arguments)
        return buffer.dispatch(tokens.x, tokens.topk_idx, num_experts=EXPERTS)[0].size(0) > 0

    assert all(exchange(body)[0])
    with pytest.raises(Error, match="num_max_tokens_per_rank and hidden"):
        run_ranks(1, lambda group: ElasticBuffer(group))


def source_ranks(handle):
    rows = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
    return handle.recv_src_metadata[:rows, 0] // MAX_TOKENS


@pytest.mark.parametrize("cpu_sync", [True, False])
@pytest.mark.parametrize("scales", [None, "row-major", "tma"])
def test_3_4_hybrid_rows_are_grouped_by_scaleup_rank_and_everything_else_follows(cpu_sync, scales):
    def body(buffer, tokens):
        x = tokens.x if scales is None else per_token_cast_to_fp8(tokens.x)
        options = dict(num_experts=EXPERTS, do_cpu_sync=cpu_sync, use_tma_aligned_col_major_sf=scales == "tma")
        first = buffer.dispatch(x, tokens.topk_idx, tokens.topk_weights, **options)
        handle = first[3]
        options.pop("do_cpu_sync")
        again = buffer.dispatch(x, topk_weights=tokens.topk_weights, handle=handle, **options)
        rows = first[0] if scales is None else first[0][0].to(torch.bfloat16)
        return x, first, again, buffer.combine(rows, handle, topk_weights=first[2])

    results, sources = exchange(body, ranks_per_node=2)
    mine = [tokens._replace(x=x if scales is None else x[0].float()) for tokens, (x, *_) in zip(sources, results)]
    for rank, (_, first, again, (combined, home, _)) in enumerate(results):
        handle, valid = first[3], int(first[3].psum_num_recv_tokens_per_scaleup_rank[-1])
        expected = expected_rows(rank, mine, EXPERTS, masked_weights=False)
        source = source_ranks(handle)
        group = source % 2
        assert torch.equal(group, group.sort().values)  # scale-up rank by scale-up rank
        assert torch.equal((group == 0).sum().view(1).to(torch.int32), handle.psum_num_recv_tokens_per_scaleup_rank[:1])
        order = torch.argsort(handle.recv_src_metadata[:valid, 0])
        for made in (first, again):
            data = made[0] if scales is None else made[0][0]
            assert torch.equal(data[:valid].to(expected.rows.dtype)[order], expected.rows)
            assert torch.equal(made[1][:valid][order], expected.topk_idx)
            assert torch.equal(made[2][:valid][order], expected.topk_weights)
            if scales is not None:
                assert torch.equal(made[0][1][:valid], first[0][1][:valid])
                assert made[0][1].stride(0) == 1 if scales == "tma" else made[0][1].is_contiguous()
        tokens = sources[rank]
        assert torch.equal(home, torch.where(tokens.topk_idx >= 0, tokens.topk_weights, 0.0))
        if scales is None:
            fan_out = torch.stack([(tokens.topk_idx // LOCAL == r).any(dim=1) for r in range(RANKS)]).sum(dim=0)
            assert torch.allclose(combined.float(), tokens.x.float() * fan_out.unsqueeze(1), rtol=2e-2)


def test_3_1_deterministic_rows_are_sorted_by_source_and_a_handle_can_sort_them_later():
    def body(buffer, tokens):
        made = buffer.dispatch(tokens.x, tokens.topk_idx, tokens.topk_weights, num_experts=EXPERTS)
        recv_x, ids, weights, handle, _ = made
        if not buffer.deterministic:
            handle.deterministic_sort(True, False, recv_x, None, ids, weights)
        return recv_x, ids, weights, handle

    for deterministic in (True, False):
        results, sources = exchange(body, ranks_per_node=2, deterministic=deterministic)
        for rank, (recv_x, ids, weights, handle) in enumerate(results):
            expected = expected_rows(rank, sources, EXPERTS, masked_weights=False)
            assert torch.equal(recv_x, expected.rows) and torch.equal(ids, expected.topk_idx)
            assert torch.equal(weights, expected.topk_weights)
            assert torch.equal(source_ranks(handle), source_ranks(handle).sort().values)


REPLICATED = [[5, 0], [1, 2, 0, 7], [3, 4], [6, 1, 0]]  # experts 0 and 1 have several homes; slots are uneven


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
@pytest.mark.parametrize("rebuilt", [False, True], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("ranks_per_node", [8, 2], ids=["direct", "hybrid"])
def test_3_4_any_placement_serves_dispatch_cached_dispatch_and_combine(expand, rebuilt, ranks_per_node, tmp_path):
    placement = Placement.from_lists(REPLICATED, 8)

    def body(buffer, tokens):
        tokens = tokens._replace(topk_idx=torch.where(tokens.topk_idx >= 0, tokens.topk_idx % 8, -1))
        stats = torch.zeros(len(REPLICATED[buffer.rank_idx]), dtype=torch.int32)
        first = buffer.dispatch(
            tokens.x,
            tokens.topk_idx,
            tokens.topk_weights,
            stats,
            num_experts=8,
            do_expand=expand,
            placement=placement,
        )
        handle = first[3]
        if rebuilt:
            file = tmp_path / f"{buffer.rank_idx}.pt"
            torch.save(handle.state_dict(), file)
            handle = EPHandle.from_state_dict(torch.load(file))
        again = buffer.dispatch(tokens.x, topk_weights=tokens.topk_weights, handle=handle, do_expand=expand)
        combined, home, _ = buffer.combine(again[0], handle, topk_weights=again[2])
        return tokens, stats, first, again, combined, home

    results, _ = exchange(body, ranks_per_node=ranks_per_node)
    selections = sum(int((tokens.topk_idx >= 0).sum()) for tokens, *_ in results)
    assert sum(int(stats.sum()) for _, stats, *_ in results) == selections
    for rank, (tokens, stats, first, again, combined, home) in enumerate(results):
        for a, b in zip(first[:3], again[:3]):
            assert (a is None and b is None) or torch.equal(a, b)
        assert torch.equal(home, torch.where(tokens.topk_idx >= 0, tokens.topk_weights, 0.0))
        if expand:  # a row per selection, wherever it was served
            wanted = tokens.x.float() * (tokens.topk_idx >= 0).sum(dim=1, keepdim=True)
            assert torch.allclose(combined.float(), wanted, rtol=2e-2)
        else:
            ids, hosted = first[1], REPLICATED[rank]
            counts = torch.bincount(ids[ids >= 0], minlength=len(hosted)).to(torch.int32)
            assert torch.equal(counts, stats)


def test_3_4_statistics_of_another_shape_are_refused_before_anything_is_sent():
    def body(buffer, tokens):
        for wrong in (torch.zeros(LOCAL + 1, dtype=torch.int32), torch.zeros(LOCAL, dtype=torch.int64)):
            with pytest.raises(Error, match="cumulative_local_expert_recv_stats"):
                buffer.dispatch(tokens.x, tokens.topk_idx, None, wrong, num_experts=EXPERTS)
        return buffer.dispatch(tokens.x, tokens.topk_idx, num_experts=EXPERTS)[0].size(0) > 0

    assert all(exchange(body)[0])


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


@pytest.mark.parametrize("tma", [False, True], ids=["row-major", "tma"])
def test_3_7_engram_brings_fp8_entries_and_their_scales(tma):
    entries, hidden = 5, 128

    def body(buffer, tokens):
        random = torch.Generator().manual_seed(3)
        all_sf = torch.rand((RANKS * entries, 2), generator=random)
        table = torch.randn((RANKS * entries, hidden), generator=random).to(torch.float8_e4m3fn)
        first = buffer.rank_idx * entries
        with pytest.raises(Error, match="sf"):
            buffer.engram_write(table[first : first + entries])
        buffer.engram_write(table[first : first + entries], all_sf)
        wanted = torch.randint(0, RANKS * entries, (3, 2), dtype=torch.int32, generator=random)
        with pytest.raises(Error, match="indices"):
            buffer.engram_fetch(wanted + RANKS * entries)
        data, sf = buffer.engram_fetch(wanted, use_tma_aligned_col_major_sf=tma)()
        flat = wanted.flatten().long()
        expected = table.view(torch.uint8)[flat].view(3, -1)
        return torch.equal(data.view(torch.uint8), expected), torch.equal(sf, all_sf[flat].view(3, -1)), sf.stride()

    for same_data, same_sf, stride in exchange(body)[0]:
        assert same_data and same_sf and stride == ((1, 4) if tma else (4, 1))


def test_3_7_gathers_interleave_alone_and_in_batches_within_the_sessions_limits():
    def body(buffer, tokens):
        a, b = torch.full((4,), buffer.rank_idx), torch.full((2, 2), buffer.rank_idx + 0.5)
        size = ElasticBuffer.get_agrs_num_max_session_bytes(buffer.group, (4,), torch.int64)
        size += ElasticBuffer.get_agrs_num_max_session_bytes(buffer.group, [(2, 2)] * 2, torch.float32)
        assert ElasticBuffer.get_agrs_buffer_size_hint(buffer.group, size) % (2 << 20) == 0
        buffer.agrs_set_config(size, 2)
        with buffer.agrs_new_session(enabled=False):
            pass
        buffer.create_agrs_session()
        with pytest.raises(Error, match="open already"):
            buffer.create_agrs_session()
        own = buffer.agrs_get_inplace_tensor((4,), torch.int64)
        own.copy_(a)
        all_a, wait_a = buffer.all_gather(own)
        all_b, all_c, wait_b = buffer.all_gather([b, b + 1])
        wait_b(), wait_a()
        with pytest.raises(Error, match="3 gathers"):
            buffer.all_gather(a)
        buffer.destroy_agrs_session()
        return all_a, all_b, all_c

    for all_a, all_b, all_c in exchange(body)[0]:
        assert all_a[:, 0].tolist() == [0, 1, 2, 3]
        assert all_b[:, 1, 1].tolist() == [0.5, 1.5, 2.5, 3.5] and torch.equal(all_c, all_b + 1)


def test_3_3_a_barrier_lets_nobody_pass_before_everybody_came():
    came = []

    def body(buffer, tokens):
        import time

        time.sleep(0.02 * buffer.rank_idx)
        came.append(buffer.rank_idx)
        buffer.barrier(use_comm_stream=False, with_cpu_sync=True, sequential=False)
        return len(came)

    assert exchange(body)[0] == [RANKS] * RANKS
