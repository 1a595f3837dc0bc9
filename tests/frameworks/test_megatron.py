# SPDX-License-Identifier: MIT
"""Megatron Core's own MoELayer (router, dispatcher, SequentialMLP experts) with its backends "deepep" and "hybridep", which
call this library, beside the same layer with its "alltoall" dispatcher, which calls torch.distributed only."""

import functools

import pytest
import torch
import torch.distributed as dist

import cpu
from processes import spawn

pytest.importorskip("megatron.core", reason="megatron-core is not installed: make framework-test installs it")

EXPERTS, HIDDEN, FFN = 8, 32, 48
SEQUENCE, BATCH = 12, 2
BACKENDS = ("deepep", "hybridep")
CUDA = torch.cuda.is_available() and torch.cuda.device_count() >= 2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs two GPUs"))]
PRELOAD = ("megatron.core.models.gpt.moe_module_specs", "megatron.core.optimizer")


def run(body, device, *arguments):
    """body(rank, device, *arguments) as a rank of an expert-parallel group: four on the CPU, one for each of two GPUs."""
    ranks = 2 if device == "cuda" else 4
    spawn(functools.partial(_rank, body, device, arguments), ranks, device=device, preload=PRELOAD)


def _rank(body, device, arguments, rank):
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    if device == "cpu":
        cpu.patch_torch()
    if not moe_utils.HAVE_TE:
        # 0.16.1 asks whether it is None, but without Transformer Engine never defines it.
        moe_utils.te_general_gemm = None
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    body(rank, device, *arguments)
    parallel_state.destroy_model_parallel()


def make_layer(device, dispatcher, dtype=torch.float32, topk=2, **options):
    """The layer as GPT models make it, the same weights for every dispatcher."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    if dispatcher in BACKENDS:
        options.update(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=dispatcher)
    else:
        options.update(moe_token_dispatcher_type=dispatcher)
    ranks = dist.get_world_size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=FFN,
        moe_ffn_hidden_size=FFN,
        num_moe_experts=EXPERTS,
        expert_model_parallel_size=ranks,
        moe_router_topk=topk,
        moe_router_pre_softmax=topk == 1,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **options,
    )
    layer = build_module(get_moe_module_spec(use_te=False, num_experts=EXPERTS), config=config).to(device)
    local = EXPERTS // ranks
    for name, parameter in layer.named_parameters():
        expert = name.split("local_experts.")[-1].split(".")[0]
        number = dist.get_rank() * local + int(expert) if expert.isdigit() else EXPERTS
        seed = 1000 * number + ["router.weight", "linear_fc1.weight", "linear_fc2.weight"].index(ending(name))
        random = torch.Generator().manual_seed(seed)
        value = torch.randn(parameter.shape, generator=random) / parameter.shape[-1] ** 0.5
        parameter.data.copy_(value)
    return layer.train()


def ending(name):
    return ".".join(name.split(".")[-2:])


def numbers(seed, rank, dtype, device, sequence=SEQUENCE):
    random = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn((sequence, BATCH, HIDDEN), generator=random).to(dtype).to(device)


def step(layer, rank, device, seed=0, sequence=SEQUENCE):
    """{"output", "input" gradient, gradient of each parameter} of one forward and backward."""
    dtype = next(layer.experts.parameters()).dtype
    x = numbers(seed, rank, dtype, device, sequence).requires_grad_()
    layer.zero_grad()
    output, bias = layer(x)
    assert bias is None and output.shape == x.shape
    output.backward(numbers(seed + 50, rank, dtype, device, sequence))
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **gradients}


def compare(got, wanted, tolerance, which):
    for name, value in wanted.items():
        assert value is None or got[name] is not None, name
        if value is not None:
            assert value.abs().sum() > 0 or "local_experts" in name, name
            torch.testing.assert_close(
                got[name], value, rtol=tolerance, atol=tolerance, msg=lambda said, name=name: f"{which}{name}: {said}"
            )


def check_all(rank, device, cases, tolerance=0.0):
    """Every backend beside alltoall, for each (dtype, experts per token, options of the layer)."""
    for dtype, topk, options in cases:
        wanted = step(make_layer(device, "alltoall", dtype, topk, **options), rank, device)
        for backend in BACKENDS:
            got = step(make_layer(device, backend, dtype, topk, **options), rank, device)
            compare(got, wanted, tolerance, f"{backend}, {dtype}, {topk}, {options}: ")


@pytest.mark.parametrize("device", DEVICES)
def test_with_two_experts_per_token_outputs_and_gradients_are_those_of_alltoall_bit_for_bit(device):
    # A sum of two rows is the same in either order.
    run(check_all, device, [(dtype, topk, {}) for dtype in (torch.float32, torch.bfloat16) for topk in (1, 2)])
