# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Trains the pocket VLA on demonstrations, by behaviour cloning, on two cores.

One set of weights for all tasks in the demonstrations: the instruction tells them apart.
These two commands made the weights that come with the package (docs/pocket_vla.md):

    python examples/collect_demos.py --help       # see docs/pocket_vla.md for the options
    python examples/train_pocket_vla.py demos --out pocket_vla.safetensors

    PocketVLATeacher("PushCube-v1", path="pocket_vla.safetensors") then acts with it.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torchrl.objectives import BCLoss

from torchrl_rpd.data import ManiSkillDemos
from torchrl_rpd.teachers.pocket import PocketVLA

CHUNK = ("vla_action", "chunk")


def main() -> None:
    """Reads the demonstrations, trains, writes the weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demos", type=Path, nargs="+", help="HDF5 files or folders")
    parser.add_argument("--out", type=Path, default=Path("pocket_vla.safetensors"))
    parser.add_argument(
        "--keep-failures",
        action="store_true",
        help="also learn from episodes that were recorded without success",
    )
    parser.add_argument("--camera", default="human", help="the view to learn from")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--chunk-size", type=int, default=4)
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="convolutions in bfloat16, faster where the processor knows it",
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    try:
        demos = ManiSkillDemos(
            args.demos,
            cameras={"image": args.camera},
            state=None,
            success_only=not args.keep_failures,
            chunk_size=args.chunk_size,
            batch_size=args.batch_size,
        )
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"train_pocket_vla.py: {error}")
    print(
        f"{len(demos):,} frames of {len(demos.episodes):,} episodes, left out: "
        f"{demos.skipped_by_reason}; told: {'; '.join(demos.instructions)}",
        flush=True,
    )

    model = PocketVLA(
        action_dim=demos.metadata.action_mean.shape[-1],
        chunk_size=args.chunk_size,
        image_size=args.image_size,
    ).to(args.device)
    loss_module = BCLoss(model, loss_function="l1")
    loss_module.set_keys(action=CHUNK, pad_mask="action_is_pad")
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.updates, pct_start=0.05
    )
    start, running = time.perf_counter(), 0.0
    for update in range(1, args.updates + 1):
        batch = demos.sample().to(args.device)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=args.bfloat16):
            loss = loss_module(batch)["loss_bc"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if update == 1 else 0.98 * running + 0.02 * loss.item()
        if update % 200 == 0 or update == args.updates:
            seconds = time.perf_counter() - start
            left = seconds / update * (args.updates - update)
            print(
                f"update {update:,} of {args.updates:,}: mean absolute error "
                f"{running:.4f}, {seconds:.0f} s, {left:.0f} s left",
                flush=True,
            )
    model.cpu().save(
        args.out,
        instructions=demos.instructions,
        episodes=len(demos.episodes),
        frames=len(demos),
        camera=args.camera,
        updates=args.updates,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        error=running,
        versions={name: version(name) for name in ("torch", "torchrl", "mani_skill")},
    )
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
