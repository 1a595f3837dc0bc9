#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs the library across a cluster that is built on this machine: one network namespace per node, joined by a bridge.

Exchanges are compared with the oracle on every rank; then links are cut, ranks killed and paused, and every other rank must end with an error
that names a rank of the broken node, within its deadline. Needs root, or runs itself inside a user namespace of its own (unshare)."""
import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = ["1,1", "2,2", "4,4", "3,1", "1,2,1", "2,2,2", "4,2,1", "1,1,1,1", "2,2,2,2", "4,1,3,2"]
TIMEOUT_MS = 3000  # deadline of every wait in the fault tests
PATIENCE = 12  # seconds for all survivors: the deadline, once for the call and once for closing, on a busy machine
LOST = 3  # exit code of a rank that lost a peer


def run(*command, check=True):
    return subprocess.run([str(part) for part in command], check=check, capture_output=True, text=True)


class Cluster:
    """A namespace for each node, with addresses 10.77.0.1, .2, .. Their links meet at a bridge in a namespace of its own; where links shall be
    bad, tc netem makes them so, or else a switch in user space."""

    def __init__(self, sizes, link=None):
        self.sizes = sizes
        prefix = f"ep{os.getpid()}"
        self.switch = f"{prefix}s"
        self.names = [f"{prefix}n{node}" for node in range(len(sizes))]
        self.link = link
        self.lossy_switch = None
        self.traffic = ""  # what the switch in user space says at its end

    def __enter__(self):
        try:
            self.build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def build(self):
        for name in self.names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        if self.link and not has_netem():
            self.join_by_lossy_switch()
        else:
            self.join_by_bridge()
        for node, name in enumerate(self.names):
            run("ip", "-n", name, "address", "add", f"{self.address(node)}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")

    def join_by_bridge(self):
        run("ip", "netns", "add", self.switch)
        self.in_switch("ip", "link", "add", "bridge0", "type", "bridge")
        self.in_switch("ip", "link", "set", "bridge0", "up")
        for node, name in enumerate(self.names):
            run("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{node}", "netns", self.switch)
            self.in_switch("ip", "link", "set", f"port{node}", "master", "bridge0", "up")
            if self.link:
                run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "netem", *self.link.netem())

    def join_by_lossy_switch(self):
        command = [sys.executable, ROOT / "tools/lossy_switch.py", *self.link.switch_options(), *self.names]
        self.lossy_switch = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        if self.lossy_switch.stdout.readline().strip() != "ready":
            raise RuntimeError("tools/lossy_switch.py did not start; is there /dev/net/tun?")

    def __exit__(self, *_):
        if self.lossy_switch:
            self.lossy_switch.terminate()
            self.traffic = self.lossy_switch.communicate()[0].strip()
        for name in [*self.names, self.switch]:
            run("ip", "netns", "delete", name, check=False)

    def in_switch(self, *command):
        return run("ip", "netns", "exec", self.switch, *command)

    @staticmethod
    def address(node):
        return f"10.77.0.{node + 1}"

    def node_of(self, rank):
        for node, size in enumerate(self.sizes):
            if rank < size:
                return node
            rank -= size
        raise ValueError(rank)

    def cut(self, node):
        run("ip", "-n", self.names[node], "link", "set", "eth0", "down")


class Link:
    """What is wrong with the links of a cluster."""

    def __init__(self, delay_ms=0.0, jitter_ms=0.0, loss=0.0):
        self.delay_ms, self.jitter_ms, self.loss = delay_ms, jitter_ms, loss

    @classmethod
    def parse(cls, text):
        """'delay=1,jitter=0.5,loss=0.01': milliseconds, and a share."""
        fields = dict(field.split("=") for field in text.split(","))
        return cls(float(fields.pop("delay", 0)), float(fields.pop("jitter", 0)), float(fields.pop("loss", 0)), **fields)

    def __str__(self):
        return f"delay {self.delay_ms:g} ms, jitter {self.jitter_ms:g} ms, loss {100 * self.loss:g} %"

    def netem(self):
        return ["delay", f"{self.delay_ms}ms", f"{self.jitter_ms}ms", "loss", f"{100 * self.loss}%"]

    def switch_options(self):
        return ["--delay-ms", self.delay_ms, "--jitter-ms", self.jitter_ms, "--loss", self.loss]


@functools.cache
def has_netem():
    """Whether this kernel can spoil links itself."""
    name = f"ep{os.getpid()}try"
    run("ip", "netns", "add", name)
    try:
        return run("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms", check=False).returncode == 0
    finally:
        run("ip", "netns", "delete", name, check=False)


class Ranks:
    """One process per rank, in its node's namespace; what it says goes to a file."""

    def __init__(self, cluster, program, arguments, provider, port):
        self.cluster = cluster
        world = sum(cluster.sizes)
        self.logs = [tempfile.NamedTemporaryFile("w+", suffix=f".rank{rank}") for rank in range(world)]
        self.processes = []
        for rank in range(world):
            environment = dict(
                os.environ, RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR=cluster.address(0), MASTER_PORT=str(port),
                EP_NETWORK_PROVIDER=provider, EP_RENDEZVOUS_SECRET="of the cluster test")
            name = cluster.names[cluster.node_of(rank)]
            self.processes.append(subprocess.Popen(
                ["ip", "netns", "exec", name, str(program), *arguments], env=environment, stdout=self.logs[rank], stderr=subprocess.STDOUT))

    def said(self, rank):
        return Path(self.logs[rank].name).read_text(errors="replace")

    def wait_until_ready(self, seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if all("ready" in self.said(rank) for rank in range(len(self.processes))):
                return True
            if any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.02)
        return False

    def wait(self, ranks, seconds):
        """Exit codes; None for a rank that has not ended in time."""
        deadline = time.monotonic() + seconds
        codes = {}
        for rank in ranks:
            try:
                codes[rank] = self.processes[rank].wait(max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                codes[rank] = None
        return codes

    def end(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for log in self.logs:
            log.close()


LINKS = [Link(delay_ms=2), Link(delay_ms=1, jitter_ms=1), Link(delay_ms=0.5, loss=0.01)]


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

    def ranks(self, cluster, arguments):
        self.port += 1
        return Ranks(cluster, self.options.program, arguments, self.options.provider, self.port)

    @staticmethod
    def leftovers(before):
        return [f"left in /dev/shm: {name}" for name in sorted(shared_memory() - before)]

    def check(self, nodes, link=None):
        """Every form of exchange, compared with the oracle on every rank."""
        sizes = [int(size) for size in nodes.split(",")]
        start, before = time.monotonic(), shared_memory()
        with Cluster(sizes, link) as cluster:
            ranks = self.ranks(cluster, ["check", nodes])
            try:
                codes = ranks.wait(range(sum(sizes)), self.options.limit)
                problems = [f"rank {rank}: exit code {code}: {ranks.said(rank).strip()[-300:]}" for rank, code in codes.items() if code != 0]
            finally:
                ranks.end()
            problems += self.leftovers(before)
        self.report(f"exchange on {nodes}{f', {link}' if link else ''}{f' ({cluster.traffic})' if cluster.traffic else ''}", problems, time.monotonic() - start)

    def fault(self, nodes, name, broken, strike, mend=None):
        """`strike` breaks the ranks `broken`; every other rank must end, naming one of them."""
        sizes = [int(size) for size in nodes.split(",")]
        start, before = time.monotonic(), shared_memory()
        with Cluster(sizes) as cluster:
            ranks = self.ranks(cluster, ["loop", nodes, str(TIMEOUT_MS)])
            try:
                if ranks.wait_until_ready(self.options.limit):
                    strike(cluster, ranks)
                    survivors = [rank for rank in range(sum(sizes)) if rank not in broken]
                    codes = ranks.wait(survivors, PATIENCE)
                    problems = [text for rank, code in codes.items() if (text := self.judge(rank, code, ranks.said(rank), broken))]
                else:
                    problems = [f"rank {rank} was not ready: {ranks.said(rank).strip()[-300:]}" for rank in range(sum(sizes))]
                if mend:
                    mend(cluster, ranks)
            finally:
                ranks.end()
            problems += self.leftovers(before)
        self.report(f"{name} on {nodes}", problems, time.monotonic() - start)

    @staticmethod
    def judge(rank, code, said, broken):
        """What is wrong with how a survivor ended; empty if nothing."""
        if code is None:
            return f"rank {rank} hangs: {said.strip()[-300:]}"
        lost = re.search(r"^lost (-?\d+): (.*)$", said, re.M)
        if code != LOST or not lost:
            return f"rank {rank}: exit code {code}: {said.strip()[-300:]}"
        return "" if int(lost[1]) in broken else f"rank {rank} blames rank {lost[1]}, not one of {sorted(broken)}: {lost[2]}"

    def speed(self):
        """The network alone, between two nodes: iperf3, and puts of src/net. What an exchange between nodes can reach at most."""
        start = time.monotonic()
        with Cluster([1, 1]) as cluster:
            inside = [["ip", "netns", "exec", name] for name in cluster.names]
            server = subprocess.Popen([*inside[0], "iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
            time.sleep(0.3)
            answer = run(*inside[1], "iperf3", "-c", cluster.address(0), "-t", "3", "-J")
            server.wait()
            rate = json.loads(answer.stdout)["end"]["sum_received"]["bits_per_second"] / 8e9
            ranks = Ranks(cluster, self.options.build / "bench/fabric_raw", ["--provider", self.options.provider], self.options.provider, 29499)
            codes = ranks.wait(range(2), self.options.limit)
            print(f"iperf3, one connection: {rate:.3f} GB/s\n{ranks.said(0)}", end="")
            ranks.end()
        self.report("network alone", [f"rank {rank}: exit code {code}" for rank, code in codes.items() if code != 0], time.monotonic() - start)

    def faults(self):
        def killed(rank):
            return lambda cluster, ranks: ranks.processes[rank].send_signal(signal.SIGKILL)

        def paused(rank):
            return lambda cluster, ranks: ranks.processes[rank].send_signal(signal.SIGSTOP)

        self.fault("2,2", "rank 3 killed", {3}, killed(3))
        self.fault("4,4", "rank 5 killed, on no rail of rank 0", {5}, killed(5))
        self.fault("2,2", "rank 0, which listened, killed", {0}, killed(0))
        self.fault("2,2", "rank 2 paused", {2}, paused(2))
        # Those behind the cut cannot know that it is they who are alone: they blame the other side.
        self.fault("2,1,2", "link of node 1 cut", {2}, lambda cluster, ranks: cluster.cut(1))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build/host", help="build tree with the test programs")
    parser.add_argument("--provider", default="tcp;ofi_rxm", help="libfabric provider between the nodes")
    parser.add_argument("--nodes", action="append", help=f"ranks of each node, '4,4'; may be repeated; default: {' '.join(CLUSTERS)}")
    parser.add_argument("--link", action="append", type=Link.parse, metavar="FAULTS",
                        help="exchange over bad links too: 'delay=1,jitter=0.5,loss=0.01' (ms and share); may be repeated; default: three such")
    parser.add_argument("--only", choices=["exchange", "faults", "speed"],
                        help="half of the suite; or the network alone, beside iperf3, for which bench/fabric_raw must be built")
    parser.add_argument("--limit", type=float, default=90, help="seconds for one run of all ranks")
    options = parser.parse_args()
    options.program = (options.build / "tests/cluster_rank_main").resolve()
    return options


def main():
    options = arguments()
    if os.geteuid() != 0:
        sys.exit("cluster_test: network namespaces need root: sudo make cluster-test, or unshare -rn --mount make cluster-test")
    if not options.program.is_file():
        sys.exit(f"cluster_test: {options.program} is missing; make cluster-test builds it")
    suite = Suite(options)
    if options.only == "speed":
        suite.speed()
        return bool(suite.failures)
    if options.only != "faults":
        for nodes in options.nodes or CLUSTERS:
            suite.check(nodes)
        for link in options.link or LINKS:
            suite.check("2,2", link)
    if options.only != "exchange":
        suite.faults()
    print(f"cluster_test: {suite.runs - suite.failures} of {suite.runs} passed")
    return bool(suite.failures)


if __name__ == "__main__":
    sys.exit(main())
