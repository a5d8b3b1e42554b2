"""What harm comes with all protections, and without some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def harms(scenario: Callable[[Path, Sequence[str]], int], folder: Path, without: str) -> tuple[int, int]:
    """Let the same happen with and without: side by side, each with servers of its own.

    :param scenario: gets a folder, and what is switched off; returns how much harm there was.
    :return: with everything, and without that.
    """
    with ThreadPoolExecutor(2) as pool:
        tries = [
            pool.submit(scenario, folder / name, switched_off)
            for name, switched_off in (("whole", []), ("mutant", [without]))
        ]
        whole, mutant = (one.result() for one in tries)
    print(f"{without}: harm {whole}; without it {mutant}")
    return whole, mutant
