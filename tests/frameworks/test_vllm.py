# SPDX-License-Identifier: MIT
"""vLLM's own managers of all-to-all backends and its prepare/finalize classes, on this library: four processes, CPU
tensors. The experts between are those of layer.py."""

import functools
import importlib.util
import types

import pytest
import torch

import cpu
from layer import COUNTS, EXPERTS, LOCAL, RANKS, TOPK, all_tokens, as_fp8, by_rank, dequantised, expert, slots, whole
from processes import spawn

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make framework-test installs it", allow_module_level=True)

HIDDEN = 2048  # the smallest that its low-latency class takes
MOST = 16  # tokens of a rank
FP8 = torch.float8_e4m3fn
FP8_BLOCKS = {"quant_dtype": FP8, "block_shape": [128, 128]}


def run(body, *arguments):
    spawn(functools.partial(_rank, body, arguments), RANKS, preload=("load_vllm",))


def _rank(body, arguments, rank):
    import load_vllm  # noqa: F401
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.utils import import_utils

    cpu.patch_torch()
    # vLLM offers V2 where NCCL is as new as DeepSeek's package needs it. This library does without, and here is none.
    import_utils._get_runtime_nccl_version = lambda: import_utils.DEEPEP_V2_MIN_NCCL_VERSION_RAW
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        parallel_state.init_distributed_environment(RANKS, rank, "env://", rank, "gloo")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS, backend="gloo")
        body(rank, *arguments)


def group():
    from vllm.distributed.parallel_state import get_ep_group

    return get_ep_group().cpu_group


def quantisation(**options):
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

    return FusedMoEQuantConfig.make(**options)


def delegate():
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate

    return TopKWeightAndReduceDelegate()


def weigh(rows, weights):
    """What vLLM does to a rank's rows before the combine: weighted in BF16, added in FP32, rounded."""
    return (rows * weights[:, :, None]).to(torch.bfloat16).float().sum(dim=1).to(torch.bfloat16)


def quantised(x):
    """x as vLLM's FP8 quantisation gives it back."""
    from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

    return dequantised(*moe_kernel_quantize_input(x, None, FP8, False, [128, 128]))


def high_throughput(rank, quant_options, asynchronous):
    from vllm.distributed.device_communicators.all2all import DeepEPHTAll2AllManager
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ht import DeepEPHTPrepareAndFinalize

    manager = DeepEPHTAll2AllManager(group())
    manager.set_num_sms(12)
    layer = DeepEPHTPrepareAndFinalize(manager.get_handle({}), manager.world_size, manager.dp_world_size, rank * LOCAL)
    assert manager.get_handle({}) is layer.buffer  # kept by its arguments
    tokens, quant = all_tokens(HIDDEN)[rank], quantisation(**quant_options)
    arguments = (tokens.x, tokens.topk_weights, tokens.topk_idx, EXPERTS, None, False, quant)
    x, scales, meta, ids, weights = layer.prepare_async(*arguments)() if asynchronous else layer.prepare(*arguments)
    assert meta.expert_num_tokens.tolist() == [int((ids == e).sum()) for e in range(rank * LOCAL, (rank + 1) * LOCAL)]
    sent = tokens.x
    if quant.is_block_quantized:
        assert x.dtype == FP8 and scales.shape == (x.shape[0], HIDDEN // 128)
        x, sent = dequantised(x, scales), quantised(tokens.x)
    output, reduce = torch.empty_like(tokens.x), delegate()
    if asynchronous:
        layer.finalize_async(output, slots(rank, x, ids), weights, ids, False, reduce)()
    else:
        layer.finalize(output, slots(rank, x, ids), weights, ids, False, reduce)
    assert torch.equal(output, by_rank(tokens, weigh, sent))
    torch.testing.assert_close(output.float(), whole(tokens, sent), rtol=2e-2, atol=5e-2)
    manager.destroy()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_high_throughput_gives_the_layer_of_one_rank(asynchronous):
    run(high_throughput, {}, asynchronous)


def test_high_throughput_with_fp8_blocks_gives_the_layer_of_the_quantised_tokens():
    run(high_throughput, FP8_BLOCKS, True)


def low_latency(rank, quant_options, asynchronous):
    from vllm.distributed.device_communicators.all2all import DeepEPLLAll2AllManager
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ll import DeepEPLLPrepareAndFinalize

    manager, quant = DeepEPLLAll2AllManager(group()), quantisation(**quant_options)
    buffer = manager.get_handle(
        {
            "max_num_tokens_per_dp_rank": MOST,
            "token_hidden_size": HIDDEN,
            "num_ep_ranks": RANKS,
            "num_global_experts": EXPERTS,
            "num_local_experts": LOCAL,
        }
    )
    fp8 = quant.quant_dtype == FP8
    layer = DeepEPLLPrepareAndFinalize(buffer, MOST, manager.world_size, use_fp8_dispatch=fp8)
    sources = all_tokens(HIDDEN)
    tokens = sources[rank]
    arguments = (tokens.x, tokens.topk_weights, tokens.topk_idx, EXPERTS, None, False, quant)
    if asynchronous:
        hook, receiver = layer.prepare_async(*arguments)
        hook()
        x, scales, meta, _, _ = receiver()
    else:
        x, scales, meta, _, _ = layer.prepare(*arguments)
    counts = [sum(int((s.topk_idx == rank * LOCAL + e).sum()) for s in sources) for e in range(LOCAL)]
    assert meta.expert_num_tokens.tolist() == counts
    if quant.is_block_quantized:
        assert x.dtype == FP8 and scales.shape == (LOCAL, RANKS * MOST, HIDDEN // 128)
        x = dequantised(x, scales.contiguous())
    out = torch.full((LOCAL, RANKS * MOST, HIDDEN), float("nan"), dtype=torch.bfloat16)
    for e, count in enumerate(counts):
        out[e, :count] = expert(rank * LOCAL + e, x[e, :count])
    output = torch.full_like(tokens.x, float("nan"))
    rest = (tokens.topk_weights, tokens.topk_idx, False, delegate())
    if asynchronous:
        hook, receiver = layer.finalize_async(output, out, *rest)
        hook()
        receiver()
    else:
        layer.finalize(output, out, *rest)
    sent = as_fp8(tokens.x) if fp8 else tokens.x
    assert torch.equal(output, whole(tokens, sent).to(torch.bfloat16))
    manager.destroy()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_low_latency_gives_the_layer_of_one_rank(asynchronous):
    run(low_latency, {}, asynchronous)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_low_latency_with_fp8_dispatch_gives_the_layer_of_the_quantised_tokens(asynchronous):
    run(low_latency, FP8_BLOCKS, asynchronous)


def elastic(rank, quant_options, cudagraph, asynchronous):
    from vllm import forward_context
    from vllm.distributed.device_communicators.all2all import DeepEPV2All2AllManager
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_v2 import DeepEPV2PrepareAndFinalize

    manager, quant = DeepEPV2All2AllManager(group()), quantisation(**quant_options)
    manager._gin_checked = True  # it asks for NCCL's networking, from the GPU
    fp8 = quant.is_block_quantized
    arguments = {"num_max_tokens_per_rank": MOST, "hidden": HIDDEN, "num_topk": TOPK, "use_fp8_dispatch": fp8}
    buffer = manager.get_handle({**arguments, "num_experts": EXPERTS})
    assert manager.max_sms_used() > 0
    layer = DeepEPV2PrepareAndFinalize(
        buffer, manager.world_size, manager.dp_world_size, rank * LOCAL, EXPERTS, TOPK, fp8, cudagraph
    )
    tokens = all_tokens(HIDDEN)[rank]
    context = types.SimpleNamespace(dp_metadata=forward_context.DPMetadata(torch.tensor(COUNTS)))
    with forward_context.override_forward_context(context):
        arguments = (tokens.x, tokens.topk_weights, tokens.topk_idx, EXPERTS, None, False, quant)
        x, scales, meta, ids, weights = layer.prepare_async(*arguments)() if asynchronous else layer.prepare(*arguments)
    sent = tokens.x
    if fp8:
        assert x.dtype == FP8 and scales.shape == (x.shape[0], HIDDEN // 128)
        x, sent = dequantised(x, scales), quantised(tokens.x)
    if cudagraph:
        assert x.shape[0] == RANKS * 16 and ids.shape == (x.shape[0], TOPK)  # as many as there could be
        assert meta.expert_num_tokens is None
        received = int(meta.psum_recv_per_rank[-1])
        assert bool((ids[received:] == -1).all())
        x, weights = torch.where(torch.arange(len(x))[:, None] < received, x, 0), torch.nan_to_num(weights)
    else:
        assert meta.expert_num_tokens.tolist() == [int((ids == rank * LOCAL + e).sum()) for e in range(LOCAL)]
        assert ids.shape == weights.shape == (x.shape[0], 1)
    output, reduce = torch.empty_like(tokens.x), delegate()
    if asynchronous:
        layer.finalize_async(output, slots(rank, x, ids), weights, ids, False, reduce)()
    else:
        layer.finalize(output, slots(rank, x, ids), weights, ids, False, reduce)
    if cudagraph:
        assert torch.equal(output, by_rank(tokens, weigh, sent))
    torch.testing.assert_close(output.float(), whole(tokens, sent), rtol=2e-2, atol=5e-2)
    manager.destroy()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("options", [{}, FP8_BLOCKS], ids=["bf16", "fp8"])
@pytest.mark.parametrize("cudagraph", [False, True], ids=["prefill", "decode"])
def test_v2_gives_the_layer_of_one_rank(options, cudagraph, asynchronous):
    run(elastic, options, cudagraph, asynchronous)
