# SPDX-License-Identifier: MIT
"""Torch operators: gradients, checkpoints, compilation, handles that are saved and restored."""

import pytest
import torch
import torch.distributed as dist
from deep_ep import Buffer, _core, ops
from torch.utils.checkpoint import checkpoint

from processes import spawn
from ranks import make_tokens, run_ranks

RANKS, EXPERTS, HIDDEN, TOPK = 4, 8, 64, 2


def layer(number, x, topk_idx, weights, bound):
    """Every expert multiplies by 2; the router's weights are applied where the experts are."""
    rows, ids, here, _, *handle = torch.ops.deep_ep.dispatch(number, x, topk_idx, weights, EXPERTS, bound, 1)
    share = torch.where(ids >= 0, here, torch.zeros_like(here)).sum(dim=1, keepdim=True)
    return torch.ops.deep_ep.combine(number, 2 * rows * share, handle, x.size(0))


def gradients(function, tokens, number, bound):
    x = tokens.x.float().requires_grad_()
    weights = tokens.topk_weights.clone().requires_grad_()
    y = function(number, x, tokens.topk_idx, weights, bound)
    (y * y).sum().backward()
    return y.detach(), x.grad, weights.grad


def expected(tokens):
    x = tokens.x.float().requires_grad_()
    weights = tokens.topk_weights.clone().requires_grad_()
    share = torch.where(tokens.topk_idx >= 0, weights, torch.zeros_like(weights)).sum(dim=1, keepdim=True)
    y = 2 * x * share
    (y * y).sum().backward()
    return y.detach(), x.grad, weights.grad


def close(got, wanted):
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(got, wanted))


@pytest.mark.parametrize("bound", [0, 80])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_dispatch_and_combine_are_each_others_gradient(bound, checkpointed):
    run = (lambda *a: checkpoint(layer, *a, use_reentrant=False)) if checkpointed else layer

    def body(group):
        tokens = make_tokens(group.rank(), 9 + group.rank(), HIDDEN, TOPK, EXPERTS)
        with Buffer(group, timeout_secs=20) as buffer:
            return tokens, gradients(run, tokens, ops.register_buffer(buffer), bound)

    # Backward runs on autograd's thread of a CPU graph, which is the caller's.
    for tokens, got in run_ranks(RANKS, body):
        assert close(got, expected(tokens))


def test_operators_pass_torchs_own_checks():
    def body(group):
        tokens = make_tokens(group.rank(), 5, HIDDEN, TOPK, EXPERTS)
        with Buffer(group) as buffer:
            number = ops.register_buffer(buffer)
            arguments = (number, tokens.x.float(), tokens.topk_idx, tokens.topk_weights, EXPERTS, 16, 1)
            torch.library.opcheck(
                torch.ops.deep_ep.dispatch.default, arguments, test_utils=("test_schema", "test_faketensor")
            )

    run_ranks(1, body)


def _compiled(rank):
    tokens = make_tokens(rank, 9, HIDDEN, TOPK, EXPERTS)
    with Buffer(dist.group.WORLD, timeout_secs=60) as buffer:
        number = ops.register_buffer(buffer)
        function = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert close(gradients(function, tokens, number, 80), expected(tokens))


def test_torch_compile_traces_the_layer_in_one_graph():
    spawn(_compiled, 2)


@pytest.mark.parametrize("layout", ["by_rank", "by_expert"])
def test_handles_are_saved_as_tensors_and_restored(layout, tmp_path):
    def body(group):
        tokens = make_tokens(group.rank(), 9, HIDDEN, TOPK, EXPERTS)
        with Buffer(group) as buffer:
            core = buffer._opened()
            rows, *_, handle = core.dispatch(
                x=tokens.x, topk_idx=tokens.topk_idx, num_experts=EXPERTS, layout=_core.OutputLayout[layout]
            )
            file = tmp_path / f"{group.rank()}.pt"
            torch.save(handle.save(), file)
            restored = _core.Handle.restore(torch.load(file))
            again = core.dispatch(x=tokens.x, handle=restored)[0]
            return rows, again, core.combine(x=rows, handle=handle)[0], core.combine(x=rows, handle=restored)[0]

    for rows, again, first, second in run_ranks(RANKS, body):
        assert torch.equal(rows, again) and torch.equal(first, second)


def test_a_list_that_is_no_saved_handle_is_refused():
    with pytest.raises(_core.Error, match="saved handle"):
        _core.Handle.restore([torch.zeros(1)] * 3)
    with pytest.raises(_core.Error, match="saved handle"):
        _core.Handle.restore([torch.zeros(13, dtype=torch.int64)] * 11)
