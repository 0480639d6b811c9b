"""How work that takes seconds tells how far it is. Who shows it is the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

#: A title and how much there is to do -> a context in which progress is told, by what was done since.
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress that nobody looks at."""
    yield lambda _: None
