# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Two functions in turns, and the ratio of what they take."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ROUNDS = 7


@dataclass(frozen=True)
class Row:
    """A line of the page.

    Args:
        what (str): which two are compared.
        ratios (list of float): one per round: the first one's seconds over the second's.
        at_most (float, optional): the bar for the median.
        at_least (float, optional): likewise.
        note (str): absolute figures, of this machine.
    """

    what: str
    ratios: list[float]
    at_most: float = math.inf
    at_least: float = 0.0
    note: str = ""

    @property
    def cells(self) -> list[str]:
        """Of a Markdown table."""
        median = statistics.median(self.ratios)
        figures = f"{median:.2f} [{min(self.ratios):.2f}, {max(self.ratios):.2f}]"
        if not self.at_least and self.at_most == math.inf:
            return [self.what, figures, "", "", self.note]  # no bar
        bar = (
            f"at least {self.at_least:.2f}"
            if self.at_least
            else f"at most {self.at_most:.2f}"
        )
        met = self.at_least <= median <= self.at_most
        return [self.what, figures, bar, "met" if met else "**missed**", self.note]


def wait(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    functions: dict[str, Callable[[], Any]],
    *,
    rounds: int = ROUNDS,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one call that does not count.

    What else the machine does weighs on both sides of a ratio, since they run in turns.
    """
    device = torch.device("cpu") if device is None else device
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            wait(device)
            start = time.perf_counter()
            function()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(one: list[float], other: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(one, other, strict=True)]
