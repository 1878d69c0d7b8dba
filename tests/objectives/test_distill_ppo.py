# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""DistillPPOLoss: values, gradients, masks and reductions."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import distributions as d
from torchrl.modules import TanhNormal
from torchrl.objectives import ClipPPOLoss

from torchrl_rpd.objectives import DistillPPOLoss, distances
from torchrl_rpd.objectives._student import gate

RELEASED = {
    "loss_critic_type": "l2",
    "critic_coeff": 0.25,
    "entropy_coeff": 0.0,
    "normalize_advantage": True,
}
TYPES = ["mse", "l1", "smooth_l1", "cosine", "nll", "kl"]


def grads(loss, parameters):
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return [None if g is None else g.detach() for g in found]


class TestReleasedObjective:
    """Against the objective of the released code, written out in plain torch."""

    @staticmethod
    def released(actor, critic, data, term, coeff):
        loc, std = actor[0].module(data["observation"])
        value = critic.module(data["observation"]).squeeze(-1)
        label = data["teacher_action"].double()
        log_prob = (
            -(((data["action"] - loc) / std) ** 2) / 2
            - std.log()
            - math.log(2 * math.pi) / 2
        ).sum(-1)
        log_ratio = log_prob - data["action_log_prob"]
        ratio = log_ratio.exp()
        adv = data["advantage"].squeeze(-1)
        adv = (adv - adv.mean()) / (adv.std() + 1e-8)
        pg = torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.2)).mean()
        v_loss = 0.5 * ((value - data["value_target"].squeeze(-1)) ** 2).mean()
        distill = {
            "mse": lambda: ((label - loc) ** 2).mean(),
            "l1": lambda: (label - loc).abs().mean(),
            "bc": lambda: -d.Normal(loc, std).log_prob(label).sum(1).mean(),
        }[term]()
        k3 = ((ratio - 1) - log_ratio).mean()
        return pg + 0.5 * v_loss + coeff * distill, coeff * distill, k3

    @pytest.mark.parametrize("coeff", [1.0, 0.3])
    @pytest.mark.parametrize("term", ["mse", "l1", "bc"])
    def test_loss_and_every_gradient(self, build, total, term, coeff):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        loss = DistillPPOLoss(
            actor, critic, distill_type=term, distill_coeff=coeff, **RELEASED
        )
        params = [*actor.parameters(), *critic.parameters()]
        out = loss(data)
        got = grads(total(out), params)
        expected, distill, k3 = self.released(actor, critic, data, term, coeff)
        torch.testing.assert_close(total(out), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out["loss_distill"], distill, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out["kl_k3"], k3, rtol=1e-6, atol=1e-6)
        assert out["kl_k3"] > 1e-3  # The policies do differ in this test.
        for g, e in zip(got, grads(expected, params), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)

    def test_ppd_baseline(self, build):
        """mean(KL(student || teacher) * clamp(ratio, min=1 - clip)), ratio attached."""
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["action_log_prob"] += 0.2 * torch.arange(12).fmod(3)
        data["teacher_std"] = torch.rand(12, 7).add(0.2)
        loss = DistillPPOLoss(
            actor,
            critic,
            distill_type="kl",
            kl_direction="reverse",
            ratio_weighted=True,
        )
        out = loss(data)
        loc, std = actor[0].module(data["observation"])
        student = d.Independent(d.Normal(loc, std), 1)
        label, spread = data["teacher_action"].double(), data["teacher_std"].double()
        kl = d.kl_divergence(student, d.Independent(d.Normal(label, spread), 1))
        ratio = (student.log_prob(data["action"]) - data["action_log_prob"]).exp()
        assert (ratio < 0.8).any() and (ratio > 0.8).any()
        expected = (kl * ratio.clamp(min=0.8)).mean()
        torch.testing.assert_close(out["loss_distill"], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            out["distill_error"], kl.mean(), rtol=1e-6, atol=1e-6
        )
        params = list(actor.parameters())
        got = grads(out["loss_distill"], params)
        for g, e in zip(got, grads(expected, params), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)

    def test_kl_directions(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["teacher_std"] = torch.rand(12, 7).add(0.2)
        loc, std = actor[0].module(data["observation"])
        student = d.Normal(loc, std)
        teacher = d.Normal(
            data["teacher_action"].double(), data["teacher_std"].double()
        )
        for direction, pair in [
            ("forward", (teacher, student)),
            ("reverse", (student, teacher)),
        ]:
            loss = DistillPPOLoss(
                actor, critic, distill_type="kl", kl_direction=direction
            )
            torch.testing.assert_close(
                loss(data)["loss_distill"], d.kl_divergence(*pair).sum(-1).mean()
            )


class TestByHand:
    def test_values_and_gradient(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor, (2,))
        shift = torch.tensor([[1.0, 0, 0, 0, 0, 0, -2.0], [0, 0, 0, 0.5, 0, 0, 0]])
        data["teacher_action"] = data["loc"] + shift
        loss = DistillPPOLoss(actor, critic, distill_coeff=0.5)
        out = loss(data)
        # ((1 + 4) / 7 + 0.25 / 7) / 2 = 5.25 / 14 = 0.375, and half of it.
        torch.testing.assert_close(out["distill_error"].item(), 0.375)
        torch.testing.assert_close(out["loss_distill"].item(), 0.1875)
        # d loss / d bias of the last layer = 0.5 * 2 * sum_i(m - a) / (2 * 7)
        #                                   = -(sum of shift) / 14
        (grad,) = grads(out["loss_distill"], [actor[0].module[2].bias])
        expected = torch.tensor([-1.0, 0, 0, -0.5, 0, 0, 2.0]).double() / 14
        torch.testing.assert_close(grad, expected)

    def test_k3(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor, (2,))
        with torch.no_grad():
            log_prob = actor.get_dist(data).log_prob(data["action"])
        data["action_log_prob"] = log_prob - torch.tensor([math.log(2), -math.log(2)])
        # Ratios 2 and 1/2: ((2 - 1 - log 2) + (0.5 - 1 + log 2)) / 2 = 0.25
        out = DistillPPOLoss(actor, critic)(data)
        torch.testing.assert_close(out["kl_k3"].item(), 0.25)


class TestGradientPath:
    @pytest.mark.parametrize("kind", TYPES)
    def test_reaches_the_mean(self, build, kind):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor, (11,))  # Odd: signs cannot cancel.
        data["teacher_std"] = torch.full((11, 7), 0.3)
        out = DistillPPOLoss(actor, critic, distill_type=kind)(data)
        (grad,) = grads(out["loss_distill"], [actor[0].module[2].bias])
        moved = grad[:6] if kind == "cosine" else grad
        assert moved.isfinite().all() and (moved != 0).all()
        if kind == "cosine":
            assert grad[6] == 0  # The gripper belongs to no part.

    @pytest.mark.parametrize("kind", TYPES)
    def test_reaches_the_std_only_with_nll_and_kl(self, build, kind):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["teacher_std"] = torch.full((12, 7), 0.3)
        out = DistillPPOLoss(actor, critic, distill_type=kind)(data)
        std = actor[0].module[3].state_independent_scale
        (grad,) = grads(out["loss_distill"], [std])
        if kind in ("nll", "kl"):
            assert (grad != 0).all()
        else:
            assert grad is None

    def test_never_reaches_critic_or_teacher(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        label = data["teacher_action"].requires_grad_()
        out = DistillPPOLoss(actor, critic)(data)
        found = grads(out["loss_distill"], [*critic.parameters(), label])
        assert all(g is None for g in found)

    def test_detached_outputs(self, build):
        actor, critic = build.actor(), build.critic()
        out = DistillPPOLoss(actor, critic)(build.minibatch(actor))
        assert out["loss_distill"].requires_grad
        for key in ("distill_error", "distill_coverage", "kl_k3"):
            assert not out[key].requires_grad


def same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    view = {8: torch.int64, 4: torch.int32}[a.element_size()]
    assert torch.equal(a.contiguous().view(view), b.contiguous().view(view))


class TestCoefficientZero:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("labels", ["finite", "nan", "masked_nan"])
    @pytest.mark.parametrize("kind", [*TYPES, "ppd", "tanh_nll", "tanh_mse"])
    def test_bitwise_equal_to_clip_ppo(self, build, total, kind, labels, dtype):
        settings = dict(RELEASED, entropy_coeff=0.01)
        options: dict = {"distill_type": kind, "distill_coeff": 0.0}
        if kind == "ppd":
            options |= {"distill_type": "kl", "ratio_weighted": True}
        student = {"dtype": dtype}
        if kind.startswith("tanh"):
            options["distill_type"] = kind[5:]
            student["distribution_class"] = TanhNormal
        results = []
        for cls, extra in ((ClipPPOLoss, {}), (DistillPPOLoss, options)):
            actor, critic = build.actor(**student), build.critic(dtype)
            data = build.minibatch(actor, dtype=dtype)
            data["teacher_std"] = torch.full((12, 7), 0.3)
            if labels != "finite":
                data["teacher_action"][:5] = math.nan
                data["teacher_std"][2:6] = math.nan
            if labels == "masked_nan":
                data["teacher_mask"][:6] = False
            torch.manual_seed(7)  # The entropy of TanhNormal is sampled.
            out = cls(actor, critic, **settings, **extra)(data)
            params = [*actor.parameters(), *critic.parameters()]
            results.append((out, total(out), grads(total(out), params)))
        (ppo, ppo_total, ppo_grads), (rpd, rpd_total, rpd_grads) = results
        assert rpd["loss_distill"] == 0
        for key, value in ppo.items():
            same_bits(rpd[key], value)
        same_bits(rpd_total.detach(), ppo_total.detach())
        for got, expected in zip(rpd_grads, ppo_grads, strict=True):
            same_bits(got, expected)

    def test_the_gate_adds_no_bit_to_another_gradient(self):
        # -0.0 + 0.0 is 0.0, so what the gate lets through must be -0.0.
        x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
        ppo = torch.tensor([-0.0, 0.0, 1.0])
        for label in (1.0, -1.0, math.nan):
            gated = gate(x, torch.tensor(False))
            same_bits(gated.detach(), x.detach())
            (grad,) = grads((x * ppo).sum() + (gated - label).square().sum(), [x])
            same_bits(grad, ppo)

    def test_no_more_host_synchronisations_than_clip_ppo(self, build):
        from torch.utils._python_dispatch import TorchDispatchMode

        class CountReads(TorchDispatchMode):
            reads = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                name = func.overloadpacket.__name__
                if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
                    self.reads += 1
                return func(*args, **(kwargs or {}))

        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        counts = {}
        for kind in (None, "mse", "l1", "smooth_l1", "cosine", "nll"):
            cls = ClipPPOLoss if kind is None else DistillPPOLoss
            loss = cls(
                actor, critic, **({} if kind is None else {"distill_type": kind})
            )
            loss(data)
            with CountReads() as mode:
                loss(data)
            counts[kind] = mode.reads
        assert set(counts.values()) == {counts[None]}, counts


class TestMasks:
    def labelled(self, build, mask, batch=(12,)):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor, batch)
        data["teacher_std"] = torch.full((*batch, 7), 0.3)
        data["teacher_mask"] = mask
        for key in ("teacher_action", "teacher_std"):
            data[key][~mask.squeeze(-1)] = math.nan
        return actor, critic, data

    @pytest.mark.parametrize("kind", TYPES)
    def test_equals_the_loss_on_the_labelled_rows(self, build, kind):
        mask = (torch.arange(12) % 3 != 0).unsqueeze(-1)
        actor, critic, data = self.labelled(build, mask)
        loss = DistillPPOLoss(actor, critic, distill_type=kind)
        params = list(actor.parameters())
        out, part = loss(data), loss(data[mask.squeeze(-1)])
        torch.testing.assert_close(out["loss_distill"], part["loss_distill"])
        torch.testing.assert_close(out["distill_error"], part["distill_error"])
        assert out["distill_coverage"] == pytest.approx(8 / 12)
        got, expected = (grads(o["loss_distill"], params) for o in (out, part))
        for g, e in zip(got, expected, strict=True):
            assert (g is None) == (e is None)
            if g is not None:
                torch.testing.assert_close(g, e)

    @pytest.mark.parametrize("kind", TYPES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_no_label_at_all(self, build, total, kind, reduction):
        mask = torch.zeros(12, 1, dtype=torch.bool)
        actor, critic, data = self.labelled(build, mask)
        loss = DistillPPOLoss(actor, critic, distill_type=kind, reduction=reduction)
        out = loss(data)
        assert (out["loss_distill"] == 0).all()
        assert out["distill_error"] == 0 and out["distill_coverage"] == 0
        found = grads(total(out).sum(), actor.parameters())
        assert all(g.isfinite().all() for g in found)

    def test_absent_mask_means_all_valid(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        with_mask = DistillPPOLoss(actor, critic)(data)
        without = DistillPPOLoss(actor, critic)(data.exclude("teacher_mask"))
        assert torch.equal(with_mask["loss_distill"], without["loss_distill"])
        assert without["distill_coverage"] == 1

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_reductions(self, build, reduction):
        mask = (torch.arange(12).reshape(3, 4) % 3 != 0).unsqueeze(-1)
        actor, critic, data = self.labelled(build, mask, (3, 4))
        loss = DistillPPOLoss(actor, critic, distill_coeff=0.5, reduction=reduction)
        out = loss(data)
        rows = (data["loc"] - data["teacher_action"]).square().mean(-1)
        rows = torch.where(mask.squeeze(-1), rows, 0.0)
        expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 8}[reduction]
        torch.testing.assert_close(out["loss_distill"].detach(), 0.5 * expected)
        torch.testing.assert_close(out["distill_error"], rows.sum() / 8)
        assert out["loss_distill"].shape == out["loss_objective"].shape

    def test_composes_with_the_mask_of_padded_trajectories(self, build, total):
        mask = torch.ones(3, 4, 1, dtype=torch.bool)
        mask[0] = False
        actor, critic, data = self.labelled(build, mask, (3, 4))
        padded = torch.ones(3, 4, 1, dtype=torch.bool)
        padded[:, 3] = False
        data["collector", "mask"] = padded
        data["teacher_action"][:, 3] = math.nan  # Padding holds anything,
        data["teacher_mask"][:, 3] = True  # also where a label is claimed.
        out = DistillPPOLoss(actor, critic)(data)
        rows = (data["loc"] - data["teacher_action"]).square().mean(-1)[1:, :3]
        torch.testing.assert_close(out["loss_distill"].detach(), rows.mean())
        assert out["distill_coverage"] == pytest.approx(6 / 9)
        assert all(g.isfinite().all() for g in grads(total(out), actor.parameters()))
        kept = DistillPPOLoss(actor, critic)(data[:, :3].exclude("collector"))
        torch.testing.assert_close(out["kl_k3"], kept["kl_k3"])

    def test_short_labels_are_left_out_of_cosine(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["teacher_action"][:3, :6] = 0.01
        loss = DistillPPOLoss(actor, critic, distill_type="cosine")
        out = loss(data)
        error, _ = distances.cosine_distance(
            data["loc"][3:], data["teacher_action"][3:], ((0, 1, 2), (3, 4, 5)), 0.05
        )
        torch.testing.assert_close(out["distill_error"], error.mean())
        assert out["distill_coverage"] == pytest.approx(9 / 12)

    def test_row_shaped_and_integer_masks_are_understood(self, build):
        mask = (torch.arange(12) % 2 == 0).unsqueeze(-1)
        actor, critic, data = self.labelled(build, mask)
        loss = DistillPPOLoss(actor, critic)
        expected = loss(data)["loss_distill"]
        for other in (mask.squeeze(-1), mask.to(torch.uint8)):
            data["teacher_mask"] = other
            assert torch.equal(loss(data)["loss_distill"], expected)

    def test_a_nan_label_under_a_true_mask_is_not_hidden(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["teacher_action"][0, 0] = math.nan
        assert DistillPPOLoss(actor, critic)(data)["loss_distill"].isnan()


class TestBadInput:
    @pytest.mark.parametrize(
        "options, match",
        [
            ({"distill_type": "l2"}, "distill_type must be one of"),
            ({"kl_direction": "both"}, "kl_direction must be one of"),
            ({"distill_coeff": -1.0}, "distill_coeff must be >= 0"),
            ({"cosine_parts": ()}, "cosine_parts"),
            ({"cosine_parts": ((0, 1), ())}, "cosine_parts"),
            ({"cosine_min_norm": 0.0}, "cosine_min_norm"),
            ({"ratio_weighted": True}, "ratio_weighted"),
        ],
    )
    def test_options(self, build, options, match):
        with pytest.raises(ValueError, match=match):
            DistillPPOLoss(build.actor(), build.critic(), **options)

    def test_missing_label(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor).exclude("teacher_action")
        with pytest.raises(KeyError, match=r"TeacherActionTransform.*set_keys"):
            DistillPPOLoss(actor, critic)(data)

    def test_labels_that_were_never_fetched(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["teacher_ticket"] = torch.ones(12, 1, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="postproc=transform"):
            DistillPPOLoss(actor, critic)(data)

    @pytest.mark.parametrize("shape", [(12, 6), (12, 1), (12,), (12, 1, 7)])
    def test_label_of_the_wrong_shape(self, build, shape):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["teacher_action"] = torch.zeros(shape)
        with pytest.raises(ValueError, match=r"teacher_action.*shape"):
            DistillPPOLoss(actor, critic)(data)

    def test_mask_of_the_wrong_shape(self, build):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["teacher_mask"] = torch.ones(12, 7, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"teacher_mask.*shape"):
            DistillPPOLoss(actor, critic)(data)

    def test_normal_without_event_dimension(self, build):
        actor, critic = build.actor(d.Normal), build.critic()
        obs = TensorDict({"observation": torch.randn(12, 5, dtype=torch.float64)}, [12])
        data = actor(obs).detach()
        data["advantage"] = data["value_target"] = torch.randn(12, 1)
        data["teacher_action"] = torch.zeros(12, 7)
        with pytest.raises(ValueError, match="IndependentNormal"):
            DistillPPOLoss(actor, critic)(data)

    @pytest.mark.parametrize("std", [0.0, -1.0, math.nan])
    def test_teacher_std_not_positive(self, build, std):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        data["teacher_std"] = torch.ones(12, 7)
        data["teacher_std"][4, 2] = std
        loss = DistillPPOLoss(actor, critic, distill_type="kl")
        with pytest.raises(ValueError, match="positive teacher standard deviation"):
            loss(data)
        data["teacher_mask"][4] = False
        assert loss(data)["loss_distill"].isfinite()

    def test_kl_without_teacher_std(self, build):
        actor, critic = build.actor(), build.critic()
        with pytest.raises(KeyError, match="teacher_std"):
            DistillPPOLoss(actor, critic, distill_type="kl")(build.minibatch(actor))

    def test_kl_needs_a_gaussian_student(self, build):
        actor, critic = build.actor(TanhNormal), build.critic()
        data = build.minibatch(actor)
        data["teacher_std"] = torch.ones(12, 7)
        with pytest.raises(TypeError, match="Gaussian"):
            DistillPPOLoss(actor, critic, distill_type="kl")(data)


if __name__ == "__main__":
    pytest.main([__file__])
