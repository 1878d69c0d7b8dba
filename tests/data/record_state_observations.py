# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Records what stock ManiSkill observes, for tests/envs/test_vulkan.py.

On a machine with a Vulkan driver (a software driver does)::

    python tests/data/record_state_observations.py > tests/data/state_observations.json

With ``--without-vulkan`` the same rollouts run through ``use_without_vulkan``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys

import numpy as np

TASKS = (
    "PickCube-v1",
    "PushCube-v1",
    "PullCube-v1",
    "StackCube-v1",
    "LiftPegUpright-v1",
    "PegInsertionSide-v1",
    "PokeCube-v1",
    "PullCubeTool-v1",
    "RollBall-v1",
    "PlugCharger-v1",
    "PushT-v1",
)
STEPS = 20


def rollout(task_id: str, render_backend: str) -> np.ndarray:
    """Observations ``[1 + STEPS, D]`` of seed 7 under fixed random actions."""
    import gymnasium
    import mani_skill.envs  # noqa: F401  (registers the tasks)

    env = gymnasium.make(
        task_id,
        obs_mode="state",
        control_mode="pd_ee_delta_pose",
        render_backend=render_backend,
    ).unwrapped
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=7)
    observations = [observation[0].numpy()]
    for _ in range(STEPS):
        action = rng.uniform(-1, 1, env.single_action_space.shape).astype(np.float32)
        observations.append(env.step(action)[0][0].numpy())
    env.close()
    return np.stack(observations)


def summarise(observations: np.ndarray) -> dict:
    """A digest of all bits, and the last observation for machines that round else."""
    return {
        "sha256": hashlib.sha256(observations.tobytes()).hexdigest(),
        "last": [round(float(x), 6) for x in observations[-1]],
    }


def main() -> None:
    """Prints one JSON object: task -> digest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without-vulkan", action="store_true")
    without_vulkan = parser.parse_args().without_vulkan

    import torch

    torch.set_num_threads(1)
    render_backend = "cpu"
    with contextlib.redirect_stdout(sys.stderr):
        if without_vulkan:
            from torchrl_rpd.envs._vulkan import use_without_vulkan

            use_without_vulkan()
            use_without_vulkan()  # a second call changes nothing
            render_backend = "none"
        result = {task: summarise(rollout(task, render_backend)) for task in TASKS}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
