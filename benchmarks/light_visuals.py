# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The stock robot beside its light visuals: a picture of both, and their speed.

python -m benchmarks.light_visuals

Needs a renderer and matplotlib. The two are timed in turns, block by block, so that what
else the machine does weighs on both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from torchrl_rpd import set_learner_threads
from torchrl_rpd.envs import ManiSkillEnv

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "light_visuals.png"
LOOKS = {"stock": False, "light_visuals=True": True}


def seconds(env: ManiSkillEnv, steps: int) -> float:
    """Seconds per step, random actions, resets not counted."""
    td = env.reset()
    actions = [env.action_spec.rand() for _ in range(steps)]
    start = time.perf_counter()
    for action in actions:
        td = env.step(td.set("action", action))["next"]
    return (time.perf_counter() - start) / steps


def speed(task: str, size: int, steps: int, blocks: int, **kwargs: object) -> None:
    """Prints steps per second of both looks: medians over the blocks."""
    envs = {
        name: ManiSkillEnv(
            task,
            obs_mode="rgb",
            image_size=size,
            fast_controller=True,
            light_visuals=light,
            **kwargs,
        )
        for name, light in LOOKS.items()
    }
    measured: dict[str, list[float]] = {name: [] for name in envs}
    for env in envs.values():
        seconds(env, 2)  # the shaders are compiled at the first picture
    for _ in range(blocks):
        for name, env in envs.items():
            measured[name].append(seconds(env, steps))
    rates = {name: 1 / statistics.median(times) for name, times in measured.items()}
    stock, light = rates.values()
    camera = kwargs.get("camera", "main")
    print(
        f"{task}, {camera} camera, {size} x {size}: stock {stock:.0f} steps/s, light "
        f"{light:.0f} steps/s ({light / stock:.1f}x)"
    )
    for env in envs.values():
        env.close()


def draw(task: str, size: int, path: Path) -> None:
    """Writes one picture of the same moment with both looks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 3.8), layout="constrained")
    for axis, (name, light) in zip(axes, LOOKS.items(), strict=True):
        env = ManiSkillEnv(
            task, obs_mode="rgb", camera="human", image_size=size, light_visuals=light
        )
        env.set_seed(2)  # nothing hides the goal (green)
        td = env.reset()
        forward = torch.tensor([[0.3, 0.0, -0.5, 0.0, 0.0, 0.0, 1.0]])
        for _ in range(3):
            td = env.step(td.set("action", forward))["next"]
        axis.imshow(td["observation", "image"][0].permute(1, 2, 0).numpy())
        axis.set_title(name)
        axis.set_axis_off()
        env.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Draws, then measures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="PickCube-v1")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=5)
    args = parser.parse_args()
    set_learner_threads()
    draw(args.task, 320, args.picture)
    print(f"drawn: {args.picture}")
    speed("PushCube-v1", 128, args.steps, args.blocks)
    speed("PushCube-v1", 256, args.steps, args.blocks, camera="human")


if __name__ == "__main__":
    main()
