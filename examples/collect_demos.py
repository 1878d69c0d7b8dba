# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Records demonstrations of several tasks in ManiSkill's own trajectory files.

    python examples/collect_demos.py --out demos --episodes 200      # four tasks, 64 pixels
    python examples/collect_demos.py PushCube-v1 --camera main hand --image-size 128
    python examples/collect_demos.py PickCube-v1 --state-only --flaw cube_offset_std=0.01
    python examples/collect_demos.py PickCube-v1 --planner --planner-python PATH
    python examples/collect_demos.py PushCube-v1 --act-as PullCube-v1   # and the reverse

The demonstrator is the scripted teacher, which acts from the simulator's state; pictures
are recorded beside it. Killed at any time, the same command goes on where it was; with
more --episodes it adds some. ManiSkill's motion planner needs an environment of its own:
docs/demonstrations.md. To train on the files: ``torchrl_rpd.data.ManiSkillDemos``.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from torchrl_rpd import set_learner_threads
from torchrl_rpd.data import flat_state, record_demos
from torchrl_rpd.envs import TASKS as TASK_TABLE
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.teachers import ScriptedTeacher

TASKS = ("PushCube-v1", "PullCube-v1", "PickCube-v1", "StackCube-v1")
# What one task's demonstrator does in the scene of the other: its goal lies 0.2 m from the
# cube, on the other side of it.
MIRRORED = {
    ("PushCube-v1", "PullCube-v1"): (-0.4, 0.0, 0.0),
    ("PullCube-v1", "PushCube-v1"): (0.4, 0.0, 0.0),
}
MIRRORED_STEPS = 18  # no success ends these episodes


def flaw(word: str) -> tuple[str, Any]:
    """A flaw's name and its value."""
    name, _, value = word.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise argparse.ArgumentTypeError(f"NAME=VALUE expected, got {word!r}") from None


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("tasks", nargs="*", default=TASKS, help=f"default: {' '.join(TASKS)}")
    add("--out", type=Path, default=Path("demos"), help="one file for each task")
    add("--episodes", type=int, default=100, help="of each task (default: 100)")
    add("--seed", type=int, default=0, help="of the first episode (default: 0)")
    add("--camera", nargs="+", default=["human"], help="default: human")
    add("--image-size", type=int, default=64, help="pixels (default: 64)")
    add("--state-only", action="store_true", help="no pictures: 20 times as fast")
    add("--stock-visuals", action="store_true", help="the robot as ManiSkill draws it")
    add("--fast-controller", action="store_true", help="equal up to rounding")
    add("--workers", type=int, default=1, help="processes (default: 1)")
    add("--keep-failures", action="store_true", help="also episodes without success")
    add(
        "--flaw",
        nargs="+",
        type=flaw,
        default=[],
        metavar="NAME=VALUE",
        help="the teacher's flaws, e.g. jitter=0.1 cube_offset_std=0.01",
    )
    add(
        "--noise",
        type=float,
        default=0.0,
        help="disturbs what is executed, records what was intended (default: 0)",
    )
    add(
        "--act-as",
        metavar="TASK",
        help="push in PullCube-v1's scenes or pull in PushCube-v1's, so that only the "
        "instruction tells which; every episode is kept",
    )
    add("--planner", action="store_true", help="ManiSkill's motion planner acts")
    add(
        "--planner-python", default=sys.executable, help="Python with numpy<2 and mplib"
    )
    return parser.parse_args(words)


def demonstrator(task: str, flaws: dict[str, Any]) -> Callable[[TensorDictBase], Any]:
    """The scripted teacher, whose flat state is put together from the parts recorded."""
    teacher = ScriptedTeacher(task, **flaws)

    def act(td: TensorDictBase) -> torch.Tensor:
        observation = td["observation"]
        if not isinstance(observation, torch.Tensor):
            observation = flat_state(td)
        seen = {"observation": observation, "episode_seed": td["episode_seed"]}
        return teacher(TensorDict(seen, td.batch_size))["vla_action", "chunk"][
            ..., 0, :
        ]

    return act


def record(task: str, args: argparse.Namespace) -> None:
    """Records one task, or goes on with it."""
    flaws = dict(args.flaw)
    acted, keep = task, "all" if args.keep_failures else "success"
    if args.act_as is not None:
        acted, keep = args.act_as, "all"
        if (task, acted) not in MIRRORED:
            raise SystemExit(
                "collect_demos.py: --act-as goes with PushCube-v1 and PullCube-v1, each "
                f"for the other; got {acted} for {task}."
            )
        flaws["goal_offset"] = MIRRORED[task, acted]
    # What ManiSkill needs to make the environment again, and what it does not know.
    made_with: dict[str, Any] = {
        "obs_mode": "state" if args.state_only else "rgb+state_dict",
        "control_mode": "pd_ee_delta_pose",
        "reward_mode": "sparse",
        "sim_backend": "physx_cpu",
    }
    if acted != task:
        made_with["max_episode_steps"] = MIRRORED_STEPS
    ours: dict[str, Any] = {"fast_controller": args.fast_controller}
    names = None
    if not args.state_only:
        ours["camera"] = args.camera
        ours["image_size"] = args.image_size
        ours["light_visuals"] = not args.stock_visuals
        main = next((c for c in args.camera if c != "hand"), None)
        if "main" not in args.camera and main is not None:
            names = {"image": main}
    env = ManiSkillEnv(task, num_workers=args.workers, **made_with, **ours)
    started = time.perf_counter()
    done = record_demos(
        env,
        demonstrator(acted, flaws),
        args.out / (f"{task}.h5" if acted == task else f"{task}-as-{acted}.h5"),
        task_id=task,
        episodes=args.episodes,
        seed=args.seed,
        keep=keep,
        noise=args.noise,
        instruction=TASK_TABLE[acted].instruction,
        cameras=names,
        env_kwargs=made_with,
        settings={**ours, "teacher": "scripted", "flaws": flaws},
        source_type="scripted",
        source_desc="torchrl_rpd.teachers.ScriptedTeacher",
    )
    env.close()
    print(
        f"{done.path}: {done.episodes} episodes, {done.steps} steps; "
        f"{done.dropped} were played and not kept "
        f"({time.perf_counter() - started:.0f} s)"
    )


def plan(task: str, args: argparse.Namespace) -> None:
    """Has ManiSkill's own tools plan, convert the actions and draw the pictures."""
    planned = args.out / task / "motionplanning" / "trajectory.h5"
    module = "mani_skill.examples.motionplanning.panda.run"
    run = ["-e", task, "-n", str(args.episodes), "-o", "none", "-b", "physx_cpu"]
    run += ["--record-dir", str(args.out), "--traj-name", planned.stem]
    replay = ["--traj-path", str(planned), "-c", "pd_ee_delta_pose", "--save-traj"]
    replay += ["-o", "state" if args.state_only else "rgb", "-b", "physx_cpu"]
    for tool, options in [
        (module, [*run, "--only-count-success"]),
        ("mani_skill.trajectory.replay_trajectory", replay),
    ]:
        command = [args.planner_python, "-m", tool, *options]
        print(" ".join(command), flush=True)
        try:
            code = subprocess.run(command).returncode
        except OSError as error:
            sys.exit(f"{args.planner_python} cannot be started: {error}")
        if code != 0:
            died = "crashed, as mplib does with numpy 2" if code < 0 else "failed"
            sys.exit(
                f"{tool} {died} (exit status {code}). ManiSkill's motion planner needs a "
                "Python environment with numpy<2: docs/demonstrations.md says how to "
                "make one; name its interpreter with --planner-python."
            )


def main(words: list[str] | None = None) -> None:
    """Records the tasks one after the other."""
    args = parse(words)
    set_learner_threads()
    for task in args.tasks:
        (plan if args.planner else record)(task, args)


if __name__ == "__main__":
    main()
