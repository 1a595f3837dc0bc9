# SPDX-License-Identifier: MIT
"""What README.md shows in Python runs as it stands."""

import os
import pathlib
import re
import subprocess
import sys

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"


def test_the_example_of_the_readme_runs_on_two_ranks(tmp_path):
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    program = tmp_path / "moe.py"
    program.write_text(block)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    # The handler says where, should a process abort.
    speaking = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=speaking)
    assert done.returncode == 0, done.stderr
    # What two ranks print at once may share a line.
    assert done.stdout.count("torch.Size([16, 512])") == 2, done.stdout
