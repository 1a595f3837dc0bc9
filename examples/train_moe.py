#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Trains a small mixture-of-experts language model on real text, with experts spread over several ranks and, from the
same seed, on one rank; the two loss curves must agree. Runs on GPUs where there are some, one for each rank or shared.
Text: --file, or this project's own documents and sources."""

import argparse
import json
import pathlib
import socket
import sys
from typing import Any, Dict, List

import torch
import torch.distributed as dist
from torch import nn

import deep_ep
from deep_ep.utils.envs import device, launch, take_device

ROOT = pathlib.Path(__file__).resolve().parent.parent


def gather_text(file: str) -> bytes:
    paths = [pathlib.Path(file)] if file else sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.cpp")])
    return b"\n".join(path.read_bytes() for path in paths)


def read_text(args: argparse.Namespace) -> torch.Tensor:
    return torch.frombuffer(bytearray((pathlib.Path(args.out) / "text").read_bytes()), dtype=torch.uint8)


def batch(text: torch.Tensor, step: int, args: argparse.Namespace) -> torch.Tensor:
    """The whole batch of a step, the same on every rank."""
    random = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(0, text.numel() - args.length - 1, (args.batch,), generator=random)
    return text[starts.unsqueeze(1) + torch.arange(args.length + 1)].long()


class Experts(nn.Module):
    """The experts of one rank and the router that every rank has. All experts are drawn, so that a seed means the same
    model however many ranks there are."""

    def __init__(self, width: int, args: argparse.Namespace, buffer: Any) -> None:
        super().__init__()
        self.num_experts, self.num_topk = args.experts, args.topk
        self.number = deep_ep.ops.register_buffer(buffer)
        self.router = nn.Linear(width, args.experts, bias=False)
        local = args.experts // buffer.group_size
        mine = slice(buffer.rank * local, (buffer.rank + 1) * local)
        self.up = nn.Parameter((torch.randn(args.experts, width, 2 * width) / width**0.5)[mine].clone())
        self.down = nn.Parameter((torch.randn(args.experts, 2 * width, width) / (2 * width) ** 0.5)[mine].clone())
        self.register_buffer("load", torch.zeros(local, dtype=torch.int64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(dim=-1).topk(self.num_topk, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        dispatch, combine = torch.ops.deep_ep.dispatch, torch.ops.deep_ep.combine
        rows, local, share, counts, *handle = dispatch(self.number, x, ids, weights, self.num_experts, 0, 1)
        self.load += counts
        y = rows * 0  # a rank without rows takes part in the backward pass all the same
        for expert in range(self.up.size(0)):
            at, k = (local == expert).nonzero(as_tuple=True)
            out = nn.functional.gelu(rows[at] @ self.up[expert]) @ self.down[expert]
            y = y.index_add(0, at, out * share[at, k].unsqueeze(1))
        return combine(self.number, y, handle, x.size(0))


class Block(nn.Module):
    def __init__(self, args: argparse.Namespace, buffer: Any) -> None:
        super().__init__()
        self.heads = args.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(args.width), nn.LayerNorm(args.width)
        self.qkv = nn.Linear(args.width, 3 * args.width, bias=False)
        self.out = nn.Linear(args.width, args.width, bias=False)
        self.experts = Experts(args.width, args, buffer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.experts(self.norm_2(x).view(-1, width)).view(x.shape)


class Model(nn.Module):
    def __init__(self, args: argparse.Namespace, buffer: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, args.width)
        self.place = nn.Parameter(torch.randn(args.length, args.width) * 0.02)
        self.blocks = nn.ModuleList(Block(args, buffer) for _ in range(args.layers))
        self.head = nn.Linear(args.width, 256, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def share_gradients(model: nn.Module, ranks: int) -> None:
    """Means over ranks. An expert's gradient has come from all tokens already, as the sum of the ranks' means."""
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if not name.endswith(("experts.up", "experts.down")):
            dist.all_reduce(parameter.grad)
        parameter.grad /= ranks


def train(rank: int, ranks: int, args: argparse.Namespace) -> Dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    text = read_text(args)
    with deep_ep.Buffer(dist.group.WORLD) as buffer:
        model = Model(args, buffer).to(device())
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
        losses: List[float] = []
        for step in range(args.steps):
            ids = batch(text, step, args).chunk(ranks)[rank].to(device())
            logits = model(ids[:, :-1])
            loss = nn.functional.cross_entropy(logits.reshape(-1, 256), ids[:, 1:].reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            share_gradients(model, ranks)
            optimizer.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / ranks)
            if rank == 0 and (step + 1) % max(1, args.steps // 5) == 0:
                print(f"{ranks} ranks, step {step + 1}: loss {losses[-1]:.4f}", flush=True)
        loads: List[Any] = [None] * ranks
        dist.all_gather_object(loads, [block.experts.load.tolist() for block in model.blocks])
    by_layer = [sum((load[layer] for load in loads), []) for layer in range(args.layers)]
    return {"losses": losses, "load": by_layer}


def run(rank: int, ranks: int, port: int, args: argparse.Namespace) -> None:
    backend = take_device(rank, ranks)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    result = train(rank, ranks, args)
    if rank == 0:
        (pathlib.Path(args.out) / f"{ranks}_ranks.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def draw(results: Dict[int, Dict[str, Any]], file: pathlib.Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for (ranks, result), style in zip(sorted(results.items()), ("-", "--"), strict=False):
        left.plot(result["losses"], style, label=f"{ranks} rank{'s' if ranks > 1 else ''}")
    left.set(xlabel="step", ylabel="loss (nats per byte)", title="loss")
    left.legend()
    most = results[max(results)]["load"]
    for layer, load in enumerate(most):
        right.bar(
            [e + 0.8 * layer / len(most) for e in range(len(load))], load, 0.8 / len(most), label=f"layer {layer}"
        )
    right.set(xlabel="expert", ylabel="selections", title="load of the experts")
    right.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-processes", type=int, default=4, help="expert-parallel ranks, compared with one rank")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--file", default="", help="text to learn")
    parser.add_argument("--out", default="out/train_moe", help="folder for curves and picture")
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest difference of the two curves, in nats")
    args = parser.parse_args()
    if args.batch % args.num_processes or args.experts % args.num_processes:
        parser.error("--batch and --experts must be multiples of --num-processes")
    try:
        text = gather_text(args.file)
    except OSError as error:
        parser.error(f"--file: {error}")
    if len(text) < args.length + 2:
        source = args.file or f"docs/ and src/ of {ROOT}"
        parser.error(f"the text must have at least --length + 2 = {args.length + 2} bytes: {source} has {len(text)}")
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "text").write_bytes(text)  # both runs learn the same, whoever edits the sources meanwhile
    results = {}
    for ranks in (args.num_processes, 1):
        launch(run, ranks, ranks, free_port(), args)
        results[ranks] = json.loads((out / f"{ranks}_ranks.json").read_text())
    draw(results, out / "train_moe.png")
    curves = [result["losses"] for result in results.values()]
    apart = max(abs(a - b) for a, b in zip(*curves, strict=True))
    window = max(1, args.steps // 10)
    first, last = sum(curves[0][:window]) / window, sum(curves[0][-window:]) / window
    print(f"loss {first:.3f} -> {last:.3f}; the curves differ by {apart:.2e} at most (allowed {args.tolerance})")
    return 0 if apart <= args.tolerance and last < first else 1


if __name__ == "__main__":
    sys.exit(main())
