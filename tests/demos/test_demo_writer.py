# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Trajectory files that survive being killed while they are written."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from torchrl_rpd.data import DemoWriter, ManiSkillDemos, writer

h5py = pytest.importorskip(
    "h5py", reason="needs h5py: pip install 'torchrl_rpd[maniskill]'"
)

INFO = {
    "env_id": "PushCube-v1",
    "env_kwargs": {"control_mode": "pd_ee_delta_pose", "obs_mode": "state"},
    "max_episode_steps": 50,
}


def episode(seed: int, length: int = 2) -> tuple[dict, dict]:
    done = np.arange(length) == length - 1
    arrays = {
        "obs": np.full((length + 1, 35), seed, np.float32),
        "actions": np.full((length, 7), seed / 100, np.float32),
        "terminated": done,
        "truncated": ~done & False,
        "success": done,
    }
    info = {
        "episode_seed": seed,
        "reset_kwargs": {"seed": seed},
        "control_mode": "pd_ee_delta_pose",
        "success": True,
        "instruction": "push",
    }
    return arrays, info


def seeds(path) -> list[int]:
    """What a reader finds."""
    demos = ManiSkillDemos(path)
    assert demos.skipped == []
    # the arrays belong to the entries
    for i, info in enumerate(demos.episodes):
        assert (demos.episode(i)["observation", "state"] == info.seed).all()
    return [info.seed for info in demos.episodes]


class Killed(BaseException):
    """A kill: nothing after it runs."""


class TestFiles:
    def test_layout(self, tmp_path):
        path = tmp_path / "deep" / "push.h5"
        tree, info = episode(4, 3)
        tree["obs"] = {
            "agent": {"qpos": np.zeros((4, 9), np.float32)},
            "sensor_data": {"human": {"rgb": np.zeros((4, 8, 8, 3), np.uint8)}},
        }
        with DemoWriter(
            path, env_info=INFO, source_type="scripted", source_desc="by a test"
        ) as files:
            files.add_round([(tree, info)], dropped=2)
        assert sorted(p.name for p in path.parent.iterdir()) == ["push.h5", "push.json"]
        described = json.loads(path.with_suffix(".json").read_text())
        assert described["env_info"] == INFO
        assert described["source_type"] == "scripted"
        assert described["recording"]["dropped"] == 2
        (entry,) = described["episodes"]
        assert entry == {"episode_id": 0, "elapsed_steps": 3, **info}
        with h5py.File(path) as file:
            assert list(file) == ["traj_0"]
            pictures = file["traj_0/obs/sensor_data/human/rgb"]
            assert pictures.compression == "gzip"
            assert file["traj_0/actions"].dtype == np.float32

    def test_objects_are_refused(self, tmp_path):
        files = DemoWriter(tmp_path / "a.h5", env_info=INFO)
        tree, info = episode(0)
        tree["obs"] = np.array([{}, {}, {}])
        with pytest.raises(TypeError, match="holds objects"):
            files.add_round([(tree, info)])

    def test_ending(self, tmp_path):
        with pytest.raises(ValueError, match=r"end in \.h5"):
            DemoWriter(tmp_path / "a.hdf5", env_info=INFO)


class TestGoingOn:
    def test_appends(self, tmp_path):
        path = tmp_path / "a.h5"
        with DemoWriter(path, env_info=INFO) as files:
            files.add_round([episode(0), episode(1)])
        with DemoWriter(path, env_info=INFO) as files:
            assert files.rounds == 1
            files.add_round([], dropped=1)
            files.add_round([episode(2)])
        assert seeds(path) == [0, 1, 2]
        assert DemoWriter(path, env_info=INFO).rounds == 3

    def test_closing_twice_changes_nothing(self, tmp_path):
        path = tmp_path / "a.h5"
        with DemoWriter(path, env_info=INFO) as files:
            files.add_round([episode(0)])
        before = path.read_bytes()
        files.close()
        DemoWriter(path, env_info=INFO).close()
        assert path.read_bytes() == before

    def test_more_than_ten_episodes_keep_their_order(self, tmp_path):
        path = tmp_path / "a.h5"
        with DemoWriter(path, env_info=INFO) as files:
            files.add_round([episode(s) for s in range(12)])
            files.add_round([episode(12)])
        assert seeds(path) == list(range(13))

    @pytest.mark.parametrize("fatal", range(1, 12))
    def test_killed_at_any_step(self, tmp_path, monkeypatch, fatal):
        """Dies at the n-th call that changes the disk; the next run makes it whole."""
        path = tmp_path / "a.h5"
        with DemoWriter(path, env_info=INFO) as files:
            files.add_round([episode(0)])
        calls = 0

        def deadly(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == fatal:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            # a rename, a removed folder, and each array that is written
            patch.setattr(os, "replace", deadly(os.replace))
            patch.setattr(shutil, "rmtree", deadly(shutil.rmtree))
            patch.setattr(writer, "_write", deadly(writer._write))
            try:
                files = DemoWriter(path, env_info=INFO)
                files.add_round([episode(1), episode(2)])
                files.add_round([episode(3)])
                files.close()
            except Killed:
                pass
        # The command again: goes on with the rounds that are not there yet.
        rounds = [[episode(0)], [episode(1), episode(2)], [episode(3)]]
        with DemoWriter(path, env_info=INFO) as files:
            assert files.rounds >= 1
            for played in rounds[files.rounds :]:
                files.add_round(played)
        assert seeds(path) == [0, 1, 2, 3]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "a.json"]

    def test_half_written_files_do_not_count(self, tmp_path):
        path = tmp_path / "a.h5"
        files = DemoWriter(path, env_info=INFO)
        files.add_round([episode(0)])
        part = next(files.parts.iterdir())
        (files.parts / "round_00000001.tmp").write_bytes(part.read_bytes()[:700])
        path.with_suffix(".h5.tmp").write_bytes(b"half")
        with DemoWriter(path, env_info=INFO) as files:
            assert files.rounds == 1
        assert seeds(path) == [0]

    def test_other_settings_are_refused(self, tmp_path):
        path = tmp_path / "a.h5"
        with DemoWriter(path, env_info=INFO, settings={"seed": 1}) as files:
            files.add_round([episode(0)])
        with pytest.raises(ValueError, match="seed: 1 there, 2 asked for"):
            DemoWriter(path, env_info=INFO, settings={"seed": 2})
        # also while the rounds are not joined yet
        other = DemoWriter(tmp_path / "b.h5", env_info=INFO, settings={"seed": 1})
        other.add_round([episode(0)])
        with pytest.raises(ValueError, match="seed: 1 there, 2 asked for"):
            DemoWriter(tmp_path / "b.h5", env_info=INFO, settings={"seed": 2})

    def test_files_of_others_are_left_alone(self, tmp_path):
        path = tmp_path / "a.h5"
        path.with_suffix(".json").write_text('{"env_info": {}, "episodes": []}')
        with pytest.raises(ValueError, match="not recorded by this writer"):
            DemoWriter(path, env_info=INFO)


if __name__ == "__main__":
    pytest.main([__file__])
