"""The threads that sync handlers run in: daemons, so that one that never ends can't keep the process from leaving.

Those of `concurrent.futures.ThreadPoolExecutor` are waited for when Python ends.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

_T = TypeVar("_T")


class DaemonThreads(Executor):
    """Started as they are needed.

    :param count: at most so many.
    :param name: what theirs begin with.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0
        self._closed = False

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
            try:
                result = context.run(function, *args, **kwargs)
            except StopIteration as error:  # asyncio's futures refuse it, and whoever waits would wait for ever
                future.set_exception(
                    RuntimeError("the handler raised StopIteration").with_traceback(error.__traceback__)
                )
            except BaseException as error:  # it is for who waits for the result
                future.set_exception(error)
            else:
                future.set_result(result)

        self._work.put(work)
        if not self._idle.acquire(blocking=False) and self._started < self._count:
            self._started += 1
            threading.Thread(target=self._run, name=f"{self._name}-{self._started}", daemon=True).start()
        return future

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # while waiting, nothing of the handler's is kept
            self._idle.release()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let them end behind what they are at. They are never waited for."""
        self._closed = True
        if cancel_futures:
            while not self._work.empty():
                self._work.get()
        for _ in range(self._started):
            self._work.put(None)
