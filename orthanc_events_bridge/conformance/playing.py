"""The way through it: what is sent, what the program is told and what is done to it, and what is expected then."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.conformance.broker import give_again, letters, send
from orthanc_events_bridge.conformance.events import Played
from orthanc_events_bridge.conformance.judging import Expected, differences, judge, judge_order, seen_as, some, steady
from orthanc_events_bridge.conformance.program import Begun, Program
from orthanc_events_bridge.conformance.rules import Verdicts, rules_of
from orthanc_events_bridge.conformance.settings import differing
from orthanc_events_bridge.errors import TransportConfigurationError

if TYPE_CHECKING:
    from orthanc_events_bridge.consumers.dead import Letter
    from orthanc_events_bridge.transports.base import Outgoing, Transport
    from orthanc_events_bridge.transports.options import TransportOptions

#: How often the program is to give an event in all, and the seconds without a word behind which another is given it: so
#: many that a slow machine is not taken for a frozen program.
ATTEMPTS_IN_ALL: Final = 3
ACK_WAIT: Final = 12
#: Seconds behind which the one comes again that is retried once.
RETRY: Final = 1.0
#: Seconds between two looks at the dead letters.
_LOOK: Final = 0.3


class Stopped(Exception):  # noqa: N818 -- no error: what comes next can't be played
    """The program doesn't do what has to be done before the rest can be played."""


class Play:
    """One run.

    :param transport: connected.
    :param options: it was made of.
    :param url: as the program is given it.
    :param name: the consumer's.
    :param patience: seconds for each step.
    :param tell: is told what is done now.
    """

    def __init__(
        self,
        transport: Transport,
        options: TransportOptions,
        url: str,
        name: str,
        command: Sequence[str],
        patience: float,
        tell: Callable[[str], object],
    ) -> None:
        self._transport = transport
        self._options: Any = options  # of one broker or another
        self._url = url
        self._name = name
        self._patience = patience
        self._tell = tell
        self.played = Played()
        self.program = Program(command, self.played.secret)
        self.verdicts = Verdicts(rules_of(self._options.type))
        self._told: dict[str, str] = {}
        self._published: dict[str, float] = {}

    async def run(self) -> Verdicts:
        """Play it all.

        :raises BridgeError: the program can't be started, or the broker doesn't do what it has to.
        """
        early = self.played.make("study.metadata-updated", study="before it was there")
        try:
            await self._publish([early])
            await self._main()
            await self._terminated()
            await self._killed()
            await self._begun_rightly(early)
            wrong = await differing(self._options, self._name)
            self.verdicts.check("P3", not wrong, wrong)
        except Stopped as stopped:
            self._tell(str(stopped))
        finally:
            await self.program.kill()
        if self.program.begun:
            self.verdicts.check("L5", not self.program.told, "in what it says beside is something of an event's data")
        return self.verdicts

    # What the steps share.

    async def _start(self, *, start: str = "new", name: str = "") -> None:
        told = {self.played.subject_of(self.played.sent[one]): what for one, what in self._told.items()}
        await self.program.start(
            {
                "BROKER_URL": self._url,
                "CONSUMER": name or self._name,
                "START": start,
                "MAX_ATTEMPTS": str(ATTEMPTS_IN_ALL),
                "ACK_WAIT": str(ACK_WAIT),
                "CONFORMANCE": json.dumps(told),
            }
        )
        if not await self.program.wait(lambda: self.program.ready, self._patience):
            code = None if self.program.running else await self.program.gone(self._patience)
            ended = "" if code is None else f", and has ended with exit code {code}"
            raise Stopped(f'the program never said {{"did": "ready"}}{ended}: nothing more can be played')

    async def _publish(self, events: Sequence[Outgoing]) -> None:
        now = time.monotonic()
        self._published |= {one.id: now for one in events}
        await send(self._transport, events, self._patience)

    async def _all_ended(self, ids: Iterable[str], rule: str, what: str) -> bool:
        """Wait until the handler of each has ended; what is missing is against the rule."""
        wanted = set(ids)

        def missing() -> set[str]:
            return wanted - {one for one, _, _ in self.program.ended}

        if await self.program.wait(lambda: not missing(), self._patience):
            return True
        left = [self._spelt(one) for one in self.played.sent if one in missing()]
        ended = "" if self.program.running else "; the program has ended by itself"
        self.verdicts.against(rule, f"{what}: {some(left)} {'was' if len(left) == 1 else 'were'} not handled{ended}")
        return False

    def _spelt(self, identifier: str) -> str:
        event = self.played.expected.get(identifier, {})
        return f"{event.get('type', 'an event')} {identifier}"

    def _begun(self, identifier: str) -> list[Begun]:
        return [one for one in self.program.begun if one.id == identifier]

    async def _dead(self, fits: Callable[[list[Letter]], object]) -> list[Letter]:
        """The dead letters, as soon as they fit, or the patience is over."""
        end = time.monotonic() + self._patience
        while True:
            try:
                found = await letters(self._transport, self._name)
            except TransportConfigurationError as error:
                self.verdicts.against("P3", error.message)
                raise Stopped("its dead letters can't be read: nothing more can be played") from error
            if fits(found) or time.monotonic() > end:
                return found
            await self.program.wait(lambda: False, _LOOK)

    # The steps.

    async def _main(self) -> None:
        played, verdicts, tell = self.played, self.verdicts, self._tell
        every, unheard, malformed = played.every_type(), played.unheard(), played.malformed()
        keyed = played.of_keys(("a", "b", "c"), 8)
        retry, later, reject, fail = (played.told(one) for one in ("retry", "later", "reject", "fail"))
        self._told = {retry.id: "retry", later.id: "later", reject.id: "reject", fail.id: "fail"}
        tell("starting the program")
        await self._start()
        events = [retry, later, fail, reject, *malformed, *every, *unheard, *keyed]
        tell(f"playing {len(events)} events: every type in both modes, malformed ones, retries, several keys")
        await self._publish(events)
        for rule, binary in (("D1", False), ("D2", True)):
            ids = [one.id for one in every if (one.id in played.binary) is binary]
            if await self._all_ended(ids, rule, "of all types"):
                self._compare(rule, ids)
        # Whoever has no handler for a type acknowledges it: that need not be said.
        await self._all_ended([one.id for one in (unheard[-1], *keyed)], "D3", "with an unknown attribute, and of keys")
        self._compare("D3", [unheard[-1].id])
        await self._retried(retry, fail)
        verdicts.check("S3", self._attempts(later)[-1:] <= [1], "a retry in an hour came again within minutes")
        judge_order(verdicts, self.program, [*keyed, *every])
        await self._buried(reject, fail, malformed, unheard)
        await self._given_again(reject)

    def _compare(self, rule: str, ids: Iterable[str]) -> None:
        for identifier in ids:
            begun = self._begun(identifier)
            if begun:
                wrong = differences(self.played.expected[identifier], begun[0].event)
                self.verdicts.check(rule, not wrong, f"{self._spelt(identifier)}: {'; '.join(wrong)}")

    async def _retried(self, retry: Outgoing, fail: Outgoing) -> None:
        program, verdicts = self.program, self.verdicts
        await program.wait(lambda: self._attempts(retry)[-1:] > [1], self._patience)
        attempts = self._attempts(retry)
        right = steady(attempts) and attempts[-1] > 1
        verdicts.check("S2", right, f"it was to be given as attempts 1 and 2, and came as {attempts}")
        if right:
            again = next(one for one in self._begun(retry.id) if one.attempt > 1)
            waited = again.at - self._published[retry.id]
            verdicts.check("S2", waited >= RETRY, f"it was due {RETRY:g} s later, and came after {waited:.2f} s")
        await program.wait(lambda: self._attempts(fail)[-1:] >= [ATTEMPTS_IN_ALL], self._patience)

    def _attempts(self, event: Outgoing) -> list[int]:
        return [one.attempt for one in self._begun(event.id)]

    async def _buried(
        self, reject: Outgoing, fail: Outgoing, malformed: Sequence[Outgoing], unheard: Sequence[Outgoing]
    ) -> None:
        verdicts = self.verdicts
        self._tell("looking at its dead letters")
        wanted = {one.body: one for one in (reject, fail, *malformed)}
        dead = await self._dead(lambda found: wanted.keys() <= {one.letter.message.body for one in found})
        by_body = {one.letter.message.body: one for one in dead}
        for one in malformed:
            verdicts.check("D4", one.body in by_body, f"{one.body[:40]!r} is not among the dead letters, to the byte")
        verdicts.check("S4", reject.body in by_body, "what was rejected is not among the dead letters, to the byte")
        attempts = self._attempts(fail)
        right = steady(attempts) and attempts[-1] == ATTEMPTS_IN_ALL
        verdicts.check("S5", right, f"what fails came as attempts {attempts}, and not as 1 to {ATTEMPTS_IN_ALL}")
        verdicts.check("S5", fail.body in by_body, "what fails is not among the dead letters")
        for body, event in wanted.items():
            if body in by_body:
                given = ATTEMPTS_IN_ALL if event is fail else max([1, *self._attempts(event)])
                address, prefix = seen_as(self._options, event)
                expected = Expected(
                    *(event, self._name, address, prefix, given), failed=event is fail, secret=self.played.secret
                )
                judge(verdicts, by_body[body], expected)
        # What others send there at the same time is not ours to judge.
        strangers = {one.id for one in dead if one.letter.message.body not in wanted} & self.played.sent.keys()
        unheard_of = {one.id for one in unheard}
        verdicts.check("D3", not unheard_of & strangers, "an event of an unknown type is a dead letter")
        others = [self._spelt(one) for one in strangers - unheard_of]
        verdicts.check("S4", not others, f"among the dead letters is what was not rejected: {some(others)}")

    async def _given_again(self, reject: Outgoing) -> None:
        self._tell("giving it a dead letter again")
        before = len(self._begun(reject.id))
        try:
            await give_again(self._transport, self._name, reject.body)
        except TransportConfigurationError as error:
            self.verdicts.against("P3", error.message)
        await self.program.wait(lambda: len(self._begun(reject.id)) > before, self._patience)
        again = self._begun(reject.id)[before:]
        self.verdicts.check("S7", again, "a dead letter that was given again was not handled")
        if again:
            self.verdicts.check("S7", again[0].attempt == 1, f"its attempts begin anew, and it was {again[0].attempt}")
            letters_then = await self._dead(lambda some: any(one.letter.message.body == reject.body for one in some))
            back = any(one.letter.message.body == reject.body for one in letters_then)
            self.verdicts.check("S7", back, "rejected once more it is no dead letter any more")

    async def _terminated(self) -> None:
        """SIGTERM while a handler is at work, a retry waits, and others are to come."""
        played, program, verdicts = self.played, self.program, self.verdicts
        # Of one key: each begins when the one before ends.
        slow, _, last = slows = [played.told("slow") for _ in range(3)]
        others = played.of_keys((f"key {number}" for number in range(20)), 3)
        waiting = played.told("retry")
        self._told |= dict.fromkeys((one.id for one in slows), "slow") | {waiting.id: "retry"}
        await self._end("L1")  # what is to be slow is told at the start
        await self._start()
        self._tell("ending it by SIGTERM in the middle")
        await self._publish([waiting, *slows, *others])
        if not await program.wait(lambda: self._begun(slow.id) and self._begun(waiting.id), self._patience):
            verdicts.against("L1", "the event was not handled during which it was to be ended")
            raise Stopped("the program handles nothing more")
        await self._end("L1")
        ended = {one for one, _, _ in program.ended}
        verdicts.check("L1", slow.id in ended, "a handler that was at work was not let end")
        verdicts.check("L1", not self._begun(last.id), "seconds after SIGTERM handlers were begun still")
        for one in slows:
            del self._told[one.id]
        late = played.of_keys(("while it is away",), 3)
        await self._publish(late)
        before = len(program.begun)
        await self._start()
        left = [one.id for one in (*slows, *others, *late)]
        await self._all_ended(left, "L2", "of what was left and came meanwhile")
        judge_order(verdicts, program, slows, given_back=True)
        await program.wait(lambda: self._attempts(waiting)[-1:] > [1], self._patience)
        attempts = self._attempts(waiting)
        verdicts.check("S3", attempts[-1:] > [1], f"a retry that waited when it was ended came as attempts {attempts}")
        settled = ended - self._told.keys()
        again = {one.id for one in program.begun[before:]} & settled
        # A connection that is lost brings again what was settled just then; that is no fault.
        verdicts.check("L2", slow.id not in again, "the event came again whose handler was let end")
        few = len(again) <= len(settled) // 10
        verdicts.check("L2", few, f"what was settled came again: {some([self._spelt(one) for one in sorted(again)])}")

    async def _end(self, rule: str) -> None:
        code = await self.program.end(self._patience)
        said = "it has not ended" if code is None else f"its exit code is {code}"
        self.verdicts.check(rule, code == 0, f"SIGTERM: {said}")

    async def _killed(self) -> None:
        """kill -9 while a handler is at work, and others are to come."""
        played, program, verdicts = self.played, self.program, self.verdicts
        hang = played.told("hang")
        others = played.of_keys((f"key {number}" for number in range(20, 40)), 3)
        self._told[hang.id] = "hang"
        await self._end("L1")
        await self._start()
        self._tell("ending it by kill -9 in the middle")
        await self._publish([hang, *others])
        if not await program.wait(lambda: self._begun(hang.id), self._patience):
            verdicts.against("L3", "the event was not handled during which it was to be killed")
            raise Stopped("the program handles nothing more")
        await program.kill()
        before = len(self._begun(hang.id))
        del self._told[hang.id]
        await self._start()
        came = await program.wait(lambda: len(self._begun(hang.id)) > before, self._patience)
        verdicts.check("S1", came, "an event whose handler was killed did not come again")
        counts = self._options.type != "kafka"  # which does not know
        attempts = self._attempts(hang)[before:]
        right = not (counts and came) or attempts[0] > 1
        verdicts.check("S5", right, f"an event whose handler was killed came again as attempt {attempts[:1]}")
        verdicts.shown.add("L3")
        await self._all_ended([hang.id, *(one.id for one in others)], "L3", "after kill -9")
        await self._end("L1")
        later = next(played.sent[one] for one, what in self._told.items() if what == "later")
        attempts = self._attempts(later)
        verdicts.check("S3", attempts[-1:] == [1], f"a retry in an hour came as attempts {attempts}")

    async def _begun_rightly(self, early: Outgoing) -> None:
        """Another name begins with the oldest event; what the first was not given is among the old ones."""
        program, verdicts = self.program, self.verdicts
        verdicts.check(
            "P5", not self._begun(early.id), "START=new, and it was given what was sent before its first start"
        )
        self._tell("starting it under another name, to begin with the oldest event")
        self._told.clear()
        await self._start(start="oldest", name=f"{self._name}-oldest")
        came = await program.wait(lambda: self._begun(early.id), self._patience)
        verdicts.check("P5", came, "START=oldest, and it was not given what was sent before its first start")
        await self._end("L1")
