#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Exchanges between nodes on this machine: two network namespaces with four ranks each. In one run: iperf3 with as many connections, the
library, the same exchange with Open MPI, and libfabric alone with the bytes of a low-latency round trip. Needs root; writes one JSON report."""
import argparse
import datetime
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import internode_tables  # noqa: E402
from cluster import Cluster, Ranks  # noqa: E402
from internode_tables import MPI_NAMES  # noqa: E402
from run import ENVIRONMENT, commit, machine, program, short_name  # noqa: E402

PORT = 29600
# Open MPI as it chooses by itself, told only which interface joins the nodes. Its ranks of one node use shared memory.
MPI = ["--oversubscribe", "--mca", "pml", "ob1", "--mca", "btl", "self,vader,tcp", "--mca", "btl_tcp_if_include", "eth0",
       "--mca", "oob_tcp_if_include", "eth0"]


def iperf3(cluster, connections, seconds):
    """GB/s over so many connections: from node 1 to node 0, and both ways at once, added up."""
    inside = [["ip", "netns", "exec", name] for name in cluster.names]
    rates = {}
    for name, option in (("one_way", []), ("both_ways", ["--bidir"])):
        server = subprocess.Popen([*inside[0], "iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
        time.sleep(0.3)
        answer = subprocess.run(
            [*inside[1], "iperf3", "-c", cluster.address(0), "-t", str(seconds), "-P", str(connections), "-J", *option],
            check=True, capture_output=True, text=True)
        server.wait()
        end = json.loads(answer.stdout)["end"]
        sums = [end["sum_received"], *([end["sum_received_bidir_reverse"]] if option else [])]
        rates[name] = sum(one["bits_per_second"] for one in sums) / 8e9
    return {"connections": connections, "seconds": seconds, "gb_per_s": rates}


def faster(one, other):
    """Of two runs alike, the better rate each way."""
    return {**one, "runs": 2, "gb_per_s": {way: max(rate, other["gb_per_s"][way]) for way, rate in one["gb_per_s"].items()}}


def ranks_of(cluster, name, arguments, options, out):
    """Runs one process per rank and reads the report that rank 0 writes."""
    ranks = Ranks(cluster, program(options.build, name), [*arguments, "--out", str(out)], options.provider, PORT)
    try:
        codes = ranks.wait(range(len(ranks.processes)), options.limit)
        if any(code != 0 for code in codes.values()):
            said = "\n".join(f"rank {rank}, exit code {code}: {ranks.said(rank).strip()[-400:]}" for rank, code in codes.items() if code != 0)
            raise SystemExit(f"internode.py: {name}:\n{said}")
        print(ranks.said(0).strip(), file=sys.stderr, flush=True)
    finally:
        ranks.end()
    return json.loads(out.read_text())


class Board:
    """A file by which ranks in several namespaces meet."""

    def __enter__(self):
        descriptor, self.path = tempfile.mkstemp(prefix="ep_bench_board_", dir="/dev/shm")
        os.close(descriptor)
        return ["--board", self.path]

    def __exit__(self, *_):
        os.unlink(self.path)


def mpi(cluster, workload, options, folder):
    """The same exchange with Open MPI. Its daemons are started in the other namespaces by a script in place of ssh, under host names of their
    own, because it tells machines apart by their names."""
    exchange, mpirun = program(options.build, "mpi_exchange"), shutil.which("mpirun")
    if exchange is None or mpirun is None:
        return {"missing": "mpi_exchange is not built" if exchange is None else "mpirun is not installed"}
    agent = folder / "agent"
    cases = "\n".join(f"  {cluster.address(node)}) name={name} ;;" for node, name in enumerate(cluster.names))
    agent.write_text(f'#!/bin/sh\nhost=$1; shift\ncase $host in\n{cases}\nesac\n'
                     f'exec ip netns exec $name unshare --uts sh -c "hostname $name; $*"\n')
    agent.chmod(0o755)
    hosts = ",".join(f"{cluster.address(node)}:{size}" for node, size in enumerate(cluster.sizes))
    out = folder / "mpi.json"
    command = [mpirun, "--allow-run-as-root", *MPI, *options.mpi, "--mca", "plm_rsh_agent", str(agent), "--host", hosts, "-np", str(sum(cluster.sizes))]
    only = ",".join(sorted({MPI_NAMES[name] for name in options.only}))
    with Board() as board:
        line = shlex.join(map(str, [*command, exchange, *workload, "--only", only, *board, "--out", out]))
        finished = subprocess.run(
            ["ip", "netns", "exec", cluster.names[0], "unshare", "--uts", "sh", "-c", f"hostname {cluster.names[0]}; exec {line}"],
            env=dict(os.environ, **ENVIRONMENT), capture_output=True, text=True, timeout=options.limit, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"internode.py: mpirun ended with exit code {finished.returncode}: {finished.stderr[-1000:]}")
    report = json.loads(out.read_text())
    report["command"] = " ".join(["mpirun", *MPI, *options.mpi, "--host", hosts])
    return report


def low_latency_bytes(ours, num_ranks):
    """What one rank puts in a low-latency round trip on average: there, and back."""
    for op in ours["operations"]:
        if op["name"] == "ll_round_trip_fp8_bf16":
            return [max(16, int(share) // 16 * 16) for share in (op["there_bytes_all_ranks"] / num_ranks, op["back_bytes_all_ranks"] / num_ranks)]
    return None


def measure(options):
    sizes = [int(size) for size in options.nodes.split(",")]
    num_ranks, num_rails = sum(sizes), max(sizes)
    workload = ["--tokens", str(options.tokens), "--hidden", str(options.hidden), "--experts", "256", "--topk", "8", "--routing", "groups",
                "--reps", str(options.reps), "--ll-reps", str(options.ll_reps)]
    report = {}
    with Cluster(sizes) as cluster, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.which("iperf3") and not options.skip_network:
            connections = (num_rails, num_rails * num_rails)
            report["iperf3"] = [iperf3(cluster, number, options.seconds) for number in connections]
        with Board() as board:
            report["ours"] = ranks_of(cluster, "internode_exchange", ["--ranks-per-node", options.nodes, *workload, "--only", ",".join(options.only), *board], options, folder / "ours.json")
        if "iperf3" in report:  # again, for the machine may have become faster or slower: the faster one counts
            report["iperf3"] = [faster(before, iperf3(cluster, before["connections"], options.seconds)) for before in report["iperf3"]]
        if not options.skip_mpi:
            report["mpi"] = mpi(cluster, workload, options, folder)
        both = low_latency_bytes(report["ours"], num_ranks)
        if both and not options.skip_network:
            raw = ["--provider", options.provider, "--there", str(both[0]), "--back", str(both[1]), "--seconds", "3"]
            report["raw"] = ranks_of(cluster, "fabric_raw", raw, options, folder / "raw.json")
    return report


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release", help="build tree with the programs")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON report")
    parser.add_argument("--name", default="", help="name of this machine in the report's file name; default: made from its processor")
    parser.add_argument("--provider", default="tcp;ofi_rxm", help="libfabric provider between the nodes")
    parser.add_argument("--nodes", default="4,4", help="ranks of each node")
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank")
    parser.add_argument("--hidden", type=int, default=7168, help="channels of a token")
    parser.add_argument("--reps", type=int, default=10, help="measured repetitions of the large calls")
    parser.add_argument("--ll-reps", type=int, default=60, help="measured repetitions of the low-latency calls")
    parser.add_argument("--seconds", type=int, default=3, help="of each iperf3 run")
    parser.add_argument("--only", nargs="+", default=list(MPI_NAMES), choices=list(MPI_NAMES), help="operations")
    parser.add_argument("--mpi", nargs="*", default=[], help="more options for mpirun")
    parser.add_argument("--skip-mpi", action="store_true", help="without the comparison with Open MPI")
    parser.add_argument("--skip-network", action="store_true", help="without iperf3 and the network alone")
    parser.add_argument("--limit", type=float, default=180, help="seconds for one program")
    return parser.parse_args()


def main():
    options = arguments()
    options.build = options.build.resolve()
    if os.geteuid() != 0:
        sys.exit("internode.py: network namespaces need root")
    if program(options.build, "internode_exchange") is None:
        sys.exit(f"internode.py: no internode_exchange in {options.build}; build the preset 'release' first")
    now = datetime.datetime.now(datetime.timezone.utc)
    report = {"date": now.isoformat(timespec="seconds"), "commit": commit(), "machine": machine(), "load_before": os.getloadavg()[0],
              "provider": options.provider}
    report |= measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"internode_{options.name or short_name(report['machine'])}_{now:%Y-%m-%d}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(internode_tables.as_text(report))
    print(f"\nReport: {file}")


if __name__ == "__main__":
    main()
