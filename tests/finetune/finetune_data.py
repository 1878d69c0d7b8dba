# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A handful of made-up demonstrations, as a reader of real ones would store them."""

from __future__ import annotations

import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers import SamplerWithoutReplacement

TEXTS = ("push the cube", "pick up the red cube and lift it")


def demonstrations(rows: int, *, size: int = 64, horizon: int = 4) -> TensorDict:
    """Frames that differ in a few large blocks of colour, with actions in [-1, 1].

    The last frame is the last of its episode: of its chunk only the first action is
    real, and so on backwards.
    """
    generator = torch.Generator().manual_seed(7)
    blocks = torch.randint(256, (rows, 3, 4, 4), generator=generator, dtype=torch.uint8)
    blocks[1] = blocks[0]  # told apart by what is said alone
    images = blocks.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)
    actions = 2 * torch.rand(rows, 7, generator=generator) - 1
    actions[:, 6] = torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0)
    behind = torch.arange(rows).unsqueeze(1) + torch.arange(horizon)
    return TensorDict(
        {
            "observation": {"image": images},
            "language_instruction": NonTensorStack(
                *(TEXTS[i % len(TEXTS)] for i in range(rows))
            ),
            "action": actions,
            "vla_action": {"chunk": actions[behind.clamp(max=rows - 1)]},
            "action_is_pad": behind >= rows,
        },
        [rows],
    )


def buffer(data: TensorDict, batch_size: int, transform=None) -> TensorDictReplayBuffer:
    """Whole epochs in random order."""
    out = TensorDictReplayBuffer(
        storage=LazyTensorStorage(len(data)),
        sampler=SamplerWithoutReplacement(),
        batch_size=batch_size,
        transform=transform,
    )
    out.extend(data)
    return out
