#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes python/deep_ep/_core.pyi, the types of the extension, from the extension that is importable as deep_ep._core.

Needs nanobind; run it after a change of python/bindings. tests/python/test_stub.py says when it was forgotten."""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).resolve().parent.parent / "python" / "deep_ep" / "_core.pyi"
HEAD = '''# SPDX-License-Identifier: MIT
# Written by tools/make_stub.py. Tensors are torch's: Any, because the extension is built without torch.
from typing import Any, Optional
'''
ERROR = '''__version__: str

class Error(RuntimeError):
    """The only exception type that the library raises on purpose."""

    code: "ErrorCode"
    wait: Optional["WaitRecord"]
'''


def main():
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "_core.pyi"
        subprocess.run([sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "deep_ep._core", "-o", made], check=True)
        text = made.read_text()
    text = re.sub(r"^from deep_ep import Error as Error\n", ERROR, text, flags=re.M)
    text = re.sub(r"\bobject\b(?! \|)", "Any", text).replace("object | None", "Any")
    STUB.write_text(HEAD + re.sub(r"\n{3,}", "\n\n", text))


if __name__ == "__main__":
    main()
