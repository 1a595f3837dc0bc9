#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A mixture-of-experts exchange across machines, started by torchrun on each of them:

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/two_nodes.py

Every rank sends its tokens to the ranks of their experts and gets them back summed; with experts that change nothing, a
token comes home multiplied by the number of ranks it went to, which is checked. examples/two_nodes.slurm starts the same
under Slurm."""

import argparse
import os
import time

import deep_ep
import torch
import torch.distributed as dist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts-per-rank", type=int, default=8)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    dist.init_process_group("gloo")  # only for meeting; rows travel through deep_ep
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    # torchrun says how many ranks a machine has; all machines must have as many here.
    node_size = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    buffer = deep_ep.Buffer(dist.group.WORLD, ranks_per_node=node_size, explicitly_destroy=True)

    torch.manual_seed(rank)
    num_experts = args.experts_per_rank * num_ranks
    # Small whole numbers: bfloat16 adds them without rounding.
    x = torch.randint(-8, 8, (args.tokens, args.hidden)).to(torch.bfloat16)
    scores = torch.rand(args.tokens, num_experts)
    topk_idx = scores.topk(args.topk, dim=1).indices.to(deep_ep.topk_idx_t)
    topk_weights = torch.full((args.tokens, args.topk), 1.0 / args.topk)

    per_rank, per_node, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    begin = time.perf_counter()
    for _ in range(args.rounds):
        rows, _, _, counts, handle, _ = buffer.dispatch(
            x, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert, topk_idx=topk_idx, topk_weights=topk_weights)  # fmt: skip
        home, _, _ = buffer.combine(rows, handle)
    seconds = (time.perf_counter() - begin) / args.rounds

    expected = x.float() * is_in_rank.sum(dim=1, keepdim=True)
    assert torch.equal(home.float(), expected), f"rank {rank}: {(home.float() - expected).abs().max().item()} off"
    dist.barrier()
    if rank == 0:
        nodes = -(-num_ranks // node_size)
        print(f"{num_ranks} ranks on {nodes} nodes: {args.tokens} tokens each came home exactly", end="")
        print(f", {seconds * 1e3:.1f} ms a round")
    buffer.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
