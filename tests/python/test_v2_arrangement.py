# SPDX-License-Identifier: MIT
"""Contract 3.1 and 3.4: where rows stand in hybrid mode, sorted by source, and with a placement of the caller's own."""

import pytest
import torch
from deep_ep import EPHandle, Placement
from deep_ep.utils.math import per_token_cast_to_fp8

from ranks import expected_rows
from v2 import EXPERTS, LOCAL, RANKS, exchange, source_ranks


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
