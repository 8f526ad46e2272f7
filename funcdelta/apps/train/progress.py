"""Progress on the terminal: a bar, or nothing with --quiet."""

from __future__ import annotations

from typing import Protocol


class Bar(Protocol):
    """What the job tells a bar."""

    def advance(self, count: int = 1) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class SilentBar:
    """A bar that shows nothing.

    >>> SilentBar().advance(3)
    """

    def advance(self, count: int = 1) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TerminalBar:
    """A tqdm bar on stderr."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=done, desc=what, dynamic_ncols=True)

    def advance(self, count: int = 1) -> None:
        self._bar.update(count)

    def note(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self._bar.close()


def bar(what: str, total: int, done: int = 0, quiet: bool = False) -> Bar:
    """A bar for ``total`` pieces of work, of which ``done`` are done already.

    >>> bar("training", 60, quiet=True).advance()
    """
    return SilentBar() if quiet else TerminalBar(what, total, done)
