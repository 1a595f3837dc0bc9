# SPDX-License-Identifier: MIT
"""A cluster on this machine: one network namespace per node, joined by a bridge, and processes in them, one per rank. Needs root."""
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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

    def __init__(self, delay_ms=0.0, jitter_ms=0.0, loss=0.0, rate_mbit=0.0):
        self.delay_ms, self.jitter_ms, self.loss, self.rate_mbit = delay_ms, jitter_ms, loss, rate_mbit

    @classmethod
    def parse(cls, text):
        """'delay=1,jitter=0.5,loss=0.01,rate=100': milliseconds, a share, megabits per second that a node sends."""
        names = {"delay": "delay_ms", "jitter": "jitter_ms", "loss": "loss", "rate": "rate_mbit"}
        try:
            return cls(**{names[name]: float(value) for name, value in (field.split("=") for field in text.split(","))})
        except KeyError as unknown:
            raise ValueError(f"no such fault of a link: {unknown}") from None

    def __str__(self):
        rate = f", {self.rate_mbit:g} Mbit/s" if self.rate_mbit else ""
        return f"delay {self.delay_ms:g} ms, jitter {self.jitter_ms:g} ms, loss {100 * self.loss:g} %{rate}"

    def netem(self):
        rate = ["rate", f"{self.rate_mbit}mbit"] if self.rate_mbit else []
        return ["delay", f"{self.delay_ms}ms", f"{self.jitter_ms}ms", "loss", f"{100 * self.loss}%", *rate]

    def switch_options(self):
        return ["--delay-ms", self.delay_ms, "--jitter-ms", self.jitter_ms, "--loss", self.loss, "--rate-mbit", self.rate_mbit]


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
                EP_NETWORK_PROVIDER=provider, EP_TEST_PROVIDER=provider, EP_RENDEZVOUS_SECRET="of the cluster test")
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
