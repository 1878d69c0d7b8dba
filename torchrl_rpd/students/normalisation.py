# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Running statistics of observations."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["RunningObservationNorm"]


class RunningObservationNorm(nn.Module):
    """Normalises observations by the mean and variance of those seen so far.

    The statistics are buffers, so that they are saved with the student. They change only
    in :meth:`update`, never in :meth:`forward`: the log-probabilities of a rollout and of
    the updates that use it must come from the same normalisation.

    Args:
        dim (int): observation dimension ``D``.

    Keyword Args:
        eps (float): added to the variance. Default: ``1e-5``.
        clip (float): bound of the normalised values. Default: ``10.0``.

    Examples:
        >>> import torch
        >>> norm = RunningObservationNorm(1)
        >>> norm.update(torch.tensor([[1.0], [3.0]]))
        >>> norm(torch.tensor([[2.0], [3.0]])).round(decimals=3).flatten().tolist()
        [0.0, 1.0]
    """

    mean: torch.Tensor
    var: torch.Tensor
    count: torch.Tensor

    def __init__(self, dim: int, *, eps: float = 1e-5, clip: float = 10.0) -> None:
        super().__init__()
        self.eps = eps
        self.clip = clip
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """Normalises ``[*B, D]`` observations."""
        normalised = (observation - self.mean) * (self.var + self.eps).rsqrt()
        return normalised.clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, observation: torch.Tensor) -> None:
        """Adds ``[*B, D]`` observations to the statistics (Chan et al., 1979)."""
        rows = observation.reshape(-1, observation.shape[-1]).double()
        n = rows.shape[0]
        total = self.count + n
        delta = rows.mean(0) - self.mean
        m2 = (
            self.var.double() * self.count
            + rows.var(0, unbiased=False) * n
            + delta.square() * (self.count * n / total)
        )
        # In place: the loss's functional parameters refer to the same buffers.
        self.mean.add_((delta * (n / total)).to(self.mean.dtype))
        self.var.copy_(m2 / total)
        self.count.copy_(total)
