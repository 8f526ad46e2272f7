"""Locks over a fork: the child finds them free, the parent's stay as they are."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from funcdelta.locks import fork_safe_lock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system does not have")


def exit_code(child: Callable[[], bool]) -> int:
    """Of a forked process that runs ``child``: 0 where it gives True, 1 otherwise; 2 where it does not end in time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork while there are threads, which is the case here
        process = os.fork()
    if process == 0:
        code = 1
        try:
            code = 0 if child() else 1
        finally:
            os._exit(code)
    for _ in range(300):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, 9)
    os.waitpid(process, 0)
    return 2


@contextmanager
def held_elsewhere(*locks: Any) -> Iterator[None]:
    """Another thread holds them while the block runs."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        held.set()
        release.wait(4)
        for lock in locks:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(2)
    try:
        yield
    finally:
        release.set()
        thread.join(2)


def free(lock: Any) -> bool:
    """Whether this thread can have it, twice over, and gives it back."""
    got = [lock.acquire(timeout=0.5) for _ in range(2)]
    for _ in filter(None, got):
        lock.release()
    return all(got)


def test_a_child_finds_a_lock_free_that_another_thread_held() -> None:
    lock, plain = fork_safe_lock(), threading.RLock()
    with held_elsewhere(lock, plain):
        assert exit_code(lambda: free(lock)) == 0
        assert exit_code(lambda: free(plain)) == 1  # the case that it is for
        # And the parent's is held as before.
        assert not lock.acquire(blocking=False)
    assert free(lock)


def test_threads_of_the_child_exclude_each_other() -> None:
    lock = fork_safe_lock()

    def child() -> bool:
        with held_elsewhere(lock):
            refused = not lock.acquire(blocking=False)
        return refused and free(lock)

    with held_elsewhere(lock):
        assert exit_code(child) == 0


def test_the_thread_that_forks_keeps_what_it_holds() -> None:
    lock = fork_safe_lock()

    def refused_to_another() -> bool:
        got: list[bool] = []
        thread = threading.Thread(target=lambda: got.append(lock.acquire(blocking=False)))
        thread.start()
        thread.join(1)
        return got == [False]

    def child() -> bool:
        refused = refused_to_another()
        lock.release()
        refused &= refused_to_another()
        lock.release()
        return refused and free(lock)

    with lock, lock:
        assert exit_code(child) == 0
        assert refused_to_another()
    assert free(lock)


def test_a_child_of_a_child() -> None:
    lock = fork_safe_lock()

    def child() -> bool:
        with held_elsewhere(lock):
            return exit_code(lambda: free(lock)) == 0

    with held_elsewhere(lock):
        assert exit_code(child) == 0


def test_locks_are_not_kept_alive_and_are_made_while_others_are_dropped() -> None:
    lock = fork_safe_lock()
    gone = weakref.ref(lock)
    del lock
    gc.collect()
    assert gone() is None
    kept: list[Any] = []

    def make() -> None:
        for i in range(500):
            lock = fork_safe_lock()
            if i % 10 == 0:
                kept.append(lock)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    codes = [exit_code(lambda: all(free(lock) for lock in list(kept))) for _ in range(3)]
    for thread in threads:
        thread.join(3)
    assert codes == [0, 0, 0]
    assert len(kept) == 200


def test_copies_are_locks_of_their_own() -> None:
    lock = fork_safe_lock()
    with held_elsewhere(lock):
        for other in (copy.copy(lock), copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
            assert type(other) is type(lock)
            assert free(other)
            with held_elsewhere(other):
                assert exit_code(lambda other=other: free(other)) == 0
