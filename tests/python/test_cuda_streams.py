# SPDX-License-Identifier: MIT
"""Contract 1.4 on a GPU: streams, events, memory that goes back, CUDA graphs; and what goes wrong."""

import json
import threading

import pytest
import torch
from deep_ep import Buffer, Config, ElasticBuffer, Error, ErrorCode

from gpu import SMALL, moved, needs_gpu, run_on, same, settled, to_cpu
from ranks import dispatch_v1, make_tokens

pytestmark = needs_gpu
RANKS, EXPERTS, HIDDEN, TOPK = 4, 16, 256, 4
BOUND = RANKS * 48
LONG = 1_000_000_000  # GPU cycles, about half a second: what waits for it is not done at once


def on_gpu(body, num_ranks=RANKS, **options):
    """body(buffer, tokens) on every rank."""

    def run(group):
        tokens = moved(make_tokens(group.rank(), 40, HIDDEN, TOPK, EXPERTS), "cuda")
        with Buffer(group, 1 << 20, **{**SMALL, **options}) as buffer:
            return body(buffer, tokens)

    return run_on("cuda", num_ranks, run)


def layout_of(buffer, tokens):
    per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(tokens.topk_idx, EXPERTS)
    return dict(num_tokens_per_rank=per_rank, is_token_in_rank=member, num_tokens_per_expert=per_expert)


def bounded(buffer, tokens, layout, **more):
    return buffer.dispatch(
        tokens.x, topk_idx=tokens.topk_idx, topk_weights=tokens.topk_weights, num_worst_tokens=BOUND, **layout, **more
    )


def test_1_4_an_operation_waits_for_its_event_only():
    def body(buffer, tokens):
        layout = layout_of(buffer, tokens)
        bounded(buffer, tokens, layout)
        event = buffer.capture()
        torch.cuda._sleep(LONG)
        slept = torch.cuda.Event()
        slept.record()
        made = bounded(buffer, tokens, layout, previous_event=event, async_finish=True, allocate_on_comm_stream=True)
        made[5].event._event.synchronize()
        early = not slept.query()
        made[5].current_stream_wait()
        return early, made[0], made[1]

    results = on_gpu(body)
    assert all(early for early, _, _ in results)


def test_1_4_without_an_event_an_operation_waits_for_the_current_stream():
    def body(buffer, tokens):
        layout = layout_of(buffer, tokens)
        wanted = bounded(buffer, tokens, layout)[1].clone()
        late = tokens.x.clone().zero_()
        torch.cuda._sleep(LONG)
        late.copy_(tokens.x)  # the dispatch must see this
        made = bounded(buffer, tokens._replace(x=late), layout, async_finish=True)
        made[5].event._event.synchronize()
        settled()
        rows = int((wanted >= 0).any(dim=1).sum())
        with made[5]:
            pass
        combined = buffer.combine(made[0], made[4])[0]
        settled()
        count = layout["is_token_in_rank"].sum(dim=1, keepdim=True)
        return rows, torch.allclose(combined.float(), tokens.x.float() * count, rtol=2e-2)

    assert all(right for _, right in on_gpu(body))


def test_1_4_inputs_may_go_at_once_and_outputs_while_they_are_still_read():
    """Inputs are dropped and overwritten right after asynchronous calls; outputs are dropped while a late reader, on the
    current stream, has yet to copy them, and the next dispatches must leave them alone until then."""

    def body(buffer, tokens):
        layout = layout_of(buffer, tokens)
        copies = []
        for turn in range(12):
            x = tokens.x + turn
            made = buffer.dispatch(
                x,
                topk_idx=tokens.topk_idx,
                topk_weights=tokens.topk_weights,
                num_worst_tokens=BOUND,
                previous_event=buffer.capture(),
                async_finish=True,
                allocate_on_comm_stream=True,
                **layout,
            )
            del x
            torch.full((40, HIDDEN), float("nan"), dtype=torch.bfloat16, device="cuda")
            made[5].current_stream_wait()
            torch.cuda._sleep(LONG // 100)
            copies.append((made[0].clone(), made[1].clone()))
            del made
        wanted = []
        for turn in range(12):
            exact = bounded(buffer, tokens._replace(x=tokens.x + turn), layout)
            wanted.append((exact[0].clone(), exact[1].clone()))
        settled()
        here = (copies[0][1] >= 0).any(dim=1)
        return all(
            torch.equal(got[0][here], right[0][here]) and torch.equal(got[1], right[1])
            for got, right in zip(copies, wanted)
        )

    assert all(on_gpu(body, arena_bytes=1 << 21))


def test_operations_run_on_the_communication_stream_with_as_many_sms_as_allowed(tmp_path):
    def body(buffer, tokens):
        layout = layout_of(buffer, tokens)
        assert isinstance(buffer.get_comm_stream(), torch.cuda.Stream)
        assert buffer.get_comm_stream() != torch.cuda.current_stream()
        settled()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            received = buffer.dispatch(
                tokens.x, topk_idx=tokens.topk_idx, topk_weights=tokens.topk_weights, config=Config(6), **layout
            )
            buffer.combine(received[0], received[4], config=Config(4))
            torch.cuda.synchronize()
        profile.export_chrome_trace(str(tmp_path / "trace.json"))

    on_gpu(body, num_ranks=1)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    grids = {
        name: [e["args"]["grid"][0] for e in events if f"::{name}" in e["name"] and "grid" in e.get("args", {})]
        for name in ("notify", "dispatch", "combine")
    }
    assert max(grids["notify"]) <= 6 and grids["dispatch"] == [6] and grids["combine"] == [4], grids


capturing = threading.Lock()


def captured(graph, enqueue):
    """One rank at a time: others must not wait for us meanwhile."""
    with capturing, torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        return enqueue()


@pytest.mark.parametrize("expand", [None, False, True], ids=["V1", "V2 compact", "V2 expanded"])
def test_graphs_replay_with_other_ids_weights_and_rows(expand):
    """Between replays everything changes in place, other operations run and their memory comes and goes."""

    def step(buffer, tokens, layout):
        if expand is None:
            received = bounded(buffer, tokens, layout)
            rows, weights, handle = received[0], received[2], received[4]
        else:
            rows, _, weights, handle, _ = buffer.dispatch(
                tokens.x, tokens.topk_idx, tokens.topk_weights, num_experts=EXPERTS, do_expand=expand, do_cpu_sync=False
            )
        return buffer.combine(2 * rows, handle, topk_weights=weights)[:2]

    def run(group):
        tokens = moved(make_tokens(group.rank(), 40, HIDDEN, TOPK, EXPERTS), "cuda")
        made = (
            Buffer(group, 1 << 20, **SMALL)
            if expand is None
            else ElasticBuffer(
                group,
                num_max_tokens_per_rank=48,
                hidden=HIDDEN,
                arena_bytes=SMALL["arena_bytes"],
                num_gpu_timeout_secs=20,
            )
        )
        with made as buffer:
            layout = layout_of(buffer, tokens) if expand is None else None
            step(buffer, tokens, layout)
            settled()
            group.barrier()
            graph = torch.cuda.CUDAGraph()
            outputs = captured(graph, lambda: step(buffer, tokens, layout))
            group.barrier()
            right = []
            for turn in range(6):
                new = moved(make_tokens(100 * turn + group.rank(), 40, HIDDEN, TOPK, EXPERTS), "cuda")
                for static, value in zip(tokens, new):
                    static.copy_(value)
                if turn % 2 == 1:
                    tokens.topk_idx[turn:] = -1  # hardly a token
                graph.replay()
                got = [each.clone() for each in outputs]
                wanted = step(buffer, tokens, layout)
                right.append(same(to_cpu(got), to_cpu(list(wanted))))
            settled()
            group.barrier()
            del graph
            return right

    for right in run_on("cuda", RANKS, run):
        assert all(right), right


def test_an_exact_dispatch_in_a_capture_says_what_to_do():
    def run(group):
        tokens = moved(make_tokens(0, 8, HIDDEN, TOPK, EXPERTS), "cuda")
        with Buffer(group, 1 << 20, **SMALL) as buffer:
            layout = layout_of(buffer, tokens)
            settled()
            with pytest.raises(Error, match="give num_worst_tokens"):
                captured(
                    torch.cuda.CUDAGraph(),
                    lambda: buffer.dispatch(
                        tokens.x, topk_idx=tokens.topk_idx, topk_weights=tokens.topk_weights, **layout
                    ),
                )

    run_on("cuda", 1, run)


def test_a_wrong_id_is_refused_on_all_ranks_and_the_buffer_works_on():
    def body(buffer, tokens):
        layout, wrong = layout_of(buffer, tokens), tokens.topk_idx.clone()
        if buffer.rank == 1:
            wrong[3, 1] = EXPERTS
        with pytest.raises(Error, match="rank 1 .* expert 16") as caught:
            buffer.dispatch(tokens.x, topk_idx=wrong, topk_weights=tokens.topk_weights, **layout)
        assert caught.value.code == ErrorCode.invalid_argument
        return dispatch_v1(buffer, tokens, EXPERTS)[0].size(0) > 0

    assert all(on_gpu(body))


def test_a_bounded_dispatch_raises_later_what_it_found():
    def body(buffer, tokens):
        layout, wrong = layout_of(buffer, tokens), tokens.topk_idx.clone()
        wrong[0, 0] = EXPERTS + buffer.rank
        bounded(buffer, tokens._replace(topk_idx=wrong), layout)
        # Each rank has a mistake of its own, and hears of that or of a peer's first.
        with pytest.raises(Error, match=r"topk_idx\[0, 0\].*experts are 0"):
            buffer.check()
        return dispatch_v1(buffer, tokens, EXPERTS)[0].size(0) > 0

    assert all(on_gpu(body))


def test_python_finds_a_mistake_and_the_peers_hear_of_it():
    def body(buffer, tokens):
        layout = layout_of(buffer, tokens)
        weights = tokens.topk_weights if buffer.rank != 2 else tokens.topk_weights[:3]
        with pytest.raises(Error, match="topk_weights"):
            buffer.dispatch(tokens.x, topk_idx=tokens.topk_idx, topk_weights=weights, **layout)
        with pytest.raises(Error, match="topk_idx is on cpu"):
            buffer.dispatch(tokens.x, topk_idx=tokens.topk_idx.cpu(), topk_weights=tokens.topk_weights, **layout)
        return dispatch_v1(buffer, tokens, EXPERTS)[0].size(0) > 0

    assert all(on_gpu(body))


def test_a_rank_that_does_not_come_is_named():
    def body(buffer, tokens):
        layout = layout_of(buffer, tokens)
        if buffer.rank == 1:
            return None
        with pytest.raises(Error) as caught:
            buffer.dispatch(tokens.x, topk_idx=tokens.topk_idx, topk_weights=tokens.topk_weights, **layout)
        return caught.value.code, caught.value.wait.peer

    assert on_gpu(body, num_ranks=2, timeout_secs=1)[0] == (ErrorCode.timeout, 1)


def test_threads_on_the_default_stream_are_refused():
    def body(buffer, tokens):
        with torch.cuda.stream(torch.cuda.default_stream()), pytest.raises(Error, match="stream of their own"):
            buffer.get_dispatch_layout(tokens.topk_idx, EXPERTS)

    on_gpu(body, num_ranks=2)


def test_one_buffer_serves_cpu_and_cuda_tensors():
    def body(buffer, tokens):
        gpu = dispatch_v1(buffer, tokens, EXPERTS)
        cpu = dispatch_v1(buffer, moved(tokens, "cpu"), EXPERTS)
        again = dispatch_v1(buffer, tokens, EXPERTS)
        sums = [to_cpu(buffer.combine(each[0], each[4])[0]) for each in (gpu, cpu, again)]
        return all(torch.equal(each[0].cpu(), cpu[0]) for each in (gpu, again)) and same(sums[:2], sums[1:])

    assert all(on_gpu(body))


def test_allocated_rows_are_combined_without_a_copy():
    def body(buffer, tokens):
        recv_x, *_, handle, _ = dispatch_v1(buffer, tokens, EXPERTS)
        ready = buffer.allocate(recv_x.shape, recv_x.dtype)
        ready.copy_(recv_x)
        buffer.reset_statistics()
        first = buffer.combine(ready, handle)[0]
        staged = buffer.statistics()["staged_bytes"]
        second = buffer.combine(recv_x.clone(), handle)[0]
        settled()
        return staged, torch.equal(first, second)

    assert on_gpu(body) == [(0, True)] * RANKS


def test_buffers_come_and_go_and_outputs_outlive_them():
    def body(buffer, tokens):
        kept = dispatch_v1(buffer, tokens, EXPERTS)[0]
        before = kept.clone()
        buffer.close()
        settled()
        return torch.equal(kept, before)

    for _ in range(10):
        assert all(on_gpu(body, num_ranks=2))
