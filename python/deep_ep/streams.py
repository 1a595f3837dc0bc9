# SPDX-License-Identifier: MIT
"""Which stream an operation runs on, what it waits for and who waits for it: the same rules for every call of both APIs.

On a GPU operations run on the buffer's communication stream. It waits for all that is enqueued on the caller's current
stream, or only for `previous_event`. After a synchronous call the current stream waits for it; an asynchronous one returns an
event instead."""

from typing import Any, Tuple

import torch

from .event import EventHandle, EventOverlap, event_of, finished, wait_for


class HostCall:
    """An operation on CPU tensors: complete when it returns."""

    def __init__(self, previous_events: Tuple[Any, ...], asynchronous: bool) -> None:
        for event in previous_events:
            wait_for(event)
        self._asynchronous = asynchronous

    def __enter__(self) -> "HostCall":
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def finished(self, *tensors: Any) -> EventOverlap:
        return finished(self._asynchronous, *tensors)

    def results(self, *tensors: Any) -> None:
        pass


class CudaCall:
    """An operation on CUDA tensors, enqueued. Inside its `with` block the communication stream is torch's current one."""

    def __init__(self, session: Any, stream: Any, previous_events: Tuple[Any, ...], asynchronous: bool) -> None:
        self._session, self._stream, self._asynchronous = session, stream, asynchronous
        self._user = torch.cuda.current_stream(stream.device)
        self._events = tuple(event_of(event) for event in previous_events)
        self._inside = torch.cuda.stream(stream)

    def __enter__(self) -> "CudaCall":
        if self._events[0] is None and self._user != self._stream:
            self._stream.wait_stream(self._user)
        for event in self._events:
            if event is not None:
                event.let_wait(self._stream)
        self._session.use_streams(self._stream, self._user)
        self._inside.__enter__()
        self._session.in_call = True
        return self

    def __exit__(self, *exception: Any) -> None:
        self._session.in_call = False
        self._inside.__exit__(*exception)

    def finished(self, *tensors: Any) -> EventOverlap:
        """`tensors`: what the caller handed in. Torch must not give their memory to others before the stream is done with
        it; outputs of the library look after themselves."""
        if not self._asynchronous:
            if self._user != self._stream:
                self._user.wait_stream(self._stream)
            return EventOverlap()
        _record(tensors, self._stream)
        return EventOverlap(EventHandle.on(self._stream), tensors or None)

    def results(self, *tensors: Any) -> None:
        """Tensors that torch made inside the `with` block and that go out to the caller."""
        _record(tensors, self._user)


def _record(tensors: Tuple[Any, ...], stream: Any) -> None:
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            tensor.record_stream(stream)
