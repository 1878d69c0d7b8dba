# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Serves the original Octo (JAX) over OpenPI's websocket protocol, with a batch dimension.

Stands alone: it runs in Octo's own environment and needs nothing of torchrl_rpd, see the
README beside it.

    python octo_jax_server.py --checkpoint hf://rail-berkeley/octo-small-1.5 --port 8765

Every message is msgpack, arrays as {b"__ndarray__": True, b"data", b"dtype", b"shape"}.
On connection the server sends its metadata. A request holds

    observation/image          uint8 [B, H, W, 3] (or one image [H, W, 3]), 256 x 256
    observation/wrist_image    the same, 128 x 128 (optional)
    prompt                     one text, or a list of B texts
    num_samples                draws per row, whose mean is the answer (optional)
    initial_noise, step_noise  [B, 28] and [20, B, 28]: denoise with these instead of
                               the server's own draws, for comparisons (optional)

and the answer ``actions`` float32 [B, 4, 7], un-normalised, ``std`` [B, 4, 7] with several
draws, ``readout`` [B, D] (which no draw enters) with given noise, and ``server_timing``.
An error is answered by a text frame; the connection stays open.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import websockets


def pack_array(value: Any) -> Any:
    """Arrays as openpi_client.msgpack_numpy writes them."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "VOc":
            raise ValueError(f"Unsupported dtype: {value.dtype}")
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {
            b"__npgeneric__": True,
            b"data": value.item(),
            b"dtype": value.dtype.str,
        }
    return value


def unpack_array(value: dict) -> Any:
    """The inverse of :func:`pack_array`."""
    if b"__ndarray__" in value:
        return np.ndarray(
            buffer=value[b"data"],
            dtype=np.dtype(value[b"dtype"]),
            shape=value[b"shape"],
        )
    if b"__npgeneric__" in value:
        return np.dtype(value[b"dtype"]).type(value[b"data"])
    return value


def pack(value: Any) -> bytes:
    """A message."""
    return msgpack.packb(value, default=pack_array)


def unpack(data: bytes) -> Any:
    """The content of a message."""
    return msgpack.unpackb(data, object_hook=unpack_array)


def metadata(model: str, action_dim: int, action_horizon: int) -> dict[str, Any]:
    """What a client is told on connection, in the words of torchrl_rpd's protocol."""
    return {
        "server": "octo_jax_server/1",
        "model": model,
        "action_dim": action_dim,
        "action_horizon": action_horizon,
        "action_convention": "un-normalised, gripper as the model gives it",
        "image_size": 256,
        "batch": True,
        "request_keys": ["observation/image", "prompt"],
    }


class OctoPolicy:
    """The original model behind one function from requests to answers."""

    def __init__(
        self, checkpoint: str, step: int | None, unnorm_key: str | None, seed: int
    ) -> None:
        import jax
        from octo.model.octo_model import OctoModel

        self.jax = jax
        self.model = OctoModel.load_pretrained(checkpoint, step)
        statistics = self.model.dataset_statistics
        flat = "action" in statistics and "mean" in statistics["action"]
        if not flat and unnorm_key not in statistics:
            raise SystemExit(f"--unnorm-key must be one of {sorted(statistics)}")
        self.statistics = (statistics if flat else statistics[unnorm_key])["action"]
        self.rng = jax.random.PRNGKey(seed)
        self.tasks: dict[tuple[str, ...], Any] = {}
        self.head = self.model.module.bind({"params": self.model.params}).heads[
            "action"
        ]

        def eps(module: Any, outputs: Any, time: Any, x: Any) -> Any:
            return module.heads["action"](
                outputs, time=time, noisy_actions=x, train=False
            )

        self.eps = jax.jit(
            lambda params, *inputs: self.model.module.apply(
                {"params": params}, *inputs, method=eps
            )
        )
        self.metadata = metadata(
            checkpoint, self.head.action_dim, self.head.action_horizon
        )

    def infer(self, request: dict) -> dict:
        """Answers one request."""
        image = request["observation/image"]
        batched = image.ndim == 4
        images = {"image_primary": image if batched else image[None]}
        if "observation/wrist_image" in request:
            wrist = request["observation/wrist_image"]
            images["image_wrist"] = wrist if batched else wrist[None]
        rows = len(images["image_primary"])
        for name, value in images.items():
            size = 256 if name == "image_primary" else 128
            if value.shape != (rows, size, size, 3) or value.dtype != np.uint8:
                raise ValueError(
                    f"{name}: expected uint8 {(rows, size, size, 3)}, got {value.dtype} "
                    f"{value.shape}"
                )
        prompt = request["prompt"]
        texts = (prompt,) * rows if isinstance(prompt, str) else tuple(prompt)
        if len(texts) != rows:
            raise ValueError(f"{len(texts)} prompts for {rows} images")
        if texts not in self.tasks:
            self.tasks.clear()
            self.tasks[texts] = self.model.create_tasks(texts=list(texts))
        observations = {name: value[:, None] for name, value in images.items()}
        given = (observations, self.tasks[texts])
        mask = np.ones((rows, 1), dtype=bool)
        if "initial_noise" in request:
            answer = self._denoise(*given, mask, request)
        else:
            self.rng, key = self.jax.random.split(self.rng)
            draws = self.model.sample_actions(
                *given,
                unnormalization_statistics=self.statistics,
                timestep_pad_mask=mask,
                sample_shape=(int(request.get("num_samples", 1)),),
                rng=key,
            )
            draws = np.asarray(draws)
            answer = {"actions": draws.mean(0)}
            if len(draws) > 1:
                answer["std"] = draws.std(0)
        return answer if batched else {k: v[0] for k, v in answer.items()}

    def _denoise(
        self, observations: Any, tasks: Any, mask: np.ndarray, request: dict
    ) -> dict:
        """The head's own loop (predict_action), with given noise."""
        import jax.numpy as jnp

        head, statistics = self.head, self.statistics
        outputs = self.model.run_transformer(observations, tasks, mask)
        x = jnp.asarray(request["initial_noise"])[:, None]
        for i, time_step in enumerate(reversed(range(head.diffusion_steps))):
            steps = jnp.full((*x.shape[:-1], 1), time_step)
            eps = self.eps(self.model.params, outputs, steps, x)
            alpha, alpha_hat = head.alphas[time_step], head.alpha_hats[time_step]
            x = (x - (1 - alpha) / jnp.sqrt(1 - alpha_hat) * eps) / jnp.sqrt(alpha)
            z = jnp.asarray(request["step_noise"][i])[:, None]
            x = x + (time_step > 0) * jnp.sqrt(head.betas[time_step]) * z
            x = jnp.clip(x, -head.max_action, head.max_action)
        chunk = np.asarray(x[:, -1])
        chunk = chunk.reshape(-1, head.action_horizon, head.action_dim)
        keep = statistics.get("mask", np.ones(head.action_dim, dtype=bool))
        chunk = np.where(keep, chunk * statistics["std"] + statistics["mean"], chunk)
        return {
            "actions": chunk.astype(np.float32),
            "readout": np.asarray(outputs["readout_action"].tokens)[:, -1, 0],
        }


async def serve(policy: OctoPolicy, host: str, port: int, max_size: int) -> None:
    """Answers until it is interrupted; one request at a time, as there is one model."""
    # In a thread: the first request compiles for long, and pings must be answered.
    worker = ThreadPoolExecutor(max_workers=1)
    loop = asyncio.get_running_loop()

    async def answer(socket: Any) -> None:
        await socket.send(pack({**policy.metadata, "max_message_bytes": max_size}))
        async for message in socket:
            start = time.perf_counter()
            try:
                request = unpack(message)
                result = await loop.run_in_executor(worker, policy.infer, request)
            except Exception:
                await socket.send(traceback.format_exc())
                continue
            milliseconds = 1000 * (time.perf_counter() - start)
            result["server_timing"] = {"infer_ms": milliseconds}
            await socket.send(pack(result))

    async with websockets.serve(
        answer, host, port, compression=None, max_size=max_size
    ):
        logging.info("listening on ws://%s:%d", host, port)
        await asyncio.Future()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="hf://rail-berkeley/octo-small-1.5")
    parser.add_argument("--step", type=int)
    parser.add_argument("--unnorm-key", help="for pretrained models, e.g. viola")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--max-megabytes", type=int, default=256, help="of a message")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    policy = OctoPolicy(args.checkpoint, args.step, args.unnorm_key, args.seed)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(policy, args.host, args.port, args.max_megabytes * 2**20))


if __name__ == "__main__":
    main()
