"""aiormq, on which aio-pika stands, made to tell what it knows: its connection, its channel, its errors.

What aiormq 7.2 leaves to us, as measured: confirms of two messages with one id are swapped; a refusal while logging in
loses its text; an alarm is only logged; errors that nobody waits for are logged with their tracebacks; an error can
only be told from another by its class; a request that is cancelled in the moment in which the server closes its channel
closes it once more, for which the server ends the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import ssl
from collections.abc import Callable
from typing import Any, Final

import aiormq
import aiormq.connection
import pamqp.base
import pamqp.commands
import pamqp.frame
import pamqp.header
from aiormq.abc import ConfirmationFrameType, DeliveredMessage
from aiormq.exceptions import AMQPError

#: Frames of a channel that can wait to be looked at.
_FRAMES: Final = 1000

# What it says is in our own errors, and at DEBUG it would write down whole events.
logging.getLogger("aiormq").setLevel(logging.CRITICAL)


class ClosedError(Exception):
    """The server has closed a channel, or the connection while we logged in.

    :param code: AMQP's: 403 not permitted, 404 not found, 405 locked, 406 precondition failed …
    :param text: in the server's words.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text

    @property
    def missing(self) -> bool:
        """Whether there is no such queue or exchange. AMQP's number is the same where its node is only down."""
        return self.code == 404 and re.search(r"\bno (queue|exchange) '", self.text) is not None


class Amqp(aiormq.Connection):
    """aiormq's connection; tells of an alarm, and of what a refused login was refused for."""

    READER_CLOSE_TIMEOUT = 1
    on_blocked: Callable[[str], None]

    @staticmethod
    async def _rpc(
        request: pamqp.base.Frame,
        writer: asyncio.StreamWriter,
        frame_receiver: aiormq.connection.FrameReceiver,
        wait_response: bool = True,
    ) -> Any:
        writer.write(pamqp.frame.marshal(request, 0))
        await writer.drain()
        if not wait_response:
            return None
        _, _, frame = await frame_receiver.get_frame()
        if isinstance(frame, pamqp.commands.Connection.Close):
            raise ClosedError(frame.reply_code or 0, frame.reply_text or "")
        return frame

    # The names are those that Python gives to double underscores in `aiormq.Connection`.
    async def _Connection__handle_connection_blocked(  # noqa: N802
        self, frame: pamqp.commands.Connection.Blocked
    ) -> None:
        self.on_blocked(frame.reason or "an alarm")

    async def _Connection__handle_connection_unblocked(  # noqa: N802
        self, frame: pamqp.commands.Connection.Unblocked
    ) -> None:
        self.on_blocked("")


class Channel(aiormq.Channel):
    """aiormq's channel; hands over at once what the server says, without a task for each message.

    A callback is called in the server's order, and must not wait. What it raises is a defect: aiormq would end the
    channel for it, and tell nobody.

    :ivar fault: why the server has closed it.
    :ivar on_confirm: called with delivery tag, whether all before it are meant too, and whether it is an ack.
    :ivar on_return: called with an unroutable message.
    :ivar on_fault: called when the server has closed it.
    :ivar on_defect: called with what a callback has raised, or aiormq; nothing more is received.
    """

    fault: ClosedError | None = None

    def __init__(self, connection: aiormq.Connection, number: int, *, confirms: bool) -> None:
        super().__init__(connection, number, publisher_confirms=confirms, frame_buffer=_FRAMES)
        self.on_confirm: Callable[[int, bool, bool], None] = lambda tag, multiple, acked: None
        self.on_return: Callable[[DeliveredMessage], None] = lambda message: None
        self.on_fault: Callable[[ClosedError], None] = lambda fault: None
        self.on_defect: Callable[[Exception], None] = lambda defect: None
        self._receivers: dict[str, Callable[[DeliveredMessage], None]] = {}
        self._cancelled: dict[str, Callable[[], None]] = {}

    async def consume(
        self,
        queue: str,
        receive: Callable[[DeliveredMessage], None],
        cancelled: Callable[[], None],
        *,
        tag: str = "",
        arguments: dict[str, Any] | None = None,
        exclusive: bool = False,
    ) -> str:
        """Begin to receive from a queue; every message is to be acknowledged.

        :param receive: called with each message.
        :param cancelled: called when the server ends it: the queue was deleted.
        :param tag: the consumer's name on the server; made up if empty.
        :return: the consumer's name.
        :raises ClosedError: see `Connection.ask`, with which this is to be awaited.
        """
        tag = tag or f"{self.number}.{len(self._receivers)}"
        self._receivers[tag], self._cancelled[tag] = receive, cancelled
        await self.basic_consume(queue, _nothing, consumer_tag=tag, arguments=arguments, exclusive=exclusive)
        return tag

    async def _on_deliver_frame(self, frame: pamqp.commands.Basic.Deliver) -> None:
        message = await self._content(frame)
        receive = self._receivers.get(frame.consumer_tag or "")
        if receive is not None:
            receive(message)

    async def _on_cancel_frame(self, frame: pamqp.commands.Basic.Cancel | pamqp.commands.Basic.CancelOk) -> None:
        await super()._on_cancel_frame(frame)
        cancelled = self._cancelled.get(frame.consumer_tag or "")
        if isinstance(frame, pamqp.commands.Basic.Cancel) and cancelled is not None:
            cancelled()

    async def _on_return_frame(self, frame: pamqp.commands.Basic.Return) -> None:
        self.on_return(await self._content(frame))

    async def _content(self, frame: pamqp.commands.Basic.Deliver | pamqp.commands.Basic.Return) -> DeliveredMessage:
        header = await self._get_frame()
        assert isinstance(header, pamqp.header.ContentHeader)
        return await self._read_content(frame, header)

    async def _on_confirm_frame(self, frame: ConfirmationFrameType) -> None:
        multiple = bool(getattr(frame, "multiple", False))
        self.on_confirm(frame.delivery_tag or 0, multiple, isinstance(frame, pamqp.commands.Basic.Ack))

    async def _on_close_frame(self, frame: pamqp.commands.Channel.Close) -> None:
        self.fault = ClosedError(frame.reply_code or 0, frame.reply_text or "")
        self.on_fault(self.fault)
        await super()._on_close_frame(frame)

    # The names are those that Python gives to double underscores in `aiormq.Channel`.
    async def _Channel__close_after_failure(self, frame: pamqp.base.Frame | None) -> None:  # noqa: N802
        closing: asyncio.Event = self._Channel__close_event  # type: ignore[attr-defined]  # aiormq's
        if not closing.is_set():
            await super()._Channel__close_after_failure(frame)  # type: ignore[misc]  # aiormq's

    async def _on_close(self, exc: Any = None) -> None:
        if isinstance(exc, Exception) and not isinstance(exc, aiormq.exceptions.ChannelClosed):
            self.on_defect(exc)
        else:
            await super()._on_close(exc)

    async def _reader(self) -> None:
        with contextlib.suppress(Exception):  # it is told already; nobody looks at how this task ends
            await super()._reader()


async def _nothing(message: DeliveredMessage) -> None:
    """aiormq's own way to hand over a message, which we don't use."""


def closed(error: aiormq.exceptions.ChannelClosed) -> ClosedError:
    """aiormq tells by classes what the server tells by numbers."""
    codes: dict[type[BaseException], int] = {
        aiormq.exceptions.ChannelAccessRefused: 403,
        aiormq.exceptions.ChannelNotFoundEntity: 404,
        aiormq.exceptions.ChannelLockedResource: 405,
        aiormq.exceptions.ChannelPreconditionFailed: 406,
    }
    number = codes.get(type(error))
    if number is None:
        number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    return ClosedError(number, str(error.args[-1] if error.args else ""))


def chain(error: BaseException | None) -> list[BaseException]:
    """An error and those behind it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def words(error: BaseException | None) -> str:
    """The words of an error, without the numbers and addresses that Python puts around them."""
    if error is None or isinstance(error, asyncio.CancelledError):
        return ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error).replace("_", " ").lower()
    if isinstance(error, AMQPError) and isinstance(error.__cause__, OSError):
        return words(error.__cause__)
    if isinstance(error, OSError):
        # asyncio's own words name the address once more; those of a name's several addresses it puts into one text.
        # And aiormq's errors of this kind have a word where others have the number.
        numbers = (
            [error.errno]
            if isinstance(error.errno, int)
            else [int(one) for one in re.findall(r"\[Errno (\d+)\]", str(error))]
        )
        if numbers:
            told = (os.strerror(one) if one > 0 else error.strerror or "" for one in numbers)
            return ", ".join(dict.fromkeys(told))
    text = str(error.args[-1]) if isinstance(error, AMQPError) and error.args else str(error)
    return re.sub(r"^[A-Z_]+ - ", "", text) or type(error).__name__
