"""Heartbeats between ranks, so that a lost rank is noticed and named within a stated time.

A collective waits for a lost peer until its timeout, which is half an hour and cannot be short, because preparing,
saving and exporting may take hours. A heartbeat's can be short: a separate thread sends it, whatever the rank does.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Protocol

from smolconv.errors import MachineError, first_line

_LONGEST_INTERVAL_SECONDS = 10.0
_BEATS_IN_SILENCE = 8  #: heartbeats that must fail in a row
_VERDICT = "smolconv/lost"


class LostRank(MachineError):
    """A rank shows no sign of life: it was stopped, or its node died or cannot be reached."""


class Store(Protocol):
    """The methods that a heartbeat needs of the rendezvous store."""

    def set(self, key: str, value: str, /) -> None: ...

    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


def _key(rank: int) -> str:
    return f"smolconv/alive/{rank}"


def announce(store: Store, rank: int) -> None:
    """Set the key that the others read first. Every rank must call this before the ranks wait for each other."""
    store.set(_key(rank), f"0 {socket.gethostname()}")
    if rank == 0:
        store.set(_VERDICT, "-")


class Heartbeat:
    """Two threads, which run from the rendezvous until the ranks have finished.

    Each rank increments its own key in the store. Rank 0 reads all keys; the others read only rank 0's key and its
    verdict, so the store serves two small requests per rank every few seconds. Times are local: clocks of different
    nodes are never compared. ``end`` is called once, on one of the threads, and must not return.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, *, silence_seconds: float, end: Callable[[LostRank], object]
    ) -> None:
        self.doing = "its start"  #: current phase, for the message
        self._store, self._rank, self._silence, self._end = store, rank, silence_seconds, end
        self._watched = [other for other in range(world_size) if other != rank] if rank == 0 else [0]
        self._interval = min(_LONGEST_INTERVAL_SECONDS, silence_seconds / _BEATS_IN_SILENCE)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._said: dict[int, bytes] = {}
        self._heard = dict.fromkeys(self._watched, time.monotonic())  #: when each key last changed
        self._verdict = ""

    def start(self) -> Heartbeat:
        # If the store's node is lost, requests hang for 15 minutes, so another thread watches the clock.
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name=f"heartbeat {work.__name__}", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop before the ranks end, which they do at different times."""
        self._over.set()

    def _beat(self) -> None:
        host, count, keys = socket.gethostname(), 0, [*map(_key, self._watched), _VERDICT]
        while not self._over.wait(self._interval):
            count += 1
            try:
                self._store.set(_key(self._rank), f"{count} {host}")
                *said, verdict = self._store.multi_get(keys)
            except RuntimeError:
                continue  # the store may have ended with rank 0; the timeout will show it
            now = time.monotonic()
            with self._lock:
                for rank, text in zip(self._watched, said):
                    if self._said.get(rank) != text:
                        self._said[rank], self._heard[rank] = text, now
                self._verdict = verdict.decode(errors="replace")

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(min(1.0, self._interval)):
            now = time.monotonic()
            with self._lock:
                if now - before > self._silence / 2:
                    # This process was stopped, or its machine slept, so it could not read any key.
                    self._heard = dict.fromkeys(self._watched, now)
                before = now
                lost = [rank for rank, heard in self._heard.items() if now - heard > self._silence]
                verdict = self._verdict if self._verdict not in ("", "-") else ""
            if verdict:
                self._end(LostRank(verdict))
                return
            if lost:
                message = self._name(lost)
                if self._rank == 0:
                    self._publish(message)
                    time.sleep(self._interval)  # the store may end with this process, and all must report the same
                self._end(LostRank(message))
                return

    def _publish(self, message: str) -> None:
        """Tell the others, within a few seconds or never: this rank may be the one that is cut off."""
        publishing = threading.Thread(target=self._try_to_set, args=(message,), daemon=True)
        publishing.start()
        publishing.join(self._interval)

    def _try_to_set(self, message: str) -> None:
        try:
            self._store.set(_VERDICT, message)
        except RuntimeError:
            return

    def _name(self, lost: Iterable[int]) -> str:
        by_host: defaultdict[str, list[int]] = defaultdict(list)
        for rank in lost:
            by_host[self._said.get(rank, b"").decode(errors="replace").partition(" ")[2] or "a node"].append(rank)
        named = "; ".join(f"{_ranks(ranks)} on {host}" for host, ranks in by_host.items())
        return (
            f"no sign of life for {self._silence:g} s from {named}, seen from {socket.gethostname()} in {self.doing}.\n"
            "Its node died, the network is cut, or the process was stopped "
            "(launch.silence_seconds).\nThe same command resumes from the last checkpoint, also on the remaining "
            "nodes if their ranks can divide the batch."
        )


def lost_connection(error: BaseException) -> LostRank | None:
    """The error for a collective whose connection to a peer broke: its node died, or it failed."""
    if type(error).__name__ == "DistBackendError" or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    ):
        return LostRank(f"the connection to another rank broke: {first_line(error)}")
    return None


def _ranks(ranks: list[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
