# SPDX-License-Identifier: MIT
"""Events of DeepEP's API. On CPU tensors every operation is complete when it returns, and so is every event."""

from typing import Any, Callable, Optional, Tuple

import torch


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


class EventHandle:
    """A moment on the current stream: of CUDA, where the process uses it; else it lies in the past already."""

    def __init__(self) -> None:
        self._event: Any = None
        if _cuda_in_use():
            self._event = torch.cuda.Event()
            self._event.record()

    @classmethod
    def on(cls, stream: Any) -> "EventHandle":
        """A moment on that stream."""
        handle = cls.__new__(cls)
        handle._event = stream.record_event()
        return handle

    def current_stream_wait(self) -> None:
        """Makes the current stream wait for this moment."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def let_wait(self, stream: Any) -> None:
        """Makes `stream` wait."""
        if self._event is not None:
            stream.wait_event(self._event)


class EventOverlap:
    """What asynchronous calls return: an event, or none after a synchronous call. Usable in a `with` statement, whose
    end waits for the event."""

    # Defaults, which every call would set anew: most events are those of synchronous calls.
    hook_after_wait: Optional[Callable[[], None]] = None
    _release_handle = False

    def __init__(self, event: Optional[EventHandle] = None, extra_tensors: Optional[Tuple[Any, ...]] = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def __repr__(self) -> str:
        return f"EventOverlap({'None' if self.event is None else 'event'})"

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Makes the current stream wait for the event, then runs the registered hook."""
        assert self.event is not None, "there is no event: the call was synchronous"
        self.event.current_stream_wait()
        if self.hook_after_wait is not None:
            hook, self.hook_after_wait = self.hook_after_wait, None
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook: Callable[[], None]) -> None:
        """Runs `hook` once, after the next `current_stream_wait`."""
        assert self.hook_after_wait is None, "a hook is registered already"
        self.hook_after_wait = hook

    def __call__(self, release_handle: bool = False) -> "EventOverlap":
        self._release_handle = release_handle
        return self

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release_handle)
        self._release_handle = False


def event_of(previous_event: Any) -> Optional[EventHandle]:
    """Of an `EventOverlap` or an `EventHandle`; both APIs take both, and None."""
    return getattr(previous_event, "event", previous_event)


def wait_for(previous_event: Any) -> None:
    """Makes the current stream wait."""
    event = event_of(previous_event)
    if event is not None:
        event.current_stream_wait()


def finished(async_finish: bool, *tensors: Any) -> EventOverlap:
    """What a call returns whose work is done."""
    return EventOverlap(EventHandle(), tensors or None) if async_finish else EventOverlap()
