# SPDX-License-Identifier: MIT
"""The environment build/python, with torch and this tree's package installed as a user would install it; and frameworks that
call the package, each of one version, without what they depend on, in a folder of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "python"
TORCH = "torch==2.13.0"
MPI4PY = "mpi4py>=4.1"  # from this version on its wheels find the machine's MPI when they are loaded

# What pip gets for each framework of tests/frameworks: its own package, and those few that the modules under test import.
FRAMEWORKS = {
    "megatron": ("megatron-core==0.16.1",),
}
SMALL_FRAMEWORKS = ("megatron",)  # a download of some megabytes: `make test` runs their tests too


def run(*command):
    print("+", " ".join(map(str, command)), flush=True)
    return subprocess.run(command, cwd=ROOT).returncode == 0


def prepare():
    """The interpreter; None where something could not be installed, which pip has said by then."""
    python = HOME / "bin" / "python"
    made = python.exists() or run(sys.executable, "-m", "venv", HOME)
    # Where nvcc is but no GPU, its kernels would be compiled for nothing: the preset `cuda` compiles them in the tests.
    no_gpu = () if shutil.which("nvidia-smi") else ("-C", "cmake.define.DEEP_EP_CUDA=OFF")
    if not (made and run(python, "-m", "pip", "install", "-q", *no_gpu, TORCH, ".[test]")):
        return None
    if shutil.which("mpirun"):
        run(python, "-m", "pip", "install", "-q", MPI4PY)  # without it a test is skipped and says so
    return python


def install_framework(python, name):
    """The folder to put into PYTHONPATH; None where pip could not install it, which it has said by then."""
    folder, packages = ROOT / "build" / "frameworks" / name, FRAMEWORKS[name]
    installed = folder / "installed.txt"
    if installed.is_file() and installed.read_text().split() == list(packages):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    if not run(python, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *packages):
        return None
    installed.write_text("\n".join(packages) + "\n")
    return folder
