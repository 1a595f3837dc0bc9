# SPDX-License-Identifier: MIT
"""Nodes of two ranks that share no memory, on one GPU: both APIs over a network, the same bits as on CPU tensors."""

import pytest
import test_cuda_low_latency as low_latency
import test_cuda_streams as streams
import test_cuda_v1 as v1
import test_cuda_v2 as v2

from gpu import needs_gpu

pytestmark = needs_gpu
NODE = 2


@pytest.fixture(autouse=True, params=["loopback", "tcp"])
def network(request, monkeypatch):
    monkeypatch.setenv("EP_NETWORK_PROVIDER", request.param)


def test_v1_rows_handles_and_sums():
    v1.test_1_6_rows_ids_weights_counts_and_handles(NODE, 8)
    v1.test_1_6_without_topk(NODE)
    v1.test_1_6_worst_tokens(NODE)
    v1.test_1_7_combine(NODE, 2)


@pytest.mark.parametrize("expand", [False, True], ids=["compact", "expanded"])
def test_v2_exact_and_bounded(expand):
    for cpu_sync in (True, False):
        v2.test_3_4_dispatch_combine_and_handle(expand, cpu_sync, NODE)


@pytest.mark.parametrize("hook", [False, True], ids=["at once", "hook"])
def test_low_latency_in_every_form(hook, monkeypatch):
    opened = low_latency.opened
    monkeypatch.setattr(low_latency, "opened", lambda *how: opened(*how, ranks_per_node=NODE))
    for form in ("bf16", "fp8"):
        low_latency.test_1_10_and_1_11_dispatch_and_combine(form, hook)


def test_graphs_of_low_latency_calls_replay_with_other_ids(monkeypatch):
    opened = low_latency.opened
    monkeypatch.setattr(low_latency, "opened", lambda *how: opened(*how, ranks_per_node=NODE))
    low_latency.test_graphs_replay_with_hooks_and_other_ids()


def test_graphs_of_normal_calls_replay_with_other_ids_weights_and_rows(monkeypatch):
    opened = streams.Buffer
    monkeypatch.setattr(streams, "Buffer", lambda *how, **more: opened(*how, ranks_per_node=NODE, **more))
    streams.test_graphs_replay_with_other_ids_weights_and_rows(None)
