# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Students: networks, statistics, files."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import ClipPPOLoss

from torchrl_rpd.students import ActorCritic, RunningObservationNorm, mlp_actor_critic


def observations(*shape):
    return TensorDict({"observation": torch.randn(*shape, 5)}, batch_size=shape)


def test_action_distribution():
    """log N(a; m, exp(-0.5)) summed over dimensions, by hand; no squashing."""
    student = mlp_actor_critic(5, 3, log_std_init=-0.5)
    td = student.actor(observations(64))
    std = math.exp(-0.5)
    assert td["scale"].unique().tolist() == [pytest.approx(std)]
    z = (td["action"] - td["loc"]) / std
    log_prob = -0.5 * z.square() - math.log(std) - 0.5 * math.log(2 * math.pi)
    assert torch.allclose(td["action_log_prob"], log_prob.sum(-1), atol=1e-5)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        td = student.actor(td)
    assert torch.equal(td["action"], td["loc"])


def test_initialisation():
    """Small first actions, orthogonal hidden layers, zero biases."""
    student = mlp_actor_critic(5, 3, num_cells=(32, 16))
    weights = [p for n, p in student.actor.named_parameters() if n.endswith("weight")]
    assert [tuple(w.shape) for w in weights] == [(32, 5), (16, 32), (3, 16)]
    # Orthonormal rows or columns times the gain.
    assert torch.allclose(weights[0].T @ weights[0], 2 * torch.eye(5), atol=1e-5)
    assert torch.allclose(weights[2] @ weights[2].T, 1e-4 * torch.eye(3), atol=1e-8)
    for name, parameter in student.critic.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
    assert student.actor(observations(9))["loc"].abs().max() < 0.1


def test_statistics_equal_those_of_all_rows():
    rows = 3 + 2 * torch.randn(1000, 4, dtype=torch.float64)
    norm = RunningObservationNorm(4)
    for part in (rows[:10], rows[10:400].reshape(39, 10, 4), rows[400:]):
        norm.update(part.float())
    assert norm.count == 1000
    assert torch.allclose(norm.mean.double(), rows.mean(0), atol=1e-5)
    assert torch.allclose(norm.var.double(), rows.var(0, unbiased=False), atol=1e-4)
    normalised = norm(rows.float())
    assert normalised.mean().abs() < 1e-5
    assert normalised.std() == pytest.approx(1.0, abs=1e-3)
    assert norm(torch.full((1, 4), 1e6)).tolist() == [[10.0] * 4]


def test_forward_does_not_change_the_statistics():
    student = mlp_actor_critic(5, 3)
    before = student.observation_norm.mean.clone()
    student.actor(observations(7))
    student.critic(observations(7))
    assert torch.equal(student.observation_norm.mean, before)


def test_update_reaches_actor_critic_and_loss():
    """One set of statistics: the loss's functional parameters refer to it, too."""
    student = mlp_actor_critic(5, 3)
    loss = ClipPPOLoss(student.actor, student.critic)
    td = student.actor(observations(20)).detach()
    td["observation"] = td["observation"] * 5 + 3
    td.update({"advantage": torch.randn(20, 1), "value_target": torch.randn(20, 1)})
    before = loss(td)["loss_critic"].detach()
    loc = student.actor(td.clone())["loc"].detach()
    student.observation_norm.update(td["observation"])
    assert not torch.equal(loss(td)["loss_critic"], before)
    assert not torch.equal(student.actor(td.clone())["loc"], loc)


@pytest.mark.parametrize("normalize", [True, False])
def test_saved_student_acts_the_same(tmp_path, normalize):
    student = mlp_actor_critic(
        5, 3, num_cells=(8,), log_std_init=-1.0, normalize_observation=normalize
    )
    if normalize:
        student.observation_norm.update(torch.randn(50, 5) * 3 + 1)
    file = tmp_path / "new" / "student.safetensors"
    student.save(file, task="PickCube-v1", frames=100)
    loaded = ActorCritic.load(file)
    assert loaded.metadata == {"task": "PickCube-v1", "frames": 100}
    assert loaded.config == student.config
    td = observations(11)
    for module in ("actor", "critic"):
        key = {"actor": "loc", "critic": "state_value"}[module]
        expected = getattr(student, module)(td.clone())[key]
        assert torch.equal(getattr(loaded, module)(td.clone())[key], expected)
    if normalize:  # still one set, not two
        loaded.observation_norm.update(torch.full((1000, 5), 100.0))
        changed = loaded.critic(td.clone())["state_value"]
        assert not torch.equal(changed, student.critic(td.clone())["state_value"])
    assert [f.name for f in file.parent.iterdir()] == ["student.safetensors"]


def test_nested_observation_key(tmp_path):
    student = mlp_actor_critic(5, 3, observation_key=("observation", "state"))
    student.save(tmp_path / "s")
    td = TensorDict({"observation": {"state": torch.randn(2, 5)}}, batch_size=[2])
    assert ActorCritic.load(tmp_path / "s").actor(td)["action"].shape == (2, 3)


def test_other_files_are_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"no student that ActorCritic.save wrote"):
        ActorCritic.load(tmp_path / "other")


if __name__ == "__main__":
    pytest.main([__file__])
