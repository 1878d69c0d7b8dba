# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""State observations on a machine without a Vulkan driver.

ManiSkill describes how its objects look even when nothing is drawn
(``render_backend="none"``), and SAPIEN refuses to create those descriptions without
a Vulkan device. :func:`has_render_device` finds out whether there is one, and
:func:`use_without_vulkan` lets scenes be built where there is none. Physics,
observations and rewards do not depend on what is replaced here.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

# Exits with 0 when SAPIEN can both describe and draw objects. A driver that lacks
# an extension SAPIEN needs (Mesa before 24.3) is listed by Vulkan but fails here, as
# does one without ray tracing, which ManiSkill's "cpu" render backend asks for.
_PROBE = """
import sys
import sapien.render
for name in ("cuda", "cpu"):
    try:
        sapien.render.RenderSystem(sapien.Device(name))
        sapien.render.RenderMaterial()
    except RuntimeError:
        continue
    sys.exit(0)
sys.exit(1)
"""


@functools.cache
def has_render_device() -> bool:
    """Tells whether SAPIEN can render on this machine (GPU or software Vulkan).

    The question is put in a child process: SAPIEN prints errors when a driver is
    missing or too old, a broken driver can end the process, and a Vulkan instance
    created here would be inherited by forked workers. Takes under a second; the
    answer is kept for the life of the process. False when SAPIEN is not installed.
    """
    return exits_well(_PROBE)


def exits_well(code: str, *args: str) -> bool:
    """Tells whether Python runs ``code`` in a child process without an error."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", code, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return child.returncode == 0


class _NotDrawn:
    """Stands in for a material or texture where nothing will be drawn.

    Takes every constructor argument, attribute and ``set_*`` call and forgets them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("set_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def use_without_vulkan() -> None:
    """Lets ManiSkill build scenes for state observations without a Vulkan driver.

    To be called before ``gym.make(..., obs_mode="state", render_backend="none")``,
    and only where :func:`has_render_device` is False: afterwards this process cannot
    render. Calling it again changes nothing. All tasks of the task table then build,
    with the observations of a machine that has a driver, bit for bit.

    Replaced, each for a reason:

    * ``RenderMaterial``, whose constructor is what fails, and ``RenderTexture2D``,
      which fails likewise for a robot description that names a texture. Four modules
      hold the names: ``sapien.render`` (used by ManiSkill's tasks),
      ``sapien.pysapien.render`` (used by SAPIEN's actor builder for default materials
      and type checks), SAPIEN's URDF loader and ManiSkill's MJCF loader (robots).
      Nothing reads the stand-ins: without a render backend the builders drop their
      visual records.
    * the table of PushT-v1, see :func:`allow_push_t_without_rendering`.
    """
    # By name: star imports in these packages break `import a.b.c as d`.
    for name in (
        "sapien.render",
        "sapien.pysapien.render",
        "sapien.wrapper.urdf_loader",
        "mani_skill.utils.building._mjcf_loader",
    ):
        module: Any = importlib.import_module(name)
        module.RenderMaterial = module.RenderTexture2D = _NotDrawn
    allow_push_t_without_rendering()


def allow_push_t_without_rendering() -> None:
    """Lets PushT-v1 be built with ``render_backend="none"``, driver or not.

    The task paints its table white through a render component which is only there
    when something is drawn, and fails on None otherwise. With a render backend the
    stock code runs unchanged, so that this may be called on any machine.
    """
    push_t = importlib.import_module("mani_skill.envs.tasks.tabletop.push_t")
    painted = push_t.WhiteTableSceneBuilder
    if getattr(painted.build, "works_without_rendering", False):
        return
    paint, plain = painted.build, push_t.TableSceneBuilder.build

    @functools.wraps(paint)
    def build(self: Any) -> None:
        (paint if self.scene.can_render() else plain)(self)

    build.works_without_rendering = True  # type: ignore[attr-defined]
    painted.build = build
