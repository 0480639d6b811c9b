"""Prefetches the items of an iterator in a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetched(Iterator[T], Generic[T]):
    """Yields the items in order, and prefetches at most ``ahead``. Items must not be None or exceptions."""

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._ahead: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        # The thread holds no reference to this object, so it ends when the object is garbage-collected.
        self._thread = threading.Thread(
            target=_read_ahead, args=(items, self._ahead, self._stopped), name="data", daemon=True
        )
        self._thread.start()

    def __next__(self) -> T:
        item = None if self._stopped.is_set() else self._ahead.get()
        if item is not None and not isinstance(item, BaseException):
            return item
        self.close()
        raise StopIteration if item is None else item

    def close(self) -> None:
        """End the thread and any iteration that waits for it."""
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(queue.Full):
            self._ahead.put_nowait(None)

    def __del__(self) -> None:
        self._stopped.set()


def _read_ahead(items: Iterator[T], ahead: queue.Queue[T | BaseException | None], stopped: threading.Event) -> None:
    def hand_over(item: T | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ahead.put(item, timeout=0.1)
                return

    try:
        for item in items:
            hand_over(item)
            if stopped.is_set():
                return
        hand_over(None)
    except BaseException as error:
        hand_over(error)
