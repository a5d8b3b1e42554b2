"""``orthanc-events route``: the router."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orthanc_events_bridge.cli_options import EXIT_CODES, Commands, UsageError, add_command
from orthanc_events_bridge.cli_workers import again, check_count, supervise, work
from orthanc_events_bridge.errors import GoneError

if TYPE_CHECKING:
    import httpx

    from orthanc_events_bridge.workflows.conditions import Verdict
    from orthanc_events_bridge.workflows.router import Decision, Router

_EPILOG: Final = f"""\
examples:
  orthanc-events route --config router.yaml --check    look at rules, broker, destinations
  orthanc-events route --config router.yaml            route, until Ctrl-C or SIGTERM
  orthanc-events route --config router.yaml --workers 4
  orthanc-events route --config router.yaml --dry-run  say what would be sent, send nothing
  orthanc-events route --config router.yaml --explain 1.2.840.113619.2.55.3

A file:

  broker: nats://127.0.0.1:4222
  orthanc: http://127.0.0.1:8042
  destinations:
    pacs: {{modality: pacs}}
    research: {{orthanc: "https://research.example.org/orthanc"}}
  rules:
    - name: everything
      to: [pacs]
    - name: knees
      when:
        - {{tag: Modality, is: MR}}
        - {{tag: BodyPartExamined, glob: "KNEE*"}}
      to: [research]

What can't be sent is tried again by itself, and is in the end among the dead letters of
NAME-DESTINATION: orthanc-events dlq list --broker URL --consumer router-pacs.
docs/consumers/router.md has all options and what is guaranteed.

{EXIT_CODES}"""


def define(commands: Commands) -> None:
    """Add the command."""
    text = "Started several times, here or elsewhere, they share the work."
    parser = add_command(commands, "route", _route, "send studies where rules say", text, epilog=_EPILOG)
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: $ORTHANC_EVENTS_CONSUMER")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; default: 1")
    parser.add_argument("--broker", metavar="URL", help="default: $ORTHANC_EVENTS_BROKER, or what the file says")
    parser.add_argument(
        "--http", metavar="HOST:PORT", help="tell health and metrics there; each further worker at the next port"
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="default: info")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="connect everywhere, say what was found, and leave")
    what.add_argument("--dry-run", action="store_true", help="decide for what comes from now on, and send nothing")
    what.add_argument(
        "--explain", metavar="ID", help="say which rules fit a resource that is there, and why: its Orthanc id or UID"
    )
    parser.add_argument("--json", action="store_true", help="with --explain: for programs")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # its number, of one that is supervised
    parser.add_argument("--only-load", action="store_true", help=argparse.SUPPRESS)


def _route(options: argparse.Namespace) -> int:
    from orthanc_events_bridge.consumers.leaving import logs

    check_count(options.workers)
    if options.json and options.explain is None:
        raise UsageError("--json says how to explain", "say --explain ID too")
    if options.workers > 1 and not (options.check or options.dry_run or options.explain):
        logs(options.log_level or "info")
        return supervise(["route", *again(options, "config", "broker", "http", "log_level")], options.workers)
    router = _router(options)
    if options.explain is not None:
        return asyncio.run(_explain(router, options.explain, as_json=options.json))
    return work(options, router)


def _router(options: argparse.Namespace) -> Router:
    from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as
    from orthanc_events_bridge.workflows.router import Router
    from orthanc_events_bridge.workflows.router_settings import RouterSettings

    given: dict[str, Any] = {name: getattr(options, name) for name in ("broker", "http", "log_level")}
    line = CommandLine(options.config, {name: value for name, value in given.items() if value is not None})
    return Router(configure_as(RouterSettings, {}, given=line), dry=options.dry_run).numbered(options.worker or 0)


async def _explain(router: Router, identifier: str, *, as_json: bool) -> int:
    async with router.deciding.asking() as orthanc:
        resource, decision = await router.explain(orthanc, await _orthanc_id(orthanc, identifier, router.level))
    if as_json:
        rules = [
            {"rule": rule.name, "fits": verdict.true, "to": list(rule.to), "why": _as_dict(verdict)}
            for rule, verdict in decision.verdicts
        ]
        print(json.dumps({"level": resource.level, "id": resource.id, "to": decision.rules, "rules": rules}, indent=2))
        return 0
    print(f"{resource.level} {resource.id}, {len(resource.instances)} instances")
    print("\n".join(_lines(decision)))
    return 0


async def _orthanc_id(orthanc: httpx.AsyncClient, identifier: str, level: str) -> str:
    """Orthanc's id of what is named by that, or by its UID."""
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
            yield from _tree(part, 1)
    sent = ", ".join(f"{to} (by {rule})" for to, rule in decision.rules.items())
    yield f"it goes to {sent or 'nobody'}"


def _tree(verdict: Verdict, depth: int) -> Iterator[str]:
    found = f"; there is {verdict.found}" if verdict.found else ""
    yield f"{'  ' * depth}{'yes' if verdict.true else 'no '} {verdict.condition}{found}"
    for part in verdict.parts:
        yield from _tree(part, depth + 1)


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    parts = {"parts": [_as_dict(one) for one in verdict.parts]} if verdict.parts else {"found": verdict.found}
    return {"condition": verdict.condition, "true": verdict.true, **parts}
