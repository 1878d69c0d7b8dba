# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the students' heads have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from tensordict.utils import NestedKey
from torch import nn
from torchrl.modules import (
    MLP,
    IndependentNormal,
    ProbabilisticActor,
)


def orthogonal_mlp(
    in_features: int,
    out_features: int,
    num_cells: Sequence[int],
    activation: type[nn.Module],
    last_gain: float,
) -> MLP:
    """Builds an MLP with zero biases and orthogonal weights.

    The gain of the hidden layers is the square root of 2, that of the last layer
    ``last_gain``.
    """
    mlp = MLP(
        in_features=in_features,
        out_features=out_features,
        num_cells=list(num_cells),
        activation_class=activation,
    )
    linears = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
    for layer in linears:
        nn.init.orthogonal_(layer.weight, last_gain if layer is linears[-1] else 2**0.5)
        nn.init.zeros_(layer.bias)
    return mlp


def normal_actor(
    modules: Sequence[nn.Module],
    action_dim: int,
    log_std_init: float | Sequence[float],
    in_key: NestedKey,
) -> ProbabilisticActor:
    """An unbounded diagonal normal around what ``modules`` compute from ``in_key``.

    Its standard deviation does not depend on the observation.

    Raises:
        ValueError: if there is neither one initial value nor one per action dimension.
    """
    values = torch.as_tensor(log_std_init, dtype=torch.get_default_dtype())
    if values.shape not in ((), (action_dim,)):
        raise ValueError(
            f"log_std_init is a number, or one for each of the {action_dim} action "
            f"dimensions; got {list(values.shape)}."
        )
    scale = AddStateIndependentNormalScale(action_dim)
    scale.state_independent_scale.data.copy_(values)
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(*modules, scale), in_keys=[in_key], out_keys=["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
