# SPDX-License-Identifier: MIT
"""`Buffer.runtime`: what outsiders ask of DeepEP's compiled object."""

import weakref
from typing import Any


class Runtime:
    def __init__(self, buffer: Any) -> None:
        self._buffer = weakref.ref(buffer)

    def _alive(self) -> Any:
        buffer = self._buffer()
        assert buffer is not None, "the buffer is gone"
        return buffer

    def is_available(self) -> bool:
        buffer = self._buffer()
        return buffer is not None and buffer._core is not None

    def get_num_rdma_ranks(self) -> int:
        return self._alive()._num_nodes

    def get_rdma_rank(self) -> int:
        buffer = self._alive()
        return buffer._rank // buffer._node_size

    def get_root_rdma_rank(self, global_: bool) -> int:
        buffer = self._alive()
        return buffer._rank % buffer._node_size if global_ else 0

    def get_local_device_id(self) -> int:
        buffer = self._alive()
        return buffer._rank % buffer._node_size

    def get_local_ipc_handle(self) -> bytes:
        """Empty: ranks map each other's memory while the buffer opens."""
        return b""

    def get_local_nvshmem_unique_id(self) -> bytes:
        """Empty: there is no NVSHMEM."""
        return b""

    def sync(self, *_: Any) -> None:
        """Nothing is left to do: a buffer that exists is connected."""

    def destroy(self) -> None:
        self._alive().close()
