"""README's table of versions says what a run has found, and what it hasn't tried."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tools import matrix_table

CELL = {"orthanc": "1.12.7", "python": "3.13", "broker": "NATS", "version": "2.15.1"}


def junit(*cases: tuple[Mapping[str, str], str]) -> str:
    """Pytest's result: of each case what it has recorded, and how it ended."""
    text = ""
    for recorded, end in cases:
        properties = "".join(f'<property name="{name}" value="{value}"/>' for name, value in recorded.items())
        text += f'<testcase name="a_cell"><properties>{properties}</properties>{end}</testcase>'
    return f"<testsuites><testsuite>{text}</testsuite></testsuites>"


def test_failed_and_not_tried_are_shown() -> None:
    older = {**CELL, "orthanc": "1.10.1", "python": "3.11"}
    kafka = {**CELL, "broker": "Kafka", "version": "4.1.0"}
    result = junit((CELL, ""), (older, "<failure/>"), (kafka, "<error/>"), ({}, "<skipped/>"))
    assert matrix_table.table(matrix_table.cells(result)).splitlines()[2:] == [
        "| 1.10.1 (3.11) | **failed** | not tried |",
        "| 1.12.7 (3.13) | passed | **failed** |",
    ]


@pytest.mark.parametrize("ends", [("", "<failure/>"), ("<failure/>", "")])
def test_a_failure_is_not_hidden_by_another_try(ends: tuple[str, str]) -> None:
    assert "**failed**" in matrix_table.table(matrix_table.cells(junit(*((CELL, end) for end in ends))))


@pytest.mark.parametrize(
    ("result", "wrong"),
    [(junit(({}, "<failure/>")), "a_cell ended before it knew"), (junit(({}, "<skipped/>")), "no cell was tried")],
)
def test_what_has_no_versions_makes_no_table(result: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        matrix_table.cells(result)
