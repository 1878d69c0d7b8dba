# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Steps and seconds to 90 % success: the released configuration and ``preset=best``.

Read from the study's results, which hold whole runs: nothing is trained here.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch

from benchmarks.speed._section import Section
from benchmarks.study import AROUND, load
from examples.report import Run, percent, steps_to

GOAL = 0.9
ARMS = {  # name on the page: group of the study, arm
    "`preset=best`": ("best_goal", "rpd"),
    "released (`preset=paper`)": ("released_goal", "released"),
}
COLUMNS = ("", "success at the end, %", "steps to 90 %", "seconds to 90 %", "seeds")


def runs_of(group: str, arm: str) -> list[Run]:
    """The committed runs of an arm."""
    found = load(group)["runs"].items()
    return [
        Run(Path(name), run["results"], {})
        for name, run in found
        if name.startswith(f"{arm}-seed")
    ]


def reached(run: Run) -> tuple[float, float]:
    """Steps and seconds; infinity where it never happens.

    A run's seconds are spread over its steps evenly.
    """
    curve = [(int(step), float(value)) for step, value in run.results["curve"]]
    steps = steps_to(curve, GOAL, AROUND)
    return steps, run.results["seconds"] * steps / run.results["frames"]


def cell(values: list[float], budget: float) -> str:
    """The median; what is never reached is larger than the budget."""
    median = statistics.median(values)
    share = f"({sum(map(math.isfinite, values))} of {len(values)})"
    if math.isfinite(median):
        return f"{median:,.0f} {share}"
    return f"> {budget:,.0f} {share}"


def rows(*, device: torch.device) -> Section:
    """One row per configuration that has runs; nothing depends on the device."""
    table = []
    for name, place in ARMS.items():
        runs = runs_of(*place)
        if not runs:
            continue
        steps, seconds = zip(*map(reached, runs), strict=True)
        table.append(
            [
                name,
                percent(statistics.fmean(run.success for run in runs)),
                cell(list(steps), max(run.results["frames"] for run in runs)),
                cell(list(seconds), max(run.results["seconds"] for run in runs)),
                ", ".join(str(run.seed) for run in runs),
            ]
        )
    text = (
        "PickCube-v1, sparse reward, state student, the teacher that sees the goal 26 mm "
        "too high; medians over seeds, in brackets how many of them reach it (a mean of "
        f"{AROUND} evaluations). Pages and "
        "commands of the runs: `benchmarks/results/study/best_goal.md` and "
        "`released_goal.md`. Two runs at a time shared the machine."
    )
    return Section(table, columns=COLUMNS, text=text)
