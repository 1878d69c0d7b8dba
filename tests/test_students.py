# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Students: networks, statistics, files."""

from __future__ import annotations

import copy
import json
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import ClipPPOLoss

from torchrl_rpd.objectives import DistillPPOLoss, FiniteHorizonGAE
from torchrl_rpd.students import (
    ActorCritic,
    NatureCNN,
    RunningObservationNorm,
    cnn_actor_critic,
    mlp_actor_critic,
)


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


def test_one_deviation_per_dimension(tmp_path):
    student = mlp_actor_critic(5, 3, log_std_init=(-1.5, -1.5, -0.25))
    scale = student.actor(observations(4))["scale"]
    expected = torch.tensor([-1.5, -1.5, -0.25]).exp().expand(4, 3)
    torch.testing.assert_close(scale, expected)
    student.save(tmp_path / "s.safetensors")
    loaded = ActorCritic.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.actor(observations(4))["scale"], scale)
    with pytest.raises(ValueError, match="one for each of the 3 action dimensions"):
        mlp_actor_critic(5, 3, log_std_init=(-1.5, -0.25))


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


def frames(batch, size=36, state=None):
    observation = {"image": torch.randint(256, (*batch, 3, size, size)).to(torch.uint8)}
    if state is not None:
        observation["state"] = torch.randn(*batch, state)
    return TensorDict({"observation": TensorDict(observation, batch)}, batch)


def minibatch(student, batch=(6,), **kwargs):
    """What the loss reads, beside ``("next", ...)`` for GAE."""
    with set_exploration_type(ExplorationType.RANDOM):
        data = student.actor(frames(batch, **kwargs)).detach()
    data["next"] = frames(batch, **kwargs)
    for key in ("done", "terminated", "truncated"):
        data["next", key] = torch.zeros(*batch, 1, dtype=torch.bool)
    data["next", "reward"] = torch.randn(*batch, 1)
    data["advantage"] = torch.randn(*batch, 1)
    data["value_target"] = torch.randn(*batch, 1)
    data["teacher_action"] = torch.randn_like(data["action"])
    return data


@contextmanager
def convolutions():
    """Counts the images that each pass of the encoder gets."""
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: (
            seen.append(out.shape[:-1].numel())
            if isinstance(module, NatureCNN)
            else None
        )
    )
    try:
        yield seen
    finally:
        hook.remove()


class TestCNN:
    def test_parameters_of_the_paper(self):
        """13.19 M at 256x256 with 7 actions.

        convolutions: 256 -> (256 - 8)/4 + 1 = 63 -> (63 - 4)/2 + 1 = 30 -> 28
          3 * 32 * 8 * 8 + 32                                     =      6,176
          32 * 64 * 4 * 4 + 64                                    =     32,832
          64 * 64 * 3 * 3 + 64                                    =     36,928
        linear: 64 * 28 * 28 * 256 + 256 = 50,176 * 256 + 256     = 12,845,312
        encoder                                                   = 12,921,248
        actor: 256 * 512 + 512 + 512 * 7 + 7 = 131,584 + 3,591    =    135,175
        log standard deviation                                    =          7
        critic: 131,584 + 512 + 1                                 =    132,097
        together                                                  = 13,188,527
        """
        student = cnn_actor_critic(256, 7)
        size = {
            name: sum(p.numel() for p in module.parameters())
            for name, module in {
                "encoder": student.actor[0],
                "actor": student.actor,
                "critic": student.critic,
            }.items()
        }
        assert size["encoder"] == 12_921_248
        assert size["actor"] == 12_921_248 + 135_175 + 7
        assert size["critic"] == 132_097
        loss = DistillPPOLoss(student.actor, student.critic)
        assert sum(p.numel() for p in loss.parameters()) == 13_188_527
        # With a state of 42: 42 * 256 + 256 more, and 256 more inputs to each head.
        other = DistillPPOLoss(*_networks(cnn_actor_critic(256, 7, state_dim=42)))
        added = 42 * 256 + 256 + 2 * 256 * 512
        assert sum(p.numel() for p in other.parameters()) == 13_188_527 + added

    def test_layers(self):
        """Kernels, strides, activations: against the encoder written out."""
        encoder = NatureCNN((40, 52))
        c1, c2, c3 = (m for m in encoder.modules() if isinstance(m, nn.Conv2d))
        image = torch.randint(256, (5, 3, 40, 52)).to(torch.uint8)
        x = image.float() / 255
        x = F.relu(F.conv2d(x, c1.weight, c1.bias, stride=4))
        x = F.relu(F.conv2d(x, c2.weight, c2.bias, stride=2))
        x = F.relu(F.conv2d(x, c3.weight, c3.bias, stride=1))
        # (40-8)/4+1 = 9, (9-4)//2+1 = 3, 1; (52-8)/4+1 = 12, (12-4)/2+1 = 5, 3
        assert x.shape == (5, 64, 1, 3)
        x = F.relu(F.linear(x.flatten(1), encoder.linear.weight, encoder.linear.bias))
        torch.testing.assert_close(encoder(image), x)
        assert [tuple(c.weight.shape) for c in (c1, c2, c3)] == [
            (32, 3, 8, 8),
            (64, 32, 4, 4),
            (64, 64, 3, 3),
        ]

    def test_crop(self):
        part, whole = NatureCNN((36, 44)), NatureCNN(64, crop=[20, 8, 36, 44])
        whole.load_state_dict(part.state_dict())
        image = torch.randint(256, (2, 5, 3, 64, 64)).to(torch.uint8)
        expected = part(image[..., 20:56, 8:52].clone())
        assert torch.equal(whole(image), expected)
        # What lies around it is not seen.
        image[..., :20, :] = 0
        image[..., 52:] = 255
        assert torch.equal(whole(image), expected)

    def test_initialisation_of_the_released_code(self):
        student = cnn_actor_critic(36, 7)
        td = frames((64,))
        td = student.actor(td)
        torch.testing.assert_close(td["scale"], torch.full((64, 7), math.exp(-0.5)))
        assert td["loc"].abs().max() < 0.1  # last gain 0.014
        for module, last_gain in [
            (student.actor[1], 0.01 * 2**0.5),
            (student.critic, 2**0.5),
        ]:
            hidden, last = (m for m in module.modules() if isinstance(m, nn.Linear))
            for layer, gain in [(hidden, 2**0.5), (last, last_gain)]:
                w = layer.weight
                gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
                torch.testing.assert_close(
                    gram, gain**2 * torch.eye(len(gram)), rtol=1e-4, atol=1e-4 * gain**2
                )
                assert (layer.bias == 0).all()
        # The encoder keeps PyTorch's own: uniform within 1 / sqrt(fan in).
        first = next(m for m in student.actor.modules() if isinstance(m, nn.Conv2d))
        bound = (3 * 8 * 8) ** -0.5
        assert 0.95 * bound < first.weight.abs().max() <= bound
        assert 0.5 * bound < first.bias.abs().max() <= bound

    @pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
    @pytest.mark.parametrize("state", [None, 5])
    def test_batches(self, batch, state):
        student = cnn_actor_critic(36, 3, state_dim=state)
        td = student.actor(frames(batch, state=state))
        assert td["action"].shape == (*batch, 3)
        assert td["action_log_prob"].shape == batch
        assert student.value_network(td)["state_value"].shape == (*batch, 1)
        assert td["observation", "image"].dtype == torch.uint8

    def test_features_are_not_stored(self):
        student = cnn_actor_critic(36, 3)
        td = student.value_network(student.actor(frames((2,))))
        assert set(td.keys()) == {
            "observation",
            "loc",
            "scale",
            "action",
            "action_log_prob",
            "state_value",
        }

    def test_state_matters_where_there_is_one(self):
        student = cnn_actor_critic(36, 3, state_dim=2)
        td = frames((1,), state=2).expand(2).clone()
        td["observation", "state"][1] += 1
        loc, value = student.actor(td)["loc"], student.value_network(td)["state_value"]
        assert not torch.equal(loc[0], loc[1]) and value[0] != value[1]


class TestSharedEncoder:
    @pytest.mark.parametrize("cls", [ClipPPOLoss, DistillPPOLoss])
    @pytest.mark.parametrize("functional", [True, False])
    def test_runs_once_per_loss_and_learns_from_both(self, cls, functional):
        student = cnn_actor_critic(36, 3)
        data = minibatch(student)
        loss = cls(student.actor, student.critic, functional=functional)
        with convolutions() as seen:
            out = loss(data)
        assert seen == [6]  # Once, the minibatch of 6.
        params = list(student.actor[0].parameters())
        for key in [k for k in out.keys() if k.startswith("loss_")]:
            grads = torch.autograd.grad(
                out[key], params, retain_graph=True, allow_unused=True
            )
            reached = [g is not None and bool((g != 0).any()) for g in grads]
            assert all(reached) == (key != "loss_entropy"), key

    def test_losses_equal_those_of_two_passes(self):
        """The loss with the head alone is the loss with encoder and head."""
        student = cnn_actor_critic(36, 3)
        data = minibatch(student)
        once = ClipPPOLoss(student.actor, student.critic)
        twice = ClipPPOLoss(student.actor, student.value_network)
        with convolutions() as seen:
            expected = twice(data)
        assert seen == [6, 6]
        out = once(data)
        for key, value in expected.items():
            torch.testing.assert_close(out[key], value)
        params = [*student.actor.parameters(), *student.critic.parameters()]

        def gradients(output):
            total = sum(v for k, v in output.items() if k.startswith("loss_"))
            return torch.autograd.grad(total, params)

        for g, e in zip(gradients(out), gradients(expected), strict=True):
            torch.testing.assert_close(g, e)

    def test_features_left_in_the_data_are_not_used(self):
        student = cnn_actor_critic(36, 3)
        data = minibatch(student)
        loss = ClipPPOLoss(student.actor, student.critic)
        expected = loss(data)["loss_critic"]
        data["features"] = torch.full((6, 256), torch.nan)
        assert torch.equal(loss(data)["loss_critic"], expected)

    def test_separate_losses_keep_the_critic_out_of_the_encoder(self):
        student = cnn_actor_critic(36, 3)
        data = minibatch(student)
        loss = ClipPPOLoss(student.actor, student.critic, separate_losses=True)
        with convolutions() as seen:
            out = loss(data)
        assert seen == [6]
        shared, own = student.actor[0].parameters(), student.critic.parameters()
        params = [*shared, *own]
        grads = torch.autograd.grad(out["loss_critic"], params, allow_unused=True)
        assert [g is not None for g in grads] == [False] * 8 + [True] * 4

    def test_every_parameter_once(self):
        """In the loss, its state dict and an optimiser's step."""
        student = cnn_actor_critic(36, 3)
        data = minibatch(student)
        loss = DistillPPOLoss(student.actor, student.critic)
        # 3 convolutions and 1 linear layer, 2 + 2 layers of the heads, the log std.
        params = list(loss.parameters())
        assert len(params) == len({id(p) for p in params}) == 2 * 8 + 1
        weights = [v for k, v in loss.state_dict().items() if "params" in k]
        assert sum(v.numel() for v in weights if isinstance(v, torch.Tensor)) == sum(
            p.numel() for p in params
        )
        before = student.value_network(data.copy())["state_value"]
        optimizer = torch.optim.SGD(loss.parameters(), 0.1)
        sum(v for k, v in loss(data).items() if k.startswith("loss_")).backward()
        optimizer.step()
        # The loss trains the modules that act and that GAE asks.
        assert not torch.equal(
            student.value_network(data.copy())["state_value"], before
        )

    def test_a_copy_shares_its_own_encoder(self):
        student = copy.deepcopy(cnn_actor_critic(36, 3))
        data = minibatch(student)
        before = student.value_network(data.copy())["state_value"]
        with torch.no_grad():
            student.actor[0].module.image.linear.bias.add_(1)
        after = student.value_network(data.copy())["state_value"]
        assert not torch.equal(before, after)

    @pytest.mark.parametrize(
        "options, passes",
        [
            # 4 envs with 3 steps, roots and next: all at once, or 2 envs at a time.
            ({"deactivate_vmap": True}, [12, 12]),
            ({"value_chunk_size": 2}, [6, 6, 6, 6]),
            ({}, None),
        ],
    )
    def test_advantages(self, options, passes):
        """FiniteHorizonGAE sees images through ``value_network``."""
        student = cnn_actor_critic(36, 3)
        data = minibatch(student, (4, 3)).exclude("advantage", "value_target")
        with torch.no_grad():
            value = student.value_network(data.copy())["state_value"]
            after = student.value_network(data["next"].copy())["state_value"]
        gae = FiniteHorizonGAE(
            gamma=0.8, lmbda=0.9, value_network=student.value_network, **options
        )
        with convolutions() as seen:
            out = gae(data.copy())
        if passes is not None:
            assert seen == passes
        torch.testing.assert_close(out["state_value"], value)
        torch.testing.assert_close(out["next", "state_value"], after)
        expected = FiniteHorizonGAE(gamma=0.8, lmbda=0.9, value_network=None)
        data["state_value"], data["next", "state_value"] = value, after
        torch.testing.assert_close(out["advantage"], expected(data)["advantage"])
        assert "features" not in out.keys()
        assert out["observation", "image"].dtype == torch.uint8


class TestImagesThatDoNotFit:
    def test_float_images(self):
        student = cnn_actor_critic(36, 3)
        td = frames((2,))
        td["observation", "image"] = td["observation", "image"] / 255
        with pytest.raises(Exception, match=r"float32, not uint8.*ToTensorImage"):
            student.actor(td)

    @pytest.mark.parametrize("shape", [(36, 36, 3), (3, 40, 36), (1, 36, 36)])
    def test_shape(self, shape):
        encoder = NatureCNN(36)
        with pytest.raises(ValueError, match="channels first"):
            encoder(torch.zeros(2, *shape, dtype=torch.uint8))

    @pytest.mark.parametrize("size", [35, (35, 64), (64, 8)])
    def test_too_small(self, size):
        with pytest.raises(ValueError, match="at least 36 pixels"):
            cnn_actor_critic(size, 3)

    def test_crop_needs_the_whole_picture(self):
        encoder = NatureCNN(64, crop=[20, 8, 36, 44])
        with pytest.raises(ValueError, match=r"built for \(3, 64, 64\)"):
            encoder(torch.zeros(2, 3, 36, 44, dtype=torch.uint8))

    @pytest.mark.parametrize(
        "crop", [(-1, 0, 40, 40), (0, -1, 40, 40), (25, 0, 40, 40), (0, 25, 40, 40)]
    )
    def test_crop_outside(self, crop):
        with pytest.raises(ValueError, match="does not lie in an image of 64 x 64"):
            cnn_actor_critic(64, 3, crop=crop)

    def test_crop_of_other_numbers(self):
        with pytest.raises(ValueError, match="four numbers"):
            cnn_actor_critic(64, 3, crop=(0, 40))

    def test_crop_too_small(self):
        with pytest.raises(ValueError, match="35 x 40 pixels are too few"):
            cnn_actor_critic(64, 3, crop=(0, 0, 35, 40))


class TestImageFiles:
    @pytest.mark.parametrize(("state", "crop"), [(None, None), (4, (4, 0, 38, 43))])
    def test_saved_student_acts_the_same(self, tmp_path, state, crop):
        size = 42, 44
        student = cnn_actor_critic(
            size,
            3,
            crop=crop,
            state_dim=state,
            log_std_init=-1.0,
            image_key="pixels",
        )
        with torch.no_grad():
            for p in student.actor.parameters():
                p.add_(0.01 * torch.randn_like(p))
        student.save(tmp_path / "s.safetensors", task="PickCube-v1")
        loaded = ActorCritic.load(tmp_path / "s.safetensors")
        assert loaded.config == student.config
        assert loaded.builder == "cnn_actor_critic"
        assert loaded.metadata == {"task": "PickCube-v1"}
        td = TensorDict(
            {
                "pixels": torch.randint(256, (2, 3, *size)).to(torch.uint8),
                "observation": {"state": torch.randn(2, 4)},
            },
            [2],
        )
        for name, key in [("actor", "loc"), ("value_network", "state_value")]:
            got, expected = (
                getattr(s, name)(td.clone())[key] for s in (loaded, student)
            )
            assert torch.equal(got, expected)
        # Every weight is in the file once: 4 bytes each and a header.
        numbers = sum(p.numel() for p in student.actor.parameters())
        numbers += sum(p.numel() for p in student.critic.parameters())
        assert (tmp_path / "s.safetensors").stat().st_size < 4 * numbers + 10_000

    def test_files_of_the_first_version(self, tmp_path):
        """They name no builder and hold an MLP."""
        from safetensors.torch import save_model

        student = mlp_actor_critic(5, 3)
        header = {
            "format": "torchrl_rpd.student/1",
            "config": json.dumps(student.config),
            "metadata": "{}",
        }
        save_model(student._container(), str(tmp_path / "old"), metadata=header)
        td = observations(4)
        expected = student.actor(td.clone())["loc"]
        assert torch.equal(
            ActorCritic.load(tmp_path / "old").actor(td)["loc"], expected
        )

    def test_unknown_builder(self, tmp_path):
        student = mlp_actor_critic(5, 3)
        student.builder = "transformer_actor_critic"
        student.save(tmp_path / "s")
        with pytest.raises(ValueError, match="does not have"):
            ActorCritic.load(tmp_path / "s")


def _networks(student):
    return student.actor, student.critic


if __name__ == "__main__":
    pytest.main([__file__])
