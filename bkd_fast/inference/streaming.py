"""Pipeline stages that run concurrently on a stream of items, in order and with bounded memory."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from threadpoolctl import threadpool_limits

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


class Outcome(NamedTuple, Generic[A, D]):
    """What became of one item: ``result``, or the ``error`` that one of the stages raised for it."""

    item: A
    result: D | None
    error: Exception | None


def pipeline(
    items: Iterable[A],
    before: Callable[[A], B],
    together: Callable[[list[B]], list[C]],
    after: Callable[[A, C], D],
    *,
    batch: int,
    workers: int,
) -> Iterator[Outcome[A, D]]:
    """Three stages: ``before`` and ``after`` in ``workers`` threads, ``together`` on batches in the caller's thread.

    A batch is what the source has given, 1 to ``batch`` items: a slow source is not waited for, a fast one fills
    the batches. At most ``3 batch`` items are taken from the source beyond what the caller has
    received, however slow the caller is. Results come in the order of the items.

    Args:
        items: consumed in a separate thread; what it raises is raised after the results before it.

    Returns:
        An outcome for each item: an exception in ``before`` or ``after`` is that item's own, and the stream continues.
        One in ``together`` ends it.
    """
    source = _Source(items, batch)
    with ThreadPoolExecutor(workers, thread_name_prefix="stream", initializer=_single_threaded) as pool:
        source.start(lambda item: pool.submit(before, item))
        finished: deque[tuple[A, Future[D] | Exception]] = deque()
        try:
            for group in source.groups():
                made: list[tuple[A, B | Exception]] = [(item, _outcome(future)) for item, future in group]
                good = [(item, value) for item, value in made if not isinstance(value, Exception)]
                results = iter(together([value for _, value in good]) if good else [])
                for item, value in made:
                    if isinstance(value, Exception):
                        finished.append((item, value))
                    else:
                        finished.append((item, pool.submit(after, item, next(results))))
                # Wait for the last stage if it is a batch behind, or if there is nothing else to do.
                while finished and (len(finished) > batch or _ready(finished[0][1]) or source.idle()):
                    yield _received(source, finished)
            while finished:
                yield _received(source, finished)
            source.check()
        finally:
            source.stop()


def _single_threaded() -> None:
    """Limit a worker to one compute thread: more would compete with the network's, which spin while they wait."""
    torch.get_num_threads()  # which sets this thread's number, once
    threadpool_limits(1, user_api="openmp")


def _received(source: _Source[Any], finished: deque[tuple[Any, Any]]) -> Outcome[Any, Any]:
    item, state = finished.popleft()
    value = state if isinstance(state, Exception) else _outcome(state)
    source.release()
    if isinstance(value, Exception):
        return Outcome(item, None, value)
    return Outcome(item, value, None)


def _outcome(future: Future[B]) -> B | Exception:
    try:
        return future.result()
    except Exception as error:
        return error


def _ready(state: Any) -> bool:
    return isinstance(state, Exception) or state.done()


class _Source(Generic[A]):
    """Take items from an iterable in a thread, a bounded number ahead."""

    def __init__(self, items: Iterable[A], batch: int) -> None:
        self.items, self.batch = items, batch
        self.waiting: queue.SimpleQueue[tuple[A, Future[Any]] | None] = queue.SimpleQueue()
        self.budget = threading.Semaphore(3 * batch)
        self.stopped = threading.Event()
        self.error: BaseException | None = None

    def start(self, submit: Callable[[A], Future[Any]]) -> None:
        """Start the thread; ``submit`` starts the first stage of an item."""
        self.thread = threading.Thread(target=self._take, args=(submit,), name="stream source", daemon=True)
        self.thread.start()

    def _take(self, submit: Callable[[A], Future[Any]]) -> None:
        try:
            for item in self.items:
                self.budget.acquire()
                if self.stopped.is_set():
                    return
                self.waiting.put((item, submit(item)))
        except BaseException as error:  # for the caller's thread, where it is raised
            self.error = error
        finally:
            self.waiting.put(None)

    def groups(self) -> Iterator[list[tuple[A, Future[Any]]]]:
        """Yield the available items, at least one and at most a batch; wait only for the first."""
        ended = False
        while not ended:
            group: list[tuple[A, Future[Any]]] = []
            while len(group) < self.batch:
                try:
                    taken = self.waiting.get(block=not group)
                except queue.Empty:
                    break
                if taken is None:
                    ended = True
                    break
                group.append(taken)
            if group:
                yield group

    def idle(self) -> bool:
        """Return whether no item waits for a group."""
        return self.waiting.empty()

    def release(self) -> None:
        """Note that the caller has received an item."""
        self.budget.release()

    def check(self) -> None:
        """Raise what the iterable raised."""
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the thread, unless it waits for the iterable."""
        self.stopped.set()
        self.budget.release()
