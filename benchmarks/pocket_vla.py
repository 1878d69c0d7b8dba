# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How often the pocket VLA succeeds, and whether it does what it is told.

Success: whole episodes of each task it was trained on, also seen by cameras that it was
not trained on. Language: the same scenes of PushCube and PullCube twice, once with the
instruction to push and once with that to pull; counted is where the cube is moved, away
from the robot or towards it.

    python -m benchmarks.pocket_vla --out benchmarks/results/pocket_vla.md
    python -m benchmarks.pocket_vla --weights pocket_vla.safetensors   # of your own
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from benchmarks.machine import machine_line
from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.evaluation import Estimate, evaluate
from torchrl_rpd.teachers import PocketVLATeacher
from torchrl_rpd.teachers.pocket import POCKET_INSTRUCTIONS

PUSH, PULL = "PushCube-v1", "PullCube-v1"
CUBE_X = 28  # column of the flat state of both
MOVED = 0.02  # metres, half a cube
HORIZON = 25  # steps; the demonstrator needs about ten
HEADER = """# The pocket VLA

One set of weights, four tasks, 128 pixels of one camera. Episodes that it was not trained
on, ended by success or the time limit; Wilson's intervals. How the weights were made:
[docs/pocket_vla.md](../../docs/pocket_vla.md).
"""


def build(task: str, num_envs: int, camera: str, obs_mode: str = "rgb") -> EnvBase:
    """The environment whose pictures the weights were trained on, or another view."""
    return ManiSkillEnv(
        task,
        num_envs=num_envs,
        obs_mode=obs_mode,
        camera=camera,
        image_size=128,
        light_visuals=True,
        fast_controller=True,
        reward_mode="sparse",
        ignore_terminations=obs_mode != "rgb",
    )


@torch.no_grad()
def displacements(env: EnvBase, teacher: PocketVLATeacher, seed: int) -> torch.Tensor:
    """How far the cubes are moved along x, in metres, ``[num_envs]``."""
    env.set_seed(seed)
    frames: TensorDictBase = env.reset()
    start = frames["observation", "state"][..., CUBE_X].clone()
    for _ in range(HORIZON):
        frames["action"] = teacher(frames.clone())["vla_action", "chunk"][..., 0, :]
        frames = env.step(frames)["next"]
    return frames["observation", "state"][..., CUBE_X] - start


def language(weights: Path | None, scenes: int, num_envs: int, seed: int) -> str:
    """One line for each task's scenes, and all together."""
    rows, opposite, total = [], 0, 0
    for task in (PUSH, PULL):
        env = build(task, num_envs, "human", "rgb+state")
        moved = {}
        for told in (PUSH, PULL):
            words = POCKET_INSTRUCTIONS[told]
            teacher = PocketVLATeacher(instruction=words, path=weights)
            rounds = range(-(-scenes // 2 // num_envs))
            moved[told] = torch.cat(
                [displacements(env, teacher, seed + i) for i in rounds]
            )[: scenes // 2]
        env.close()
        pushed, pulled = moved[PUSH] > MOVED, moved[PULL] < -MOVED
        both = int((pushed & pulled).sum())
        opposite, total = opposite + both, total + pushed.numel()
        rows.append(
            f"| {task} | {int(pushed.sum())} | {int(pulled.sum())} | {both} | "
            f"{pushed.numel()} |"
        )
    share = Estimate.of_share(opposite, total)
    header = (
        f"| scenes of | told to push: moved away by {1000 * MOVED:.0f} mm or more | told "
        "to pull: moved towards the robot | both in the same scene | scenes |\n"
        "|---|---|---|---|---|\n"
    )
    return (
        header + "\n".join(rows) + f"\n\nOpposite sides in the same scene: {share}.\n"
    )


def made_of(weights: Path | None) -> str:
    """What the file says about its training."""
    teacher = PocketVLATeacher("PushCube-v1", path=weights)
    known = teacher.metadata
    count = sum(p.numel() for p in teacher.parameters())
    return (
        f"{count:,} weights, {known['frames']:,} frames of {known['episodes']:,} "
        f"episodes, {known['updates']:,} updates of {known['batch_size']}, mean absolute "
        f"error {known['error']:.3f} at the end.\n"
    )


def success(
    weights: Path | None, *, episodes: int, num_envs: int, seed: int, camera: str
) -> str:
    """One line for each task."""
    lines = [
        "| task | success at any step | 95 % interval | at the last step | episodes |",
        "|---|---|---|---|---|",
    ]
    for task in POCKET_INSTRUCTIONS:
        env = build(task, num_envs, camera)
        teacher = PocketVLATeacher(task, path=weights)
        result = evaluate(env, teacher, episodes=episodes, seeds=seed)
        env.close()
        once = result.success_once
        lines.append(
            f"| {task} | {once.mean:.3f} | {once.low:.3f} to {once.high:.3f} | "
            f"{result.success_at_end.mean:.3f} | {once.n} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, help="default: the package's")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=5_000_000)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--cameras", nargs="+", default=["human", "human_shifted"])
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    args = parser.parse_args()
    set_learner_threads()
    parts = [HEADER, made_of(args.weights)]
    for camera in args.cameras:
        table = success(
            args.weights,
            episodes=args.episodes,
            num_envs=args.envs,
            seed=args.seed,
            camera=camera,
        )
        parts.append(f"## Seen from `{camera}`\n\n{table}")
    if args.scenes:
        told = language(args.weights, args.scenes, args.envs, args.seed)
        parts.append(f"## Told to push and to pull\n\n{told}")
    words = " ".join(sys.argv[1:])
    parts.append(
        f"{machine_line()}\n\nCommand: `python -m benchmarks.pocket_vla {words}`.\n"
    )
    text = "\n".join(parts)
    print(text)
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
