"""Bytes as a stage of gigabytes."""

from __future__ import annotations

import pytest

from fluxkiln.progress import count_bytes


class Told:
    def __init__(self) -> None:
        self.lines: list[tuple] = []

    def stage(self, *told) -> None:
        self.lines.append(told)

    def done(self, *told) -> None:
        self.lines.append(told)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([(0, 18_800_000), (9_000_000, 18_800_000), (18_800_000, 18_800_000)], [("s", "18.8 MB", "read")]),
        ([(1_900_000_000, 3_000_000_000)], [("s", "1.9 GB", "of 3.0 GB")]),
        ([(1, 3_000_000_000), (3_000_000_000, 3_000_000_000)], [("s", "3.0 GB", "read")] * 3),
    ],
)
def test_count_bytes(steps, told):
    progress = Told()
    report = count_bytes(progress, "s", "read")
    for step in steps:
        report(*step)
    total = max(1, steps[0][1] // 1_000_000_000)
    assert [line for line in progress.lines if len(line) == 3] == told
    assert set(progress.lines) - set(told) == {("s", total)}
