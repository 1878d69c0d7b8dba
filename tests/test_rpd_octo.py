# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Octo, ManiSkill's pictures, the loss and the trainer together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs import Compose, StepCounter, TransformedEnv

from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import cnn_actor_critic
from torchrl_rpd.teachers.octo import OctoTeacher, write_random_checkpoint
from torchrl_rpd.trainers import LogTeacher, make_ppo_trainer
from torchrl_rpd.transforms import TeacherActionTransform

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.maniskill, pytest.mark.render]


@pytest.mark.parametrize(
    ("window", "samples"), [(1, 1), (2, 3)], ids=["paper", "history and spread"]
)
def test_a_few_iterations(tmp_path, window, samples):
    pytest.importorskip("transformers")
    frames, num_envs, steps = 16, 2, 4
    octo = OctoTeacher.from_pretrained(
        write_random_checkpoint(tmp_path),
        instruction="push the cube away from the robot base",
        window_size=window,
        num_samples=samples,
    )
    spread = samples > 1
    teacher = TeacherActionTransform(
        octo, teacher_std_key="teacher_std" if spread else None
    )
    env = ManiSkillEnv(
        "PushCube-v1",
        num_envs=num_envs,
        obs_mode="rgb",
        camera="human",
        image_size=256,
        light_visuals=True,
    )
    # Episodes of three steps end inside the batches.
    env = TransformedEnv(env, Compose(StepCounter(3), teacher))
    env.set_seed(0)
    student = cnn_actor_critic(256, 7)
    loss = DistillPPOLoss(
        student.actor,
        student.critic,
        distill_type="kl" if spread else "mse",
        entropy_bonus=False,
        loss_critic_type="l2",
        normalize_advantage=True,
    )
    seen = []
    loss.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    before = [parameter.clone() for parameter in loss.parameters()]
    trainer = make_ppo_trainer(
        collector=Collector(
            env,
            student.actor,
            frames_per_batch=num_envs * steps,
            total_frames=frames,
            auto_register_policy_transforms=False,
        ),
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=3e-4, eps=1e-5),
        gae=FiniteHorizonGAE(gamma=0.8, lmbda=0.9, value_network=student.value_network),
        total_frames=frames,
        minibatch_size=8,
        num_epochs=1,
        target_kl=None,
        drop_keys=[("next", "observation")],
        progress_bar=False,
    )
    LogTeacher(teacher).register(trainer)
    trainer.train()

    assert trainer.collected_frames == frames
    # Once per stored frame, and for roots that are not stored yet.
    assert frames <= teacher.stats()["queries"] <= frames + num_envs
    assert len(seen) == frames // 8
    for data in seen:
        assert data["teacher_mask"].all()
        assert data["teacher_action"].abs().amax(-1).gt(0).all()
        assert data["teacher_action"].unique().numel() > 4
        if spread:
            assert data["teacher_std"].gt(0).all()
    errors = trainer._log_dict["distill_error"]
    assert torch.tensor(errors).isfinite().all()
    after = list(loss.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_example(tmp_path):
    pytest.importorskip("transformers")
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "examples/rpd_octo.py", "--tiny"),
            *("--task", "PushCube-v1", "--out", str(tmp_path / "log")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # 32 stored frames and the roots of the two environments that come after them.
    assert "'queries': 34" in done.stdout
    assert "success_once" in done.stdout


if __name__ == "__main__":
    pytest.main([__file__])
