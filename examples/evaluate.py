# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Evaluates a saved student on fresh episodes.

python examples/evaluate.py runs/demo --episodes 200 --seeds 3000000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.evaluation import evaluate
from torchrl_rpd.students import ActorCritic


def main() -> None:
    """Loads the student, plays, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "path", type=Path, help="a student's file, or the folder that holds it"
    )
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3_000_000)
    parser.add_argument("--envs", type=int, default=16)
    args = parser.parse_args()

    file = args.path / "student.safetensors" if args.path.is_dir() else args.path
    if not file.exists():
        parser.error(f"{file} does not exist; `make demo` writes one.")
    set_learner_threads()
    student = ActorCritic.load(file)
    task, reward = student.metadata["task"], student.metadata["reward"]
    # ManiSkill's own controller: the student was trained with the fast one.
    env = ManiSkillEnv(task, num_envs=args.envs, reward_mode=reward)
    result = evaluate(env, student.actor, episodes=args.episodes, seeds=args.seeds)
    print(f"{file} on {task}, {args.episodes} episodes, seeds from {args.seeds}")
    for name in ("success_once", "success_at_end", "episode_return", "length"):
        print(f"  {name:<15} {getattr(result, name)}")


if __name__ == "__main__":
    main()
