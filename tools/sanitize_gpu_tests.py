#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs compute-sanitizer over small tests of the CUDA backend on this machine's first GPU, and says which check found what. Exit code 0 only if no tool found
anything and all tests passed.

memcheck and initcheck let no two kernels of a process run side by side, and a rank waits for its peers: they get tests of one rank, and ranks that are processes.
racecheck and synccheck run any test. Everything is slow under them, so deadlines are long."""
import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE_RANK_HT = "All/DispatchMatrix.*/0:All/DispatchMatrix.*/5:All/CombineMatrix.*/0:All/ProcessRanks.give_the_results_of_the_oracle_in_every_layout/0"
PROCESSES = "All/ProcessRanks.give_the_results_of_the_oracle_in_every_layout/1"
FAR_HT = "Internode.goes_on_without_ranks*"
FAR_LL = "Loopback/InternodeLowLatency.keeps_several_tickets_in_flight_and_uses_their_slots_again/2"
# Tool; program, whose backend is that of its name or the one beside it; tests, or the logical nodes of ranks that are processes.
CHECKS = [
    ("memcheck", "backends_tests", ONE_RANK_HT),
    ("memcheck", "backends_tests", PROCESSES),
    ("memcheck", "cuda_tests", "Ranks/CudaGraph.*/0"),
    ("memcheck", "cluster_rank_main", "1,1"),
    ("initcheck", "backends_tests", ONE_RANK_HT),
    ("initcheck", "cluster_rank_main", "1,1"),
    ("racecheck", "cuda_tests", "CudaExchange.follows_placements_and_nodes"),
    ("racecheck", "cuda_tests", "CudaLowLatency.follows_placements_and_nodes"),
    ("racecheck", "cuda_tests", "Ranks/CudaGraph.*/0"),
    ("racecheck", "internode_tests", FAR_HT),
    ("racecheck", "internode_tests", FAR_LL),
    ("synccheck", "cuda_tests", "CudaExchange.follows_placements_and_nodes:CudaLowLatency.follows_placements_and_nodes"),
    ("synccheck", "internode_tests", f"{FAR_HT}:{FAR_LL}"),
]
SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", re.M)
CLEAN = re.compile(r"^0 (?:errors|hazards)\b")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def commands_of(tool, program, what, args):
    """Each process: command and environment."""
    # Child processes too; reads and writes of a copy that is not in device memory are no business of initcheck.
    start = [args.sanitizer, "--tool", tool, "--target-processes", "all", str(args.tests / program)]
    env = {**os.environ, "EP_TEST_TIMEOUT_MS": "60000", "CUDA_DEVICE_MAX_CONNECTIONS": "32", "EP_TEST_BACKEND": "host" if program == "cuda_tests" else "cuda"}
    if program != "cluster_rank_main":
        return [([*start, f"--gtest_filter={what}", "--gtest_color=no"], env)]
    ranks = sum(int(size) for size in what.split(","))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    return [([*start, "check", what], {**env, **meeting, "RANK": str(rank)}) for rank in range(ranks)]


def run(tool, program, what, args):
    """What the tool found, or how the tests failed; nothing where all is well."""
    log = args.logs / f"{tool}_{program}_{abs(hash(what)) % 10000}.log"
    end = time.monotonic() + args.limit
    with log.open("w") as out:
        processes = [subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT) for command, env in commands_of(tool, program, what, args)]
        codes = []
        for process in processes:
            try:
                codes.append(process.wait(timeout=max(0.1, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
    text = log.read_text(errors="replace")
    summaries = SUMMARY.findall(text)
    trouble = [summary for summary in summaries if not CLEAN.match(summary)]
    if any(codes):
        trouble.append(f"exit codes {codes}")
    if len(summaries) < len(processes):
        trouble.append("the tool said nothing")
    return "; ".join(trouble), log


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, default=ROOT / "build" / "cuda" / "tests", help="folder of the programs")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "sanitizers", help="where the tools' reports go")
    parser.add_argument("--sanitizer", default=shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer")
    parser.add_argument("--tools", nargs="+", default=sorted({tool for tool, _, _ in CHECKS}))
    parser.add_argument("--limit", type=float, default=300, help="seconds for one check")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    bad = 0
    for tool, program, what in (check for check in CHECKS if check[0] in args.tools):
        began = time.monotonic()
        trouble, log = run(tool, program, what, args)
        bad += bool(trouble)
        print(f"{tool} {program} {what}: {trouble or 'nothing found'} ({time.monotonic() - began:.0f} s, {log})", flush=True)
    print(f"{bad} checks found something" if bad else "all checks found nothing")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
