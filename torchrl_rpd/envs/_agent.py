# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Changes to the robot of one ManiSkill environment that outlive its rebuilding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mani_skill.envs.sapien_env import BaseEnv


def keep_installed(env: BaseEnv, install: Callable[[Any], None]) -> None:
    """Applies ``install`` to the robot now, and again whenever ManiSkill rebuilds it.

    Only this environment object changes. The same function is kept once.
    """
    install(env.agent)
    kept = getattr(env._load_agent, "kept", None)
    if kept is None:
        kept = []
        load_agent = env._load_agent

        @functools.wraps(load_agent)
        def load_and_install(*args: Any, **kwargs: Any) -> None:
            load_agent(*args, **kwargs)
            for function in kept:
                function(env.agent)

        load_and_install.kept = kept  # type: ignore[attr-defined]
        env._load_agent = load_and_install
    if install not in kept:
        kept.append(install)
