# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What OpenVLA and Octo normalise numbers with."""

from __future__ import annotations

import numpy as np
import torch


def spread(values: torch.Tensor) -> dict[str, list[float]]:
    """Mean, population deviation, extremes and 1 % quantiles of each column."""
    # NumPy: torch.quantile takes no more than 16 million numbers.
    numbers = values.double().numpy()
    low, high = np.quantile(numbers, [0.01, 0.99], axis=0)
    return {
        "mean": numbers.mean(0).tolist(),
        "std": numbers.std(0).tolist(),
        "min": numbers.min(0).tolist(),
        "max": numbers.max(0).tolist(),
        "q01": low.tolist(),
        "q99": high.tolist(),
    }
