# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Draws all views of the camera study, one row per task, for docs/cameras.md.

python docs/draw_cameras.py

Needs a renderer and matplotlib.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch

from torchrl_rpd.envs import CAMERA_VIEWS, ManiSkillEnv

PICTURE = Path(__file__).parent / "images" / "camera_views.png"


def pictures(task: str, size: int) -> dict[str, torch.Tensor]:
    """The same moment of an episode in all views, ``[H, W, 3]`` uint8 each."""
    env = ManiSkillEnv(
        task,
        obs_mode="rgb",
        camera=tuple(CAMERA_VIEWS),
        image_size=size,
        render_backend="cpu",
    )
    env.set_seed(1)  # nothing hides the cube or the goal
    td = env.reset()
    forward = torch.tensor([[0.3, 0.0, -0.5, 0.0, 0.0, 0.0, 1.0]])
    for _ in range(2):
        td = env.step(td.set("action", forward))["next"].exclude("reward")
    drawn = {
        name: td["observation", "image" if name == "human" else f"{name}_image"]
        for name in CAMERA_VIEWS
    }
    env.close()
    return {name: image[0].permute(1, 2, 0) for name, image in drawn.items()}


def main() -> None:
    """Draws one picture of all views and tasks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["PushCube-v1", "PickCube-v1"])
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    rows, columns = len(args.tasks), len(CAMERA_VIEWS)
    inches = args.size / 100
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * (inches + 0.05), rows * (inches + 0.25)),
        squeeze=False,
        layout="constrained",
    )
    for line, task in zip(axes, args.tasks, strict=True):
        drawn = pictures(task, args.size)
        for axis, (name, image) in zip(line, drawn.items(), strict=True):
            axis.imshow(image.numpy())
            axis.set_title(f'{task.removesuffix("-v1")}, "{name}"', fontsize=8)
            axis.set_axis_off()
    drawn_sheet = io.BytesIO()
    figure.savefig(drawn_sheet, dpi=100)
    # A palette makes a small file. The clusters keep the few pixels of small things.
    sheet = Image.open(drawn_sheet).convert("RGB")
    sheet = sheet.quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=2)
    sheet.save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
