# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A robot drawn with few triangles.

The Panda's visual meshes have 135,000 triangles, which is nearly the whole cost of a
picture on a CPU. Its collision shapes have 200 to 300 per link: drawn in their place
they leave the robot recognisable, and nothing else about it changes.
"""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any


@functools.cache
def light_agent(agent_class: Any) -> type:
    """The same robot, drawn as its collision shapes.

    A subclass with the same ``uid``; neither the given class nor ManiSkill's registry
    changes, so that both kinds can live in one process.
    """
    if not getattr(agent_class, "urdf_path", None):
        raise ValueError(
            "light_visuals=True needs a robot that is described by a URDF file, which "
            f"{agent_class.__name__} is not: use light_visuals=False."
        )

    class LightAgent(agent_class):
        """Draws the collision shapes; simulates what its parent does."""

        def _load_articulation(self, *args: Any, **kwargs: Any) -> None:
            from mani_skill import format_path

            # The file is read while the robot is built, and never again: controllers
            # that read the robot's description find the class's own path.
            stock = Path(format_path(str(agent_class.urdf_path)))
            with tempfile.TemporaryDirectory() as folder:
                self.urdf_path = str(write_light_urdf(stock, Path(folder)))
                try:
                    super()._load_articulation(*args, **kwargs)
                finally:
                    del self.urdf_path

    LightAgent.__name__ = agent_class.__name__
    LightAgent.__qualname__ = agent_class.__qualname__
    return LightAgent


def write_light_urdf(urdf: Path, folder: Path) -> Path:
    """Writes a copy of a robot description whose links look like they collide.

    Links without collision shapes keep their looks. The file of the same name that lists
    the pairs of links which may touch (SRDF) is copied too.
    """
    tree = ET.parse(urdf)
    for link in tree.iter("link"):
        collisions = link.findall("collision")
        if not collisions:
            continue
        for visual in link.findall("visual"):
            link.remove(visual)
        for collision in collisions:
            visual = copy.deepcopy(collision)
            visual.tag = "visual"
            link.append(visual)
    for mesh in tree.iter("mesh"):
        mesh.set("filename", _absolute(mesh.get("filename", ""), urdf.parent))
    light = folder / urdf.name
    tree.write(light)
    srdf = urdf.with_suffix(".srdf")
    if srdf.exists():
        shutil.copy(srdf, folder)
    return light


def _absolute(filename: str, folder: Path) -> str:
    """Where a mesh lies that a file in ``folder`` refers to."""
    name = filename.removeprefix("package://")
    # A package is a folder somewhere above the file.
    above = (folder, *folder.parents) if name != filename else (folder,)
    return str(next((d / name for d in above if (d / name).is_file()), folder / name))
