# SPDX-License-Identifier: MIT
"""Contract 4.3: helper modules."""

import pytest
import torch
from deep_ep.utils.gate import get_unbalanced_scores
from deep_ep.utils import testing
from deep_ep.utils.math import (
    align,
    calc_diff,
    ceil_div,
    count_bytes,
    create_grouped_scores,
    hash_tensor,
    hash_tensors,
    inplace_unique,
    per_token_cast_back,
    per_token_cast_to_fp8,
    safe_div,
)
from deep_ep.utils.semantic import value_or, weak_lru


def test_calc_diff_is_zero_for_equal_tensors_only():
    x = torch.randn(8, 8)
    assert calc_diff(x, x) == pytest.approx(0, abs=1e-12)
    assert calc_diff(x, -x) > 0.1


@pytest.mark.parametrize("columns", [128, 256, 200])
def test_fp8_casts_round_trip(columns):
    x = torch.randn(5, columns).to(torch.bfloat16)
    q, scales = per_token_cast_to_fp8(x)
    assert q.dtype == torch.float8_e4m3fn and scales.shape == (5, -(-columns // 128))
    assert calc_diff(per_token_cast_back(q, scales), x) < 1e-3
    assert per_token_cast_back(q[:0], scales[:0]).shape == (0, columns)


def test_packed_exponents_are_read_lowest_byte_first():
    q = torch.ones(1, 512).to(torch.float8_e4m3fn)
    packed = torch.tensor([[127 | 128 << 8 | 126 << 16 | 129 << 24]], dtype=torch.int64).to(torch.int32)
    assert per_token_cast_back(q, packed)[0, ::128].tolist() == [1.0, 2.0, 0.5, 4.0]


def test_inplace_unique_sorts_distinct_values_down():
    x = torch.tensor([[3, 1, 3, -1], [-1, -1, -1, -1], [0, 2, 1, 2]])
    inplace_unique(x, 4)
    assert x.tolist() == [[3, 1, -1, -1], [-1, -1, -1, -1], [2, 1, 0, -1]]


def test_grouped_scores_keep_chosen_groups():
    scores = create_grouped_scores(torch.ones(2, 6), torch.tensor([[0], [2]]), 3)
    assert scores.tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]


def test_hashes_do_not_depend_on_the_order_of_rows():
    x = torch.randn(6, 4)
    assert hash_tensor(x) == hash_tensor(x[torch.randperm(6)])
    assert hash_tensors(x, (x, None)) == 0
    assert count_bytes(x, (x.to(torch.bfloat16), None)) == 96 + 48
    assert safe_div(0, 0) == 0 and safe_div(1, 2) == 0.5


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("ratio", [1, 2])
def test_unbalanced_scores_load_rank_0_as_asked(precise, ratio):
    torch.manual_seed(0)
    scores = get_unbalanced_scores(512, 16, 4, 2, ratio, precise)
    chosen = scores.topk(2, dim=1).indices // 4
    tokens = torch.stack([(chosen == rank).any(dim=1).sum() for rank in range(4)]).double()
    assert float(tokens[0] / tokens[1:].mean()) == pytest.approx(ratio, rel=0.15)


def test_small_helpers():
    assert (ceil_div(7, 4), align(5, 4), align(8, 4)) == (2, 8, 8)
    assert (value_or(None, 3), value_or(0, 3)) == (3, 0)

    class Counting:
        calls = 0

        @weak_lru()
        def square(self, number):
            self.calls += 1
            return number * number

    first, second = Counting(), Counting()
    assert [first.square(3), first.square(3), second.square(3)] == [9, 9, 9]
    assert (first.calls, second.calls) == (1, 1)


def test_bench_drops_the_first_sample_and_runs_what_comes_between():
    calls, between = [], []
    mean, shortest, longest = testing.bench(lambda: calls.append(0), 2, 5, lambda: between.append(0))
    assert (len(calls), len(between)) == (2 + 1 + 5, 6)
    assert 0 <= shortest <= mean <= longest


def test_bench_kineto_returns_what_was_asked_for(monkeypatch):
    met = []
    one = testing.bench_kineto(lambda: None, "dispatch", num_tests=3, barrier=lambda: met.append(0))
    assert one >= 0 and len(met) == 3
    pair = testing.bench_kineto(lambda: None, ("dispatch", "notify"), num_tests=2)
    assert len(pair) == 2
    halves = testing.bench_kineto(lambda: None, "dispatch", num_tests=4, num_kernels_per_period=2)
    assert len(halves) == 2
    monkeypatch.setenv("EP_USE_NVIDIA_TOOLS", "1")
    assert testing.bench_kineto(lambda: None, ("dispatch", "combine")) == (1, 1)


def test_bench_kineto_tells_the_launches_of_a_period_apart():
    assert testing._periods([1.0, 5.0, 3.0, 7.0], 2) == [2.0, 6.0]
    assert testing._periods([1.0, 3.0], 1) == 2.0 and testing._periods([], 1) == 0.0
