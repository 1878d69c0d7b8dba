# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""RPD from scripts that know TorchRL and Hydra only."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import instantiate
from hydra_toys import OVERRIDES
from tensordict import TensorDict
from torchrl.trainers import Trainer

ROOT = Path(__file__).parents[2]
CONF = ROOT / "examples" / "conf"

# The pattern of TorchRL's sota-implementations/ppo_trainer/train.py: this package is
# mentioned nowhere.
SCRIPT = """
import hydra
import torchrl
from torchrl.trainers.algorithms.configs import PPOTrainerConfig

@hydra.main(config_path="config", config_name="config", version_base="1.3")
def main(cfg):
    def report(td):
        torchrl.logger.info(f"reward {td['next', 'reward'].mean():.3f}")

    trainer = hydra.utils.instantiate(cfg.trainer)
    trainer.register_op(dest="batch_process", op=report)
    trainer.train()

if __name__ == "__main__":
    main()
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    # As an installed package is found: torchrl_rpd and hydra_plugins on the path.
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *words],
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=600,
    )


def scalars(folder: Path, name: str) -> list[float]:
    """The logged values of one name, in order."""
    with open(folder / "scalars" / f"{name}.csv") as file:
        return [float(row[1]) for row in csv.reader(file)]


class TestScriptOfTorchRL:
    def test_trains_rpd(self, tmp_path):
        words = ["--config-path", str(CONF), *OVERRIDES, "schedule=constant"]
        done = run(tmp_path, *words, "schedule.init=1.0", "name=toy")
        assert done.returncode == 0, done.stderr[-3000:]
        log = tmp_path / "runs" / "toy"
        # 256 frames of 8 environments in batches of 128, and their labels: one per
        # frame, and one for each root that the last rollout ends with.
        assert scalars(log, "teacher/queries") == [128 + 8, 256 + 8]
        first, last = scalars(log, "loss_distill")
        assert 0 < last < first
        assert scalars(log, "distill_coverage") == [1.0, 1.0]
        assert len(scalars(log, "eval/success_once")) == 2
        # 2 epochs of 128 / 32 minibatches, unless the target KL has ended them.
        assert all(steps <= 8 for steps in scalars(log, "optim_steps"))

    @pytest.mark.maniskill
    @pytest.mark.slow
    def test_trains_rpd_in_maniskill(self, tmp_path):
        done = run(
            tmp_path,
            *("--config-path", str(CONF), "task=push_cube", "flaw=none"),
            *("frames=64", "env.num_envs=2", "env.num_workers=1", "name=push"),
            *("trainer.steps_per_batch=16", "trainer.minibatch_size=16"),
            *("evaluation.interval=64", "evaluation.episodes=2"),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        log = tmp_path / "runs" / "push"
        assert scalars(log, "teacher/queries") == [34, 66]
        assert min(scalars(log, "loss_distill")) > 0


# Puts the toy environment into examples/conf/torchrl_nodes.yaml.
TOY_NODES = [
    "env.base_env._target_=hydra_toys.reach",
    "label.teacher._target_=hydra_toys.pointer",
    "env.base_env.num_envs=8",
    "policy_network.in_features=2",
    "policy_network.out_features=4",
    "value_network.in_features=2",
    "collector.frames_per_batch=128",
    "minibatches.minibatch_size=32",
    "target_kl.target_kl=null",
    "trainer.total_frames=256",
    "trainer.num_epochs=2",
    "trainer.progress_bar=false",
]


def one_policy(trainer: Trainer) -> bool:
    """Whether collector and loss have the same weights."""
    learner = TensorDict.from_module(trainer.loss_module.actor_network)
    actor = TensorDict.from_module(trainer.collector.policy)
    return bool((learner.data == actor.data).all())


class TestTrainerNodeOfTorchRL:
    @pytest.fixture
    def cfg(self, tmp_path):
        words = [*TOY_NODES, f"logger.log_dir={tmp_path}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("torchrl_nodes", overrides=words)

    def test_trains_rpd(self, cfg):
        trainer = instantiate(cfg.trainer)
        assert one_policy(trainer)
        trainer.train()
        logged = trainer._log_dict
        assert logged["teacher/queries"] == [136, 264]
        assert logged["loss_distill"][0] > 0
        # The schedule has reached its end with the last batch.
        assert logged["loss_distill"][-1] == 0
        # 2 epochs of 128 / 32 minibatches in each batch, none skipped.
        assert logged["optim_steps"][-1] >= 8

    def test_without_the_hook_the_first_batch_is_another_policys(self, cfg):
        del cfg.trainer.hooks[0]  # sync_policy
        assert not one_policy(instantiate(cfg.trainer))

    def test_hook_without_its_part(self, cfg):
        cfg.env.transform = None
        with pytest.raises(Exception, match="no TeacherActionTransform"):
            instantiate(cfg.trainer)


class TestDiscovery:
    def test_plugin_is_found(self):
        names = [p.__name__ for p in Plugins.instance().discover(SearchPathPlugin)]
        assert "TorchRLRPDPlugin" in names

    def test_is_shipped(self):
        setuptools = pytest.importorskip("setuptools")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        include = project["tool"]["setuptools"]["packages"]["find"]["include"]
        found = setuptools.find_namespace_packages(str(ROOT), include=include)
        assert "hydra_plugins" in found
        # A namespace package: other plugins live there, too.
        assert not (ROOT / "hydra_plugins" / "__init__.py").exists()

    def test_leaves_other_applications_alone(self, tmp_path):
        # An application of Hydra without TorchRL pays nothing for the plugin.
        script = tmp_path / "app.py"
        script.write_text(
            "import sys\n"
            "from hydra import compose, initialize\n"
            "with initialize(version_base='1.3', config_path=None):\n"
            "    compose(overrides=['+a=1'])\n"
            "assert 'hydra_plugins.torchrl_rpd_plugin' in sys.modules\n"
            "assert 'torch' not in sys.modules\n"
            "assert 'torchrl_rpd' not in sys.modules\n"
        )
        done = subprocess.run(
            [sys.executable, str(script)],
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    pytest.main([__file__])
