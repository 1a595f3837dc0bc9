# SPDX-License-Identifier: MIT
"""NCCL communicators, which this library does not need: the names exist and hold nothing."""

from typing import Any


class NCCLCommHandle:
    def __init__(self, comm: int = 0) -> None:
        self.comm = comm

    def get(self) -> int:
        return self.comm


def get_nccl_comm_handle(group: Any) -> NCCLCommHandle:
    return NCCLCommHandle()


def destroy_all_managed_nccl_comm() -> None:
    """There are none."""
