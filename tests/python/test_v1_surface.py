# SPDX-License-Identifier: MIT
"""Contract 1.1 to 1.4 and section 2: construction, sizes, names, events; section 0: upstream's quirks."""

import importlib
import inspect
import os
import subprocess
import sys

import deep_ep
import pytest
import torch
from deep_ep import Buffer, Config, ElasticBuffer, EventHandle, EventOverlap

from ranks import run_ranks


def test_2_every_name_is_where_users_import_it():
    import deep_ep._C as compiled
    import deep_ep_cpp
    from deep_ep.buffer import Buffer as by_file
    from deep_ep.buffers.elastic import ElasticBuffer as by_folder
    from deep_ep.buffers.legacy import Buffer as legacy
    from deep_ep.utils import EventHandle as handle  # Q10
    from deep_ep.utils import EventOverlap as overlap
    from deep_ep.utils import comm, envs, event, find_pkgs, gate, math, refs, semantic, testing

    assert by_file is legacy is Buffer is compiled.Buffer and by_folder is ElasticBuffer
    assert handle is EventHandle is deep_ep_cpp.EventHandle and overlap is EventOverlap is event.EventOverlap
    assert deep_ep_cpp.Config is Config and compiled.topk_idx_t is deep_ep.topk_idx_t is torch.int64
    assert all((comm, envs, find_pkgs, gate, math, refs, semantic, testing))
    assert isinstance(deep_ep.__version__, str)
    assert compiled.is_sm90_compiled() and Buffer.is_sm90_compiled()


def test_2_the_compiled_module_has_upstreams_names():
    import deep_ep._C as compiled

    for name in (
        "Buffer Config ElasticBuffer EventHandle calculate_elastic_buffer_size create_cpu_handle create_nccl_comm destroy_nccl_comm "
        "get_elastic_buffer_alignment get_local_nccl_unique_id get_logical_domain_size get_low_latency_rdma_size_hint "
        "get_physical_domain_size init_jit is_sm90_compiled topk_idx_t"
    ).split():
        assert hasattr(compiled, name), name
    assert compiled.get_elastic_buffer_alignment() == 2 << 20
    group = deep_ep.in_process_group(1)[0]
    assert compiled.calculate_elastic_buffer_size(group, 64, 256) == ElasticBuffer.get_buffer_size_hint(group, 64, 256)


def test_q7_v1_captures_an_overlap_and_v2_an_event():
    assert isinstance(Buffer.capture(), EventOverlap) and isinstance(Buffer.capture().event, EventHandle)
    assert isinstance(ElasticBuffer.capture(), EventHandle)


def test_1_2_one_bias_or_two():
    one, two = torch.zeros(1), torch.ones(1)
    assert Buffer._unpack_bias(None) == (None, None)
    assert Buffer._unpack_bias(one) == (one, None)
    assert Buffer._unpack_bias((one, two)) == Buffer._unpack_bias([one, two]) == (one, two)


def test_2_event_overlap_waits_releases_and_runs_its_hook():
    ran = []
    event = EventOverlap(EventHandle(), (torch.zeros(1),))
    event.register_hook_after_wait(lambda: ran.append(1))
    with pytest.raises(AssertionError):
        event.register_hook_after_wait(lambda: None)
    with event(release_handle=True) as same:
        assert same is event
    assert ran == [1] and event.event is None and event.hook_after_wait is None
    with pytest.raises(AssertionError):
        EventOverlap().current_stream_wait()
    with EventOverlap():
        pass
    assert EventOverlap(None, None).extra_tensors is None


def test_1_1_constructor_arguments_are_visible_to_inspect():
    names = inspect.signature(Buffer.__init__).parameters
    for name in (
        "group num_nvl_bytes num_rdma_bytes low_latency_mode num_qps_per_rank allow_nvlink_for_low_latency_mode allow_mnnvl "
        "use_fabric explicitly_destroy enable_shrink comm"
    ).split():
        assert name in names


EVENTS = "previous_event=None, async_finish=False, allocate_on_comm_stream=False"
LAYOUT = "num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None, num_tokens_per_expert=None"
IDS = "topk_idx=None, topk_weights=None, expert_alignment=1"
V2_COMM = "previous_event=None, previous_event_before_epilogue=None, async_with_compute_stream=False, allocate_on_comm_stream=False"
UPSTREAM = {
    Buffer.get_dispatch_layout: f"topk_idx, num_experts, {EVENTS}",
    Buffer.dispatch: f"x, handle=None, {LAYOUT}, {IDS}, num_worst_tokens=0, config=None, {EVENTS}",
    Buffer.combine: f"x, handle, topk_weights=None, bias=None, config=None, {EVENTS}",
    Buffer.internode_dispatch: f"x, handle=None, {LAYOUT}, {IDS}, config=None, {EVENTS}",
    Buffer.internode_combine: f"x, handle, topk_weights=None, bias=None, config=None, {EVENTS}",
    Buffer.low_latency_dispatch: (
        "x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, cumulative_local_expert_recv_stats=None, "
        "dispatch_wait_recv_cost_stats=None, use_fp8=True, round_scale=False, use_ue8m0=False, async_finish=False, "
        "return_recv_hook=False"
    ),
    Buffer.low_latency_combine: (
        "x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False, async_finish=False, "
        "return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None"
    ),
    Buffer.get_next_low_latency_combine_buffer: "handle",
    Buffer.clean_low_latency_buffer: "num_max_dispatch_tokens_per_rank, hidden, num_experts",
    Buffer.low_latency_update_mask_buffer: "rank_to_mask, mask=False",
    Buffer.get_local_buffer_tensor: "dtype, size=None, offset=0, use_rdma_buffer=False",
    Buffer.get_low_latency_rdma_size_hint: "num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts",
    Config: (
        "num_sms=20, num_max_nvl_chunked_send_tokens=6, num_max_nvl_chunked_recv_tokens=256, "
        "num_max_rdma_chunked_send_tokens=6, num_max_rdma_chunked_recv_tokens=256"
    ),
    ElasticBuffer: (
        "group, num_bytes=None, num_cpu_bytes=0, num_max_tokens_per_rank=0, hidden=0, num_topk=0, use_fp8_dispatch=False, "
        "deterministic=False, allow_hybrid_mode=True, allow_multiple_reduction=True, prefer_overlap_with_compute=True, "
        "sl_idx=3, num_allocated_qps=0, num_cpu_timeout_secs=300, num_gpu_timeout_secs=100, explicitly_destroy=False"
    ),
    ElasticBuffer.get_buffer_size_hint: (
        "group, num_max_tokens_per_rank, hidden, num_topk=0, use_fp8_dispatch=False, allow_hybrid_mode=True, "
        "allow_multiple_reduction=True"
    ),
    ElasticBuffer.get_theoretical_num_sms: (
        "num_experts, num_topk, num_scaleout_topk=0, rdma_gbs=0, nvlink_gbs=0, sm_read_gbs=200, sm_write_gbs=50"
    ),
    ElasticBuffer.barrier: "use_comm_stream=True, with_cpu_sync=False, sequential=True",
    ElasticBuffer.dispatch: (
        "x, topk_idx=None, topk_weights=None, cumulative_local_expert_recv_stats=None, num_experts=None, "
        "num_max_tokens_per_rank=None, expert_alignment=None, num_sms=0, num_qps=0, "
        f"{V2_COMM}, handle=None, do_handle_copy=True, do_cpu_sync=None, do_expand=False, do_zero_padding=False, "
        "use_tma_aligned_col_major_sf=False"
    ),
    ElasticBuffer.combine: f"x, handle, topk_weights=None, bias=None, num_sms=0, num_qps=0, {V2_COMM}",
    ElasticBuffer.engram_write: "storage, sf=None",
    ElasticBuffer.engram_fetch: "indices, num_qps=0, use_tma_aligned_col_major_sf=False",
    ElasticBuffer.pp_set_config: "num_max_tensor_bytes, num_max_inflight_tensors",
    ElasticBuffer.agrs_set_config: "num_max_session_bytes, num_max_all_gathers_per_session",
}


@pytest.mark.parametrize("callable_", UPSTREAM, ids=lambda each: each.__qualname__)
def test_1_to_3_arguments_have_upstreams_names_order_and_defaults(callable_):
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ours = [
        each.name if each.default is each.empty else f"{each.name}={each.default}"
        for each in inspect.signature(callable_).parameters.values()
        if each.kind in positional and each.name != "self"
    ]
    assert ours == UPSTREAM[callable_].split(", ")


def test_1_1_attributes_and_runtime():
    def body(group):
        buffer = Buffer(
            group, 128, 256, True, 12, True, False, explicitly_destroy=True, use_fabric=True, enable_shrink=True
        )
        seen = (buffer.rank, buffer.group_size, buffer.num_nvl_bytes, buffer.num_rdma_bytes, buffer.low_latency_mode)
        assert buffer.group is group and buffer.explicitly_destroy and buffer.enable_shrink
        assert buffer.nvshmem_qp_depth == 1024
        runtime = buffer.runtime
        assert runtime.is_available() and runtime.get_num_rdma_ranks() == 1 and runtime.get_rdma_rank() == 0
        buffer.destroy()
        buffer.destroy()
        assert buffer.runtime is None and not runtime.is_available()
        with pytest.raises(deep_ep.Error, match="closed"):
            buffer.get_dispatch_layout(torch.zeros((1, 1), dtype=torch.int64), 2)
        return seen

    assert run_ranks(2, body)[1] == (1, 2, 128, 256, True)


def test_1_1_without_group_and_comm_there_is_a_value_error():
    with pytest.raises(ValueError):
        Buffer(None)


def test_1_1_an_mpi_communicator_serves_as_group():
    class Comm:
        def Get_rank(self):  # noqa: N802  (mpi4py's name)
            return 0

        def Get_size(self):  # noqa: N802
            return 1

        def allgather(self, mine):
            return [mine]

    with Buffer(None, comm=Comm()) as buffer:
        assert (buffer.rank, buffer.group_size) == (0, 1) and isinstance(buffer.group, Comm)


def test_1_1_sizes_that_are_no_multiple_of_128_are_refused():
    with pytest.raises(RuntimeError, match="num_nvl_bytes"):
        run_ranks(1, lambda group: Buffer(group, 100))


def test_1_2_destroy_needs_explicitly_destroy():
    def body(group):
        with Buffer(group) as buffer, pytest.raises(AssertionError):
            buffer.destroy()

    run_ranks(1, body)


def test_q3_local_buffer_offsets_count_bytes_and_views_end_with_the_memory():
    def body(group):
        with Buffer(group, 1024, 256) as buffer:
            whole = buffer.get_local_buffer_tensor(torch.uint8)
            whole.copy_(torch.arange(1024) % 256)
            part = buffer.get_local_buffer_tensor(torch.int32, torch.Size((2, 3)), offset=4)
            assert part.shape == (2, 3) and part.view(torch.uint8)[0, 0] == 4
            assert buffer.get_local_buffer_tensor(torch.int32, offset=8).numel() == 254
            assert buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).zero_().numel() == 256
            with pytest.raises(AssertionError):
                buffer.get_local_buffer_tensor(torch.int32, torch.Size((300,)))

    run_ranks(1, body)


def test_1_2_set_num_sms_is_class_wide_and_even():
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(24)
        assert Buffer.get_dispatch_config(8).num_sms == 24
        with pytest.raises(AssertionError):
            Buffer.set_num_sms(23)
    finally:
        Buffer.set_num_sms(before)


_OF_MANY = (32, 288, 8, 128), (1, 288, 8, 128)
RECOMMENDED = {  # by ranks: for dispatch, for combine
    2: ((24, 256, 6, 128), (10, 256, 6, 128)),
    4: ((6, 256, 6, 128), (9, 256, 6, 128)),
    8: ((6, 256, 6, 128), (4, 256, 6, 128)),
    16: ((36, 288, 20, 128), (4, 288, 12, 128)),
    **{ranks: _OF_MANY for ranks in (24, 32, 48, 64)},
    96: ((20, 480, 12, 128), (1, 480, 8, 128)),
    128: ((20, 560, 12, 128), (1, 560, 8, 128)),
    144: ((32, 720, 12, 128), (2, 720, 8, 128)),
    160: ((28, 720, 12, 128), (2, 720, 8, 128)),
}


def test_1_3_recommended_configs_are_upstreams():
    for ranks, wanted in RECOMMENDED.items():
        for config, numbers in zip((Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)), wanted):
            # Receiving chunks are rounded up to a multiple of sending ones.
            assert repr(config) == repr(Config(Buffer.num_sms, *numbers))
    assert repr(Config(20, 6, 256, 12, 128)) == "Config(20, 6, 256, 12, 132)"


def test_1_3_unknown_rank_counts_have_no_recommended_config():
    with pytest.raises(AssertionError):
        Buffer.get_dispatch_config(3)


def test_appendix_a_v1_sizes():
    assert Config(20, 6, 256, 6, 128).get_nvl_buffer_size_hint(14336, 8) == 335709824
    assert Config(24, 6, 256, 6, 128).get_nvl_buffer_size_hint(14336, 8) == 402851712
    assert Config(20, 6, 256, 6, 128).get_rdma_buffer_size_hint(14336, 8) == 0
    assert Config(20, 36, 288, 20, 128).get_nvl_buffer_size_hint(14336, 16) == 377673984
    assert Config(20, 36, 288, 20, 128).get_rdma_buffer_size_hint(14336, 16) == 91887744
    assert Config(20, 4, 288, 12, 128).get_rdma_buffer_size_hint(14336, 16) == 86637184


@pytest.mark.parametrize(
    "arguments, expected",
    [((128, 7168, 8, 288), 2146961792), ((128, 7168, 8, 256), 1908410496), ((16, 5120, 8, 256), 170395776)],
)
def test_appendix_a_low_latency_sizes(arguments, expected):
    assert Buffer.get_low_latency_rdma_size_hint(*arguments) == expected


@pytest.mark.parametrize("values", [(-1,), (20, 6, 6), (20, 0, 256), (20, 6, 256, 0), (20, 6, 256, 200, 128)])
def test_1_3_configs_are_checked(values):
    with pytest.raises(RuntimeError):
        Config(*values)


def test_2_import_takes_less_than_a_second_beside_torch():
    code = "import torch, time; a = time.perf_counter(); import deep_ep; print(time.perf_counter() - a)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    ]
    assert min(seconds) < 1


def test_q11_positional_use_fabric_of_the_last_v1_is_read_and_more_is_refused():
    def body(group):
        with Buffer(group, 0, 0, False, 24, True, False, True, True, True) as buffer:
            return buffer.use_fabric, buffer.explicitly_destroy, buffer.enable_shrink

    assert run_ranks(1, body) == [(True, True, True)]
    with pytest.raises(TypeError, match="positional"):
        run_ranks(1, lambda group: Buffer(group, 0, 0, False, 24, True, False, False, False, False, None, 1))


def test_5_environment_variables_that_users_know_are_read(monkeypatch):
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "2050")

    def body(group):
        with Buffer(group, low_latency_mode=True) as buffer:
            return buffer.nvshmem_qp_depth

    assert run_ranks(1, body) == [2050]
    code = "import deep_ep; print(deep_ep.topk_idx_t)"
    environment = {**os.environ, "EP_NUM_TOPK_IDX_BITS": "32"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout.strip() == "torch.int32"


def test_1_2_small_methods_of_a_buffer():
    with Buffer(deep_ep.in_process_group(1)[0], 1 << 10) as buffer:
        assert Buffer.is_sm90_compiled() is True
        assert buffer.get_local_buffer_tensor(torch.float32).shape == (256,)
        assert buffer.get_local_buffer_tensor(torch.int8, torch.Size((4, 8))).shape == (4, 8)
        stream = buffer.get_comm_stream()
        assert stream is None or stream == torch.cpu.current_stream()


@pytest.mark.parametrize(
    "kind", [Buffer, ElasticBuffer, EventOverlap, EventHandle, Config], ids=lambda each: each.__name__
)
def test_1_to_3_help_has_something_to_say_about_every_public_method(kind):
    public = {name: member for name, member in inspect.getmembers(kind, callable) if not name.startswith("_")}
    assert [name for name, member in public.items() if not inspect.getdoc(member)] == []


def test_1_1_a_buffer_prints_who_it_is_and_whether_it_is_open():
    buffer = Buffer(deep_ep.in_process_group(1)[0])
    assert repr(buffer) == "<deep_ep.buffer.Buffer: rank 0 of 1 on cpu>"
    buffer.close()
    assert repr(buffer).endswith("closed>") and repr(EventOverlap()) == "EventOverlap(None)"


def test_1_12_errors_are_runtime_errors_and_pythons_own_checks_assertions():
    assert issubclass(deep_ep.Error, RuntimeError)
    with Buffer(deep_ep.in_process_group(1)[0]) as buffer:
        with pytest.raises(RuntimeError, match="num_experts"):
            buffer.get_dispatch_layout(torch.zeros((1, 1), dtype=torch.int64), 0)
        with pytest.raises(AssertionError):
            buffer.dispatch(torch.zeros((1, 16), dtype=torch.bfloat16))


HELPERS = {
    "envs": "init_dist init_seed get_global_seed get_local_seed dist_print get_rdma_gbs get_nvlink_gbs check_nvlink_connections "
    "check_torch_deterministic check_fast_rdma_atomic_support get_physical_domain_size get_logical_domain_size",
    "math": "calc_diff per_token_cast_to_fp8 per_token_cast_back inplace_unique create_grouped_scores hash_tensor hash_tensors "
    "count_bytes safe_div ceil_div align",
    "testing": "bench bench_kineto",
    "gate": "get_unbalanced_scores",
    "refs": "dispatch combine generate_pre_combine_data ordered_accumulate",
    "event": "EventHandle EventOverlap",
    "comm": "get_nccl_comm_handle NCCLCommHandle destroy_all_managed_nccl_comm",
    "semantic": "value_or weak_lru",
    "find_pkgs": "",
}


@pytest.mark.parametrize("module", HELPERS)
def test_4_3_helper_modules_have_what_upstreams_tests_import(module):
    imported = importlib.import_module(f"deep_ep.utils.{module}")
    assert [name for name in HELPERS[module].split() if not hasattr(imported, name)] == []


def test_4_9_every_attribute_that_upstreams_tests_touch_is_there():
    of_buffer = (
        "capture combine destroy dispatch get_combine_config get_dispatch_config get_dispatch_layout clean_low_latency_buffer "
        "get_low_latency_rdma_size_hint get_next_low_latency_combine_buffer is_sm90_compiled low_latency_combine "
        "low_latency_dispatch low_latency_query_mask_buffer set_num_sms"
    )
    of_elastic = (
        "agrs_get_inplace_tensor agrs_new_session agrs_set_config all_gather barrier capture combine create_agrs_session destroy "
        "destroy_agrs_session dispatch engram_fetch engram_write get_agrs_buffer_size_hint get_agrs_num_max_session_bytes "
        "get_engram_storage_size_hint get_logical_domain_size get_pp_buffer_size_hint get_theoretical_num_qps "
        "get_theoretical_num_sms num_allocated_qps num_ranks pp_recv pp_send pp_set_config rank_idx scaleout_rank_idx "
        "scaleup_rank_idx"
    )
    of_handle = (
        "dst_buffer_slot_idx num_recv_tokens_per_expert_list psum_num_recv_tokens_per_expert "
        "psum_num_recv_tokens_per_scaleup_rank recv_src_metadata topk_idx"
    )
    group = deep_ep.in_process_group(1)[0]
    ids = torch.zeros((2, 1), dtype=torch.int64)
    with Buffer(group) as buffer, ElasticBuffer(group, num_max_tokens_per_rank=8, hidden=64) as elastic:
        handle = elastic.dispatch(torch.zeros((2, 64), dtype=torch.bfloat16), ids, num_experts=1)[3]
        for thing, names in ((buffer, of_buffer), (elastic, of_elastic), (handle, of_handle)):
            assert [name for name in names.split() if not hasattr(thing, name)] == []
    assert len(inspect.signature(Config).parameters) == 5
