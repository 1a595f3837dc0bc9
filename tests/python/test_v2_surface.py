# SPDX-License-Identifier: MIT
"""Contract 3.1 to 3.3 and 3.5: construction, sizes, numbers and names of ElasticBuffer and EPHandle."""

import deep_ep
import pytest
import torch
from deep_ep import ElasticBuffer, EPHandle, Error, EventHandle, in_process_group

from ranks import run_ranks
from v2 import HIDDEN, MAX_TOKENS, RANKS, exchange


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


@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(num_bytes=0),
        dict(num_bytes=(2 << 20) + 1),
        dict(num_bytes=2 << 20, num_cpu_bytes=4 << 20),
        dict(num_bytes=4 << 20, num_cpu_bytes=1 << 20),
        dict(num_max_tokens_per_rank=8, hidden=64, num_cpu_bytes=2 << 20),
        dict(num_max_tokens_per_rank=8),
    ],
)
def test_3_1_sizes_are_checked(sizes):
    with pytest.raises(Error):
        ElasticBuffer(in_process_group(1)[0], **sizes)


def test_3_3_small_methods():
    with ElasticBuffer(
        in_process_group(1)[0], num_bytes=4 << 20, num_cpu_bytes=2 << 20, explicitly_destroy=True
    ) as buffer:
        assert buffer.num_bytes == 4 << 20 and isinstance(ElasticBuffer.capture(), EventHandle)
        assert buffer.get_theoretical_num_sms(8, 2) == buffer.get_theoretical_num_sms(8, 2) > 0
        with pytest.raises(Error, match="num_scaleout_topk"):
            buffer.get_theoretical_num_sms(8, 2, 1)
        buffer.barrier(use_comm_stream=False, with_cpu_sync=True, sequential=False)
        buffer.destroy(), buffer.destroy()
        assert buffer.runtime is None


@pytest.mark.parametrize("cpu_sync", [True, False])
def test_3_8_a_wait_ends_with_the_timeout_of_its_kind_and_names_who_was_waited_for(cpu_sync):
    """With a host's read of the counts the one for CPUs, else the one for GPUs."""
    short = dict(num_cpu_timeout_secs=0.5) if cpu_sync else dict(num_gpu_timeout_secs=0.5)

    def body(group):
        with ElasticBuffer(group, num_max_tokens_per_rank=8, hidden=64, **short) as buffer:
            if group.rank() == 0:
                x, ids = torch.zeros((2, 64), dtype=torch.bfloat16), torch.zeros((2, 1), dtype=torch.int64)
                with pytest.raises(Error, match="rank 0 waited for rank 1"):
                    buffer.dispatch(x, ids, num_experts=2, do_cpu_sync=cpu_sync)
            group.barrier()

    run_ranks(2, body)


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


@pytest.mark.parametrize("ranks, expected", [(2, 22), (4, 16), (8, 14)])
def test_appendix_a_theoretical_sms(ranks, expected):
    from deep_ep.elastic_sizes import theoretical_num_sms

    assert theoretical_num_sms(ranks, 256, 8, 18 * 26.562 * 0.9, (200, 50), True) == expected
    assert theoretical_num_sms(ranks, 256, 8, 18 * 26.562 * 0.9, (200, 50), False) == 64


def test_3_3_a_barrier_lets_nobody_pass_before_everybody_came():
    came = []

    def body(buffer, tokens):
        import time

        time.sleep(0.02 * buffer.rank_idx)
        came.append(buffer.rank_idx)
        buffer.barrier(use_comm_stream=False, with_cpu_sync=True, sequential=False)
        return len(came)

    assert exchange(body)[0] == [RANKS] * RANKS
