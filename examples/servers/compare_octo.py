# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
r"""Asks the original Octo (octo_jax_server.py) and the port about the same images.

The readouts, which no noise enters, are compared directly; the chunks are denoised from
the same noise on both sides.

    python examples/servers/compare_octo.py --checkpoint octo-small-1.5 \
        --server ws://127.0.0.1:8765 --unnorm-key viola
"""

from __future__ import annotations

import argparse
import asyncio

import numpy as np
import torch
import websockets
from octo_jax_server import pack, unpack  # the file beside this one

from torchrl_rpd.teachers.octo import OctoTeacher

PROMPTS = ["pick up the cube", "push the cube away", "lift the peg upright"]


async def ask(server: str, request: dict) -> tuple[dict, dict]:
    """Metadata and answer."""
    async with websockets.connect(server, compression=None, max_size=None) as socket:
        metadata = unpack(await socket.recv())
        await socket.send(pack(request))
        answer = await socket.recv()
    if isinstance(answer, str):
        raise SystemExit(f"the server says:\n{answer}")
    return metadata, unpack(answer)


def main() -> None:
    """Asks both and prints the differences."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", required=True, help="the server's, for the port"
    )
    parser.add_argument("--server", default="ws://127.0.0.1:8765")
    parser.add_argument("--unnorm-key")
    parser.add_argument("--tokenizer")
    parser.add_argument("--images", help="an .npy file, uint8 [B, 256, 256, 3]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    if args.images:
        images = np.load(args.images)
    else:
        # Coloured blocks: noise alone would tell little about edges and regions.
        blocks = rng.integers(256, size=(3, 16, 16, 3), dtype=np.uint8)
        images = blocks.repeat(16, 1).repeat(16, 2)
    rows = len(images)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(rows)]
    teacher = OctoTeacher.from_pretrained(
        args.checkpoint, unnorm_key=args.unnorm_key, tokenizer=args.tokenizer
    )
    width = teacher.chunk_size * teacher.action_dim
    initial = rng.standard_normal((rows, width)).astype(np.float32)
    steps = rng.standard_normal((20, rows, width)).astype(np.float32)
    request = {
        "observation/image": images,
        "prompt": prompts,
        "initial_noise": initial,
        "step_noise": steps,
    }
    metadata, theirs = asyncio.run(ask(args.server, request))

    ids, mask = teacher._tokenize(prompts)
    one_step = torch.ones(rows, 1, dtype=torch.bool)
    chunk = teacher.sample_chunk(
        images[:, None], ids, mask, one_step, initial[:, None], steps[:, :, None]
    )
    text = teacher.model.encode_text(ids, mask)
    shown = {"primary": torch.from_numpy(images)[:, None].movedim(-1, -3)}
    with torch.no_grad():
        readout = teacher.model.readouts(shown, text)[:, -1, 0]

    print(f"original: {metadata['model']}, port: {args.checkpoint}, {rows} images")
    for name, ours, original in (
        ("readout", readout.numpy(), theirs["readout"]),
        ("actions", chunk.numpy(), theirs["actions"]),
    ):
        worst = np.abs(ours - original).max()
        print(f"{name:8} largest difference {worst:.1e}, of values up to ", end="")
        print(f"{np.abs(original).max():.2f}")
    for row in range(rows):
        print(f"{prompts[row]!r}")
        print(f"  original {np.array2string(theirs['actions'][row, 0], precision=4)}")
        print(f"  port     {np.array2string(chunk[row, 0].numpy(), precision=4)}")


if __name__ == "__main__":
    main()
