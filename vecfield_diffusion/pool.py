"""Items of work side by side, each on one thread: for operations that are too small to share among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def one_each(most: int | None = None) -> Iterator[Callable[..., Iterator[Any]]]:
    """Gives a `map` that works on as many items at once as torch has threads, each on one: in the order of the items.

    For operations that are too small to share among threads, on a CPU. On leaving, what has not begun is dropped.

    Arguments:
        most: Items at once, where each takes memory; None for as many as there are threads.
    """
    threads = torch.get_num_threads()
    workers = min(threads, most or threads)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
