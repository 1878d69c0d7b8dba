# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""DistillPPOLoss as a TorchRL loss: keys, dispatch, state, compilation, students."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import shutil
import weakref

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_composite_lp_aggregate,
)
from torch import distributions as d
from torch import nn
from torchrl.modules import IndependentNormal, OneHotCategorical, TanhNormal
from torchrl.objectives import ClipPPOLoss, SoftUpdate
from torchrl.objectives.value import GAE

from torchrl_rpd.objectives import DistillPPOLoss
from torchrl_rpd.objectives._student import point_estimate

# TorchInductor writes C++ for the CPU.
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "cl")),
    reason="needs a C++ compiler",
)
EXTRA = ["loss_distill", "distill_error", "distill_coverage", "kl_k3"]


class TestOneForward:
    @pytest.mark.parametrize("kind", ["mse", "cosine", "nll", "kl"])
    def test_actor_runs_once(self, build, kind):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["teacher_std"] = torch.ones(12, 7)
        loss = DistillPPOLoss(actor, critic, distill_type=kind)
        calls = []
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out: (
                calls.append(module) if isinstance(module, nn.Linear) else None
            )
        )
        try:
            loss(data)
        finally:
            hook.remove()
        assert len(calls) == 4  # Two layers of the actor and two of the critic.

    def test_graph_is_freed(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        loss = DistillPPOLoss(actor, critic)
        seen = []
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out: (
                seen.append(weakref.ref(out)) if isinstance(module, nn.Tanh) else None
            )
        )
        try:
            out = loss(data)
        finally:
            hook.remove()
        assert len(seen) == 2
        del out
        gc.collect()
        assert [ref() for ref in seen] == [None, None]

    def test_graph_is_freed_after_an_error(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor).exclude("value_target")  # Fails in the critic.
        loss = DistillPPOLoss(actor, critic)
        with pytest.raises(KeyError, match="value_target"):
            loss(data)
        assert loss._distill_out is None


class TestKeys:
    @pytest.mark.parametrize("kind", ["mse", "kl"])
    def test_nested(self, build, kind):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["teacher_std"] = torch.ones(12, 7)
        data["teacher_mask"][::2] = False
        loss = DistillPPOLoss(actor, critic, distill_type=kind)
        expected = loss(data)
        for name in ("teacher_action", "teacher_mask", "teacher_std"):
            data.rename_key_(name, ("vla", "labels", name))
            loss.set_keys(**{name: ("vla", "labels", name)})
        assert ("vla", "labels", "teacher_action") in loss.in_keys
        assert (("vla", "labels", "teacher_std") in loss.in_keys) == (kind == "kl")
        out = loss(data)
        for key in EXTRA:
            assert torch.equal(out[key], expected[key])

    def test_none_restores_the_default(self, build):
        loss = DistillPPOLoss(build.actor(), build.critic())
        loss.set_keys(teacher_action="label", distill_action="arm")
        loss.set_keys(teacher_action=None, distill_action=None)
        assert loss.tensor_keys.teacher_action == "teacher_action"
        assert loss.tensor_keys.distill_action is None

    def test_keys_of_the_parent_still_work(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        loss = DistillPPOLoss(actor, critic)
        expected = loss(data)
        loss.set_keys(advantage=("ppo", "advantage"))
        out = loss(data.rename_key_("advantage", ("ppo", "advantage")))
        assert torch.equal(out["loss_objective"], expected["loss_objective"])

    def test_unknown_key(self, build):
        loss = DistillPPOLoss(build.actor(), build.critic())
        with pytest.raises(ValueError, match="not an accepted tensordict key"):
            loss.set_keys(teacher="label")

    def test_in_and_out_keys(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        loss = DistillPPOLoss(actor, critic)
        assert {"teacher_action", "teacher_mask"} <= set(loss.in_keys)
        assert "teacher_std" not in loss.in_keys
        assert loss.out_keys[-4:] == EXTRA
        out = loss(data)
        assert set(loss.out_keys) <= set(out.keys())
        # What the parent returns is all there.
        assert set(out.keys()) == set(ClipPPOLoss(actor, critic)(data).keys()) | {
            *EXTRA
        }

    def test_dispatch(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        loss = DistillPPOLoss(actor, critic)
        kwargs = {
            "observation": data["observation"],
            "action": data["action"],
            "action_log_prob": data["action_log_prob"],
            "teacher_action": data["teacher_action"],
            "teacher_mask": data["teacher_mask"],
            "next_observation": data["observation"] + 0.1,
            "next_reward": torch.randn(12, 1),
            "next_done": torch.zeros(12, 1, dtype=torch.bool),
            "next_terminated": torch.zeros(12, 1, dtype=torch.bool),
        }
        values = dict(zip(loss.out_keys, loss(**kwargs), strict=True))
        expected = loss(data)["loss_distill"]
        torch.testing.assert_close(values["loss_distill"], expected)

    def test_select_out_keys(self, build):
        actor, critic = build.actor(), build.critic()
        loss = DistillPPOLoss(actor, critic)
        loss.select_out_keys("loss_objective", "loss_distill")
        data = build.minibatch(actor)
        # What the losses could compute an advantage from counts as an input.
        data["next"] = {
            "observation": data["observation"],
            "reward": data["advantage"],
            "done": data["teacher_mask"],
            "terminated": data["teacher_mask"],
        }
        out = loss(data)
        outputs = set(out.exclude(*loss.in_keys).keys())
        assert outputs == {"loss_objective", "loss_distill"}


class TestCoefficient:
    def test_assignment_keeps_the_buffer(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        # An integer must not round what a schedule assigns.
        loss = DistillPPOLoss(actor, critic, distill_coeff=1)
        buffer, full = loss.distill_coeff, loss(data)["loss_distill"]
        loss.distill_coeff = 0.3
        assert loss.distill_coeff is buffer and buffer.is_floating_point()
        torch.testing.assert_close(loss(data)["loss_distill"], 0.3 * full)

    def test_assignment_between_forward_and_backward(self, build, total):
        actor, critic = build.actor(), build.critic()
        loss = DistillPPOLoss(actor, critic)
        out = loss(build.minibatch(actor))
        loss.distill_coeff = 0.0
        (grad,) = torch.autograd.grad(out["loss_distill"], [actor[0].module[2].bias])
        assert (grad != 0).any()

    def test_state_dict(self, build):
        loss = DistillPPOLoss(build.actor(), build.critic(), distill_coeff=0.25)
        state = loss.state_dict()
        assert state["distill_coeff"] == 0.25
        other = DistillPPOLoss(build.actor(), build.critic())
        other.load_state_dict(state)
        assert other.distill_coeff == 0.25
        assert set(state) - set(
            ClipPPOLoss(build.actor(), build.critic()).state_dict()
        ) == {"distill_coeff"}

    @pytest.mark.parametrize("value", [True, "1", torch.ones(2)])
    def test_not_a_number(self, build, value):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            DistillPPOLoss(build.actor(), build.critic(), distill_coeff=value)


class TestCopies:
    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_same_output_other_parameters(self, build, how, total):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        loss = DistillPPOLoss(actor, critic, distill_coeff=0.5)
        total(loss(data)).backward()
        other = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda x: pickle.loads(pickle.dumps(x)),
        }[how](loss)
        expected, out = loss(data), other(data)
        for key, value in expected.items():
            assert torch.equal(out[key], value)
        with torch.no_grad():
            for p in other.actor_network_params.parameters():
                p.add_(0.1)
        assert torch.equal(loss(data)["loss_distill"], expected["loss_distill"])
        assert not torch.equal(other(data)["loss_distill"], expected["loss_distill"])


class TestHostVariants:
    def test_not_functional(self, build, total):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        expected = DistillPPOLoss(actor, critic)(data)
        out = DistillPPOLoss(actor, critic, functional=False)(data)
        for key, value in expected.items():
            assert torch.equal(out[key], value)
        total(out).backward()
        assert all(p.grad is not None for p in actor.parameters())

    def test_delay_actor_distils_the_current_policy(self, build, total):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        loss = DistillPPOLoss(actor, critic, delay_actor=True)
        SoftUpdate(loss, eps=0.9)
        with torch.no_grad():
            actor[0].module[2].bias.add_(0.25)
        out = loss(data)
        mean, _ = actor[0].module(data["observation"])
        expected = (mean - data["teacher_action"]).square().mean()
        torch.testing.assert_close(out["loss_distill"], expected)
        total(out).backward()
        assert actor[0].module[2].bias.grad.isfinite().all()

    def test_advantage_computed_in_forward(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor, (3, 4)).exclude("advantage", "value_target")
        data["next"] = {
            "observation": torch.randn(3, 4, 5).double(),
            "reward": torch.randn(3, 4, 1).double(),
            "done": torch.zeros(3, 4, 1, dtype=torch.bool),
            "terminated": torch.zeros(3, 4, 1, dtype=torch.bool),
        }
        loss = DistillPPOLoss(actor, critic)
        in_forward = loss(data.copy())
        ahead = data.copy()
        GAE(gamma=0.99, lmbda=0.95, value_network=critic)(ahead)
        torch.testing.assert_close(
            in_forward["loss_objective"], loss(ahead)["loss_objective"]
        )
        assert torch.equal(in_forward["loss_distill"], loss(ahead)["loss_distill"])

    @pytest.mark.parametrize(
        "kind, backend",
        [
            *((kind, "eager") for kind in ("mse", "cosine", "nll")),
            ("kl", "aot_eager"),
            pytest.param("l1", "aot_eager", marks=pytest.mark.slow),
            pytest.param("smooth_l1", "aot_eager", marks=pytest.mark.slow),
            *(
                pytest.param(kind, "inductor", marks=[pytest.mark.slow, needs_compiler])
                for kind in ("mse", "cosine", "nll", "kl")
            ),
        ],
    )
    def test_compile(self, build, total, backend, kind):
        torch._dynamo.reset()
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["teacher_std"] = torch.ones(12, 7)
        data["teacher_mask"][::3] = False
        data["teacher_action"][::3] = math.nan
        loss = DistillPPOLoss(
            actor, critic, distill_type=kind, ratio_weighted=kind == "kl"
        )
        # One graph, as ClipPPOLoss: a break would raise.
        compiled = torch.compile(loss, backend=backend, fullgraph=True)
        for coeff in (1.0, 0.0):  # Scheduled without a second compilation.
            loss.distill_coeff = coeff
            out, expected = compiled(data), loss(data)
            for key, value in expected.items():
                torch.testing.assert_close(out[key], value)
            params = list(actor.parameters())
            for g, e in zip(
                torch.autograd.grad(total(out), params),
                torch.autograd.grad(total(expected), params),
                strict=True,
            ):
                torch.testing.assert_close(g, e)

    def test_trains_towards_the_teacher(self, build, total):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        loss = DistillPPOLoss(actor, critic)
        optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        errors = []
        for _ in range(60):
            out = loss(data)
            errors.append(out["distill_error"].item())
            optimizer.zero_grad()
            total(out).backward()
            optimizer.step()
        assert errors[-1] < 0.5 * errors[0]


class TestOtherStudents:
    def test_tanh_normal_compares_the_squashed_mean(self, build):
        actor = build.actor(TanhNormal, low=-2.0, high=2.0)
        critic = build.critic()
        data = build.minibatch(actor)
        out = DistillPPOLoss(actor, critic)(data)
        loc, _ = actor[0].module(data["observation"])
        mean = 2 * torch.tanh(loc)
        expected = (mean - data["teacher_action"]).square().mean()
        torch.testing.assert_close(out["loss_distill"], expected)

    def test_nll_under_tanh_normal(self, build):
        actor, critic = build.actor(TanhNormal), build.critic()
        data = build.minibatch(actor)
        data["teacher_action"][0] = 1.0  # The border of its support: a closed gripper.
        loss = DistillPPOLoss(actor, critic, distill_type="nll")
        out = loss(data)
        log_prob = actor.get_dist(data).log_prob(data["teacher_action"].double())
        torch.testing.assert_close(out["loss_distill"], -log_prob.mean())
        found = torch.autograd.grad(out["loss_distill"], list(actor.parameters()))
        assert all(g.isfinite().all() for g in found)
        data["teacher_mask"][::2] = False
        data["teacher_action"][::2] = math.nan
        out = loss(data)
        torch.testing.assert_close(out["loss_distill"], -log_prob[1::2].mean())
        found = torch.autograd.grad(out["loss_distill"], list(actor.parameters()))
        assert all(g.isfinite().all() for g in found)

    def test_independent_of_torch_equals_independent_normal(self, build):
        def independent(loc, scale):
            return d.Independent(d.Normal(loc, scale), 1)

        results = []
        for distribution in (IndependentNormal, independent):
            actor, critic = build.actor(distribution), build.critic()
            data = build.minibatch(build.actor())
            for kind in ("mse", "nll"):
                out = DistillPPOLoss(actor, critic, distill_type=kind)(data)
                results.append(out["loss_distill"])
        torch.testing.assert_close(results[:2], results[2:])

    @pytest.mark.parametrize("kind", ["mse", "nll"])
    def test_discrete_actions_are_refused(self, build, kind):
        def one_hot(loc, scale):
            return OneHotCategorical(logits=loc)

        actor, critic = build.actor(one_hot), build.critic()
        data = build.minibatch(actor)
        with pytest.raises(TypeError, match="continuous actions"):
            DistillPPOLoss(actor, critic, distill_type=kind)(data)

    def test_students_without_a_known_centre_are_refused(self, build):
        def squashed(loc, scale):
            normal = d.Independent(d.Normal(loc, scale), 1)
            return d.TransformedDistribution(normal, [d.TanhTransform()])

        actor, critic = build.actor(squashed), build.critic()
        data = build.minibatch(actor)
        with pytest.raises(
            TypeError, match="neither a deterministic_sample nor a mean"
        ):
            DistillPPOLoss(actor, critic, entropy_bonus=False)(data)

    def test_tanh_normal_takes_its_median(self, build):
        """Not the mean of the squashed distribution, which lies nearer to 0."""
        dist = TanhNormal(torch.tensor([0.8]).double(), torch.tensor([0.7]).double())
        centre = point_estimate(dist)
        torch.testing.assert_close(centre, torch.tensor([0.8]).double().tanh())
        samples = dist.sample((20_000,))
        below = (samples < centre).double().mean()
        assert below.item() == pytest.approx(0.5, abs=0.02)
        assert samples.mean() < centre - 0.05

    @pytest.mark.parametrize("aggregate", [False, True])
    @pytest.mark.parametrize("kind", ["mse", "nll", "cosine"])
    def test_one_nested_head_needs_no_key(self, build, aggregate, kind):
        """A composite of one head, by the name that the action has in the env."""
        arm = ("agents", "arm")

        def composite(params):
            return CompositeDistribution(
                params, distribution_map={arm: IndependentNormal}
            )

        with set_composite_lp_aggregate(aggregate):
            actor = ProbabilisticTensorDictSequential(
                TensorDictModule(
                    nn.Sequential(nn.Linear(5, 14), NormalParamExtractor()),
                    ["observation"],
                    [("params", *arm, "loc"), ("params", *arm, "scale")],
                ),
                ProbabilisticTensorDictModule(
                    ["params"],
                    [arm],
                    distribution_class=composite,
                    return_log_prob=True,
                    default_interaction_type=InteractionType.RANDOM,
                ),
            )
            critic = build.critic(torch.float32)
            data = actor(TensorDict({"observation": torch.randn(6, 5)}, [6])).detach()
            data["advantage"] = torch.randn(6, 1)
            data["value_target"] = torch.randn(6, 1)
            data["teacher_action"] = torch.randn(6, 7)
            out = DistillPPOLoss(actor, critic, distill_type=kind)(data)
            loc, std = data["params", *arm, "loc"], data["params", *arm, "scale"]
            label = data["teacher_action"]
            expected = {
                "mse": lambda: (loc - label).square().mean(),
                "nll": lambda: -d.Normal(loc, std).log_prob(label).sum(-1).mean(),
                "cosine": lambda: torch.stack(
                    [
                        1 - torch.cosine_similarity(loc[:, p], label[:, p])
                        for p in ([0, 1, 2], [3, 4, 5])
                    ]
                ).mean(),
            }[kind]()
            torch.testing.assert_close(out["loss_distill"], expected)

    @staticmethod
    def two_heads():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 14), NormalParamExtractor())
        base = nn.Sequential(nn.Linear(5, 4), NormalParamExtractor())
        return ProbabilisticTensorDictSequential(
            TensorDictModule(
                net,
                ["observation"],
                [("params", "arm", "loc"), ("params", "arm", "scale")],
            ),
            TensorDictModule(
                base,
                ["observation"],
                [("params", "base", "loc"), ("params", "base", "scale")],
            ),
            ProbabilisticTensorDictModule(
                ["params"],
                [("action", "arm"), ("action", "base")],
                distribution_class=CompositeDistribution,
                distribution_kwargs={
                    "distribution_map": {
                        "arm": IndependentNormal,
                        "base": IndependentNormal,
                    },
                    "name_map": {
                        "arm": ("action", "arm"),
                        "base": ("action", "base"),
                    },
                },
                return_log_prob=True,
                default_interaction_type=InteractionType.RANDOM,
            ),
        )

    def test_composite_distils_the_chosen_head(self, build):
        with set_composite_lp_aggregate(False):
            actor, critic = self.two_heads(), build.critic(torch.float32)
            data = actor(TensorDict({"observation": torch.randn(6, 5)}, [6])).detach()
            data["advantage"] = torch.randn(6, 1)
            data["value_target"] = torch.randn(6, 1)
            data["teacher_action"] = torch.randn(6, 7)
            loss = DistillPPOLoss(actor, critic)
            with pytest.raises(KeyError, match="distill_action"):
                loss(data)
            loss.set_keys(distill_action=("action", "arm"))
            out = loss(data)
            expected = (data["params", "arm", "loc"] - data["teacher_action"]).square()
            torch.testing.assert_close(out["loss_distill"], expected.mean())
            ppo = ClipPPOLoss(actor, critic)(data)
            assert torch.equal(out["loss_objective"], ppo["loss_objective"])
            arm, base = actor[0].module[0].weight, actor[1].module[0].weight
            grads = torch.autograd.grad(
                out["loss_distill"], [arm, base], allow_unused=True
            )
            assert (grads[0] != 0).any()
            assert grads[1] is None


if __name__ == "__main__":
    pytest.main([__file__])
