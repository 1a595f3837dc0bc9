# SPDX-License-Identifier: MIT
"""Megatron Core's own MoELayer (router, dispatcher, SequentialMLP experts) with its backends "deepep" and "hybridep",
which call this library, beside the same layer with its "alltoall" dispatcher, which calls torch.distributed only."""

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint

import cpu
from processes import spawn

pytest.importorskip("megatron.core", reason="megatron-core is not installed: make framework-test installs it")

EXPERTS, HIDDEN, FFN = 8, 32, 48
SEQUENCE, BATCH = 12, 2
BACKENDS = ("deepep", "hybridep")
CUDA = torch.cuda.is_available() and torch.cuda.device_count() >= 2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs two GPUs"))]
PRELOAD = ("megatron.core.models.gpt.moe_module_specs", "megatron.core.optimizer")


def run(body, device, *arguments, **sizes):
    """body(rank, device, *arguments) as a rank of an expert-parallel group: four on the CPU, or two with a GPU each."""
    ranks = 2 if device == "cuda" else 4
    sizes.setdefault("expert_model_parallel_size", ranks)
    spawn(functools.partial(_rank, body, device, arguments, sizes), ranks, device=device, preload=PRELOAD)


def _rank(body, device, arguments, sizes, rank):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe import moe_utils

    warnings.simplefilter("ignore")  # of what is not installed, mostly
    if device == "cpu":
        cpu.patch_torch()
    if not moe_utils.HAVE_TE:
        # 0.16.1 asks whether it is None, but without Transformer Engine never defines it.
        moe_utils.te_general_gemm = None
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(1)
    body(rank, device, *arguments)
    parallel_state.destroy_model_parallel()


def make_config(dispatcher, dtype=torch.float32, topk=2, **options):
    from megatron.core.transformer.transformer_config import TransformerConfig

    chosen = dict(moe_token_dispatcher_type=dispatcher)
    if dispatcher in BACKENDS:
        chosen = dict(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=dispatcher)
    defaults = dict(
        num_layers=1,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_router_pre_softmax=topk == 1,
        expert_model_parallel_size=dist.get_world_size(),
    )
    return TransformerConfig(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=FFN,
        moe_ffn_hidden_size=FFN,
        num_moe_experts=EXPERTS,
        moe_router_topk=topk,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **chosen,
        **{**defaults, **options},
    )


def make_layer(device, dispatcher, dtype=torch.float32, topk=2, **options):
    """The layer as GPT models make it, the same for every dispatcher."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module

    torch.manual_seed(1)
    config = make_config(dispatcher, dtype, topk, **options)
    layer = build_module(get_moe_module_spec(use_te=False, num_experts=EXPERTS), config=config)
    layer.set_layer_number(1)
    for number, (name, parameter) in enumerate(layer.named_parameters()):
        # Each rank's experts are others; sizes keep those of the input.
        random = torch.Generator().manual_seed(100 * number + (dist.get_rank() if ".experts." in f".{name}" else 99))
        parameter.data.copy_(torch.randn(parameter.shape, generator=random) / parameter.shape[-1] ** 0.5)
    return layer.to(device).train()


def numbers(seed, rank, dtype, device, sequence):
    random = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn((sequence, BATCH, HIDDEN), generator=random).to(dtype).to(device)


def forward(layer, rank, device, seed=0, sequence=SEQUENCE):
    x = numbers(seed, rank, layer.config.params_dtype, device, sequence).requires_grad_()
    output, bias = layer(x)
    assert bias is None and output.shape == x.shape and output.dtype == x.dtype
    return x, output


def backward(layer, x, output, rank, device, seed=50):
    """{"output", "input": its gradient, gradient of each parameter}"""
    layer.zero_grad()
    output.backward(numbers(seed, rank, output.dtype, device, output.size(0)))
    return {"output": output.detach(), "input": x.grad, **{name: each.grad for name, each in layer.named_parameters()}}


def step(layer, rank, device, seed=0, sequence=SEQUENCE):
    return backward(layer, *forward(layer, rank, device, seed, sequence), rank, device, seed + 50)


def compare(got, wanted, tolerance, which):
    assert got.keys() == wanted.keys()
    for name in wanted:
        # An expert that had no row has no gradient, or zeros.
        here, there = (torch.zeros(1) if each[name] is None else each[name].cpu() for each in (got, wanted))
        here, there = torch.broadcast_tensors(here, there)
        assert ".local_experts." in name or there.abs().sum() > 0, f"{which}: {name} is zero"
        said = functools.partial("{}: {}: {}".format, which, name)
        torch.testing.assert_close(here, there, rtol=tolerance, atol=tolerance, msg=said)


def check_all(rank, device, cases, backends=BACKENDS):
    """Every backend beside alltoall, for each (dtype, experts per token, options of the layer, tolerance)."""
    for dtype, topk, options, tolerance in cases:
        make = functools.partial(make_layer, device, dtype=dtype, topk=topk, **options)
        wanted = step(make("alltoall"), rank, device)
        for backend in backends:
            got = step(make(backend), rank, device)
            compare(got, wanted, tolerance, f"{backend}, {dtype}, {topk} of {EXPERTS}, {options}")


@pytest.mark.parametrize("device", DEVICES)
def test_with_two_experts_per_token_outputs_and_gradients_are_those_of_alltoall_bit_for_bit(device):
    # A sum of two rows is the same in either order.
    run(check_all, device, [(dtype, topk, {}, 0.0) for dtype in (torch.float32, torch.bfloat16) for topk in (1, 2)])


@pytest.mark.parametrize("device", DEVICES)
def test_with_more_experts_per_token_they_are_those_of_alltoall_but_for_rounding(device):
    # Rows of experts on one rank are summed there, before the sum over ranks.
    cases = [(torch.float32, topk, {}, 2e-5) for topk in (3, 5, 8)]
    run(check_all, device, [*cases, (torch.bfloat16, 4, {}, 5e-2)])


@pytest.mark.parametrize("device", DEVICES)
def test_routers_of_all_kinds(device):
    deepseek = dict(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=2.5,
        moe_shared_expert_intermediate_size=FFN,
    )
    kinds = [
        deepseek,
        dict(moe_router_load_balancing_type="sinkhorn"),
        dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1, moe_z_loss_coeff=1e-3),
    ]
    cases = [(dtype, 2, kind, 0.0) for dtype in (torch.float32, torch.bfloat16) for kind in kinds]
    # Probabilities travel in single precision, with alltoall in the router's.
    cases += [
        (torch.float32, 2, dict(moe_router_dtype="fp64"), 1e-5),
        (torch.bfloat16, 2, dict(moe_router_dtype=None), 5e-2),
    ]
    run(check_all, device, cases)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_above_an_experts_capacity_are_dropped(device):
    policies = [
        dict(moe_expert_capacity_factor=factor, moe_token_drop_policy=policy)
        for factor in (0.5, 1.0)
        for policy in ("probs", "position")
    ]
    run(check_all, device, [(torch.float32, 2, policy, 0.0) for policy in policies])


@pytest.mark.parametrize("device", DEVICES)
def test_hybridep_pads_experts_to_their_capacity(device):
    # A token may pad many experts, so sums have more than two rows. Megatron refuses this option with "deepep".
    padded = [
        dict(moe_expert_capacity_factor=factor, moe_pad_expert_input_to_capacity=True) for factor in (0.5, 1.0, 1.5)
    ]
    run(check_all, device, [(torch.float32, 2, options, 2e-5) for options in padded], ["hybridep"])


def _padded(rank, device):
    """As where experts compute in FP8. That needs Transformer Engine, so the switches are set in layers without."""
    wanted = step(make_layer(device, "alltoall"), rank, device)
    for backend in BACKENDS:
        layer = make_layer(device, backend)
        manager = layer.token_dispatcher._comm_manager
        manager.pad_multiple = 16
        layer.config.moe_router_padding_for_quantization = True
        compare(step(layer, rank, device), wanted, 1e-5, f"{backend}, padded")
        counts = manager.tokens_per_expert
        assert bool((counts % 16 == 0).all()) and bool((counts > 0).all()), counts


@pytest.mark.parametrize("device", DEVICES)
def test_experts_rows_are_padded_to_a_multiple(device):
    run(_padded, device)


def _sequences(rank, device):
    layers = {dispatcher: make_layer(device, dispatcher) for dispatcher in ("alltoall", *BACKENDS)}
    # Longer than at first, when buffers were made; another length on each rank; one token. Megatron refuses none.
    for seed, sequence in enumerate([4, 64, 8 + 3 * rank, 1]):
        wanted, *others = (step(layer, rank, device, seed, sequence) for layer in layers.values())
        for backend, got in zip(BACKENDS, others):
            compare(got, wanted, 0.0, f"{backend}, sequence of {sequence}")


@pytest.mark.parametrize("device", DEVICES)
def test_lengths_of_the_sequence_change_from_step_to_step_and_differ_between_ranks(device):
    run(_sequences, device)


def _interleaved(rank, device):
    """Two micro-batches: both forward, then both backward, the later one first, as in a pipeline's schedule."""
    for backend in BACKENDS:
        layer = make_layer(device, backend)
        alone = [step(layer, rank, device, seed) for seed in (0, 1)]
        both = [forward(layer, rank, device, seed) for seed in (0, 1)]
        for seed in (1, 0):
            compare(backward(layer, *both[seed], rank, device, seed + 50), alone[seed], 0.0, f"{backend}, batch {seed}")
        x, _ = both[0]
        with torch.no_grad():
            assert torch.equal(layer(x)[0], alone[0]["output"])
        y = x.detach().requires_grad_()
        again, _ = torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False)
        compare(backward(layer, y, again, rank, device), alone[0], 0.0, f"{backend}, checkpointed")


@pytest.mark.parametrize("device", DEVICES)
def test_micro_batches_may_interleave_and_be_recomputed(device):
    run(_interleaved, device)


def _tensor_parallel(rank, device):
    """Experts cut in two: the flexible dispatcher sends each token to both ranks that have a part of its expert."""
    options = dict(
        tensor_model_parallel_size=2,
        expert_tensor_parallel_size=2,
        expert_model_parallel_size=dist.get_world_size() // 2,
        sequence_parallel=True,
    )
    check_all(rank, device, [(torch.float32, 2, options, 2e-5)])


@pytest.mark.parametrize("device", DEVICES)
def test_experts_that_are_cut_over_ranks(device):
    ranks = 2 if device == "cuda" else 4
    sizes = dict(tensor_model_parallel_size=2, expert_tensor_parallel_size=2, expert_model_parallel_size=ranks // 2)
    run(_tensor_parallel, device, **sizes)


def train(rank, device, dispatcher, steps):
    """Losses of a small GPT, Megatron's GPTModel, that learns to count."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    torch.manual_seed(3 + rank)  # experts differ between ranks; what all ranks have is sent by the first
    words, sequence = 32, 16
    model = GPTModel(
        config=make_config(dispatcher, num_layers=2, hidden_dropout=0.0, attention_dropout=0.0),
        transformer_layer_spec=get_gpt_layer_local_spec(num_experts=EXPERTS),
        vocab_size=words,
        max_sequence_length=sequence,
    ).to(device)
    common = [each for name, each in model.named_parameters() if ".experts." not in name]
    for parameter in common:
        dist.broadcast(parameter.data, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    random = torch.Generator().manual_seed(rank)
    mask = torch.ones(1, 1, sequence, sequence, dtype=torch.bool).triu(1).to(device)
    position = torch.arange(sequence)
    losses = []
    for _ in range(steps):
        text = (torch.randint(words, (4, 1), generator=random) + torch.arange(sequence + 1)) % words
        text = text.to(device)
        optimizer.zero_grad()
        loss = model(text[:, :-1], position.expand(4, -1).to(device), mask, labels=text[:, 1:]).mean()
        loss.backward()
        for parameter in common:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
        dist.all_reduce(loss.detach())
        losses.append(float(loss) / dist.get_world_size())
    return torch.tensor(losses)


def _train(rank, device):
    wanted = train(rank, device, "alltoall", 20)
    assert wanted[-1] < wanted[0] / 4, wanted
    # On a GPU torch's gradient of the embedding is not the same in every run.
    tolerance = 1e-3 if device == "cuda" else 0.0
    for backend in BACKENDS:
        said = functools.partial("{}: {}".format, backend)
        torch.testing.assert_close(train(rank, device, backend, 20), wanted, rtol=tolerance, atol=tolerance, msg=said)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gpt_model_trains_alike(device):
    run(_train, device)
