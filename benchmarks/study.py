# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The study: examples/rpd.py over tasks, rewards, teachers' errors and seeds.

Each run is one command of ``examples/rpd.py``, started here with its own process. What is
in the committed results already is not run again, and a run that was killed goes on from
its last checkpoint, so that an interrupted study goes on with the same command. Each group
becomes a page with curves and tables under ``benchmarks/results/study``.

    python -m benchmarks.study --plan                  # what is left, in core-hours
    python -m benchmarks.study --groups best_goal best_blind --jobs 2
    python -m benchmarks.study --page                  # only the pages, runs nothing
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._results import write_json
from benchmarks.machine import machine
from benchmarks.study_groups import GROUPS
from examples.report import (
    Run,
    draw,
    final_table,
    interval,
    percent,
    sections_of,
    steps_table,
    teachers_of,
)

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "study"
RUNS = REPOSITORY / "runs" / "study"
# One process per run: two runs at a time use two cores better than one run with workers.
ALWAYS = ("env.num_workers=1", "env.num_envs=16", "trainer.progress_bar=false")
AROUND = 3  # a single one has few episodes
# Of one core, from earlier runs: for the plan alone.
FRAMES_PER_SECOND = {"state": 220, "pictures": 70}


@dataclass(frozen=True)
class Job:
    """One run of a group."""

    group: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Names its folder."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """What stands behind ``python examples/rpd.py`` on the command line."""
        group = GROUPS[self.group]
        words = (*ALWAYS, *group.common.split(), *group.arms[self.arm].split())
        return [*words, f"seed={self.seed}"]

    @property
    def frames(self) -> int:
        """Of its budget."""
        last = [word for word in self.overrides if word.startswith("frames=")][-1]
        return int(last.removeprefix("frames="))

    @property
    def hours(self) -> float:
        """About how long one core needs."""
        sees = "pictures" if "student=rgb" in self.overrides else "state"
        return self.frames / FRAMES_PER_SECOND[sees] / 3600


def file_of(group: str) -> Path:
    """Where a group's results are kept."""
    return RESULTS / f"{group}.json"


def load(group: str) -> dict[str, Any]:
    """The results of a group so far."""
    file = file_of(group)
    return json.loads(file.read_text()) if file.exists() else {"runs": {}}


def save(group: str, results: dict[str, Any]) -> None:
    """Keeps a group's results, the runs by name."""
    results["runs"] = dict(sorted(results["runs"].items()))
    write_json(file_of(group), results)


def todo(groups: list[str], seeds: list[int] | None) -> list[Job]:
    """What is missing, all arms of a seed before the next seed."""
    jobs = []
    for name in groups:
        done = load(name)["runs"]
        chosen = GROUPS[name].seeds if seeds is None else seeds
        wanted = [Job(name, arm, seed) for seed in chosen for arm in GROUPS[name].arms]
        # What was run with other settings does not count.
        jobs += [
            job
            for job in wanted
            if done.get(job.name, {}).get("overrides") != job.overrides
        ]
    return jobs


_lock = threading.Lock()


def work(job: Job) -> None:
    """Runs one command and takes its results over."""
    runs = RUNS / job.group
    command = [sys.executable, "-W", "ignore", "examples/rpd.py", *job.overrides]
    command += [f"name={job.name}", f"runs={runs}"]
    log = runs / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        code = subprocess.run(
            command,
            cwd=REPOSITORY,
            stdout=out,
            stderr=subprocess.STDOUT,
            # The package is found without an installation, threads are set before torch.
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "OMP_NUM_THREADS": "1",
                # Lavapipe draws in the process's own thread: one run, one core.
                "LP_NUM_THREADS": "0",
            },
            check=False,
        ).returncode
    finished = runs / job.name / "results.json"
    if code or not finished.exists():
        print(f"{job.group}/{job.name} stopped (exit code {code}): {log}", flush=True)
        return
    result = json.loads(finished.read_text())
    with _lock:
        results = load(job.group)
        results["machine"] = machine()
        results["runs"][job.name] = {"overrides": job.overrides, "results": result}
        save(job.group, results)
    success = result["student"]["success_once"]
    print(
        f"{job.group}/{job.name}: {success['mean']:.3f} "
        f"[{success['low']:.3f}, {success['high']:.3f}]  {result['seconds']:.0f} s",
        flush=True,
    )


def config_of(overrides: list[str]) -> dict[str, str]:
    """The overrides by name, as far as they say what is compared."""
    pairs = dict(word.split("=", 1) for word in overrides)
    for name in ("seed", "algo", "trainer.progress_bar"):
        pairs.pop(name, None)
    return {"sees.student": pairs.pop("student", "state"), **pairs}


def verdict(arms: list[Any]) -> list[str]:
    """Each RPD arm's lower bound against teacher and controls, in one sentence."""
    others = {}
    if teachers := teachers_of(arms):
        others["teacher"] = [t["mean"] for t in teachers.values()]
    for algo, name in (("imitation", "imitation alone"), ("ppo", "PPO alone")):
        # Of several, the one with the most steps.
        controls = sorted(
            (arm for arm in arms if arm.algo == algo), key=lambda a: a.end
        )
        if controls:
            others[name] = [run.success for run in controls[-1].runs]
    return [
        line
        for arm in arms
        if arm.algo not in ("imitation", "ppo")
        for line in (f"{arm.name} {_against(arm, others)}", "")
    ]


def _against(arm: Any, others: dict[str, list[float]]) -> str:
    mean, low, _ = interval([run.success for run in arm.runs])
    if math.isnan(low):
        return f"{percent(mean)}: one seed so far, which has no interval."
    beside = ", ".join(
        f"{'above' if low > interval(values)[0] else 'NOT above'} {name} "
        f"({percent(interval(values)[0])})"
        for name, values in others.items()
    )
    queries = sum(run.results["teacher_stats"]["queries"] for run in arm.runs)
    share = queries / sum(run.results["frames"] for run in arm.runs)
    return (
        f"{percent(mean)}, lower bound {percent(low)}: {beside}. Queries of the "
        f"teacher: {percent(share)} % of the frames."
    )


def page(group: str) -> str:
    """The group's page; draws its picture."""
    results = load(group)
    runs = [
        Run(Path(name), run["results"], config_of(run["overrides"]))
        for name, run in results["runs"].items()
    ]
    lines = [f"# {GROUPS[group].title}", "", f"    {command_of(group)}", ""]
    seconds = sum(run.results["seconds"] for run in runs)
    for number, (key, arms) in enumerate(sections_of(runs).items()):
        picture = f"{group}-{number}.png" if number else f"{group}.png"
        draw(key, arms, None, RESULTS / picture)
        lines += [f"## {key[0]}, {key[1]} reward, teacher `{key[2]}`", ""]
        lines += verdict(arms)
        lines += [f"![curves]({picture})", ""]
        lines += [*final_table(arms), *steps_table(arms, None, AROUND)]
        lines += [
            "Each point of a curve: a few episodes, the same ones for all points and runs "
            "(`evaluation.episodes`). The table's rates: others, and more of them "
            "(`episodes`); so a curve may end below or above its row.",
            "",
            f"Steps to a rate: the first mean of {AROUND} evaluations in a row over it.",
            "",
        ]
    if any(run.results.get("resumed") for run in runs):
        lines += ["(*) A run was interrupted: its seconds since the last start.", ""]
    lines += ["Commands of the arms, behind `python examples/rpd.py`:", ""]
    lines += [
        f"- {arm}: `{shlex.join(Job(group, arm, 0).overrides[:-1])}`"
        for arm in GROUPS[group].arms
    ]
    facts = ", ".join(f"{k} {v}" for k, v in results["machine"].items())
    lines += [
        "",
        f"Runs: {len(runs)}, {seconds / 3600:.1f} hours of training added up. {facts}.",
        "",
    ]
    text = "\n".join(lines)
    (RESULTS / f"{group}.md").write_text(text)
    return text


def command_of(group: str) -> str:
    """What runs it."""
    return f"python -m benchmarks.study --groups {group}"


def main() -> None:
    """Parses the arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=[*GROUPS])
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the group's")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--plan", action="store_true", help="what is left")
    parser.add_argument("--page", action="store_true", help="write the pages")
    args = parser.parse_args()
    if not args.page:
        jobs = todo(args.groups, args.seeds)
        hours = sum(job.hours for job in jobs)
        print(f"{len(jobs)} runs to do, about {hours:.1f} core-hours", flush=True)
        for job in jobs if args.plan else ():
            print(f"  {job.group}/{job.name}: {shlex.join(job.overrides)}")
        if args.plan:
            return
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, jobs))
    for group in args.groups:
        if load(group)["runs"]:
            page(group)
            print(f"wrote {RESULTS / group}.md")


if __name__ == "__main__":
    main()
