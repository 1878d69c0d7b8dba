# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""DistillPPOLoss for any batch shape, dtype, mask and rubbish under the mask.

The expected values are computed row by row in numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.modules import IndependentNormal
from torchrl.objectives import ClipPPOLoss

from torchrl_rpd.objectives import DistillPPOLoss

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

many = hypothesis.settings(
    derandomize=True, max_examples=25, deadline=None, database=None
)

KINDS = ["mse", "l1", "smooth_l1", "cosine", "nll", "kl_forward", "kl_reverse", "ppd"]
SHAPES = [(5,), (2, 3), (12,), (2, 1, 4), (3, 1)]
MIN_NORM = 0.05
CLIP = 0.2


class Student(nn.Module):
    """Mean and standard deviation are inputs, so that a test can choose them."""

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, mean, std):
        return mean + self.bias, std


@dataclass
class Case:
    """A minibatch and a loss."""

    shape: tuple[int, ...]
    size: int
    dtype: torch.dtype
    label_dtype: torch.dtype
    kind: str
    coeff: float
    reduction: str
    mask: np.ndarray
    rubbish: float
    seed: int
    options: dict = field(init=False)
    actor: ProbabilisticTensorDictSequential = field(init=False)
    critic: TensorDictModule = field(init=False)
    data: TensorDict = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        shape, size = self.shape, self.size

        def tensor(low, high, *last, dtype=self.dtype):
            values = rng.uniform(low, high, (*shape, *last))
            return torch.from_numpy(np.asarray(values)).to(dtype)

        self.actor = ProbabilisticTensorDictSequential(
            TensorDictModule(
                Student(self.dtype, size), ["mean", "std"], ["loc", "scale"]
            ),
            ProbabilisticTensorDictModule(
                ["loc", "scale"],
                ["action"],
                distribution_class=IndependentNormal,
                return_log_prob=True,
            ),
        )
        self.critic = TensorDictModule(
            nn.Linear(1, 1, dtype=self.dtype), ["feature"], ["state_value"]
        )
        mask = torch.from_numpy(self.mask)
        label = tensor(-2, 2, size, dtype=self.label_dtype)
        std = tensor(0.2, 1.5, size, dtype=self.label_dtype)
        self.data = TensorDict(
            {
                "mean": tensor(-2, 2, size),
                "std": tensor(0.2, 1.5, size),
                "feature": tensor(-1, 1, 1),
                "action": tensor(-2, 2, size),
                "advantage": tensor(-1, 1, 1),
                "value_target": tensor(-1, 1, 1),
                "teacher_action": torch.where(mask, label, self.rubbish),
                "teacher_std": torch.where(mask, std, self.rubbish),
                "teacher_mask": mask,
            },
            shape,
        )
        log_prob = self.actor.get_dist(self.data).log_prob(self.data["action"])
        noise = tensor(-0.5, 0.5)
        self.data["action_log_prob"] = log_prob.detach() + noise
        parts = [tuple(p) for p in np.array_split(np.arange(size), min(2, size))]
        self.options = {
            "distill_type": "kl" if self.kind[:2] in ("kl", "pp") else self.kind,
            "kl_direction": "forward" if self.kind == "kl_forward" else "reverse",
            "ratio_weighted": self.kind == "ppd",
            "cosine_parts": parts,
            "cosine_min_norm": MIN_NORM,
        }

    def run(self, cls=DistillPPOLoss, data=None, **changed):
        """Output and gradients, for mean, std and critic."""
        data = self.data.copy() if data is None else data
        for key in ("mean", "std"):
            data[key] = data[key].clone().requires_grad_()
        own = {**self.options, "distill_coeff": self.coeff}
        loss = cls(
            self.actor,
            self.critic,
            reduction=changed.pop("reduction", self.reduction),
            clip_epsilon=CLIP,
            **({**own, **changed} if cls is DistillPPOLoss else {}),
        )
        out = loss(data)
        total = sum(v for k, v in out.items() if k.startswith("loss_")).sum()
        inputs = [data["mean"], data["std"], *loss.parameters()]
        return out.detach(), torch.autograd.grad(total, inputs)

    def expected(self):
        """Error of each row (0 where none), weight, and which rows count; in numpy."""
        d = {k: v.detach().double().numpy() for k, v in self.data.items()}
        rows = self.shape
        error, weight = np.zeros(rows), np.ones(rows)
        counts = self.mask[..., 0].copy()
        for i in np.ndindex(*rows):
            if not counts[i]:
                continue
            m, s = d["mean"][i], d["std"][i]
            a, t = d["teacher_action"][i], d["teacher_std"][i]
            x = m - a
            if self.kind == "mse":
                error[i] = np.mean(x**2)
            elif self.kind == "l1":
                error[i] = np.mean(np.abs(x))
            elif self.kind == "smooth_l1":
                huber = np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)
                error[i] = np.mean(huber)
            elif self.kind == "cosine":
                terms = []
                for part in self.options["cosine_parts"]:
                    p, q = m[list(part)], a[list(part)]
                    if math.sqrt((q**2).sum()) >= MIN_NORM:
                        length = max(math.sqrt((p**2).sum()), MIN_NORM)
                        terms.append(1 - p @ q / length / math.sqrt((q**2).sum()))
                counts[i] = bool(terms)
                error[i] = np.mean(terms) if terms else 0.0
            elif self.kind == "nll":
                density = np.exp(-((x / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))
                error[i] = -np.log(density).sum()
            else:
                p, q = (
                    ((a, t), (m, s)) if self.kind == "kl_forward" else ((m, s), (a, t))
                )
                error[i] = sum(
                    math.log(sq / sp) + (sp**2 + (mp - mq) ** 2) / (2 * sq**2) - 0.5
                    for mp, sp, mq, sq in zip(*p, *q, strict=True)
                )
            if self.kind == "ppd":
                z = (d["action"][i] - m) / s
                log_prob = (-(z**2) / 2 - np.log(s) - math.log(2 * math.pi) / 2).sum()
                ratio = math.exp(log_prob - d["action_log_prob"][i])
                weight[i] = max(ratio, 1 - CLIP)
        return error, weight, counts


@st.composite
def cases(draw, kind):
    any_shape = st.lists(st.integers(1, 4), max_size=3).map(tuple)
    # Hypothesis alone likes the smallest ones, where little can go wrong.
    shape = draw(st.one_of(st.sampled_from(SHAPES), any_shape))
    rows = math.prod(shape)
    seed = draw(st.integers(0, 2**16))
    mask = draw(
        st.one_of(
            st.just(np.random.default_rng(seed).random(rows) < 0.7),
            st.lists(st.booleans(), min_size=rows, max_size=rows),
            st.sampled_from([[True] * rows, [False] * rows]),
        )
    )
    label_dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    return Case(
        shape=shape,
        size=draw(st.sampled_from([7, 6, 2, 1])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        label_dtype=draw(st.sampled_from(label_dtypes)),
        kind=kind,
        coeff=draw(st.sampled_from([0.1, 1.0, 2.5])),
        reduction=draw(st.sampled_from(["none", "mean", "sum"])),
        mask=np.array(mask, dtype=bool).reshape(*shape, 1),
        rubbish=draw(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e4])),
        seed=seed,
    )


def same_bits(a, b):
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


@pytest.mark.parametrize("kind", KINDS)
@many
@hypothesis.given(st.data())
def test_equals_numpy(kind, draw):
    case = draw.draw(cases(kind))
    out, (to_mean, to_std, *_) = case.run()
    error, weight, counts = case.expected()
    number = max(counts.sum(), 1)
    rows = case.coeff * error * weight
    reduced = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / number}
    close = {"rtol": 2e-4, "atol": 2e-5}
    expected = reduced[case.reduction]
    assert out["loss_distill"].shape == np.shape(expected)
    np.testing.assert_allclose(out["loss_distill"].numpy(), expected, **close)
    assert out["loss_distill"].dtype == case.dtype
    np.testing.assert_allclose(out["distill_error"], error.sum() / number, **close)
    np.testing.assert_allclose(
        out["distill_coverage"], counts.sum() / math.prod(case.shape), rtol=1e-6
    )
    assert to_mean.isfinite().all() and to_std.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@many
@hypothesis.given(st.data())
def test_rows_without_a_label_do_not_matter(kind, draw):
    """Neither value nor gradient depends on what lies under the mask, to the bit."""
    case = draw.draw(cases(kind))
    out, grads = case.run()
    other = case.data.copy()
    mask = torch.from_numpy(case.mask)
    for key in ("teacher_action", "teacher_std"):
        other[key] = torch.where(mask, other[key], 0.25)
    out_other, grads_other = case.run(data=other)
    for key, value in out.items():
        assert same_bits(value, out_other[key]), key
    for a, b in zip(grads, grads_other, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("kind", KINDS)
@many
@hypothesis.given(st.data())
def test_order_of_the_rows_does_not_matter(kind, draw):
    case = draw.draw(cases(kind))
    rows = math.prod(case.shape)
    order = np.random.default_rng(case.seed).permutation(rows).tolist()
    flat = case.data.reshape(rows)
    out, (to_mean, *_) = case.run(data=flat.copy())
    shuffled, (to_mean_shuffled, *_) = case.run(data=flat[order])
    expected = out["loss_distill"]
    if case.reduction == "none":
        expected = expected[order]
    torch.testing.assert_close(shuffled["loss_distill"], expected)
    for key in ("distill_error", "distill_coverage", "kl_k3"):
        torch.testing.assert_close(shuffled[key], out[key])
    torch.testing.assert_close(to_mean_shuffled, to_mean[order])


@pytest.mark.parametrize("kind", KINDS)
@many
@hypothesis.given(st.data(), st.booleans())
def test_coefficient_zero_is_clip_ppo(kind, draw, nan_under_a_true_mask):
    case = draw.draw(cases(kind))
    data = case.data.copy()
    if nan_under_a_true_mask:
        data["teacher_action"] = torch.full_like(data["teacher_action"], math.nan)
    out, grads = case.run(data=data.copy(), distill_coeff=0.0)
    ppo, ppo_grads = case.run(ClipPPOLoss, data=data.copy())
    assert (out["loss_distill"] == 0).all()
    for key, value in ppo.items():
        assert same_bits(out[key], value), key
    for a, b in zip(grads, ppo_grads, strict=True):
        assert same_bits(a, b)


if __name__ == "__main__":
    pytest.main([__file__])
