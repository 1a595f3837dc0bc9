#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs the library across a cluster that is built on this machine: one network namespace per node, joined by a bridge.

Exchanges are compared with the oracle on every rank; then links are cut, ranks killed and paused, and every other rank must end with an error
that names a rank of the broken node, within its deadline. Needs root, or runs itself inside a user namespace of its own (unshare)."""
import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster import Cluster, Link, Ranks

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = ["1,1", "2,2", "4,4", "3,1", "1,2,1", "2,2,2", "4,2,1", "1,1,1,1", "2,2,2,2", "4,1,3,2"]
TIMEOUT_MS = 3000  # deadline of every wait in the fault tests
PATIENCE = 12  # seconds for all survivors: the deadline, once for the call and once for closing, on a busy machine
LOST = 3  # exit code of a rank that lost a peer
SKIPPED = 77  # ours, as ctest knows it
BAD_LINKS = [
    ("2,2", Link(delay_ms=2)),
    ("2,2", Link(delay_ms=1, jitter_ms=1)),
    ("2,2", Link(delay_ms=0.5, loss=0.01)),
    ("2,2", Link(rate_mbit=20)),
    ("4,4", Link(delay_ms=1, loss=0.01)),
    ("3,1", Link(delay_ms=1, jitter_ms=1, loss=0.01)),
    ("1,2,1", Link(delay_ms=1, jitter_ms=1, loss=0.01)),
    ("2,1,1,2", Link(delay_ms=1, jitter_ms=1, loss=0.01, rate_mbit=50)),
]
# libfabric's shm answers a rank's messages in order: what was sent to one that has left held up what went to the others.
LEAVING_SHM = "1,1,1,1,1,1,1,1"
BRIEF_LINK = Link(delay_ms=1, jitter_ms=1, loss=0.01)


def killed(rank):
    return lambda cluster, ranks: ranks.processes[rank].send_signal(signal.SIGKILL)


def paused(rank):
    return lambda cluster, ranks: ranks.processes[rank].send_signal(signal.SIGSTOP)


def shared_memory():
    return set(os.listdir("/dev/shm"))


class Suite:
    def __init__(self, options):
        self.options = options
        self.port = 29500
        self.failures = 0
        self.runs = 0

    def report(self, name, problems, seconds):
        self.runs += 1
        self.failures += bool(problems)
        print(f"{'FAILED' if problems else 'ok':<7} {name:<80} {seconds:6.1f} s", flush=True)
        for problem in problems:
            print(f"        {problem}", flush=True)

    def ranks(self, cluster, arguments, provider=None):
        self.port += 1
        return Ranks(cluster, self.options.program, arguments, provider or self.options.provider, self.port)

    @staticmethod
    def leftovers(before, patience=30):
        """Files that came and stay: those of other programs, libfabric's in a test beside this one, go again."""
        left, deadline = shared_memory() - before, time.monotonic() + patience
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            left &= shared_memory()
        return [f"left in /dev/shm: {name}" for name in sorted(left)]

    def check(self, nodes, link=None, provider=None):
        """Every form of exchange, compared with the oracle on every rank."""
        sizes = [int(size) for size in nodes.split(",")]
        start, before = time.monotonic(), shared_memory()
        with Cluster(sizes, link) as cluster:
            ranks = self.ranks(cluster, ["check", nodes], provider)
            try:
                codes = ranks.wait(range(sum(sizes)), self.options.limit)
                problems = [f"rank {rank}: exit code {code}: {ranks.said(rank).strip()[-300:]}" for rank, code in codes.items() if code != 0]
            finally:
                ranks.end()
            problems += self.leftovers(before)
        self.report(f"exchange on {nodes}{f', {link}' if link else ''}{f' over {provider}' if provider else ''}{f' ({cluster.traffic})' if cluster.traffic else ''}", problems, time.monotonic() - start)

    def fault(self, nodes, name, broken, strike, low_latency=False):
        """`strike` breaks the ranks `broken`; every other rank must end, naming one of them."""
        sizes = [int(size) for size in nodes.split(",")]
        start, before = time.monotonic(), shared_memory()
        with Cluster(sizes) as cluster:
            ranks = self.ranks(cluster, ["loop", nodes, str(TIMEOUT_MS), *(["low_latency"] if low_latency else [])])
            try:
                if ranks.wait_until_ready(self.options.limit):
                    strike(cluster, ranks)
                    survivors = [rank for rank in range(sum(sizes)) if rank not in broken]
                    codes = ranks.wait(survivors, PATIENCE)
                    problems = [text for rank, code in codes.items() if (text := self.judge(rank, code, ranks.said(rank), broken))]
                else:
                    problems = [f"rank {rank} was not ready: {ranks.said(rank).strip()[-300:]}" for rank in range(sum(sizes))]
            finally:
                ranks.end()
            problems += self.leftovers(before)
        self.report(f"{name} on {nodes}{' in low latency' if low_latency else ''}", problems, time.monotonic() - start)

    @staticmethod
    def judge(rank, code, said, broken):
        """What is wrong with how a survivor ended; empty if nothing."""
        if code is None:
            return f"rank {rank} hangs: {said.strip()[-300:]}"
        lost = re.search(r"^lost (-?\d+): (.*)$", said, re.M)
        if code != LOST or not lost:
            return f"rank {rank}: exit code {code}: {said.strip()[-300:]}"
        return "" if int(lost[1]) in broken else f"rank {rank} blames rank {lost[1]}, not one of {sorted(broken)}: {lost[2]}"

    def faults(self):
        self.fault("2,2", "rank 3 killed", {3}, killed(3))
        self.fault("4,4", "rank 5 killed, on no rail of rank 0", {5}, killed(5))
        self.fault("2,2", "rank 0, which listened, killed", {0}, killed(0))
        self.fault("2,2", "rank 2 paused", {2}, paused(2))
        # Those behind the cut cannot know that it is they who are alone: they blame the other side.
        self.fault("2,1,2", "link of node 1 cut", {2}, lambda cluster, ranks: cluster.cut(1))
        self.fault("2,2", "rank 3 killed", {3}, killed(3), low_latency=True)
        self.fault("2,2", "rank 2 paused", {2}, paused(2), low_latency=True)
        self.fault("2,1,2", "link of node 1 cut", {2}, lambda cluster, ranks: cluster.cut(1), low_latency=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build/host", help="build tree with the test programs")
    parser.add_argument("--provider", default="tcp;ofi_rxm", help="libfabric provider between the nodes")
    parser.add_argument("--nodes", action="append", help=f"ranks of each node, '4,4'; may be repeated; default: {' '.join(CLUSTERS)}")
    parser.add_argument("--link", action="append", type=Link.parse, metavar="FAULTS",
                        help="exchange on 2,2 over bad links too: 'delay=1,jitter=0.5,loss=0.01,rate=50' (ms, share, Mbit/s); may be repeated; default: several such")
    parser.add_argument("--brief", action="store_true", help="three exchanges and one killed rank; exit code 77 where this user can make no network namespaces")
    parser.add_argument("--only", choices=["exchange", "faults"], help="half of the suite")
    parser.add_argument("--limit", type=float, default=90, help="seconds for one run of all ranks")
    options = parser.parse_args()
    options.program = (options.build / "tests/cluster_rank_main").resolve()
    return options


def brief(suite):
    suite.check("2,1")
    suite.check("1,1", BRIEF_LINK)
    suite.check(LEAVING_SHM, provider="shm")
    suite.fault("2,1", "rank 1 killed", {1}, killed(1))


def complete(suite):
    options = suite.options
    if options.only != "faults":
        for nodes in options.nodes or CLUSTERS:
            suite.check(nodes)
        if not options.nodes:
            suite.check(LEAVING_SHM, provider="shm")
        for nodes, link in [("2,2", link) for link in options.link or []] or BAD_LINKS:
            suite.check(nodes, link)
    if options.only != "exchange":
        suite.faults()


def why_not():
    """Why this user can make no such cluster; empty where it can."""
    try:
        with Cluster([1, 1], BRIEF_LINK):
            return ""
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return str(getattr(error, "stderr", "") or error).strip()


def main():
    options = arguments()
    if options.brief and (reason := why_not()):
        print(f"cluster_test: skipped: {reason}")
        return SKIPPED
    if os.geteuid() != 0:
        sys.exit("cluster_test: network namespaces need root: sudo make cluster-test, or unshare -rn --mount make cluster-test")
    if not options.program.is_file():
        sys.exit(f"cluster_test: {options.program} is missing; make cluster-test builds it")
    suite = Suite(options)
    (brief if options.brief else complete)(suite)
    print(f"cluster_test: {suite.runs - suite.failures} of {suite.runs} passed")
    return bool(suite.failures)


if __name__ == "__main__":
    sys.exit(main())
