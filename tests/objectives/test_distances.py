# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The distances, against numbers worked by hand and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as d

from torchrl_rpd.objectives import distances


class TestByHand:
    mean = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    target = torch.tensor([[0.5, -1.0], [2.0, -1.5]])
    # Differences: row 0 (-0.5, 2), row 1 (0, 0.5).

    def test_mse(self):
        # (0.25 + 4) / 2, (0 + 0.25) / 2
        torch.testing.assert_close(
            distances.mse_distance(self.mean, self.target), torch.tensor([2.125, 0.125])
        )

    def test_l1(self):
        # (0.5 + 2) / 2, (0 + 0.5) / 2
        torch.testing.assert_close(
            distances.l1_distance(self.mean, self.target), torch.tensor([1.25, 0.25])
        )

    def test_smooth_l1(self):
        # (0.25 / 2 + (2 - 0.5)) / 2, (0 + 0.25 / 2) / 2
        torch.testing.assert_close(
            distances.smooth_l1_distance(self.mean, self.target),
            torch.tensor([0.8125, 0.0625]),
        )

    def test_gaussian_nll(self):
        std = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
        half_log_2pi = 0.9189385332
        # row 0: (-0.5/0.5)^2/2 + log .5 + (2/2)^2/2 + log 2 = 1 + 0
        # row 1: 0 + 0 + (0.5/0.25)^2/2 + log .25 = 2 - 1.3862943611
        expected = torch.tensor([1.0, 2 - 1.3862943611]) + 2 * half_log_2pi
        torch.testing.assert_close(
            distances.gaussian_nll(self.mean, std, self.target), expected
        )

    def test_gaussian_kl_of_the_released_setting(self):
        # Student std 0.6, teacher std 0.1, shifted by 0.3 in each of 7 dimensions:
        # KL(student || teacher) = 7 (log(.1/.6) + (.36 + .09) / .02 - .5)
        #                        = 7 (-1.7917595 + 22.5 - .5) = 141.4577
        zeros, ones = torch.zeros(1, 7), torch.ones(1, 7)
        kl = distances.gaussian_kl(zeros, 0.6 * ones, 0.3 * ones, 0.1 * ones)
        torch.testing.assert_close(kl, torch.tensor([141.4577]), rtol=1e-6, atol=1e-4)

    def test_cosine(self):
        mean = torch.tensor([[3.0, 4.0, 0.0, 1.0], [3.0, 4.0, 0.0, 1.0]])
        target = torch.tensor([[4.0, 3.0, 0.0, -2.0], [4.0, 3.0, 0.0, 0.01]])
        error, counted = distances.cosine_distance(mean, target, ((0, 1), (2, 3)), 0.05)
        # Row 0: 1 - 24/25 and 1 + 1, mean 1.02; row 1: its second part is too short.
        torch.testing.assert_close(error, torch.tensor([1.02, 0.04]))
        assert counted.tolist() == [True, True]


def test_gaussian_nll_and_kl_equal_torch_distributions():
    torch.manual_seed(0)
    m, q = torch.randn(2, 9, 7, dtype=torch.float64)
    s, t = torch.rand(2, 9, 7, dtype=torch.float64) + 0.1
    torch.testing.assert_close(
        distances.gaussian_nll(m, s, q), -d.Normal(m, s).log_prob(q).sum(-1)
    )
    torch.testing.assert_close(
        distances.gaussian_kl(m, s, q, t),
        d.kl_divergence(d.Normal(m, s), d.Normal(q, t)).sum(-1),
    )


class TestCosine:
    def test_ignores_dimensions_outside_its_parts(self):
        mean, target = torch.randn(2, 4, 7)
        error, _ = distances.cosine_distance(mean, target, ((0, 1, 2), (3, 4, 5)), 0.05)
        target[:, 6] = -target[:, 6] + 3
        same, _ = distances.cosine_distance(mean, target, ((0, 1, 2), (3, 4, 5)), 0.05)
        assert torch.equal(error, same)

    def test_scale_of_the_label_does_not_matter(self):
        mean, target = torch.randn(2, 4, 3).add(0.5)
        near, _ = distances.cosine_distance(mean, target, ((0, 1, 2),), 1e-3)
        far, _ = distances.cosine_distance(mean, 3 * target, ((0, 1, 2),), 1e-3)
        torch.testing.assert_close(near, far)

    def test_row_without_a_part_does_not_count(self):
        target = torch.tensor([[0.0, 0.0, 0.0], [math.nan] * 3])
        error, counted = distances.cosine_distance(
            torch.ones(2, 3), target, ((0, 1, 2),), 0.05
        )
        assert not counted.any()
        assert error.tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6])
    def test_gradient_of_a_tiny_mean_is_bounded(self, size):
        mean = torch.full((1, 3), size, requires_grad=True)
        error, _ = distances.cosine_distance(
            mean, torch.tensor([[1.0, 0.0, 0.0]]), ((0, 1, 2),), 0.05
        )
        (grad,) = torch.autograd.grad(error.sum(), mean)
        # Below the floor the error is 1 - m . a / 0.05: gradient -20 along the label.
        torch.testing.assert_close(grad, torch.tensor([[-20.0, 0.0, 0.0]]))

    def test_part_outside_the_action(self):
        with pytest.raises(ValueError, match="cosine_parts"):
            distances.cosine_distance(
                torch.ones(2, 4), torch.ones(2, 4), ((0, 1, 4),), 0.05
            )


if __name__ == "__main__":
    pytest.main([__file__])
