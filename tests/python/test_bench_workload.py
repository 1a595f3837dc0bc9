# SPDX-License-Identifier: MIT
"""bench/python_workload.py draws what bench/workload.h draws: tests/bench/workload_test.cpp reads the same numbers."""

import json
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests" / "bench" / "workload.json").read_text())


@pytest.fixture
def python_workload(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import python_workload

    yield python_workload
    sys.modules.pop("python_workload")


@pytest.mark.parametrize("rank", range(GOLDEN["workload"]["ranks"]))
def test_the_python_benchmark_makes_the_exchange_of_the_cpp_program(python_workload, rank):
    work = python_workload.Workload.of({**GOLDEN["workload"], "reps": 1, "ll_reps": 1, "warmup": 0})
    wanted = GOLDEN["ranks"][rank]
    topk_idx, weights = python_workload.routing(work, rank, work.tokens)
    assert topk_idx.flatten().tolist() == wanted["topk_idx"]
    assert weights.view(torch.int32).flatten().tolist() == wanted["weight_bits"]
    rows = python_workload.rows(work, rank, work.tokens)
    assert (rows[0, :4].view(torch.int16).int() & 0xFFFF).tolist() == wanted["first_row_bits"]
    assert python_workload.digest_rows(rows) == wanted["digest"]
    slots = rows.expand(2, *rows.shape)
    assert python_workload.digest_padded(slots, torch.tensor([0, work.ll_tokens])) == wanted["digest_of_slot_1"]
