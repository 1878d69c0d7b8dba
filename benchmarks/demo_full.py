# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Every arm of the demo over five seeds: ``make demo-full``.

RPD, PPO alone and imitation alone with the same network, data and updates, at a fixed
budget. A run that is in the results already is not repeated, so that an interrupted
benchmark goes on where it was; ``--fresh`` starts over.

    python -m benchmarks.demo_full
    python -m benchmarks.demo_full --arms dense_rpd dense_ppo --seeds 0 1
    python -m benchmarks.demo_full --table        # only print what is committed
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks._results import write_json
from benchmarks.machine import machine
from examples.demo import DEMO, REPOSITORY, RESULTS, Arm, final_seeds, make_env, train
from examples.report import interval
from torchrl_rpd import set_learner_threads
from torchrl_rpd.evaluation import Estimate, evaluate
from torchrl_rpd.teachers import ScriptedTeacher

PICTURE = REPOSITORY / "docs" / "images" / "demo_full.png"
SEEDS = (0, 1, 2, 3, 4)

# Sparse: before the first successes advantages are noise, so that the distillation step
# may use up the whole KL and PPO takes over once the coefficient is low.
OFFSET = Arm(
    reward="sparse",
    teacher={"goal_offset": (0.0, 0.0, 0.026)},
    frames=80_000,
    gamma=0.99,
    bootstrap="truncated",
    log_std_init=-1.8,
    minibatch_size=200,
    target_kl=0.2,
    kl_rule="distill_only",
    coeff=5.0,
    coeff_end=0.5,
    coeff_start_frames=12_000,
    coeff_end_frames=22_000,
    eval_episodes=32,
)
CHATTER = replace(
    OFFSET,
    teacher={"gripper_chatter": 0.4},
    frames=50_000,
    log_std_init=-1.5,
    learning_rate=3e-4,
    minibatch_size=50,
    coeff_end=5.0,
)
ARMS: dict[str, Arm] = {
    "dense_rpd": DEMO,
    "dense_imitation": replace(DEMO, algo="imitation"),
    "dense_ppo": replace(DEMO, algo="ppo"),
    # PPO where PPO is known to work, with settings that suit it.
    "push_ppo": Arm(
        algo="ppo",
        task="PushCube-v1",
        frames=60_000,
        log_std_init=-0.7,
        learning_rate=1e-3,
        minibatch_size=50,
        target_kl=0.1,
    ),
    # Sparse reward, a teacher with a constant error: no average of its labels succeeds
    # more often than it does.
    "offset_rpd": OFFSET,
    "offset_imitation": replace(OFFSET, algo="imitation"),
    "sparse_ppo": replace(OFFSET, algo="ppo"),
    # Sparse reward, an error that averages out: imitation alone removes it.
    "chatter_rpd": CHATTER,
    "chatter_imitation": replace(CHATTER, algo="imitation"),
}
# What each group shows, in the order of the tables.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": (
        "PickCube-v1, normalized_dense reward; the teacher sees the cube off by "
        "N(0, 16 mm) in x and y, drawn per episode",
        ("dense_rpd", "dense_imitation", "dense_ppo"),
    ),
    "push": (
        "PushCube-v1, normalized_dense reward, no teacher: the same PPO code where PPO "
        "alone is known to work",
        ("push_ppo",),
    ),
    "offset": (
        "PickCube-v1, sparse reward; the teacher sees the goal 26 mm too high, always",
        ("offset_rpd", "offset_imitation", "sparse_ppo"),
    ),
    "chatter": (
        "PickCube-v1, sparse reward; the teacher's closing command becomes `open` with "
        "probability 0.4 (this error averages out, so imitation needs no reward)",
        ("chatter_rpd", "chatter_imitation", "sparse_ppo"),
    ),
}


def run_one(name: str, seed: int) -> dict[str, Any]:
    """Trains and evaluates one arm with one seed."""
    set_learner_threads()
    arm = ARMS[name]
    env = make_env(arm)
    seeds = final_seeds(seed)
    teacher = None
    if arm.algo != "ppo":
        policy = ScriptedTeacher(arm.task, **arm.teacher)
        teacher = evaluate(env, policy, episodes=200, seeds=seeds)
    student, report = train(arm, seed, eval_env=env, progress_bar=False)
    result = evaluate(env, student.actor, episodes=200, seeds=seeds)
    return {
        "seed": seed,
        "student": asdict(result.success_once),
        "student_at_end": asdict(result.success_at_end),
        "length": result.length.mean,
        "teacher": None if teacher is None else asdict(teacher.success_once),
        **report,
    }


def load(fresh: bool) -> dict[str, Any]:
    """The results so far."""
    if RESULTS.exists() and not fresh:
        return json.loads(RESULTS.read_text())
    return {"arms": {}}


def across_seeds(values: list[float]) -> str:
    """Mean over the seeds and the t interval of the mean."""
    mean, low, high = interval(values)
    return f"{mean:.3f}" if math.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def last_quarter(run: dict[str, Any]) -> float:
    """Lowest success on the curve after three quarters of the steps: is it steady?"""
    start = 0.75 * run["frames"]
    return min(success for frames, success in run["curve"] if frames >= start)


def tables(results: dict[str, Any]) -> str:
    """Markdown tables of all groups."""
    lines = []
    for title, names in GROUPS.values():
        if not any(results["arms"].get(name, {}).get("runs") for name in names):
            continue
        lines += [f"### {title}", ""]
        lines += [
            "| arm | steps | success: mean over seeds [95 % t interval] "
            "| each seed (200 episodes) | its lowest 95 % bound "
            "| lowest point of the curves' last quarter "
            "| share of minibatches with PPO on | teacher queries | seconds |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        teachers: dict[int, dict[str, float]] = {}
        for name in names:
            runs = results["arms"].get(name, {}).get("runs", [])
            if not runs:
                continue
            teachers |= {r["seed"]: r["teacher"] for r in runs if r["teacher"]}
            shares = [r["student"]["mean"] for r in runs]
            ppo = sum(r["ppo_active"] for r in runs) / len(runs)
            queries = sum(r["teacher_stats"]["queries"] for r in runs) / len(runs)
            seconds = sum(r["seconds"] for r in runs) / len(runs)
            lines.append(
                f"| {name} | {runs[0]['frames']:,} | {across_seeds(shares)} "
                f"| {', '.join(f'{s:.3f}' for s in shares)} "
                f"| {min(r['student']['low'] for r in runs):.3f} "
                f"| {min(last_quarter(r) for r in runs):.3f} "
                f"| {ppo:.2f} | {queries:,.0f} | {seconds:.0f} |"
            )
        if teachers:
            shares = [t["mean"] for t in teachers.values()]
            highest = max(t["high"] for t in teachers.values())
            lines.append(
                f"| teacher | | {across_seeds(shares)} "
                f"| {', '.join(f'{s:.3f}' for s in shares)} "
                f"| highest bound {highest:.3f} | | | | |"
            )
        lines.append("")
    return "\n".join(lines)


def picture(results: dict[str, Any]) -> None:
    """Curves of all groups: mean over the seeds, band from lowest to highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"rpd": "tab:blue", "imitation": "tab:orange", "ppo": "tab:gray"}
    groups = {
        key: (title, [n for n in names if results["arms"].get(n, {}).get("runs")])
        for key, (title, names) in GROUPS.items()
    }
    groups = {key: value for key, value in groups.items() if value[1]}
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    fig, axes = plt.subplots(
        rows,
        columns,
        figsize=(6.0 * columns, 3.8 * rows),
        dpi=110,
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[len(groups) :]:
        ax.set_visible(False)
    for ax, (title, names) in zip(axes.flat, groups.values(), strict=False):
        for name in names:
            arm, runs = ARMS[name], results["arms"][name]["runs"]
            steps = [step / 1000 for step, _ in runs[0]["curve"]]
            curves = [[value for _, value in run["curve"]] for run in runs]
            points = list(zip(*curves, strict=True))
            colour = colours[arm.algo]
            ax.plot(
                steps,
                [sum(p) / len(p) for p in points],
                color=colour,
                label=f"{arm.algo.upper() if arm.algo != 'imitation' else 'imitation'}"
                f"{'' if arm.algo == 'rpd' else ' alone'} ({len(runs)} seeds)",
            )
            low, high = [min(p) for p in points], [max(p) for p in points]
            ax.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
            if arm.algo == "rpd":
                teacher = sum(r["teacher"]["mean"] for r in runs) / len(runs)
                ax.axhline(teacher, color="tab:green", ls=":", label="teacher")
        ax.set(
            xlabel="environment steps (thousands)",
            ylabel="success (deterministic)",
            ylim=(-0.02, 1.02),
        )
        ax.set_title("\n".join(textwrap.wrap(title, 90)), fontsize=8)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(PICTURE)
    plt.close(fig)


def run_all(names: list[str], seeds: list[int], jobs: int, fresh: bool) -> None:
    """Runs what is missing, ``jobs`` processes at a time."""
    results = load(fresh)
    results["machine"] = machine()
    results["command"] = "python -m benchmarks.demo_full"
    todo = []
    # Seed by seed, so that an early look sees every arm.
    for seed in seeds:
        for name in names:
            arm = json.loads(json.dumps(asdict(ARMS[name])))
            entry = results["arms"].setdefault(name, {"arm": arm, "runs": []})
            if entry["arm"] != arm:
                entry["arm"], entry["runs"] = arm, []
            if seed not in [run["seed"] for run in entry["runs"]]:
                todo.append((name, seed))
    print(f"{len(todo)} runs to do, {jobs} at a time", flush=True)

    def work(job: tuple[str, int]) -> None:
        name, seed = job
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.json"
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.demo_full"]
            command += ["--one", name, str(seed), str(file)]
            done = subprocess.run(
                command, cwd=REPOSITORY, capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{name} seed {seed} FAILED:\n{done.stderr[-2000:]}", flush=True)
                return
            run = json.loads(file.read_text())
        runs = results["arms"][name]["runs"]
        runs.append(run)
        runs.sort(key=lambda r: r["seed"])
        write_json(RESULTS, results)
        success = Estimate(**run["student"])
        print(
            f"{name:<18} seed {seed}: {success}  {time.time() - start:.0f} s",
            flush=True,
        )

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, todo))


def main() -> None:
    """Parses the arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--fresh", action="store_true", help="repeat all runs")
    parser.add_argument("--table", action="store_true", help="print, run nothing")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, seed, file = args.one
        Path(file).write_text(json.dumps(run_one(name, int(seed))))
        return
    if not args.table:
        run_all(args.arms, args.seeds, args.jobs, args.fresh)
    results = load(fresh=False)
    if not results["arms"]:
        parser.error(f"{RESULTS} does not exist; run without --table.")
    text = tables(results)
    print(text)
    print(", ".join(f"{k} {v}" for k, v in results["machine"].items()))
    RESULTS.with_suffix(".md").write_text(text)
    picture(results)
    print(f"wrote {RESULTS}, {RESULTS.with_suffix('.md').name} and {PICTURE}")


if __name__ == "__main__":
    main()
