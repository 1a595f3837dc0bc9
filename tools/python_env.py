# SPDX-License-Identifier: MIT
"""The environment build/python, with torch and this tree's package installed as a user would install it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "python"
TORCH = "torch==2.13.0"


def run(*command):
    print("+", " ".join(map(str, command)), flush=True)
    return subprocess.run(command, cwd=ROOT).returncode == 0


def prepare():
    """The interpreter; None where something could not be installed, which pip has said by then."""
    python = HOME / "bin" / "python"
    made = python.exists() or run(sys.executable, "-m", "venv", HOME)
    return python if made and run(python, "-m", "pip", "install", "-q", TORCH, ".[test]") else None
