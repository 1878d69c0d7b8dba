# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Schedules, shares of labelled frames and the VLAJS recipe, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hydra_toys import OVERRIDES
from omegaconf import DictConfig

CONF = Path(__file__).parents[2] / "examples" / "conf"


def composed(*words: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(words))


def trained(*words: str):
    """A run of 4 batches of 128 frames on a toy environment."""
    cfg = composed(*OVERRIDES, "frames=512", "evaluation.interval=512", *words)
    cfg.trainer.logger = None
    trainer = instantiate(cfg.trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("fraction", "low", "high"),
    # Of 512 frames and 8 roots 104 +- 9.1 and 26 +- 5.0, with sqrt(520 * p * (1 - p));
    # the bounds are four standard deviations away.
    [(1.0, 520, 520), (0.2, 68, 140), (0.05, 6, 46)],
)
def test_share_of_labelled_frames(fraction, low, high):
    trainer = trained(f"teacher_action.query_fraction={fraction}")
    stats = trainer.parts.teacher_action.stats()
    assert low <= stats["queries"] <= high


@pytest.mark.parametrize("preset", ["cpu", "paper"])
@pytest.mark.parametrize("reward", ["dense", "sparse"])
def test_return_ratio_with_every_preset(preset, reward):
    cfg = composed(
        f"preset={preset}",
        f"reward={reward}",
        "schedule=return_ratio",
        "schedule.teacher_score=0.5",
        "schedule.score_key=success",
        "schedule.floor=0.1",
    )
    assert cfg.schedule.kind == "return_ratio"
    assert cfg.trainer.schedule.teacher_score == 0.5


def test_return_ratio_says_what_it_needs():
    cfg = composed(*OVERRIDES, "schedule=return_ratio")
    cfg.trainer.logger = None
    with pytest.raises(InstantiationException, match="needs teacher_score"):
        instantiate(cfg.trainer)


class TestVLAJS:
    def test_what_it_is(self):
        cfg = composed("algo=vlajs")
        assert cfg.loss.distill_type == "cosine"
        assert cfg.loss.cosine_parts == [[0, 1, 2], [3, 4, 5]]  # without the gripper
        assert cfg.teacher_action.query_fraction == 0.2
        assert cfg.schedule.kind == "constant"
        assert cfg.schedule.switch_off_score == 0.5
        assert cfg.name.startswith("vlajs-pick_cube-")
        # All else is the preset's.
        assert cfg.trainer.num_epochs == composed().trainer.num_epochs

    def test_command_line_wins(self):
        cfg = composed(
            "algo=vlajs", "schedule=cosine", "teacher_action.query_fraction=0.05"
        )
        assert cfg.schedule.kind == "cosine"
        assert cfg.schedule.switch_off_score == 0.5
        assert cfg.teacher_action.query_fraction == 0.05

    def test_teacher_leaves_for_good(self):
        """Every success rate is enough here: off after the second batch."""
        trainer = trained(
            "algo=vlajs",
            "loss.cosine_parts=[[0,1]]",
            "schedule.switch_off_score=0",
            "schedule.switch_off_rises=1",
            "schedule.score_episodes=1",
            "schedule.score_key=success",
        )
        coefficients = trainer._log_dict["schedule/distill_coeff"]
        assert coefficients[0] == 1.0
        assert coefficients[-1] == 0.0
        queries = trainer._log_dict["teacher/queries"]
        off = coefficients.index(0.0)
        assert queries[off] == queries[-1]
        assert 0 < queries[-1] <= 0.3 * 128 * (off + 1)
        assert not trainer.parts.teacher_action.enabled


if __name__ == "__main__":
    pytest.main([__file__])
