# SPDX-License-Identifier: MIT
"""SGLang's own dispatchers, and the code of its DeepGEMM runner before and after the GEMMs, on this library: four
processes, CPU tensors. The experts between are those of layer.py."""

import functools
import importlib.util
import os
import types

import pytest
import torch
import torch.distributed as dist

import cpu
from layer import (
    EXPERTS,
    LOCAL,
    RANKS,
    TOPK,
    all_tokens,
    as_fp8,
    by_rank,
    dequantised,
    expert,
    truncated,
    weighted_sum,
    whole,
)
from processes import spawn

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed: make framework-test installs it", allow_module_level=True)

HIDDEN = 512


def run(body, *arguments, **environment):
    spawn(functools.partial(_rank, body, arguments, environment), RANKS, preload=("load_sglang",))


def _rank(body, arguments, environment, rank):
    os.environ.update(environment)
    import load_sglang  # noqa: F401
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    cpu.patch_torch()
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=132)
    torch.cuda.is_current_stream_capturing = lambda: False
    runtime_context.publish(ServerArgs("dummy", device="cpu", tp_size=RANKS, ep_size=RANKS), role="scheduler")
    everyone = types.SimpleNamespace(device_group=dist.group.WORLD)
    runtime_context.get_parallel().override_permanently(tp_group=everyone)
    body(rank, *arguments)


def topk_output(tokens):
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    return StandardTopKOutput(tokens.topk_weights, tokens.topk_idx, None)


def experts(rank, dispatched):
    """SGLang's preparation of what was dispatched, experts of its rows, and SGLang's input of the combine."""
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig, deep_gemm

    name = dispatched.format.value
    config, state = MoeRunnerConfig(activation="silu"), {}
    given = getattr(deep_gemm, f"pre_permute_{name}_to_deep_gemm")(dispatched, None, config, state)
    x = given.hidden_states
    if given.hidden_states_scale is not None and x.dtype == torch.float8_e4m3fn:
        x = dequantised(x, given.hidden_states_scale)
    out = torch.full(x.shape, float("nan"), dtype=torch.bfloat16)
    for e in range(LOCAL):
        if given.use_masked_gemm:
            count = int(given.masked_m[e])
            out[e, :count] = expert(rank * LOCAL + e, x[e, :count])
        else:
            rows = given.m_indices == e
            out[rows] = expert(rank * LOCAL + e, x[rows])
    after = getattr(deep_gemm, f"post_permute_deep_gemm_to_{name}")
    return after(deep_gemm.DeepGemmRunnerOutput(hidden_states=out), None, config, state)


# What SGLang's kernel does to a rank's rows before the combine; on a GPU it rounds to the nearest.
gathered = functools.partial(weighted_sum, to_bf16=truncated)


def quantised(x):
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    return dequantised(*sglang_per_token_group_quant_fp8(x, 128))


def make_dispatcher(mode, **options):
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPDispatcher
    from sglang.srt.layers.moe.utils import DeepEPMode

    return DeepEPDispatcher(
        dist.group.WORLD,
        TOPK,
        num_experts=EXPERTS,
        num_local_experts=LOCAL,
        hidden_size=HIDDEN,
        params_dtype=torch.bfloat16,
        deepep_mode=DeepEPMode(mode),
        **options,
    )


def round_trip(rank, dispatcher, tokens, dtype, prefill):
    from sglang.srt.layers.dp_attention import set_is_extend_in_batch

    set_is_extend_in_batch(prefill)
    dispatcher.set_quant_config({"dispatcher_output_dtype": dtype})
    for part in ("_normal_dispatcher", "_low_latency_dispatcher"):
        if hasattr(dispatcher, part):
            getattr(dispatcher, part).set_deepep_dispatcher_dtype()
    dispatched = dispatcher.dispatch(tokens.x, topk_output(tokens))
    return dispatcher.combine(experts(rank, dispatched))


def check_normal(rank, asynchronous, dtype):
    tokens = all_tokens(HIDDEN, dropped=0.1)[rank]
    dispatcher = make_dispatcher("normal", async_finish=asynchronous)
    got = round_trip(rank, dispatcher, tokens, dtype, prefill=True)
    sent = quantised(tokens.x) if dtype == "fp8" else tokens.x
    assert torch.equal(got, by_rank(tokens, gathered, sent))
    torch.testing.assert_close(got.float(), whole(tokens, sent), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_normal_dispatcher_gives_the_layer_of_one_rank(asynchronous, dtype):
    run(check_normal, asynchronous, dtype)


def check_low_latency(rank, hook, dtype):
    tokens = all_tokens(HIDDEN, dropped=0.1)[rank]
    dispatcher = make_dispatcher("low_latency", return_recv_hook=hook)
    got = round_trip(rank, dispatcher, tokens, dtype, prefill=False)
    sent = as_fp8(tokens.x) if dtype == "fp8" else tokens.x
    assert torch.equal(got, whole(tokens, sent).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("hook", [False, True])
def test_the_low_latency_dispatcher_gives_the_layer_of_one_rank(hook, dtype):
    run(check_low_latency, hook, dtype)


def check_both(rank):
    tokens, dispatcher = all_tokens(HIDDEN)[rank], make_dispatcher("auto", async_finish=True, return_recv_hook=True)
    for _ in range(2):
        got = round_trip(rank, dispatcher, tokens, "bf16", prefill=True)
        assert torch.equal(got, by_rank(tokens, gathered))
        got = round_trip(rank, dispatcher, tokens, "bf16", prefill=False)
        assert torch.equal(got, whole(tokens).to(torch.bfloat16))


def test_prefill_and_decode_take_turns_on_one_buffer():
    run(check_both)


def check_v2(rank, prefill, fp8):
    from sglang.srt.layers.dp_attention import set_is_extend_in_batch
    from sglang.srt.layers.moe.token_dispatcher.deepep_v2 import DeepEPv2Dispatcher

    set_is_extend_in_batch(prefill)
    tokens = all_tokens(HIDDEN)[rank]
    dispatcher = DeepEPv2Dispatcher(dist.group.WORLD, TOPK, EXPERTS, LOCAL, HIDDEN, torch.bfloat16, fp8)
    dispatcher.prebuild()
    for _ in range(2):
        dispatched = dispatcher.dispatch(tokens.x, topk_output(tokens))
        expanded = dispatched.is_expanded
        got = dispatcher.combine(experts(rank, dispatched))
        sent = quantised(tokens.x) if fp8 else tokens.x
        if not expanded:
            assert torch.equal(got, by_rank(tokens, gathered, sent))
        torch.testing.assert_close(got.float(), whole(tokens, sent), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("expand", ["0", "1"], ids=["tokens", "expanded"])
def test_v2_prefill_gives_the_layer_of_one_rank(expand, fp8):
    run(check_v2, True, fp8, SGLANG_DEEPEP_V2_ENABLE_PREFILL_EXPAND=expand)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_v2_decode_gives_the_layer_of_one_rank(fp8):
    run(check_v2, False, fp8)
