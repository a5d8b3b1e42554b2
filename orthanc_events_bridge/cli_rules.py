"""What the commands have in common that work by rules: questions in place of work, and why rules fit a resource."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from orthanc_events_bridge.cli_options import UsageError
from orthanc_events_bridge.cli_workers import Working, several, work
from orthanc_events_bridge.errors import GoneError

if TYPE_CHECKING:
    import httpx

    from orthanc_events_bridge.workflows.conditions import Verdict
    from orthanc_events_bridge.workflows.facts import Resource
    from orthanc_events_bridge.workflows.rules import Decision


_Program = TypeVar("_Program", bound=Working)


def add_rule_options(
    parser: argparse.ArgumentParser,
    dry_run: str,
    explain: str = "say which rules fit a resource that is there, and why: its Orthanc id or UID",
) -> argparse._MutuallyExclusiveGroup:
    """What commands know that have rules: questions in place of work.

    :param dry_run: what that does.
    :param explain: what that does.
    :return: for questions of their own.
    """
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="connect everywhere, say what was found, and leave")
    what.add_argument("--dry-run", action="store_true", help=dry_run)
    what.add_argument("--explain", metavar="ID", help=explain)
    parser.add_argument("--json", action="store_true", help="with a question that has an ID: for programs")
    return what


def answer_or_work(
    options: argparse.Namespace,
    command: str,
    make: Callable[[argparse.Namespace], _Program],
    **questions: Callable[[_Program, str, bool], Coroutine[Any, Any, int]],
) -> int:
    """Do what a command is told: answer a question, or work, in as many processes as are asked for.

    :param make: makes what works, by the options.
    :param questions: of each option that takes an id, what answers it, for programs or for people.
    :return: the exit code.
    :raises UsageError: nothing is asked that could be answered for programs; or there can't be so many processes.
    """
    asked = {name: getattr(options, name) for name in questions if getattr(options, name) is not None}
    if options.json and not asked:
        raise UsageError("--json says how to answer", f"say {' or '.join(f'--{name} ID' for name in questions)} too")
    if (code := several(options, command, alone=bool(options.check or options.dry_run or asked))) is not None:
        return code
    program = make(options)
    for name, identifier in asked.items():  # there is one
        return asyncio.run(questions[name](program, identifier, options.json))
    return work(options, program)


def show(resource: Resource, decision: Decision, *, as_json: bool) -> None:
    """Print what rules say of a resource."""
    if as_json:
        rules = [
            {"rule": rule.name, "fits": verdict.true, "to": list(rule.to), "why": as_dict(verdict)}
            for rule, verdict in decision.verdicts
        ]
        print(json.dumps({"level": resource.level, "id": resource.id, "to": decision.rules, "rules": rules}, indent=2))
        return
    print(f"{resource.level} {resource.id}, {len(resource.instances)} instances")
    print("\n".join(_lines(decision)))


async def orthanc_id(orthanc: httpx.AsyncClient, identifier: str, level: str) -> str:
    """Orthanc's id of what is named by that, or by its UID.

    :raises GoneError: there is none.
    """
    if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}", identifier):
        return identifier
    answer = await orthanc.post("/tools/lookup", content=identifier)
    found = [one["ID"] for one in answer.raise_for_status().json() if one["Type"].lower() == level]
    if not found:
        raise GoneError(f"Orthanc has no {level} {identifier}", "give its Orthanc id or its UID")
    return str(found[0])


def _lines(decision: Decision) -> Iterator[str]:
    for rule, verdict in decision.verdicts:
        yield f"{'yes' if verdict.true else 'no ':3} rule {rule.name}, to {', '.join(rule.to)}"
        for part in verdict.parts:
            yield from tree(part, 1)
    sent = ", ".join(f"{to} (by {rule})" for to, rule in decision.rules.items())
    yield f"it goes to {sent or 'nobody'}"


def tree(verdict: Verdict, depth: int) -> Iterator[str]:
    """What became of a condition and its parts, a line each."""
    found = f"; there is {verdict.found}" if verdict.found else ""
    yield f"{'  ' * depth}{'yes' if verdict.true else 'no '} {verdict.condition}{found}"
    for part in verdict.parts:
        yield from tree(part, depth + 1)


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """The same for programs."""
    parts = {"parts": [as_dict(one) for one in verdict.parts]} if verdict.parts else {"found": verdict.found}
    return {"condition": verdict.condition, "true": verdict.true, **parts}
