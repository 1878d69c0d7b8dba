# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Fine-tune OpenVLA or Octo on your own demonstrations.

    python examples/collect_demos.py ...          # or any of ManiSkill's own files
    python examples/finetune_vla.py openvla --data demos --name my_demos
    python examples/finetune_vla.py octo --data demos --name my_demos

The result is a checkpoint in the published layout, for OpenVLATeacher, OctoTeacher and
the originals' own code. Defaults are those of the originals' fine-tuning. A run that was
killed goes on when the same command is started again. Needs the extras ``openvla`` and
``finetune``, or ``octo``; the published models need a GPU: docs/finetuning.md has the
memory. They were not run here.

Everything at a small size, on a CPU, without a download: random weights and made-up
demonstrations, on which the loss falls.

    python examples/finetune_vla.py openvla --tiny
    python examples/finetune_vla.py octo --tiny
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict
from torch.optim.lr_scheduler import LambdaLR
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers import SamplerWithoutReplacement
from torchrl.record.loggers import get_logger

from torchrl_rpd.finetune import (
    FinetuneCheckpoints,
    ImageAugmentation,
    OctoDiffusionLoss,
    OpenVLATokenLoss,
    accumulate,
    action_statistics,
    add_lora,
    export_octo,
    export_openvla,
    load_octo,
    load_openvla,
    rate_factor,
    weight_decay_groups,
)

# Of openvla's vla-scripts/finetune.py and octo's scripts/configs/finetune_config.py.
# OpenVLA's own default augments; on LIBERO it is then shown the centre, which the paper's
# teacher is not: see docs/finetuning.md.
DEFAULTS: dict[str, dict[str, Any]] = {
    "openvla": {
        "checkpoint": "openvla/openvla-7b",
        "steps": 50_000,
        "batch": 16,
        "lr": 5e-4,
        "schedule": "constant",
        "warmup": 0,
        "clip": None,
        "augment": False,
    },
    "octo": {
        "checkpoint": "rail-berkeley/octo-base-1.5",
        "steps": 50_000,
        "batch": 256,
        "lr": 3e-4,
        "schedule": "cosine",
        "warmup": 2000,
        "clip": 1.0,
        "augment": True,
    },
}
TINY = {"steps": 40, "batch": 4, "lr": 3e-3, "warmup": 0, "augment": False}


def parse() -> argparse.Namespace:
    """The command line; what is left out is as in the original of the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=DEFAULTS)
    parser.add_argument(
        "--data", type=Path, nargs="+", help="ManiSkill HDF5, or folders"
    )
    parser.add_argument("--cameras", nargs="+", help="of the files; default: all")
    parser.add_argument("--name", help="of the demonstrations (unnorm_key)")
    parser.add_argument("--checkpoint", help="folder or Hub id to start from")
    parser.add_argument("--revision", help="commit on the Hub: pin one")
    parser.add_argument("--out", type=Path, help="default: runs/finetune_<model>")
    parser.add_argument("--steps", type=int, help="of the optimiser")
    parser.add_argument("--batch", type=int, help="frames in a step")
    parser.add_argument("--micro-batch", type=int, help="at a time: bounds the memory")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--schedule", choices=["constant", "cosine"])
    parser.add_argument("--warmup", type=int, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip", type=float, help="largest norm of the gradient")
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=1000, help="steps")
    parser.add_argument("--log-every", type=int, default=10, help="steps")
    parser.add_argument("--logger", default="csv", help="csv, tensorboard or wandb")
    openvla = parser.add_argument_group("openvla")
    openvla.add_argument("--train", default="lora", choices=["lora", "full"])
    openvla.add_argument("--rank", type=int, default=32, help="of the adapters")
    openvla.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    openvla.add_argument("--checkpoint-layers", action="store_true", help="less memory")
    octo = parser.add_argument_group("octo")
    octo.add_argument("--octo-step", type=int, help="of the checkpoint; default: last")
    octo.add_argument("--octo-train", default="full", choices=["full", "head"])
    octo.add_argument("--tokenizer", help="T5's, where it is not beside the checkpoint")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    for name, value in {**DEFAULTS[args.model], **(TINY if args.tiny else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.tiny and (args.data is None or args.name is None):
        parser.error("--data and --name are needed, or --tiny")
    args.name = args.name or "tiny"
    args.out = args.out or Path(f"runs/finetune_{args.model}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.bf16 is None:  # Octo's original computes in float32
        args.bf16 = args.model == "openvla" and args.device != "cpu"
    return args


def read_demonstrations(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """A replay buffer of frames, and the statistics of its actions."""
    augment = None
    if args.augment:
        augment = getattr(ImageAugmentation, args.model)()
    if args.tiny:
        return made_up(args.batch, augment)
    from torchrl_rpd.data import ManiSkillDemos

    demos = ManiSkillDemos(
        args.data,
        cameras=args.cameras,
        state=None,
        chunk_size=4,  # Octo's horizon
        batch_size=args.batch,
        sampler=SamplerWithoutReplacement(drop_last=True),
        transform=augment,
    )
    print(f"{len(demos)} frames of {len(demos.episodes)} episodes")
    return demos, demos.statistics()


def made_up(batch: int, augment: Any) -> tuple[Any, dict[str, Any]]:
    """Four frames of noise, each with actions of its own."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, 3, 4, 4), generator=generator, dtype=torch.uint8)
    actions = 2 * torch.rand(4, 7, generator=generator) - 1
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(4),
        sampler=SamplerWithoutReplacement(),
        batch_size=batch,
        transform=augment,
    )
    buffer.extend(
        TensorDict(
            {
                "observation": {
                    "image": pixels.repeat_interleave(64, 2).repeat_interleave(64, 3)
                },
                "language_instruction": NonTensorStack(*["push the cube"] * 4),
                "action": actions,
                "vla_action": {"chunk": actions.unsqueeze(1).repeat(1, 4, 1)},
                "action_is_pad": torch.zeros(4, 4, dtype=torch.bool),
            },
            [4],
        )
    )
    return buffer, action_statistics(buffer)


def main() -> None:
    """Trains, saves, exports, and loads what it has exported."""
    args = parse()
    torch.manual_seed(args.seed)
    demos, statistics = read_demonstrations(args)

    # 1. The network, inside the teacher that it will be.
    if args.tiny:
        args.checkpoint = tiny_checkpoint(args.model)
    if args.model == "openvla":
        openvla = load_openvla(
            args.checkpoint,
            statistics,
            # All weights in bfloat16 would lose small steps.
            dtype=torch.float32 if args.train == "full" else None,
            trainable=args.train == "full",
            device=args.device,
            revision=args.revision,
        )
        if args.train == "lora":
            add_lora(openvla, rank=args.rank, dropout=args.dropout)
        loss = OpenVLATokenLoss(openvla, checkpoint_layers=args.checkpoint_layers)
        groups: Any = [p for p in loss.parameters() if p.requires_grad]
    else:
        octo = load_octo(
            args.checkpoint,
            statistics,
            step=args.octo_step,
            trained=args.octo_train,
            tokenizer=args.tokenizer,
            device=args.device,
            revision=args.revision,
        )
        loss = OctoDiffusionLoss(octo)
        groups = weight_decay_groups(loss, args.weight_decay)
    loss.train()
    trained = [p for p in loss.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in trained):,} parameters are trained")

    # 2. The optimiser, and where the run stands.
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    factor = rate_factor(
        args.schedule, warmup_steps=args.warmup, total_steps=args.steps
    )
    scheduler = LambdaLR(optimizer, factor)
    left_out = ("out", "device", "log_every", "save_every", "logger", "micro_batch")
    if args.tiny:
        left_out += ("checkpoint",)  # a new folder each time, with the same weights
    checkpoints = FinetuneCheckpoints(
        args.out / "checkpoints",
        # What the run depends on: a checkpoint of other settings is refused.
        config={k: v for k, v in vars(args).items() if k not in left_out},
        module=loss,
        optimizer=optimizer,
        scheduler=scheduler,
        buffer=demos,
    )
    done = checkpoints.resume()
    if done:
        print(f"going on at step {done}")
    logger = get_logger(args.logger, logger_name=str(args.out), experiment_name="logs")

    # 3. The loop.
    for step in range(done + 1, args.steps + 1):
        metrics = accumulate(
            loss,
            demos.sample(),
            micro_batch_size=args.micro_batch,
            autocast=torch.bfloat16 if args.bf16 else None,
        )
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip or float("inf"))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % args.log_every == 0 or step == args.steps:
            metrics["grad_norm"] = norm
            metrics["lr"] = torch.tensor(scheduler.get_last_lr()[0])
            numbers = {name: float(value) for name, value in metrics.items()}
            for name, value in numbers.items():
                logger.log_scalar(name, value, step=step)
            print(
                step, {name: float(f"{value:.3g}") for name, value in numbers.items()}
            )
        if step % args.save_every == 0 or step == args.steps:
            checkpoints.save(step)

    # 4. The checkpoint for others, and the proof that it can be read.
    target = args.out / "export"
    if target.exists():  # of this very run: it was complete
        print(f"{target} is there already")
        return
    shared: dict[str, Any] = {
        "base": args.checkpoint,
        "statistics": statistics,
        "unnorm_key": args.name,
        "revision": args.revision,
    }
    if args.model == "openvla":
        from torchrl_rpd.teachers.openvla import OpenVLATeacher

        export_openvla(loss.teacher, target, **shared)
        OpenVLATeacher.from_pretrained(target, unnorm_key=args.name)
    else:
        from torchrl_rpd.teachers.octo import OctoTeacher

        export_octo(loss.teacher, target, step=args.steps, **shared)
        OctoTeacher.from_pretrained(target, unnorm_key=args.name)
    print(f"{target}: load it with unnorm_key={args.name!r}")


def tiny_checkpoint(model: str) -> Path:
    """Random weights in the published layout."""
    if model == "openvla":
        from torchrl_rpd.teachers.openvla import write_tiny_checkpoint

        return write_tiny_checkpoint(tempfile.mkdtemp())
    from torchrl_rpd.teachers.octo import write_random_checkpoint

    return write_random_checkpoint(tempfile.mkdtemp(), layout="msgpack")


if __name__ == "__main__":
    main()
