# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Small students and minibatches for the tests of the objectives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    AddStateIndependentNormalScale,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.modules import IndependentNormal

OBS, ACTION = 5, 7


def _actor(distribution_class=IndependentNormal, dtype=torch.float64, **dist_kwargs):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(OBS, 16),
        nn.Tanh(),
        nn.Linear(16, ACTION),
        AddStateIndependentNormalScale(ACTION),
    ).to(dtype)
    with torch.no_grad():
        # Standard deviations that differ between the dimensions.
        net[3].state_independent_scale.copy_(torch.linspace(-0.5, 0.2, ACTION))
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"],
            ["action"],
            distribution_class=distribution_class,
            distribution_kwargs=dist_kwargs,
            return_log_prob=True,
        ),
    )


def _critic(dtype=torch.float64):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(OBS, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    return TensorDictModule(net, ["observation"], ["state_value"])


def _minibatch(actor, batch=(12,), dtype=torch.float64):
    """A minibatch collected by a policy that differs a little from ``actor``."""
    torch.manual_seed(3)
    data = TensorDict({"observation": torch.randn(*batch, OBS, dtype=dtype)}, batch)
    with torch.no_grad():
        data = actor(data)
        data["action_log_prob"] += 0.3 * torch.randn(*batch, dtype=dtype)
    data["advantage"] = torch.randn(*batch, 1, dtype=dtype)
    data["value_target"] = torch.randn(*batch, 1, dtype=dtype)
    # As a transform stores them: single precision.
    data["teacher_action"] = torch.rand(*batch, ACTION) * 1.8 - 0.9
    data["teacher_mask"] = torch.ones(*batch, 1, dtype=torch.bool)
    return data


@pytest.fixture
def build() -> SimpleNamespace:
    """Builders: ``actor(distribution_class)``, ``critic()``, ``minibatch(actor)``."""
    return SimpleNamespace(actor=_actor, critic=_critic, minibatch=_minibatch)


def _total(out):
    return sum(v for k, v in out.items() if k.startswith("loss_"))


@pytest.fixture
def total():
    """Sums the losses of an output as a trainer does."""
    return _total
