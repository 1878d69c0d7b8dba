# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""
Your own teacher
================

A teacher turns observations into actions, and that is all: a function, a TensorDict
module, a model on a server. This page writes three, breaks some of them on purpose, and
shows what tells.

**What this page ran** while the site was built: everything, on a batch of made-up
observations.
"""

# %%
# What it reads
# -------------
#
# The keys are TorchRL's VLA schema where it has a word: pictures are ``("observation",
# "image")`` uint8 ``[*B, 3, H, W]``, the state is ``"observation"`` or
# ``("observation", "state")``.

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded

from torchrl_rpd.teachers import TeacherCheckError, check_teacher
from torchrl_rpd.transforms import TeacherActionTransform

generator = torch.Generator().manual_seed(0)
batch = TensorDict(
    {
        "observation": {
            "image": torch.randint(
                256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator
            ),
            "state": torch.rand(8, 4, generator=generator),
        }
    },
    [8],
)
actions = Bounded(-1.0, 1.0, (7,))

# %%
# 1. A function
# -------------
#
# Rows in, actions out: ``[n, A]`` float32, in the action convention of the environment.


def follow_the_light(frames):
    image = frames["observation", "image"].float() / 255
    bright = image.mean((-1, -2))  # [n, 3]
    state = frames["observation", "state"]  # [n, 4]
    return torch.cat([8 * (bright - 0.5), state - 0.5], -1)


print(check_teacher(follow_the_light, batch, action_spec=actions))

# %%
# 2. A module with chunks
# -----------------------
#
# A model that plans several actions writes ``("vla_action", "chunk")``, ``[n, H, A]``.
# The label is the first one; ``TeacherActionTransform(replan_interval=2)`` would follow
# the plan for two steps.


class Planner(torch.nn.Module):
    def forward(self, state):
        first = torch.cat([state, state[:, :3]], -1) - 0.5
        return torch.stack([first, 0.5 * first], 1)  # [n, 2, 7]


planner = TensorDictModule(
    Planner(), in_keys=[("observation", "state")], out_keys=[("vla_action", "chunk")]
)
label = TeacherActionTransform(planner)
frames = label(batch)
print(frames["teacher_action"].shape, frames["teacher_mask"].sum().item(), "labels")

# %%
# The teacher is frozen, called without gradients on a copy of the rows, and never
# becomes part of an environment's parameters or checkpoints.
#
# 3. One that lives elsewhere
# ---------------------------
#
# A model with an environment of its own, or on another machine, is served there and
# asked from here:
#
# .. code-block:: bash
#
#     python -m torchrl_rpd.teachers.serve my_package.teachers:make --option width=64
#
# ``RemoteTeacher("ws://127.0.0.1:8000")`` is then a teacher like any other:
# :doc:`/remote_teacher`. Workers of a ``ParallelEnv`` each need their own: give the
# transform a ``teacher_factory``.
#
# What goes wrong silently
# ------------------------
#
# The published OpenVLA code under newer versions of transformers ignores the picture,
# and returns actions that look fine (:doc:`/pitfalls`). Such a teacher, and some
# relatives:


def blind(frames):
    return 0.3 * torch.ones(len(frames), 7)


def blind_to_pictures(frames):
    return torch.cat([follow_the_light(frames)[:, 3:], torch.zeros(len(frames), 3)], -1)


def not_unnormalised(frames):
    return 40 * follow_the_light(frames)


def looks_at_its_neighbours(frames):
    return follow_the_light(frames) - follow_the_light(frames).mean(0)


def forgets_to_draw_from_a_seed(frames):
    return follow_the_light(frames) + 0.2 * torch.randn(len(frames), 7)


def sometimes_nan(frames):
    action = follow_the_light(frames)
    return torch.where(action > 0.4, torch.nan, action)


for broken in (
    blind,
    blind_to_pictures,
    not_unnormalised,
    looks_at_its_neighbours,
    forgets_to_draw_from_a_seed,
    sometimes_nan,
):
    report = check_teacher(
        broken,
        batch,
        in_keys=[("observation", "image"), ("observation", "state")],
        action_spec=actions,
        raise_on_failure=False,
    )
    print(f"{broken.__name__:28} fails {[check.name for check in report.failures]}")

# %%
# By default it raises, and says what to do:

try:
    check_teacher(not_unnormalised, batch, action_spec=actions)
except TeacherCheckError as error:
    print(error)

# %%
# With an environment in the place of the batch it also plays a few steps, and looks at
# the gripper.
#
# What the transform does with the rest
# -------------------------------------
#
# NaN labels are masked and counted, or raise (``on_non_finite="raise"``); labels
# outside of the action space are clipped to its border and counted. Nothing of it is
# silent:

label = TeacherActionTransform(sometimes_nan, low=-1.0, high=1.0)
frames = label(batch)
print("labels:", frames["teacher_mask"].sum().item(), "of", len(frames))
print(dict(label.stats()))

# %%
# Conventions
# -----------
#
# A gripper in [0, 1] where the environment wants [-1, 1] is the classic. Map it where
# labels are made:


def gripper_to_pm1(action):
    return torch.cat([action[..., :6], 2 * action[..., 6:] - 1], -1)


label = TeacherActionTransform(follow_the_light, action_transform=gripper_to_pm1)
print(label(batch)["teacher_action"][0, -1], "was", follow_the_light(batch)[0, -1])

# %%
# Give ``check_teacher`` and ``evaluate`` the same ``action_transform``: they then judge
# what the student will be shown.
