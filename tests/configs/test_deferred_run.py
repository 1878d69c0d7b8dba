# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A recipe with ``teacher_action.deferred=true`` trains the same student."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hydra_toys import OVERRIDES
from torchrl.trainers.algorithms import PPOTrainer

CONF = Path(__file__).parents[2] / "examples" / "conf"


def made(*words: str, **kwargs: Any) -> PPOTrainer:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*OVERRIDES, "evaluation=null", *words])
    cfg.trainer.hooks = [cfg.log_episodes, cfg.log_teacher]
    return instantiate(cfg.trainer, logger=None, **kwargs)


@cache
def trained(deferred: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    trainer = made(
        f"teacher_action.deferred={str(deferred).lower()}",
        "teacher_action.query_fraction=0.7",
    )
    trainer.train()
    stats = dict(trainer.parts.teacher_action.stats())
    assert stats.pop("seconds") > 0
    return trainer.parts.student.actor.state_dict(), stats


def test_the_same_student() -> None:
    (weights, stats), (expected, counts) = trained(True), trained(False)
    assert stats == counts and 0 < stats["labelled"] < 256
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_another_postproc_is_not_replaced() -> None:
    with pytest.raises(InstantiationException, match=r"leave collector\.postproc out"):
        made(
            "teacher_action.deferred=true",
            "+collector.postproc._target_=torchrl.envs.RewardSum",
        )


if __name__ == "__main__":
    pytest.main([__file__])
