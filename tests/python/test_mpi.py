# SPDX-License-Identifier: MIT
"""Ranks that mpirun starts, with mpi4py's own communicators as groups. As a program this file is one of them."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

RANKS = 4


def missing():
    """What this test needs and does not find; empty where all is there."""
    if shutil.which("mpirun") is None:
        return "no mpirun"
    # MPI itself is loaded by the import, and must not be in the test's own process.
    tried = subprocess.run([sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else "mpi4py: " + tried.stderr.strip().splitlines()[-1]


def mpirun(*command):
    options = ["-n", str(RANKS)]
    if "Open MPI" in subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout:
        # More ranks than cores, yielding to each other, as root too: this machine is a test's, not a cluster's.
        options += ["--oversubscribe", "--allow-run-as-root", "--mca", "mpi_yield_when_idle", "1"]
    return subprocess.run(["mpirun", *options, *command], capture_output=True, text=True, timeout=240)


def test_1_1_and_3_7_mpi4pys_communicators_serve_as_groups():
    reason = missing()
    if reason:
        pytest.skip(reason)
    ended = mpirun(sys.executable, __file__)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("done") == RANKS, ended.stdout  # mpirun may join the lines of two ranks


def main():
    from deep_ep import Buffer, ElasticBuffer
    from mpi4py import MPI

    from test_processes import pipeline_round, round_trip

    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    rank, ranks = world.Get_rank(), world.Get_size()
    assert ranks == RANKS
    with Buffer(None, comm=world) as buffer:
        assert buffer.group is world and (buffer.rank, buffer.group_size) == (rank, ranks)
    round_trip(world, rank, ranks)
    # Ranks of a part are numbered anew, here the other way round.
    half = world.Split(color=rank % 2, key=-rank)
    round_trip(half, half.Get_rank(), 2)
    with ElasticBuffer(world, 2 << 20) as buffer:
        pipeline_round(buffer, rank)
    half.Free()
    print("done", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main()
