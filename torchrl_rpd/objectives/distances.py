# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Distances between a student's action distribution and a teacher's label.

Plain tensor functions: every one maps ``[*B, A]`` tensors to one value per row,
``[*B]``, and leaves masking, weighting and the reduction over rows to
:class:`~torchrl_rpd.objectives.DistillPPOLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "cosine_distance",
    "gaussian_kl",
    "gaussian_nll",
    "l1_distance",
    "mse_distance",
    "smooth_l1_distance",
]


def mse_distance(mean: Tensor, target: Tensor) -> Tensor:
    r"""Mean over the action dimensions of the squared difference.

    .. math::
        d_i = \frac{1}{A} \sum_{j=1}^{A} (m_{ij} - a_{ij})^2

    Args:
        mean (Tensor): the student's point estimate :math:`m`, ``[*B, A]``.
        target (Tensor): the teacher's action :math:`a`, ``[*B, A]``.

    Returns:
        Tensor: one value per row, ``[*B]``.

    Examples:
        >>> mse_distance(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor([5.])
    """
    return (mean - target).square().mean(-1)


def l1_distance(mean: Tensor, target: Tensor) -> Tensor:
    r"""Mean over the action dimensions of the absolute difference.

    .. math::
        d_i = \frac{1}{A} \sum_{j=1}^{A} |m_{ij} - a_{ij}|

    Args:
        mean (Tensor): the student's point estimate :math:`m`, ``[*B, A]``.
        target (Tensor): the teacher's action :math:`a`, ``[*B, A]``.

    Returns:
        Tensor: one value per row, ``[*B]``.

    Examples:
        >>> l1_distance(torch.zeros(1, 2), torch.tensor([[1.0, -3.0]]))
        tensor([2.])
    """
    return (mean - target).abs().mean(-1)


def smooth_l1_distance(mean: Tensor, target: Tensor) -> Tensor:
    r"""Mean over the action dimensions of the Huber distance with threshold 1.

    .. math::
        d_i = \frac{1}{A} \sum_{j=1}^{A} h(m_{ij} - a_{ij}), \qquad
        h(x) = \begin{cases} x^2 / 2 & |x| < 1 \\ |x| - 1/2 & \text{otherwise}
        \end{cases}

    Args:
        mean (Tensor): the student's point estimate :math:`m`, ``[*B, A]``.
        target (Tensor): the teacher's action :math:`a`, ``[*B, A]``.

    Returns:
        Tensor: one value per row, ``[*B]``.

    Examples:
        >>> smooth_l1_distance(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor([1.5000])
    """
    return F.smooth_l1_loss(mean, target, reduction="none").mean(-1)


def gaussian_nll(mean: Tensor, std: Tensor, target: Tensor) -> Tensor:
    r"""Negative log-density of the label under a diagonal Gaussian.

    .. math::
        d_i = \sum_{j=1}^{A} \frac{(a_{ij} - m_{ij})^2}{2 \sigma_{ij}^2}
              + \log \sigma_{ij} + \tfrac{1}{2} \log 2 \pi

    The sum (not the mean) over the dimensions is what the released "bc" loss uses.

    Args:
        mean (Tensor): the student's mean :math:`m`, ``[*B, A]``.
        std (Tensor): the student's standard deviation :math:`\sigma`, ``[*B, A]``.
        target (Tensor): the teacher's action :math:`a`, ``[*B, A]``.

    Returns:
        Tensor: one value per row, ``[*B]``.

    Examples:
        >>> zero, one = torch.zeros(1, 2), torch.ones(1, 2)
        >>> gaussian_nll(zero, one, zero)  # 2 * 0.5 * log(2 pi)
        tensor([1.8379])
    """
    nll = (target - mean).div(std).square() / 2 + std.log()
    return (nll + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(p_mean: Tensor, p_std: Tensor, q_mean: Tensor, q_std: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence between two diagonal Gaussians, KL(p || q).

    .. math::
        d_i = \sum_{j=1}^{A} \log \frac{\sigma^q_{ij}}{\sigma^p_{ij}}
              + \frac{(\sigma^p_{ij})^2 + (m^p_{ij} - m^q_{ij})^2}
                     {2 (\sigma^q_{ij})^2} - \frac{1}{2}

    Args:
        p_mean (Tensor): mean of p, ``[*B, A]``.
        p_std (Tensor): standard deviation of p, ``[*B, A]``, > 0.
        q_mean (Tensor): mean of q, ``[*B, A]``.
        q_std (Tensor): standard deviation of q, ``[*B, A]``, > 0.

    Returns:
        Tensor: one value per row, ``[*B]``, >= 0.

    Examples:
        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> gaussian_kl(zero, one, one, one)  # (1 - 0)^2 / 2
        tensor([0.5000])
    """
    log_ratio = p_std.log() - q_std.log()
    mahalanobis = (p_mean - q_mean).div(q_std).square()
    return ((2 * log_ratio).exp() + mahalanobis - 1 - 2 * log_ratio).sum(-1) / 2


def cosine_distance(
    mean: Tensor,
    target: Tensor,
    parts: Sequence[Sequence[int]],
    min_norm: float,
) -> tuple[Tensor, Tensor]:
    r"""One minus the cosine between student and teacher, part by part.

    .. math::
        d_i = \frac{1}{|P_i|} \sum_{p \in P_i} 1 -
              \frac{m_{ip} \cdot a_{ip}}
                   {\max(\|m_{ip}\|, \epsilon) \, \|a_{ip}\|}, \qquad
        P_i = \{p : \|a_{ip}\| \ge \epsilon\}

    A direction says nothing about a label that hardly moves, so parts with a label
    shorter than :math:`\epsilon` are left out. The same :math:`\epsilon` bounds the
    student's norm from below: the gradient cannot exceed :math:`1 / \epsilon` where
    a freshly initialised student has a mean of almost zero.

    Args:
        mean (Tensor): the student's point estimate :math:`m`, ``[*B, A]``.
        target (Tensor): the teacher's action :math:`a`, ``[*B, A]``.
        parts (sequence of sequences of int): the action dimensions of each part.
        min_norm (float): :math:`\epsilon`, > 0, in action units.

    Returns:
        tuple[Tensor, Tensor]: one value per row, ``[*B]`` (0 where no part counts),
        and a bool tensor ``[*B]``: does any part of the row count.

    Raises:
        ValueError: if a part names a dimension that the action does not have.

    Examples:
        >>> mean = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        >>> target = torch.tensor([[0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
        >>> cosine_distance(mean, target, ((0, 1),), 0.05)
        (tensor([1., 2., 0.]), tensor([ True,  True, False]))
    """
    dims = mean.shape[-1]
    if any(not -dims <= i < dims for part in parts for i in part):
        raise ValueError(
            f"cosine_parts={tuple(map(tuple, parts))} names a dimension that an action "
            f"of size {dims} does not have."
        )
    errors, counted = [], []
    for part in parts:
        # Stacked columns, not index tensors: those would be copied to the device of
        # a CUDA student in every call.
        m = torch.stack([mean[..., i] for i in part], -1)
        a = torch.stack([target[..., i] for i in part], -1)
        a_norm = torch.linalg.vector_norm(a, dim=-1)
        m_norm = torch.linalg.vector_norm(m, dim=-1).clamp_min(min_norm)
        long_enough = a_norm >= min_norm
        error = 1 - (m * a).sum(-1) / (m_norm * a_norm.clamp_min(min_norm))
        errors.append(torch.where(long_enough, error, 0.0))
        counted.append(long_enough)
    number = torch.stack(counted).sum(0)
    return torch.stack(errors).sum(0) / number.clamp_min(1), number > 0
