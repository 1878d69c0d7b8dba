# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which device draws the pictures, or what is missing."""

from __future__ import annotations

import functools

import torch

from torchrl_rpd.envs._vulkan import exits_well

# Exits with 0 when SAPIEN can draw on the device named by the argument.
_PROBE = """
import sys
import sapien.render
sapien.render.RenderSystem(sapien.Device(sys.argv[1]))
sapien.render.RenderMaterial()
"""

# ManiSkill's names of render backends, without the number of a device.
_DEVICES = {
    "cpu": "cpu",
    "sapien_cpu": "cpu",
    "gpu": "cuda",
    "cuda": "cuda",
    "sapien_cuda": "cuda",
}


@functools.cache
def can_draw(device: str) -> bool:
    """Tells whether SAPIEN can draw on ``"cuda"`` or ``"cpu"`` (software Vulkan).

    Asked in a child process, see :func:`torchrl_rpd.envs._vulkan.has_render_device`; the
    answer is kept for the life of the process.
    """
    return exits_well(_PROBE, device)


def choose_render_backend(render_backend: str, needed_by: str | None) -> str:
    """The ``render_backend`` to give to ManiSkill.

    Args:
        render_backend: ``"auto"``, or what the user has chosen.
        needed_by: the argument that asks for pictures, None if nobody does.

    Raises:
        RuntimeError: if pictures are needed and cannot be drawn here.
        ValueError: if pictures are needed and the user has switched them off.
    """
    if render_backend == "auto":
        if needed_by is None:
            return "none"
        if torch.cuda.is_available() and can_draw("cuda"):
            return "gpu"
        if can_draw("cpu"):
            return "cpu"
        raise RuntimeError(_missing(needed_by))
    if needed_by is not None:
        if render_backend == "none":
            raise ValueError(
                f"{needed_by} draws pictures, but render_backend='none' forbids it: use "
                "render_backend='auto'."
            )
        device = _DEVICES.get(render_backend.partition(":")[0])
        # Others, such as a PCI address, are left to SAPIEN.
        if device is not None and not can_draw(device):
            raise RuntimeError(_missing(needed_by))
    return render_backend


def _missing(needed_by: str) -> str:
    return (
        f"{needed_by} draws pictures, for which no Vulkan driver that SAPIEN can use was "
        "found: install Mesa 24.3 or newer (package mesa-vulkan-drivers; on Debian 12 "
        "from bookworm-backports), or the GPU's own driver with its Vulkan part."
    )
