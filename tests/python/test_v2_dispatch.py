# SPDX-License-Identifier: MIT
"""Contract 3.4, 3.5 and 3.8: dispatch of ElasticBuffer, what its handle holds, and arguments that are refused."""

import copy
import pickle

import pytest
import torch
from deep_ep import ElasticBuffer, EPHandle, Error, EventHandle
from deep_ep.elastic_fields import Fields
from deep_ep.utils.math import per_token_cast_to_fp8

from ranks import expected_rows, make_tokens, run_ranks
from v2 import EXPERTS, LOCAL, MAX_TOKENS, RANKS, TOPK, align, exchange, slot_counts


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


def test_3_4_statistics_of_another_shape_are_refused_before_anything_is_sent():
    def body(buffer, tokens):
        for wrong in (torch.zeros(LOCAL + 1, dtype=torch.int32), torch.zeros(LOCAL, dtype=torch.int64)):
            with pytest.raises(Error, match="cumulative_local_expert_recv_stats"):
                buffer.dispatch(tokens.x, tokens.topk_idx, None, wrong, num_experts=EXPERTS)
        return buffer.dispatch(tokens.x, tokens.topk_idx, num_experts=EXPERTS)[0].size(0) > 0

    assert all(exchange(body)[0])
