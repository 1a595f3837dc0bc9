#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs the benchmark programs on this machine, merges their reports into one JSON file and prints the table."""
import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import python_run
import tables

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--tokens", "256", "--ll-tokens", "16", "--hidden", "1024", "--reps", "10", "--ll-reps", "20"]
# Open MPI over its shared memory. Its defaults otherwise: the single-copy path (CMA) is on where the kernel allows it, and what else was
# tried is in docs/performance.md, under "Method".
MPI = ["--oversubscribe", "--mca", "pml", "ob1", "--mca", "btl", "self,vader"]


# Large pages for the ordinary memory of all programs; MPI gains most, its pack and receive buffers are such memory.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def first_match(path, pattern):
    """The first group of `pattern` in a file of the system; empty where there is none."""
    try:
        found = re.search(pattern, Path(path).read_text(), re.M)
    except OSError:
        return ""
    return found.group(1).strip() if found else ""


def output_of(command):
    """What a short command prints; empty where it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine():
    kib = first_match("/proc/meminfo", r"^MemTotal:\s*(\d+)")
    return {
        "cpu": first_match("/proc/cpuinfo", r"^model name\s*:\s*(.*)$") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(kib) * 1024 if kib else 0,
        "l3_cache": output_of(["getconf", "LEVEL3_CACHE_SIZE"]),
        "kernel": platform.release(),
        "system": first_match("/etc/os-release", r'^PRETTY_NAME="?([^"\n]*)'),
        "huge_pages": first_match("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(\w+)\]"),
        "huge_pages_shared": first_match("/sys/kernel/mm/transparent_hugepage/shmem_enabled", r"\[(\w+)\]"),
    }


def commit():
    """The commit that was measured; what is not committed is said so."""
    head = output_of(["git", "rev-parse", "HEAD"])
    changed = output_of(["git", "status", "--porcelain", "--", "src", "include", "bench", "cmake"])
    return {"id": head if re.fullmatch(r"[0-9a-f]{40,64}", head) else "none", "changed_since": bool(changed)}


def program(build, name):
    """A program of the build tree, whichever folder its generator puts it in."""
    for place in (build / "bench" / name, build / name):
        if place.is_file():
            return place
    return None


def run_program(command, out):
    """Runs one program and reads its report."""
    env = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", **ENVIRONMENT)
    finished = subprocess.run([*map(str, command), "--out", str(out)], env=env, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"run.py: {Path(command[0]).name} ended with exit code {finished.returncode}")
    return json.loads(out.read_text())


def run_mpi(build, ranks, options, folder):
    """The comparison, or why there is none."""
    exchange, mpirun = program(build, "mpi_exchange"), shutil.which("mpirun")
    if exchange is None or mpirun is None:
        return {"missing": "mpi_exchange is not built" if exchange is None else "mpirun is not installed"}
    launch = [mpirun, *(["--allow-run-as-root"] if os.geteuid() == 0 else []), *MPI, "-np", str(ranks)]
    report = run_program([*launch, exchange, *options], folder / "mpi.json")
    report["command"] = " ".join(["mpirun", *launch[1:], "mpi_exchange"])
    return report


def disagreements(ours, mpi):
    """Operations whose results differ between the two programs: then they did not make the same exchange."""
    theirs = {op["name"]: op.get("digest") for op in mpi.get("operations", [])}
    for op in ours["operations"]:
        other = theirs.get(tables.mpi_name(op["name"]))
        if other and op["digest"] != other:
            yield op["name"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release", help="build tree with the programs")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON report")
    parser.add_argument("--name", default="", help="name of this machine in the report's file name; default: made from its processor")
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that it runs, its figures mean nothing")
    parser.add_argument("--no-mpi", action="store_true", help="without the comparison with Open MPI")
    parser.add_argument("--no-python", action="store_true", help="without the Python package")
    parser.add_argument("--ranks", type=int, default=4, help="ranks, each a process")
    parser.add_argument("more", nargs="*", help="more options for the programs, after --")
    return parser.parse_args()


def short_name(info):
    words = re.sub(r"\(R\)|\(TM\)|Processor|CPU|@.*", " ", info["cpu"]).split()
    return "_".join(re.sub(r"[^a-z0-9]", "", word.lower()) for word in words) + f"_{info['cores']}_cores"


def main():
    args = arguments()
    host = program(args.build, "host_exchange")
    if host is None:
        raise SystemExit(f"run.py: no host_exchange in {args.build}; build the preset 'release' first")
    options = [*(QUICK if args.quick else []), *args.more]
    now = datetime.datetime.now(datetime.timezone.utc)
    environment = {name: value for name, value in os.environ.items() if name.startswith("EP_")} | ENVIRONMENT
    report = {"date": now.isoformat(timespec="seconds"), "commit": commit(), "machine": machine(), "environment": environment, "quick": args.quick}
    with tempfile.TemporaryDirectory() as folder:
        report["load_before"], report["niceness"] = os.getloadavg()[0], os.nice(0)
        report["ours"] = run_program([host, "--ranks", args.ranks, *options], Path(folder) / "ours.json")
        report["mpi"] = {"missing": "left out"} if args.no_mpi else run_mpi(args.build, args.ranks, options, Path(folder))
    report["disagree"] = list(disagreements(report["ours"], report["mpi"]))
    args.out.mkdir(parents=True, exist_ok=True)
    kind = "quick" if args.quick else "host"
    file = args.out / f"{kind}_{args.name or short_name(report['machine'])}_{now:%Y-%m-%d}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(tables.as_text(report))
    print(f"\nReport: {file}")
    if not args.no_python:
        about = {key: report[key] for key in ("date", "commit", "machine", "environment", "quick")}
        same_options = ["--ranks", str(args.ranks), *options]
        python_run.run(host, same_options, about, file.with_name(file.name.replace(kind, "python" if kind == "host" else "quick_python", 1)))
    if report["disagree"]:
        raise SystemExit("run.py: results differ from MPI's in " + ", ".join(report["disagree"]))


if __name__ == "__main__":
    sys.exit(main())
