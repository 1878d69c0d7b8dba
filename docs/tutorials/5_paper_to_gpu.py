# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""
From the paper to a GPU run with OpenVLA
========================================

The paper's configuration: pictures of ManiSkill's human camera, a 13-million-parameter
CNN as the student, the authors' fine-tuned OpenVLA as the teacher, 128 environments on
a GPU.

**What this page ran** while the site was built: the same classes on a checkpoint of the
published layout with small random weights, on a CPU; and the recipe, shown value by
value. **The 7B model and GPU simulation were not run here.**
"""

# %%
# The teacher
# -----------
#
# ``OpenVLATeacher`` loads the published files as they are. This checkpoint has 6 MB
# instead of 15 GB, and its actions mean nothing.

import tempfile

import torch
from tensordict import TensorDict

from torchrl_rpd.teachers import CHECKPOINTS, check_teacher
from torchrl_rpd.teachers.openvla import OpenVLATeacher, write_tiny_checkpoint

folder = write_tiny_checkpoint(tempfile.mkdtemp())
print(sorted(path.name for path in folder.iterdir()))
openvla = OpenVLATeacher.from_pretrained(
    folder, instruction="pick up the cube", max_batch_size=64
)

# %%
# Pictures in, actions out, in batches. The original code takes one picture at a time;
# here every row of a batch gets what it gets alone.

generator = torch.Generator().manual_seed(0)
pictures = torch.randint(256, (4, 3, 256, 256), dtype=torch.uint8, generator=generator)
frames = TensorDict({"observation": {"image": pictures}}, [4])
chunk = openvla(frames.clone())["vla_action", "chunk"]
alone = [openvla(frames[i : i + 1].clone())["vla_action", "chunk"] for i in range(4)]
print(chunk.shape, "batch equals rows:", torch.equal(chunk, torch.cat(alone)))

# %%
# The published teachers
# ----------------------
#
# Which key of the statistics, which picture size, what is not known:

for kind, checkpoint in CHECKPOINTS.items():
    print(kind, checkpoint.name, checkpoint.unnorm_key, checkpoint.image_size)

# %%
# Whether their gripper emits [0, 1] or [-1, 1] is not known to us. ``gripper=``
# chooses; a warning says if the statistics contradict, and ``check_teacher`` says if
# "closed" arrives as 0. Random weights may fail any check; the published ones must not:

print(check_teacher(openvla, frames, rows=2, raise_on_failure=False))

# %%
# The recipe
# ----------
#
# ``preset=paper`` is the released configuration, value by value
# (``tests/test_rpd_example.py`` holds each). What ``--cfg job`` shows and runs nothing
# of; the same through Hydra's API:

from pathlib import Path

from hydra import compose, initialize_config_dir

import torchrl_rpd.configs  # registers the nodes

conf = Path(torchrl_rpd.__file__).parents[1] / "examples" / "conf"
with initialize_config_dir(str(conf), version_base="1.3"):
    recipe = compose("config", ["preset=paper", "teacher=openvla", "task=pick_cube"])
for section, names in {
    "env": "num_envs control_mode obs_mode camera image_size reward_mode",
    "teacher": "path unnorm_key gripper readout",
    "loss": "distill_type critic_coeff loss_critic_type clip_epsilon entropy_bonus",
    "value": "gamma lmbda bootstrap_at_done",
    "schedule": "kind init",
    "optimizer": "lr eps",
    "trainer": "steps_per_batch num_epochs minibatch_size clip_norm target_kl kl_rule",
}.items():
    for name in names.split():
        print(f"{section}.{name}: {recipe[section][name]}")
print(f"frames: {recipe.frames:,}")

# %%
# What is ours and not the released code's, with the switch that restores it:
# :doc:`/differences`.
#
# The run
# -------
#
# **Not run here.** One GPU of 40 GB or more for simulation, student and teacher.
#
# .. code-block:: bash
#
#     pip install "torchrl_rpd[maniskill,openvla,hydra]"
#     python -m torchrl_rpd.doctor          # what is missing, and what that disables
#     python examples/rpd_openvla.py --tiny # the whole way at a small size, on a CPU
#     python examples/rpd.py preset=paper teacher=openvla task=pick_cube --cfg job
#     python examples/rpd.py preset=paper teacher=openvla task=pick_cube
#
# (``--tiny`` draws pictures and so needs a renderer: :doc:`/maniskill`.) The same
# command goes on after a kill: :doc:`/resume`. Put the teacher on a second GPU or
# machine with ``teacher=remote``: :doc:`/remote_teacher`.
#
# What it will cost
# -----------------
#
# The teacher decides. Queries are counted, not measured:

total = recipe.frames
batch = recipe.env.num_envs * recipe.trainer.steps_per_batch
for frames_trained, note in (
    (total, "the released total"),
    (7_100_000, "where the paper's OpenVLA curve ends"),
    (2_750_000, "where that curve passes 70 %"),
):
    queries = frames_trained + recipe.env.num_envs
    print(f"{frames_trained:>10,} frames: {queries:>10,} queries  ({note})")
print(f"the released code, at most: {8 * total:,} queries for {total:,} frames")

# %%
# Measure a rate on your GPU before you start: ``python -m benchmarks.teacher_throughput
# --teacher openvla`` (*not run here*). Three switches make it cheaper:
# ``teacher_action.query_fraction=0.2``, a schedule that ends (:doc:`/schedules`), Octo
# in the place of OpenVLA (``teacher=octo``).
