# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.fixture(scope="session")
def renderer() -> Generator[None, None, None]:
    """Keeps one environment that draws.

    SAPIEN compiles its shaders (7 s of computing) for the first environment that draws,
    and drops them with the last.
    """
    from torchrl_rpd.envs import ManiSkillEnv

    env = ManiSkillEnv("PushCube-v1", obs_mode="rgb", image_size=16, light_visuals=True)
    yield
    env.close()
