# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How often the scripted teacher without flaws succeeds, task by task.

python -m benchmarks.scripted_success --out benchmarks/results/scripted_success.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.machine import machine_line
from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.evaluation import EvaluationResult, evaluate
from torchrl_rpd.teachers import ScriptedTeacher

TASKS = (
    "PushCube-v1",
    "PullCube-v1",
    "PickCube-v1",
    "StackCube-v1",
    "LiftPegUpright-v1",
    "RollBall-v1",
    "PullCubeToolDistractor-v1",
    "PokeCubeDistractor-v1",
)
HEADER = """\
| task | success at any step | 95 % interval | at the last step | mean steps | episodes |
|---|---|---|---|---|---|
"""


def measure(
    task: str, *, episodes: int, seed: int, num_envs: int, fast_controller: bool
) -> EvaluationResult:
    """Plays the episodes of one task."""
    # the two with a distractor have no dense reward; none is looked at here
    env = ManiSkillEnv(
        task,
        num_envs=num_envs,
        fast_controller=fast_controller,
        reward_mode="sparse",
    )
    try:
        return evaluate(env, ScriptedTeacher(task), episodes=episodes, seeds=seed)
    finally:
        env.close()


def row(task: str, result: EvaluationResult) -> str:
    """One line of the table."""
    once = result.success_once
    return (
        f"| {task} | {once.mean:.3f} | {once.low:.3f} to {once.high:.3f} | "
        f"{result.success_at_end.mean:.3f} | {result.length.mean:.1f} | {once.n} |\n"
    )


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=5_000_000)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument(
        "--stock-controller", action="store_true", help="ManiSkill's own, slower"
    )
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    args = parser.parse_args()
    set_learner_threads()
    table = HEADER
    print(HEADER, end="", flush=True)
    for task in args.tasks:
        result = measure(
            task,
            episodes=args.episodes,
            seed=args.seed,
            num_envs=args.envs,
            fast_controller=not args.stock_controller,
        )
        line = row(task, result)
        print(line, end="", flush=True)
        table += line
    if args.out is not None:
        controller = "ManiSkill's own" if args.stock_controller else "fast"
        args.out.write_text(
            "# Success of the scripted teacher\n\n"
            "Without flaws, `pd_ee_delta_pose`, state observations, ManiSkill's own time "
            "limits (50 steps, RollBall 80, PullCubeToolDistractor 100), "
            f"{controller} controller, "
            f"{args.envs} environments, seed {args.seed}. An episode ends at its first "
            "success. Wilson's intervals.\n\n"
            f"{table}\n"
            "Command: `python -m benchmarks.scripted_success"
            f"{' --stock-controller' if args.stock_controller else ''} "
            f"--out {args.out}`. Machine: {machine_line()}.\n"
        )


if __name__ == "__main__":
    main()
