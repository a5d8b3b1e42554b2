"""Measurements of the bridge on real servers; ``python -m benchmarks`` writes ``RESULTS.md``.

They measure and never fail because of a number: a slow machine is no defect. Each comparison runs its sides
alternately in the same run, on the same machine, so that what disturbs one disturbs the other.
"""
