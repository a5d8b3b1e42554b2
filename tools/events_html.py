"""docs/events.html: the catalog of events for people, in one file that loads nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from string import Template
from typing import Any

from orthanc_events_bridge.changes.model import LOGGED, NAMES
from orthanc_events_bridge.consumers.samples import published
from orthanc_events_bridge.events.catalog import TYPES, VERSION, EventType
from orthanc_events_bridge.events.derived import DERIVED
from orthanc_events_bridge.testing import event, orthanc_id
from tools.asyncapi_document import BROKERS
from tools.event_schemas import ALL, ROOT, change_of, data_schema, default, derived_envelope, envelope

TEMPLATE = ROOT / "tools" / "events.html"

_JOB = {
    "type": "DicomModalityStore",
    "state": "Success",
    "progress": 100,
    "errorCode": 0,
    "created": "20261123T213601.000000",
    "completed": "20261123T213602.000000",
    "runtime": 0.487,
    "localAet": "ORTHANC",
    "remoteAet": "PACS",
    "instances": 40,
    "failedInstances": 0,
    "parentResources": [orthanc_id("study")],
}
_LOG = {"reason": "emptied", "recorded": 41, "counter": 41, "continues": 41}


def example(event_type: EventType) -> dict[str, Any]:
    """An event of a type, as it is sent."""
    if event_type in TYPES:
        level = event_type.level
        told = event(event_type.name, job=_JOB if level == "job" else None)
        found: dict[str, Any] = {**told.attributes, "data": dict(told.data)}
        if event_type.verb == "log-discontinuity":
            found["data"]["log"] = _LOG
        return found
    return dict(json.loads(published(event_type.name).body))


def properties(schema: dict[str, Any], above: str = "", required: bool = True) -> Iterator[tuple[str, str, str, str]]:
    """What is in an object, and in the objects in it: name, what it is, how often it is there, meaning.

    :param above: stands in front of the names.
    :param required: whether the object itself is always there.
    """
    for name, one in schema.get("properties", {}).items():
        always = required and name in schema.get("required", ())
        yield f"{above}{name}", kind(one), "always" if always else "", one.get("description", "")
        yield from properties(one, f"{above}{name}.", always)


def kind(schema: dict[str, Any]) -> str:
    """What a value is, in words."""
    if "const" in schema:
        return json.dumps(schema["const"])
    for word in ("enum", "x-extensible-enum"):
        if word in schema:
            return " or ".join(map(json.dumps, schema[word])) + (" or, one day, others" if word != "enum" else "")
    found = schema.get("type", "anything")
    if isinstance(found, list):
        return " or ".join(found)
    if found == "array":
        return f"list of {kind(schema.get('items', {}))}s"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {kind(schema['additionalProperties'])}s"
    return f"{found} ({schema['format']})" if "format" in schema else str(found)


def _code(text: str) -> str:
    """Text with its backquotes as HTML."""
    parts = escape(text, quote=False).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def _table(schema: dict[str, Any]) -> str:
    rows = "\n".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(what, quote=False)}</td><td>{often}</td>"
        f"<td>{_code(meaning)}</td></tr>"
        for name, what, often, meaning in properties(schema)
    )
    head = "<tr><th>property</th><th>what it is</th><th>there</th><th>meaning</th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>\n{rows}\n</tbody></table></div>'


def _facts(event_type: EventType) -> Iterator[tuple[str, str]]:
    by = DERIVED.get(event_type)
    change = change_of(event_type)
    if event_type in TYPES:
        yield "published by", "the bridge" + (f", and the consumer <code>{by}</code>" if by else "")
    else:
        yield "published by", f"the consumer <code>{by}</code>"
    if change:
        logged = change in {NAMES[one] for one in LOGGED} or change not in NAMES.values()
        yield "Orthanc's change", f"<code>{change}</code>, {'also' if logged else 'not'} in its log"
    yield "type", f"<code>{default('type_prefix')}.{event_type.name}.{VERSION}</code>"
    address = f"{default('site')}.{event_type.name}.{{partition}}"
    yield "NATS subject", f"<code>orthanc.events.{address}</code>"
    yield "RabbitMQ routing key", f"<code>{address}</code>"


def _section(event_type: EventType) -> str:
    facts = "\n".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in _facts(event_type))
    body = escape(json.dumps(example(event_type), indent=2), quote=False)
    return "\n".join(
        (
            f'<section id="{event_type.name}">',
            f'<h3><a href="#{event_type.name}">{event_type.name}</a></h3>',
            f"<p>{_code(event_type.meaning)}</p>",
            f"<dl>\n{facts}\n</dl>",
            "<h4>Data</h4>",
            _table(data_schema(event_type)),
            "<h4>Example</h4>",
            f"<pre>{body}</pre>",
            "</section>",
        )
    )


def _levels() -> dict[str, list[EventType]]:
    found: dict[str, list[EventType]] = {}
    for one in ALL:
        found.setdefault(one.level, []).append(one)
    return found


def _places() -> str:
    rows = "\n".join(
        f"<tr><td>{escape(broker.name)}</td><td>{escape(place.title)}</td>"
        f"<td><code>{escape(place.address)}</code></td><td>{_code(place.description)}</td></tr>"
        for broker in BROKERS
        for place in broker.places
    )
    head = "<tr><th>broker</th><th>what</th><th>address</th><th></th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>\n{rows}\n</tbody></table></div>'


def page() -> str:
    """docs/events.html."""
    links, sections = [], []
    for level, types in _levels().items():
        items = "\n".join(f'<li><a href="#{one.name}">{one.name}</a></li>' for one in types)
        links.append(f'<li><a href="#level-{level}">{level}</a>\n<ul>\n{items}\n</ul></li>')
        sections += [f'<h2 id="level-{level}">{level}</h2>', *map(_section, types)]
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        attributes=_table(envelope()),
        derived=_table(derived_envelope()),
        links="\n".join(links),
        number=len(ALL),
        places=_places(),
        sections="\n".join(sections),
    )
