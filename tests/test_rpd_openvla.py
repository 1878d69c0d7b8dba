# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLA, ManiSkill's pictures, the loss and the trainer together."""

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
from torchrl_rpd.teachers.openvla import OpenVLATeacher, write_tiny_checkpoint
from torchrl_rpd.trainers import LogTeacher, make_ppo_trainer
from torchrl_rpd.transforms import TeacherActionTransform

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.maniskill, pytest.mark.render]


@pytest.mark.parametrize("distill_type", ["mse", "kl"])
def test_a_few_iterations(tmp_path, distill_type):
    pytest.importorskip("transformers")
    frames, num_envs, steps = 16, 2, 4
    kl = distill_type == "kl"
    # Fixed for one, read row by row for the other.
    instruction = "push the cube away from the robot base"
    openvla = OpenVLATeacher.from_pretrained(
        write_tiny_checkpoint(tmp_path),
        instruction=None if kl else instruction,
        spread=kl,
        readout="mean" if kl else "greedy",
    )
    teacher = TeacherActionTransform(
        openvla, teacher_std_key="teacher_std" if kl else None
    )
    env = ManiSkillEnv(
        "PushCube-v1",
        num_envs=num_envs,
        obs_mode="rgb",
        camera="human",
        image_size=256,
        light_visuals=True,
        language_instruction=kl,
    )
    # Episodes of three steps end inside the batches.
    env = TransformedEnv(env, Compose(StepCounter(3), teacher))
    env.set_seed(0)
    student = cnn_actor_critic(256, 7)
    loss = DistillPPOLoss(
        student.actor,
        student.critic,
        distill_type=distill_type,
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
        minibatch_size=4,
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
    assert len(seen) == frames // 4
    for data in seen:
        assert data["teacher_mask"].all()
        # The label belongs to the picture beside it, whatever batch it was asked in.
        images = data["observation", "image"]
        tokens = openvla.tokens(images, [instruction] * len(images))
        if kl:
            assert data["teacher_std"].gt(0).all()
            moments = openvla.decoder.moments(tokens.logits)
            label = openvla.decoder.unnormalise(*moments)[0]
        else:
            label = openvla.decoder(tokens.tokens)
        torch.testing.assert_close(data["teacher_action"], label, atol=1e-4, rtol=0)
    labels = torch.cat([data["teacher_action"] for data in seen])
    assert labels.std(0).gt(0).any()  # depend on the picture
    errors = trainer._log_dict["distill_error"]
    assert torch.tensor(errors).isfinite().all()
    after = list(loss.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_example(tmp_path):
    pytest.importorskip("transformers")
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "examples/rpd_openvla.py", "--tiny"),
            *("--task", "PushCube-v1", "--distill", "kl"),
            *("--out", str(tmp_path / "log")),
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


def test_example_is_the_papers_configuration(monkeypatch):
    """128 environments, 50 steps, the published checkpoint and its statistics."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "rpd_openvla", ROOT / "examples" / "rpd_openvla.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["rpd_openvla.py"])
    args = example.parse()
    assert args.checkpoint == "Juelg/openvla-7b-finetuned-maniskill"
    assert args.unnorm_key == "maniskill_human:7.0.0"
    assert (args.envs, args.steps, args.distill) == (128, 50, "mse")


if __name__ == "__main__":
    pytest.main([__file__])
