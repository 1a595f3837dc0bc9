# SPDX-License-Identifier: MIT
"""The calls of frameworks, in their order and with their arguments (conformance)."""

import inspect
import json

import deep_ep
import pytest
import torch
from deep_ep import Buffer, Config, ElasticBuffer
from deep_ep.utils import EventHandle, EventOverlap
from deep_ep.utils.math import per_token_cast_back, per_token_cast_to_fp8

from ranks import expected_rows, make_tokens, run_ranks

RANKS, EXPERTS, HIDDEN, TOPK = 4, 8, 512, 2
LOCAL = EXPERTS // RANKS


def tokens_of(group, count=9):
    return make_tokens(group.rank(), count, HIDDEN, TOPK, EXPERTS)


class MegatronDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, probs, buffer):
        event = EventOverlap(EventHandle())
        layout = buffer.get_dispatch_layout(
            ids, EXPERTS, previous_event=event, async_finish=True, allocate_on_comm_stream=True
        )
        per_rank, per_node, per_expert, member, event = layout
        recv_x, recv_ids, recv_probs, counts, handle, event = buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=probs,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        return recv_x, recv_ids, recv_probs, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx, grad_x, grad_ids, grad_probs, grad_counts, grad_handle):
        grad, grad_probs, event = ctx.buffer.combine(
            grad_x.contiguous(),
            ctx.handle,
            topk_weights=grad_probs.float(),
            previous_event=EventOverlap(EventHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return grad, None, grad_probs, None


class MegatronCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, handle, buffer):
        combined, _, event = buffer.combine(
            x,
            handle=handle,
            async_finish=True,
            previous_event=EventOverlap(EventHandle()),
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        return combined

    @staticmethod
    def backward(ctx, grad):
        grad_x, _, _, _, _, event = ctx.buffer.dispatch(
            grad.contiguous(),
            handle=ctx.handle,
            previous_event=EventOverlap(EventHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return grad_x, None, None


def test_megatron_autograd_pair():
    def body(group):
        tokens = tokens_of(group)
        config = Buffer.get_dispatch_config(group.size())
        nvl = max(c.get_nvl_buffer_size_hint(HIDDEN * 2, RANKS) for c in (config, Buffer.get_combine_config(RANKS)))
        with Buffer(group, nvl, 0) as buffer:
            x = tokens.x.clone().requires_grad_()
            probs = tokens.topk_weights.clone().requires_grad_()
            recv_x, recv_ids, recv_probs, counts, handle = MegatronDispatch.apply(x, tokens.topk_idx, probs, buffer)
            here = torch.where(recv_ids >= 0, recv_probs, 0.0).sum(dim=1, keepdim=True)
            y = (recv_x.float() * here).to(torch.bfloat16)
            MegatronCombine.apply(y, handle, buffer).float().sum().backward()
            return tokens, x.grad, probs.grad

    for tokens, grad_x, grad_probs in run_ranks(RANKS, body):
        weight = torch.where(tokens.topk_idx >= 0, tokens.topk_weights, 0.0).sum(dim=1, keepdim=True)
        assert torch.allclose(grad_x.float(), weight.expand_as(grad_x), rtol=2e-2, atol=1e-2)
        per_k = tokens.x.float().sum(dim=1, keepdim=True)
        assert torch.allclose(grad_probs, torch.where(tokens.topk_idx >= 0, per_k, 0.0), rtol=2e-2, atol=0.2)


def test_vllm_high_throughput_prepare_and_finalize():
    def body(group):
        tokens = tokens_of(group)
        buffer = Buffer(
            group=group,
            num_nvl_bytes=1 << 20,
            num_rdma_bytes=0,
            low_latency_mode=False,
            num_qps_per_rank=1,
            explicitly_destroy=True,
        )
        event = buffer.capture()
        per_rank, per_node, per_expert, member, event = buffer.get_dispatch_layout(
            topk_idx=tokens.topk_idx,
            num_experts=EXPERTS,
            previous_event=event,
            async_finish=False,
            allocate_on_comm_stream=False,
        )
        recv_x, ids, weights, counts, handle, event = buffer.dispatch(
            x=tokens.x,
            handle=None,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
            topk_idx=tokens.topk_idx,
            topk_weights=tokens.topk_weights,
            expert_alignment=1,
            config=Buffer.get_dispatch_config(RANKS),
            previous_event=event,
            async_finish=False,
            allocate_on_comm_stream=False,
        )
        assert event.event is None
        ids = torch.where(ids == -1, EXPERTS - 1 if group.rank() == 0 else 0, ids + group.rank() * LOCAL)
        combined, _, event = buffer.combine(
            x=recv_x,
            handle=handle,
            topk_weights=None,
            config=Buffer.get_combine_config(RANKS),
            previous_event=None,
            async_finish=True,
            allocate_on_comm_stream=False,
        )
        if event.event is not None:
            event.current_stream_wait()
        buffer.destroy()
        return tokens, recv_x, sum(counts), combined.shape

    results = run_ranks(RANKS, body)
    sources = [tokens for tokens, *_ in results]
    for rank, (tokens, recv_x, count, shape) in enumerate(results):
        expected = expected_rows(rank, sources, EXPERTS)
        assert torch.equal(recv_x, expected.rows) and count == int((expected.topk_idx >= 0).sum())
        assert shape == tokens.x.shape


def low_latency_round(buffer, tokens, **dispatch_options):
    recv, counts, handle, _, hook = buffer.low_latency_dispatch(
        tokens.x,
        tokens.topk_idx,
        16,
        EXPERTS,
        use_fp8=False,
        async_finish=False,
        return_recv_hook=True,
        **dispatch_options,
    )
    hook()
    rows = torch.zeros_like(recv)
    for slot in range(LOCAL):
        rows[slot, : counts[slot]] = recv[slot, : counts[slot]]
    out = torch.empty_like(tokens.x)
    _, _, hook = buffer.low_latency_combine(
        rows,
        tokens.topk_idx,
        tokens.topk_weights,
        handle,
        async_finish=False,
        zero_copy=False,
        return_recv_hook=True,
        out=out,
    )
    hook()
    return out


def check_weighted(tokens, out):
    weight = torch.where(tokens.topk_idx >= 0, tokens.topk_weights, 0.0).sum(dim=1, keepdim=True)
    assert torch.allclose(out.float(), tokens.x.float() * weight, rtol=2e-2, atol=2e-2)


def test_vllm_low_latency_prepare_and_finalize():
    def body(group):
        tokens = tokens_of(group)
        hint = Buffer.get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank=16, hidden=HIDDEN, num_ranks=RANKS, num_experts=EXPERTS
        )
        buffer = Buffer(
            group=group,
            num_nvl_bytes=0,
            num_rdma_bytes=hint,
            low_latency_mode=True,
            num_qps_per_rank=LOCAL,
            allow_nvlink_for_low_latency_mode=True,
            allow_mnnvl=False,
            explicitly_destroy=True,
            enable_shrink=True,
        )
        out = low_latency_round(buffer, tokens, round_scale=False, use_ue8m0=False)
        mask = torch.ones(RANKS, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(mask)
        buffer.low_latency_clean_mask_buffer()
        buffer.destroy()
        return tokens, out, mask

    for tokens, out, mask in run_ranks(RANKS, body):
        check_weighted(tokens, out)
        assert mask.tolist() == [0] * RANKS


def test_sglang_one_buffer_for_both_modes_with_config_from_json():
    text = json.dumps(
        dict(
            num_sms=24,
            num_max_nvl_chunked_send_tokens=8,
            num_max_nvl_chunked_recv_tokens=256,
            num_max_rdma_chunked_send_tokens=6,
            num_max_rdma_chunked_recv_tokens=128,
        )
    )

    def body(group):
        tokens = tokens_of(group)
        config = Config(**json.loads(text))
        nvl = config.get_nvl_buffer_size_hint(HIDDEN * 2, RANKS)
        rdma = max(
            config.get_rdma_buffer_size_hint(HIDDEN * 2, RANKS),
            Buffer.get_low_latency_rdma_size_hint(16, HIDDEN, RANKS, EXPERTS),
        )
        with Buffer(group, nvl, rdma, low_latency_mode=True, num_qps_per_rank=24, allow_mnnvl=True) as buffer:
            assert buffer.low_latency_mode and buffer.group_size == RANKS
            event = Buffer.capture()
            per_rank, per_node, per_expert, member, event = buffer.get_dispatch_layout(
                tokens.topk_idx, EXPERTS, previous_event=event, async_finish=True, allocate_on_comm_stream=True
            )
            recv_x, ids, weights, counts, handle, event = buffer.dispatch(
                tokens.x,
                topk_idx=tokens.topk_idx,
                topk_weights=tokens.topk_weights,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=member,
                num_tokens_per_expert=per_expert,
                previous_event=event,
                async_finish=True,
                allocate_on_comm_stream=True,
                expert_alignment=128,
                config=config,
            )
            event.current_stream_wait()
            assert isinstance(counts, list) and all(count % 128 == 0 for count in counts)
            buffer.combine(recv_x, handle, async_finish=True, previous_event=Buffer.capture(), config=config)
            buffer.clean_low_latency_buffer(16, HIDDEN, EXPERTS)
            return tokens, low_latency_round(buffer, tokens)

    for tokens, out in run_ranks(RANKS, body):
        check_weighted(tokens, out)


FORKS = [
    ("low_latency_dispatch", dict(use_nvfp4=True, x_global_scale=torch.ones(1)), "use_nvfp4, .* as BF16, or as FP8"),
    ("low_latency_combine", dict(overlap=True, src_signals=None, src_signal_expect_value=1), "overlap, .* complete"),
    (
        "low_latency_combine",
        dict(overlap=True, packed_recv_count=None, comp_signal=None, block_m=64, threshold=8, num_sms=3),
        "overlap, .* return_recv_hook",
    ),
]


@pytest.mark.parametrize("method, keywords, reason", FORKS, ids=["nvfp4", "overlap, Blackwell", "overlap, Hopper"])
def test_keywords_of_forks_are_in_no_signature_and_refused_only_where_they_ask_for_something(method, keywords, reason):
    assert not set(keywords) & set(inspect.signature(getattr(Buffer, method)).parameters)
    switch = next(iter(keywords))

    def body(group):
        hint = Buffer.get_low_latency_rdma_size_hint(16, HIDDEN, RANKS, EXPERTS)
        with Buffer(group, 0, hint, low_latency_mode=True, timeout_secs=20) as buffer:
            tokens = tokens_of(group)

            def call(name, **more):
                if name == "low_latency_dispatch":
                    return buffer.low_latency_dispatch(tokens.x, tokens.topk_idx, 16, EXPERTS, use_fp8=False, **more)
                return buffer.low_latency_combine(made[0], tokens.topk_idx, tokens.topk_weights, made[2], **more)

            made = call("low_latency_dispatch")
            plain = call(method)[0]
            # One rank alone asks for it: all are told, and the buffer works on.
            with pytest.raises(deep_ep.Error, match=reason):
                call(method, **(keywords if group.rank() == 0 else {}))
            with pytest.raises(TypeError, match="no_such_keyword"):
                call(method, no_such_keyword=1)
            ignored = call(method, **{**keywords, switch: False})[0]
            if method == "low_latency_dispatch":
                rows = torch.arange(plain.size(1)) < made[1].view(-1, 1)
                plain, ignored = plain[rows], ignored[rows]
            return torch.equal(ignored, plain)

    assert run_ranks(RANKS, body) == [True] * RANKS


def test_sglang_and_vllm_on_the_second_generation():
    def body(group):
        tokens = tokens_of(group)
        buffer = ElasticBuffer(
            group,
            num_max_tokens_per_rank=16,
            hidden=HIDDEN,
            num_topk=TOPK,
            use_fp8_dispatch=False,
            allow_hybrid_mode=True,
            sl_idx=0,
            prefer_overlap_with_compute=False,
            explicitly_destroy=True,
        )
        sms = buffer.get_theoretical_num_sms(EXPERTS, TOPK)
        recv_x, ids, weights, handle, event = buffer.dispatch(
            tokens.x,
            topk_idx=tokens.topk_idx,
            topk_weights=tokens.topk_weights,
            num_experts=EXPERTS,
            num_max_tokens_per_rank=16,
            expert_alignment=128,
            num_sms=sms,
            num_qps=buffer.get_theoretical_num_qps(sms),
            use_tma_aligned_col_major_sf=True,
            do_cpu_sync=True,
            do_expand=True,
        )
        rows = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        assert recv_x.size(0) == sum(handle.num_recv_tokens_per_expert_list) and rows <= recv_x.size(0)
        y = (recv_x.float() * weights.unsqueeze(1)).to(torch.bfloat16)
        combined, _, _ = buffer.combine(y, handle=handle, num_sms=sms)
        buffer.destroy()
        return tokens, combined

    for tokens, combined in run_ranks(RANKS, body):
        check_weighted(tokens, combined)


def test_lmdeploy_low_latency_with_positional_use_fp8():
    def body(group):
        tokens = tokens_of(group)
        hint = Buffer.get_low_latency_rdma_size_hint(128, HIDDEN, RANKS, EXPERTS)
        with Buffer(
            group, num_nvl_bytes=0, num_rdma_bytes=hint, low_latency_mode=True, num_qps_per_rank=LOCAL
        ) as buffer:
            recv, counts, handle, event, hook = buffer.low_latency_dispatch(
                tokens.x, tokens.topk_idx, 128, EXPERTS, False, async_finish=True
            )
            assert isinstance(recv, torch.Tensor)
            event.current_stream_wait()
            rows = torch.zeros_like(recv)
            for slot in range(LOCAL):
                rows[slot, : counts[slot]] = recv[slot, : counts[slot]]
            out, event, hook = buffer.low_latency_combine(
                rows, tokens.topk_idx, tokens.topk_weights.to(torch.float32), handle, async_finish=True
            )
            event.current_stream_wait()
            assert hook is None
            return tokens, out

    for tokens, out in run_ranks(RANKS, body):
        check_weighted(tokens, out)


def test_automodel_saves_and_restores_tensor_fields_of_the_handle():
    names = (
        "topk_idx",
        "psum_num_recv_tokens_per_scaleup_rank",
        "psum_num_recv_tokens_per_expert",
        "recv_src_metadata",
        "dst_buffer_slot_idx",
        "num_unaligned_recv_tokens_per_expert",
        "token_metadata_at_forward",
        "channel_linked_list",
    )

    def body(group):
        tokens = tokens_of(group)
        with ElasticBuffer(group, num_max_tokens_per_rank=16, hidden=HIDDEN) as buffer:
            recv_x, _, _, handle, _ = buffer.dispatch(tokens.x, tokens.topk_idx, num_experts=EXPERTS)
            before = buffer.combine(recv_x, handle)[0]
            saved = {name: getattr(handle, name) for name in names}
            for name in names:
                setattr(handle, name, None)
            for name, tensor in saved.items():
                setattr(handle, name, None if tensor is None else tensor.clone())
            return before, buffer.combine(recv_x, handle)[0]

    for before, after in run_ranks(RANKS, body):
        assert torch.equal(before, after)


def test_vllm_second_generation_without_expansion_reads_the_counts_on_the_handle():
    def body(group):
        tokens = tokens_of(group)
        buffer = ElasticBuffer(
            group=group,
            num_max_tokens_per_rank=16,
            hidden=HIDDEN,
            num_topk=TOPK,
            use_fp8_dispatch=True,
            allow_hybrid_mode=False,
            prefer_overlap_with_compute=True,
            allow_multiple_reduction=False,
            num_cpu_timeout_secs=1800,
            num_gpu_timeout_secs=1800,
            explicitly_destroy=True,
        )
        assert buffer.get_theoretical_num_sms(num_experts=EXPERTS, num_topk=TOPK) % 2 == 0
        recv_x, ids, weights, handle, event = buffer.dispatch(
            x=per_token_cast_to_fp8(tokens.x),
            topk_idx=tokens.topk_idx,
            topk_weights=tokens.topk_weights,
            num_experts=EXPERTS,
            num_max_tokens_per_rank=16,
            do_expand=False,
            do_cpu_sync=False,
            async_with_compute_stream=False,
        )
        assert event.event is None and handle.num_recv_tokens_per_expert_list == []
        rows = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        y = torch.zeros(recv_x[0].shape, dtype=torch.bfloat16)
        share = torch.where(ids[:rows] >= 0, weights[:rows], 0.0).sum(dim=1, keepdim=True)
        y[:rows] = (per_token_cast_back(recv_x[0][:rows], recv_x[1][:rows]).float() * share).to(torch.bfloat16)
        combined, none, _ = buffer.combine(
            x=y, handle=handle, topk_weights=None, async_with_compute_stream=False, allocate_on_comm_stream=False
        )
        assert none is None
        buffer.destroy()
        return tokens, combined

    for tokens, combined in run_ranks(RANKS, body):
        weight = torch.where(tokens.topk_idx >= 0, tokens.topk_weights, 0.0).sum(dim=1, keepdim=True)
        assert torch.allclose(combined.float(), tokens.x.float() * weight, rtol=0.1, atol=0.1)


def test_deepgemm_feeds_the_prefix_of_a_bounded_expanded_dispatch_to_its_gemm():
    def body(group):
        tokens = tokens_of(group)
        stats = torch.zeros(LOCAL, dtype=torch.int32)
        with ElasticBuffer(group, num_max_tokens_per_rank=16, hidden=HIDDEN, num_topk=TOPK) as buffer:
            (data, sf), ids, weights, handle, _ = buffer.dispatch(
                per_token_cast_to_fp8(tokens.x),
                tokens.topk_idx,
                tokens.topk_weights,
                cumulative_local_expert_recv_stats=stats,
                num_experts=EXPERTS,
                expert_alignment=128,
                do_cpu_sync=False,
                do_handle_copy=False,
                do_expand=True,
                use_tma_aligned_col_major_sf=True,
            )
            y, begin = torch.zeros(data.shape, dtype=torch.bfloat16), 0
            for slot, end in enumerate(handle.psum_num_recv_tokens_per_expert.tolist()):
                assert end - begin == int(stats[slot])
                back = per_token_cast_back(data[begin:end], sf[begin:end].contiguous())
                y[begin:end] = (back.float() * weights[begin:end].unsqueeze(1)).to(torch.bfloat16)
                begin = -(-end // 128) * 128
            return tokens, buffer.combine(y, handle)[0]

    for tokens, combined in run_ranks(RANKS, body):
        weight = torch.where(tokens.topk_idx >= 0, tokens.topk_weights, 0.0).sum(dim=1, keepdim=True)
        assert torch.allclose(combined.float(), tokens.x.float() * weight, rtol=0.1, atol=0.1)


def test_deepspeed_uses_the_weights_that_combine_returns_as_their_gradient():
    def body(group):
        tokens = tokens_of(group)
        with ElasticBuffer(group, num_max_tokens_per_rank=16, hidden=HIDDEN, num_topk=TOPK) as buffer:
            recv_x, _, weights, handle, _ = buffer.dispatch(
                tokens.x,
                topk_idx=tokens.topk_idx.to(deep_ep.topk_idx_t),
                topk_weights=tokens.topk_weights,
                num_experts=EXPERTS,
                expert_alignment=1,
                do_expand=True,
                num_sms=12,
                num_qps=buffer.get_theoretical_num_qps(12),
            )
            grad, grad_weights, _ = buffer.combine(recv_x, handle, topk_weights=3 * weights, num_sms=12)
            again = buffer.dispatch(grad, handle=handle, do_expand=True)[0]
            return tokens, grad_weights, again.shape == recv_x.shape

    for tokens, grad_weights, same_shape in run_ranks(RANKS, body):
        assert same_shape
        assert torch.equal(grad_weights, torch.where(tokens.topk_idx >= 0, 3 * tokens.topk_weights, 0.0))


def test_xtuner_and_others_find_the_names_and_set_sms_at_import():
    from deep_ep_cpp import EventHandle as of_extension

    before = Buffer.num_sms
    Buffer.set_num_sms(24)
    Buffer.set_num_sms(before)
    assert of_extension is EventHandle and deep_ep.HybridEPBuffer and EventOverlap(of_extension()).event is not None
