"""Processes that measure cases side by side, each with its share of the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

Item, Found = TypeVar("Item"), TypeVar("Found")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """So many processes, begun when they are needed; one worker is this process itself.

    Leaving the context ends them: at once if by an exception, as by ctrl-C.
    """

    def __init__(self, jobs: int = 1) -> None:
        if jobs < 1:
            raise SystemExit(f"--jobs {jobs}: at least 1 process has to measure")
        self.threads = max(1, min(torch.get_num_threads(), cores() // jobs))  # of torch, in each worker
        self._pool = None
        if jobs > 1:
            context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in some state
            self._pool = ProcessPoolExecutor(jobs, context, _begin, (self.threads,))

    def completed(self, function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
        """The function's results in the order in which they are complete."""
        if self._pool is None:
            yield from map(function, items)
        else:
            yield from (future.result() for future in as_completed([self._pool.submit(function, i) for i in items]))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=False, cancel_futures=True)
        if kind is not None:
            for child in multiprocessing.active_children():
                child.terminate()
        self._pool.shutdown()


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches all processes; the first one ends the others
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next case for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
