"""A reentrant lock that a forked child finds free, whoever held it when the process forked.

``os.fork`` copies the memory of a process and only the thread that called it. A lock that any other thread held is
held in the child for good, by a thread that is not there, and the first call that wants it waits forever. Data loaders
and web servers fork while other threads work, so every lock that outlives a call is made here.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

__all__ = ["ForkSafeLock", "fork_safe_lock"]


_RLOCK: Any = type(threading.RLock())
_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


# Derived from the lock written in C, not wrapped around it: between a wrapper's acquire() and the body of its ``with``
# Python may raise KeyboardInterrupt, and the lock would stay held.
class ForkSafeLock(_RLOCK):
    """An ``RLock`` that is free in a forked child, unless the thread that forked holds it itself.

    Copies and pickles of it are locks of their own, and free.
    """

    def __init__(self) -> None:
        _locks.add(self)

    def __reduce__(self) -> Any:
        return ForkSafeLock, ()


def fork_safe_lock() -> ForkSafeLock:
    """A new reentrant lock; in a forked child it is free, unless the thread that forked holds it.

    What it guards must be whole at every moment, not only while the lock is free: the child finds it as the other
    thread had left it when the process forked.

    >>> lock = fork_safe_lock()
    >>> with lock, lock:
    ...     lock.acquire(blocking=False)
    True
    >>> lock.release()
    """
    return ForkSafeLock()


def _free_in_the_child() -> None:
    for lock in list(_locks):
        # The thread that forked goes on in the child, perhaps inside ``with lock``, which it will leave.
        if not lock._is_owned():
            lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_free_in_the_child)
