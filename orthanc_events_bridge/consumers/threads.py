"""The threads that handlers run in: daemons, so that one that never ends can't keep the process from leaving.

Those of `concurrent.futures.ThreadPoolExecutor` are waited for when Python ends.
"""

from __future__ import annotations

import contextvars
import functools
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

_T = TypeVar("_T")

#: As many as Python has for `asyncio.to_thread`.
USUAL: Final = min(32, (os.cpu_count() or 1) + 4)


class DaemonThreads(ThreadPoolExecutor):
    """Started as they are needed. Of the base class nothing is used: asyncio takes no other for `asyncio.to_thread`.

    :param count: at most so many.
    :param name: what theirs begin with.
    """

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, name)
        self._count = count
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(0)
        self._started = 0
        self._closed = False
        self._busy: dict[Future[Any], str] = {}

    @property
    def busy(self) -> list[str]:
        """The names of the functions that run now."""
        return sorted(self._busy.copy().values())

    def submit(self, function: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """Have a function called in a thread, with the caller's context.

        :raises RuntimeError: they are shut down.
        """
        if self._closed:
            raise RuntimeError("the threads of the handlers are shut down")
        future: Future[_T] = Future()
        context = contextvars.copy_context()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            self._busy[future] = _name(function)
            try:
                try:
                    result = context.run(function, *args, **kwargs)
                finally:
                    del self._busy[future]
            except StopIteration as error:  # asyncio's futures refuse it, and whoever waits would wait for ever
                future.set_exception(
                    RuntimeError("the handler raised StopIteration").with_traceback(error.__traceback__)
                )
            except BaseException as error:  # it is for who waits for the result
                future.set_exception(error)
            else:
                future.set_result(result)

        self._work.put(work)
        if not self._free.acquire(blocking=False) and self._started < self._count:
            self._started += 1
            threading.Thread(target=self._run, name=f"{self._name}-{self._started}", daemon=True).start()
        return future

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # while waiting, nothing of the handler's is kept
            self._free.release()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let them end behind what they are at. They are never waited for."""
        self._closed = True
        if cancel_futures:
            while not self._work.empty():
                self._work.get()
        for _ in range(self._started):
            self._work.put(None)


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        # `asyncio.to_thread` has it called in a context.
        in_context = isinstance(getattr(function.func, "__self__", None), contextvars.Context)
        return _name(function.args[0] if in_context and function.args else function.func)
    return str(getattr(function, "__qualname__", type(function).__name__))
