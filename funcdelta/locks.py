"""A reentrant lock that is free in a forked child, even if another thread held it when the process forked.

``os.fork`` copies the process's memory but only the thread that called it. In the child, a lock that another thread
held would stay held by a thread that does not exist, and the first call that needs it would wait forever. Data loaders
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


# A subclass of the lock written in C, not a wrapper: between a wrapper's acquire() and the body of its ``with``, Python
# could raise KeyboardInterrupt, and the lock would stay held.
class ForkSafeLock(_RLOCK):
    """An ``RLock`` that is free in a forked child, unless the thread that forked holds it itself.

    Copies and pickles are new, free locks.
    """

    def __init__(self) -> None:
        _locks.add(self)

    def __reduce__(self) -> Any:
        return ForkSafeLock, ()


def fork_safe_lock() -> ForkSafeLock:
    """A new reentrant lock; in a forked child it is free, unless the thread that forked holds it.

    What it guards must be consistent at every moment, not only while the lock is free: the child finds it in the state
    in which the other thread was changing it when the process forked.

    >>> lock = fork_safe_lock()
    >>> with lock, lock:
    ...     lock.acquire(blocking=False)
    True
    >>> lock.release()
    """
    return ForkSafeLock()


def _free_in_the_child() -> None:
    for lock in list(_locks):
        # The thread that forked continues in the child, perhaps inside ``with lock``, and will release it.
        if not lock._is_owned():
            lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_free_in_the_child)
