# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Runs of examples/rpd.py as one page: curves, steps to a success rate, final table.

    python examples/report.py runs/* --out report          # report/report.md and PNGs

Runs are grouped by task, reward, teacher, student and preset; a group compares its
algorithms, each over its seeds. Runs of one algorithm whose configurations differ in more
than the seed are never averaged: each configuration gets a line of its own, named by what
differs. Where the paper has a figure of the same task, it is drawn beside ours.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parents[1] / "docs" / "data"
THRESHOLDS = (0.5, 0.7, 0.9)
PAPER_WINDOW = 5  # evaluations; single ones of the paper's figure jump
ALGOS = ("rpd", "imitation", "ppo")
NAMES = {"rpd": "RPD", "imitation": "imitation alone", "ppo": "PPO alone"}
COLOURS = {"rpd": "tab:blue", "imitation": "tab:orange", "ppo": "tab:gray"}
STYLES = ("-", "--", "-.", ":")
# Where things are kept and how they are shown: no part of what is compared.
ELSEWHERE = ("name", "runs", "check_teacher", "logger", "trainer.logger")
BAR = "trainer.progress_bar"
# What config.yaml says once more, where it is used.
COPIES = (
    *(
        "trainer.env.",
        "trainer.student.",
        "trainer.teacher.",
        "trainer.teacher_action.",
    ),
    *("trainer.loss_module.", "trainer.gae.", "trainer.optimizer.", "trainer.hooks."),
    *("trainer.collector.", "trainer.schedule.", "trainer.transforms."),
    *("trainer.total_frames", "evaluation.env."),
)

Curve = list[tuple[int, float]]

# 97.5 % points of Student's t with 1 to 30 degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


# Statistics.


def t_point(n: int) -> float:
    """97.5 % point of Student's t for the mean of ``n`` values."""
    if n - 1 <= len(_T):
        return _T[n - 2]
    z, df = 1.959964, n - 1  # the first terms of the Cornish-Fisher expansion
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean over the seeds and the 95 % t interval of the mean, within [0, 1].

    One seed has no interval: the bounds are NaN.
    """
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return mean, math.nan, math.nan
    half = t_point(n) * statistics.stdev(values) / math.sqrt(n)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def steps_to(curve: Curve, threshold: float, window: int = 1) -> float:
    """Steps of the first evaluation at or above ``threshold``; infinity if none is.

    With a ``window`` each value is the mean of that many evaluations around it.
    """
    values, half = [value for _, value in curve], window // 2
    for i, (steps, _) in enumerate(curve):
        around = values[max(0, i - half) : i + half + 1]
        # Sums of decimals: 0.7 may read 0.6999999999999999.
        if statistics.fmean(around) >= threshold - 1e-9:
            return steps
    return math.inf


# Runs.


@dataclass
class Run:
    """One run's results, and the leaves of its configuration by dotted names."""

    folder: Path
    results: dict[str, Any]
    config: dict[str, Any]

    @property
    def seed(self) -> int:
        """What is averaged over."""
        return self.results["seed"]

    @property
    def section(self) -> tuple[str, ...]:
        """Task, reward, teacher, student and preset."""
        student = str(self.config.get("sees.student", "unknown"))
        names = ("task", "reward", "labels")
        return (*(self.results[n] for n in names), student, self.results["preset"])

    @property
    def success(self) -> float:
        """Of the final evaluation."""
        return self.results["student"]["success_once"]["mean"]


@dataclass
class Arm:
    """Runs that differ by their seed alone."""

    algo: str
    runs: list[Run]
    differs: dict[str, Any] = field(default_factory=dict)
    borrowed: str | None = None  # PPO of another section: no teacher takes part

    @property
    def name(self) -> str:
        """The algorithm, and what differs from others of it."""
        shown = [f"{key}={value}" for key, value in self.differs.items()]
        more = [f"{len(shown) - 3} more"] if len(shown) > 3 else []
        words = ", ".join([*shown[:3], *more])
        name = NAMES.get(self.algo, self.algo)
        return f"{name} [{words}]" if words else name

    @property
    def curves(self) -> list[Curve]:
        """Success of the evaluations, for each seed."""
        return [[(int(s), float(v)) for s, v in r.results["curve"]] for r in self.runs]

    @property
    def end(self) -> int:
        """The last evaluation that every seed has."""
        return min((curve[-1][0] if curve else 0) for curve in self.curves)

    def band(self) -> list[tuple[int, float, float, float]]:
        """Steps, mean, lower and upper bound, where every seed was evaluated."""
        curves = [dict(curve) for curve in self.curves]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        return [(s, *interval([curve[s] for curve in curves])) for s in shared]


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted names, entries of lists by their number."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    out = {}
    for key, value in tree.items():
        out |= leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def find(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs below the paths, and a sentence on each that is left out."""
    folders = sorted(
        {file.parent for path in paths for file in path.rglob("config.yaml")}
        | {file.parent for path in paths for file in path.rglob("results.json")}
    )
    runs, left_out = [], []
    for folder in folders:
        config, results = folder / "config.yaml", folder / "results.json"
        if not results.exists():
            left_out.append(f"{folder}: unfinished, it has no results.json")
        elif not config.exists():
            left_out.append(
                f"{folder}: no config.yaml, so that nothing can be compared"
            )
        else:
            flat = leaves(yaml.safe_load(config.read_text()))
            runs.append(Run(folder, json.loads(results.read_text()), flat))
    return runs, left_out


def compared(run: Run) -> dict[str, Any]:
    """What has to be equal for runs to be averaged."""

    def counts(key: str) -> bool:
        top = [key == e or key.startswith(f"{e}.") for e in ELSEWHERE]
        return not any(top) and key != BAR

    out = {key: value for key, value in run.config.items() if counts(key)}
    # Machine and moment are not in the configuration; how long it ran is.
    return {**out, "frames": run.results["frames"]}


def arms_of(algo: str, runs: list[Run]) -> list[Arm]:
    """One arm for each configuration, whatever the seed.

    Raises:
        ValueError: if two runs are of the same configuration and seed.
    """
    configs = [compared(run) for run in runs]
    keys = sorted(set().union(*configs))

    def follows_the_seed(key: str) -> bool:
        # `teacher_action.seed: ${seed}`, but not a teacher's that is fixed.
        values = [config.get(key) for config in configs]
        return key.split(".")[-1] == "seed" and all(
            value == run.seed for value, run in zip(values, runs, strict=True)
        )

    def differs(key: str) -> bool:
        return len({repr(config.get(key)) for config in configs}) > 1

    different = [key for key in keys if differs(key) and not follows_the_seed(key)]
    words = [key for key in different if not key.startswith(COPIES)]
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, config in enumerate(configs):
        groups[tuple(repr(config.get(key)) for key in different)].append(i)
    arms = []
    for members in groups.values():
        chosen = sorted((runs[i] for i in members), key=lambda run: run.seed)
        for one, other in itertools.pairwise(chosen):
            if one.seed == other.seed:
                raise ValueError(
                    f"{one.folder} and {other.folder} are the same run, seed "
                    f"{one.seed}: seeds are averaged as independent. Leave one out."
                )
        values = configs[members[0]]
        named = {key: values.get(key) for key in (words or different)}
        arms.append(Arm(algo, chosen, named))
    return sorted(arms, key=lambda arm: arm.name)


def sections_of(runs: list[Run]) -> dict[tuple[str, ...], list[Arm]]:
    """The arms of each section, RPD first."""
    grouped: dict[tuple[str, ...], dict[str, list[Run]]] = defaultdict(dict)
    for run in runs:
        grouped[run.section].setdefault(run.results["algo"], []).append(run)
    sections = {}
    for key in sorted(grouped):
        known = [algo for algo in ALGOS if algo in grouped[key]]
        algos = known + sorted(set(grouped[key]) - set(known))
        sections[key] = [arm for a in algos for arm in arms_of(a, grouped[key][a])]
    # PPO alone asks no teacher: one set of runs serves the sections of all teachers.
    for key, arms in sections.items():
        if any(arm.algo == "ppo" for arm in arms):
            continue
        for other, theirs in sections.items():
            same = (key[0], key[1], *key[3:]) == (other[0], other[1], *other[3:])
            lent = [a for a in theirs if a.algo == "ppo" and a.borrowed is None]
            if same and lent:
                arms += [Arm(a.algo, a.runs, a.differs, other[2]) for a in lent]
                break
    return sections


# The paper's curves.


@dataclass
class Figure:
    """One of the paper's figures."""

    file: str
    title: str
    teachers: dict[str, float]
    setting: str

    @property
    def curves(self) -> dict[str, Curve]:
        """Success over environment steps by method."""
        lines = (DATA / self.file).read_text().splitlines()
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
        methods = [name for name in rows[0] if name != "env_steps"]
        return {
            m: [(int(row["env_steps"]), float(row[m])) for row in rows if row[m]]
            for m in methods
        }


PICK = Figure(
    "rpd_fig_pickcube_algos.csv",
    "the paper: PickCube, dense reward",
    {"Octo": 0.09, "OpenVLA": 0.06},
    "fine-tuned VLA teachers of 9 % (Octo) and 6 % (OpenVLA) success",
)
PUSH = Figure(
    "rpd_fig_pushcube_camera.csv",
    "the paper: PushCube, changed camera",
    {"Octo": 0.0, "OpenVLA": 0.045},
    "fine-tuned VLA teachers of 0 % (Octo) and 4.5 % (OpenVLA) success under its changed "
    "camera, whose pose is not published, and a reward that is not stated",
)


def figure_for(arms: list[Arm]) -> Figure | None:
    """The paper's figure that speaks of the same thing, if there is one."""
    run = arms[0].runs[0]
    task, reward = run.results["task"], run.results["reward"]
    if (task, reward) == ("PickCube-v1", "normalized_dense"):
        return PICK
    views = (run.config.get("env.camera"), run.config.get("env.teacher_camera"))
    if task == "PushCube-v1" and any(str(v).startswith("human_") for v in views):
        return PUSH
    return None


def what_differs(figure: Figure, arms: list[Arm]) -> str:
    """The caption's second half: why the two panels are not one."""
    run = arms[0].runs[0]
    config = run.config
    envs = int(config.get("env.num_envs", 1)) * int(config.get("env.num_workers", 1))
    sees = {"state": "the simulator's state", "rgb": "pictures"}
    student = config.get("sees.student", "unknown")
    return (
        f"Right, {figure.title}, measured from the figure on the authors' page (to about "
        f"0.002): {figure.setting}; a student that sees 256x256 pictures; 128 "
        "environments simulated on a GPU; evaluations of 500 episodes, of which it is "
        "not stated whether they count success once or at the end. Left, ours: teacher "
        f"`{run.section[2]}`, a student that sees {sees.get(student, student)}, {envs} "
        f"environments, preset `{run.section[4]}`, success once. The panels have "
        "different scales of steps: only the order of the methods can be compared, no "
        "number."
    )


# The page.


def percent(value: float) -> str:
    """A share with one decimal."""
    return f"{100 * value:.1f}"


def spread(values: list[float]) -> str:
    """Mean and interval of shares, in percent."""
    mean, low, high = interval(values)
    if math.isnan(low):
        return f"{percent(mean)} (one seed, no interval)"
    return f"{percent(mean)} [{percent(low)}, {percent(high)}]"


def steps_cell(arm: Arm, threshold: float, window: int) -> str:
    """Median over the seeds; ``>`` where the median run has not reached it."""
    reached = sorted(steps_to(curve, threshold, window) for curve in arm.curves)
    # Infinite as soon as one of the runs that it lies between has not reached it.
    median = statistics.median(reached)
    count = sum(map(math.isfinite, reached))
    shown = f"{median:,.0f}" if math.isfinite(median) else f"> {arm.end:,}"
    return f"{shown} ({count}/{len(reached)})"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def seconds_cell(arm: Arm) -> str:
    """Mean wall-clock seconds of training, evaluations included."""
    mean = statistics.fmean(run.results["seconds"] for run in arm.runs)
    resumed = any(run.results.get("resumed") for run in arm.runs)
    return f"{mean:,.0f}{' (*)' if resumed else ''}"


def teachers_of(arms: list[Arm]) -> dict[int, dict[str, float]]:
    """Success of the teacher in its own evaluation, by seed."""
    out = {}
    for arm in arms:
        for run in arm.runs:
            if run.results.get("teacher") and arm.borrowed is None:
                out[run.seed] = run.results["teacher"]["success_once"]
    return out


def final_table(arms: list[Arm]) -> list[str]:
    """Success, cost and seeds of each arm, and the teacher."""
    rows = []
    for arm in arms:
        results = [run.results for run in arm.runs]
        stats = [r["teacher_stats"] for r in results]
        rows.append(
            [
                arm.name + (f" (runs of `{arm.borrowed}`)" if arm.borrowed else ""),
                f"{results[0]['frames']:,}",
                spread([run.success for run in arm.runs]),
                ", ".join(f"{run.seed}: {percent(run.success)}" for run in arm.runs),
                spread([r["student"]["success_at_end"]["mean"] for r in results]),
                f"{statistics.fmean(s['queries'] for s in stats):,.0f}",
                f"{statistics.fmean(s['seconds'] for s in stats):,.1f}",
                seconds_cell(arm),
            ]
        )
    if teachers := teachers_of(arms):
        shares = {seed: teacher["mean"] for seed, teacher in sorted(teachers.items())}
        each = ", ".join(f"{seed}: {percent(share)}" for seed, share in shares.items())
        rows.append(["teacher", "", spread(list(shares.values())), each, *[""] * 4])
    header = ["", "steps", "success, % [95 % t interval over seeds]", "each seed"]
    header += ["success at end", "teacher queries", "teacher seconds", "seconds"]
    return table(header, rows)


def steps_table(arms: list[Arm], figure: Figure | None, window: int) -> list[str]:
    """Steps to each success rate, ours and the paper's."""
    rows = [[a.name, *(steps_cell(a, t, window) for t in THRESHOLDS)] for a in arms]
    if figure is not None:
        for method, curve in figure.curves.items():
            reached = [steps_to(curve, t, PAPER_WINDOW) for t in THRESHOLDS]
            cells = [
                f"{s:,.0f}" if math.isfinite(s) else f"> {curve[-1][0]:,}"
                for s in reached
            ]
            rows.append([f"*paper: {method.replace('_', ', ')}*", *cells])
    return table(["steps to", *(f"{t:.0%}" for t in THRESHOLDS)], rows)


def draw(
    key: tuple[str, ...], arms: list[Arm], figure: Figure | None, file: Path
) -> None:
    """Learning curves; the paper's in a panel of its own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        1,
        1 if figure is None else 2,
        figsize=(6.4 if figure is None else 12.5, 4.0),
        dpi=110,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    ours = axes[0, 0]
    seen: dict[str, int] = defaultdict(int)
    for arm in arms:
        band = arm.band()
        if not band:
            continue
        steps, means, lows, highs = zip(*band, strict=True)
        steps = [s / 1000 for s in steps]
        style = STYLES[seen[arm.algo] % len(STYLES)]
        seen[arm.algo] += 1
        colour = COLOURS.get(arm.algo, "tab:purple")
        n = len(arm.runs)
        label = f"{arm.name} ({n} seed{'s' * (n > 1)})"
        marker = "o" if len(steps) == 1 else None
        ours.plot(steps, means, color=colour, ls=style, marker=marker, label=label)
        if n > 1:
            ours.fill_between(steps, lows, highs, color=colour, alpha=0.18, lw=0)
    if teachers := teachers_of(arms):
        mean = statistics.fmean(t["mean"] for t in teachers.values())
        ours.axhline(mean, color="tab:green", ls=":", label=f"teacher {mean:.2f}")
    ours.set(
        xlabel="environment steps (thousands)",
        ylabel="success once (deterministic)",
        ylim=(-0.02, 1.02),
    )
    title = f"{key[0]}, {key[1]} reward\nteacher {key[2]}, student {key[3]}, {key[4]}"
    ours.set_title(title, fontsize=9)
    ours.legend(fontsize=8)
    ours.grid(alpha=0.3)
    if figure is not None:
        paper = axes[0, 1]
        for method, curve in figure.curves.items():
            steps = [s / 1e6 for s, _ in curve]
            gray = {"color": "tab:gray"} if method == "PPO" else {}
            values = [value for _, value in curve]
            label = method.replace("_", ", ")
            paper.plot(steps, values, lw=1, label=label, **gray)
        lines = zip(figure.teachers.items(), (":", "--"), strict=True)
        for (name, share), style in lines:
            paper.axhline(share, color="tab:green", ls=style, label=f"{name} alone")
        paper.set(xlabel="environment steps (MILLIONS)")
        paper.set_title(f"{figure.title}\n(measured from its figure)", fontsize=9)
        # Beside the curves: no corner is free of them.
        paper.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        paper.grid(alpha=0.3)
    fig.savefig(file)
    plt.close(fig)


def section(key: tuple[str, ...], arms: list[Arm], out: Path, window: int) -> list[str]:
    """One group of the page; draws its picture."""
    task, reward, labels, student, preset = key
    figure = figure_for(arms)
    file = out / ("-".join(key).replace("/", "_") + ".png")
    draw(key, arms, figure, file)
    caption = (
        "Success of the evaluations during training: mean over the seeds, band: 95 % t "
        "interval of the mean."
    )
    if figure is not None:
        caption += " " + what_differs(figure, arms)
    lines = [f"## {task}, {reward} reward", ""]
    lines += [f"Teacher `{labels}`, student `{student}`, preset `{preset}`.", ""]
    several = sorted({NAMES.get(a.algo, a.algo) for a in arms if a.differs})
    if several:
        lines += [
            f"**Configurations differ in more than the seed** ({', '.join(several)}): "
            "they are not averaged, and brackets say what differs.",
            "",
        ]
    counts = {len(arm.runs) for arm in arms}
    if len(counts) > 1:
        lines += [f"The arms have different numbers of seeds: {sorted(counts)}.", ""]
    lines += [f"![{task}]({file.name})", "", caption, ""]
    lines += final_table(arms)
    lines += steps_table(arms, figure, window)
    return lines


def notes(window: int, resumed: bool) -> list[str]:
    """How the numbers were made."""
    around = "" if window == 1 else f", mean of the {window} evaluations around it"
    lines = [
        "Success: share of episodes with success at any step, in the final evaluation "
        "of each run, on episodes that nobody trained on. Intervals: Student's t over "
        "the seeds, cut off at 0 and 100; the seeds' episodes are not pooled.",
        "",
        f"Steps to a success rate: the first evaluation at or above it{around}, median "
        "over the seeds, with how many have reached it; `>` where the median run has "
        f"not, by the end of the curve. The paper's curves are averaged over "
        f"{PAPER_WINDOW} evaluations, and are means over its seeds.",
        "",
    ]
    if resumed:
        lines += ["(*) A run was interrupted: its seconds since the last start.", ""]
    return lines


def report(paths: list[Path], out: Path, *, window: int = 1) -> Path:
    """Writes ``report.md`` and its pictures to ``out``.

    Raises:
        ValueError: if there is no finished run, or one twice.
    """
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"{', '.join(missing)} does not exist.")
    runs, left_out = find(paths)
    if not runs:
        raise ValueError(
            "No finished run below "
            f"{', '.join(map(str, paths))}: examples/rpd.py writes config.yaml and "
            "results.json." + "".join(f"\n  {line}" for line in left_out)
        )
    sections = sections_of(runs)
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# Report", ""]
    lines += notes(window, any(run.results.get("resumed") for run in runs))
    for key, arms in sections.items():
        lines += section(key, arms, out, window)
    if left_out:
        lines += ["## Left out", "", *(f"- {line}" for line in left_out), ""]
    versions = sorted({json.dumps(run.results.get("versions")) for run in runs})
    lines += ["## Versions", ""]
    for text in versions:
        parts = [f"{k} {v}" for k, v in (json.loads(text) or {}).items()]
        lines.append(f"- {', '.join(parts) or 'not recorded'}")
    (out / "report.md").write_text("\n".join(lines) + "\n")
    return out / "report.md"


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders with runs in them")
    parser.add_argument("--out", type=Path, default=Path("report"))
    parser.add_argument(
        "--window",
        type=int,
        default=1,
        help="evaluations, an odd number, that are averaged for `steps to`",
    )
    args = parser.parse_args(argv)
    if args.window < 1 or args.window % 2 == 0:
        parser.error(f"--window is an odd number of evaluations, got {args.window}.")
    try:
        page = report(args.runs, args.out, window=args.window)
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is missing: pip install 'torchrl_rpd[plot]'")
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {page} and {len(list(args.out.glob('*.png')))} pictures")


if __name__ == "__main__":
    main(sys.argv[1:])
