"""One function over many items on all cores.

The workers are processes that are started anew (spawn), so the same on every system. They ignore Ctrl-C: the
parent hears of it and ends them. One that dies, for want of memory for instance, ends the work with an error.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDiedError(RuntimeError):
    """A process is gone."""


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(Generic[Item, Result]):
    """So many processes, each with the function; as a context, which ends them."""

    def __init__(self, function: Callable[[Item], Result], count: int) -> None:
        """`function` is pickled, once for each process. With one, or none, this process does the work."""
        self._function = function
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        if count < 2:
            return
        context = get_context("spawn")
        # A process is born ignoring what its parent ignores: before it can say so itself, Ctrl-C would end it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, function), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        finally:
            signal.signal(signal.SIGINT, before)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def over(self, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """(place of the item, what the function makes of it), as they get ready; they are begun in their order.

        Raises what the function raises, and WorkerDiedError. After that, and if it is left before its end, the
        workers are of no more use.
        """
        if not self._pipes:
            for place, item in enumerate(items):
                yield place, self._function(item)
            return
        todo = iter(enumerate(items))
        busy: list[Connection] = []
        for pipe, (place, item) in zip(self._pipes, todo, strict=False):
            self._send(pipe, (place, item))
            busy.append(pipe)
        while busy:
            for ready in wait(busy):
                assert isinstance(ready, Connection)
                place, result, error = self._receive(ready)
                if error is not None:
                    raise error
                following = next(todo, None)
                if following is None:
                    busy.remove(ready)
                else:
                    self._send(ready, following)
                yield place, result

    def close(self) -> None:
        """End all processes, whatever they do."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _send(self, pipe: Connection, task: tuple[int, Item]) -> None:
        try:
            pipe.send(task)
        except OSError:
            raise self._died(pipe) from None

    def _receive(self, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except (EOFError, OSError):
            raise self._died(pipe) from None

    def _died(self, pipe: Connection) -> WorkerDiedError:
        process = self._processes[self._pipes.index(pipe)]
        process.join()
        return WorkerDiedError(
            f"a worker process ended with exit code {process.exitcode}; with --jobs fewer share the memory"
        )


def _work(pipe: Connection, function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):  # the parent has gone
        while True:
            place, item = pipe.recv()
            try:
                answer: tuple[Any, ...] = place, function(item), None
            except Exception as error:  # whatever it is, the parent raises it
                answer = place, None, error
            pipe.send(answer)
