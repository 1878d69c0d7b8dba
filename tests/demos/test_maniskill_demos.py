# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""ManiSkill's trajectory files as a replay buffer."""

from __future__ import annotations

import json
import pickle

import demo_files
import numpy as np
import pytest
import torch
from torchrl.data import SliceSampler
from torchrl.data.vla import validate_vla_tensordict
from torchrl.modules.vla import TinyVLA

from torchrl_rpd.data import ManiSkillDemos

h5py = demo_files.h5py


class TestRows:
    def test_schema(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (3, 5), rewards=True)
        demos = ManiSkillDemos(path, batch_size=4, chunk_size=2)
        assert len(demos) == 8
        rows = demos.sample()
        assert validate_vla_tensordict(rows) == []
        assert rows["observation", "image"].shape == (4, 3, 4, 6)
        assert rows["observation", "image"].dtype == torch.uint8
        assert rows["observation", "state"].shape == (4, 9)
        assert rows["action"].dtype == torch.float32
        assert rows["language_instruction"] == "push the cube away from the robot base"

    def test_every_row_is_what_was_recorded(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (3, 5), rewards=True)
        demos = ManiSkillDemos(path)
        rows = demos[:]
        episode = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
        frame = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])
        assert torch.equal(rows["episode"], episode)
        assert torch.equal(rows["frame"], frame)
        wanted = episode / 10 + frame / 100
        torch.testing.assert_close(rows["action"], wanted[:, None].expand(8, 7))
        # the first pixel says which frame it is: observation t goes with action t
        pixel = rows["observation", "image"][:, :, 0, 0]
        assert torch.equal(pixel[:, 0], episode.byte())
        assert torch.equal(pixel[:, 1], frame.byte())
        assert torch.equal(rows["observation", "state"][:, 0], frame.float())
        assert rows["next", "reward"][:, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
        ends = [False, False, True, False, False, False, False, True]
        for name in ("done", "terminated", "success"):
            assert rows["next", name][:, 0].tolist() == ends
        assert not rows["next", "truncated"].any()
        assert [e.seed for e in demos.episodes] == [100, 101]

    def test_chunks_end_with_the_episode(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (3, 2))
        rows = ManiSkillDemos(path, chunk_size=3)[:]
        # hundredths of a step and tenths of an episode; the last action is repeated
        wanted = [
            [0.00, 0.01, 0.02],
            [0.01, 0.02, 0.02],
            [0.02, 0.02, 0.02],
            [0.10, 0.11, 0.11],
            [0.11, 0.11, 0.11],
        ]
        chunk = rows["vla_action", "chunk"]
        assert chunk.shape == (5, 3, 7)
        torch.testing.assert_close(chunk[..., 6], torch.tensor(wanted))
        pad = [[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 1, 1]]
        assert rows["action_is_pad"].int().tolist() == pad

    def test_done_only_at_the_end(self, tmp_path):
        """Recordings that go on after success have it in the middle, too."""
        path = demo_files.write(tmp_path / "a.h5", (4,))
        with h5py.File(path, "a") as file:
            for name in ("terminated", "success"):
                file["traj_0"][name][...] = [False, True, False, False]
        demo_files.edit_json(path, lambda d: d["episodes"][0].update(success=False))
        rows = ManiSkillDemos(path, success_only=False)[:]
        assert rows["next", "done"][:, 0].tolist() == [False, False, False, True]
        assert not rows["next", "terminated"].any()
        assert rows["next", "truncated"][:, 0].tolist() == [False, False, False, True]
        assert rows["next", "success"][:, 0].tolist() == [False, True, False, False]

    def test_slices_of_episodes(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (4, 6, 8))
        sampler = SliceSampler(num_slices=2, traj_key="episode")
        demos = ManiSkillDemos(path, batch_size=8, sampler=sampler)
        for _ in range(5):
            rows = demos.sample().reshape(2, 4)
            assert (rows["episode"] == rows["episode"][:, :1]).all()
            assert (rows["frame"].diff(dim=1) == 1).all()

    def test_memory_mapped(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (3, 5))
        kept = ManiSkillDemos(path, scratch_dir=tmp_path / "scratch", chunk_size=2)
        assert list((tmp_path / "scratch").rglob("image.memmap"))
        expected = ManiSkillDemos(path, chunk_size=2)
        for key in expected[:].exclude("language_instruction").keys(True, True):
            assert torch.equal(kept[:][key], expected[:][key])

    def test_read_only(self, tmp_path):
        demos = ManiSkillDemos(demo_files.write(tmp_path / "a.h5"))
        with pytest.raises(RuntimeError, match="allow writing"):
            demos.extend(demos[:2])


class TestInstructions:
    def test_several_texts(self, tmp_path):
        push = demo_files.write(tmp_path / "push.h5", (3,))
        pull = demo_files.write(tmp_path / "pull.h5", (2,), task_id="PullCube-v1")
        demos = ManiSkillDemos([push, pull], batch_size=16, chunk_size=2)
        push_text = "push the cube away from the robot base"
        pull_text = "pull the cube towards the robot base"
        assert demos.instructions == [push_text, pull_text]
        assert demos[:].get("language_instruction").tolist() == (
            [push_text] * 3 + [pull_text] * 2
        )
        assert demos.episode(1).get("language_instruction").tolist() == [pull_text] * 2
        rows = demos.sample()
        policy = TinyVLA(action_dim=7, chunk_size=2)
        assert policy(rows)["vla_action", "chunk"].shape == (16, 2, 7)

    @pytest.mark.parametrize(
        ("argument", "expected"),
        [
            (None, "do it"),
            ("nudge it", "nudge it"),
            ({"PushCube-v1": "shove it"}, "shove it"),
            ({"PickCube-v1": "take it"}, "do it"),
        ],
    )
    def test_whose_word_counts(self, tmp_path, argument, expected):
        path = demo_files.write(tmp_path / "a.h5", (2,), instruction="do it")
        demos = ManiSkillDemos(path, instruction=argument)
        assert demos.instructions == [expected]

    def test_unknown_task_needs_one(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (2,), task_id="Mine-v1")
        with pytest.raises(ValueError, match=r"Mine-v1: pass instruction="):
            ManiSkillDemos(path)


class TestWhatIsRead:
    def test_cameras_by_name(self, tmp_path):
        cameras = ["base_camera", "hand_camera", "side"]
        path = demo_files.write(tmp_path / "a.h5", (2,), cameras=cameras)
        rows = ManiSkillDemos(path)[:]
        names = {"image", "wrist_image", "side_image", "state"}
        assert set(rows["observation"].keys()) == names
        rows = ManiSkillDemos(path, cameras="side")[:]
        assert set(rows["observation"].keys()) == {"image", "state"}
        rows = ManiSkillDemos(path, cameras={"wrist_image": "side"}, state=None)[:]
        assert set(rows["observation"].keys()) == {"wrist_image"}

    def test_state_by_path(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (2,))
        demos = ManiSkillDemos(path, cameras=[], state=["extra/tcp_pose", "agent/qpos"])
        state = demos[:]["observation", "state"]
        assert state.shape == (2, 16)
        assert (state[:, :7] == 0.5).all()
        assert state[:, 7].tolist() == [0, 1]

    def test_flat_state(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (2, 2), obs_mode="state")
        state = ManiSkillDemos(path)[:]["observation", "state"]
        assert state.shape == (4, 35)
        assert state[:, 3].tolist() == [0, 0, 1, 1]

    def test_folders(self, tmp_path):
        for name in ("b", "a"):
            (tmp_path / name).mkdir()
            demo_files.write(tmp_path / name / "x.h5", (2,))
        # a recording under way
        (tmp_path / "c.parts").mkdir()
        (tmp_path / "c.parts" / "round_00000000.h5").write_bytes(b"")
        assert len(ManiSkillDemos(tmp_path).episodes) == 2

    def test_only_success(self, tmp_path):
        success = (True, False, True)
        path = demo_files.write(tmp_path / "a.h5", (2, 3, 4), success=success)
        demos = ManiSkillDemos(path)
        assert [e.length for e in demos.episodes] == [2, 4]
        assert demos.skipped_by_reason == {"no success": 1}
        everything = ManiSkillDemos(path, success_only=False)
        assert [e.success for e in everything.episodes] == [True, False, True]

    def test_outcomes_that_only_some_files_tell(self, tmp_path):
        a = demo_files.write(tmp_path / "a.h5", (2,), rewards=True)
        b = demo_files.write(tmp_path / "b.h5", (2,))
        rows = ManiSkillDemos([a, b])[:]
        assert "reward" not in rows["next"].keys()
        assert "success" in rows["next"].keys()


class TestStatistics:
    def test_numbers(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (1, 1))
        demos = ManiSkillDemos(path)
        # two actions: all 0, all 0.1
        meta = demos.metadata
        assert meta.action_dim == 7
        torch.testing.assert_close(meta.action_mean, torch.full((7,), 0.05))
        # of the population: sqrt((0.05^2 + 0.05^2) / 2) = 0.05
        torch.testing.assert_close(meta.action_std, torch.full((7,), 0.05))
        torch.testing.assert_close(meta.action_high, torch.full((7,), 0.1))
        assert meta.action_space == "eef_delta"
        assert meta.camera_keys == (("observation", "image"),)
        assert meta.control_frequency_hz == 20.0
        assert type(meta).from_json(meta.to_json()).dataset_id == meta.dataset_id
        spec = meta.make_action_spec()
        assert spec.shape == (7,)

    def test_published_layout(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (101,))
        stats = json.loads(json.dumps(ManiSkillDemos(path).statistics()))
        # 0, 0.01, ..., 1: the quantiles are the second and the last but one
        assert stats["action"]["q01"] == pytest.approx([0.01] * 7)
        assert stats["action"]["q99"] == pytest.approx([0.99] * 7)
        assert stats["action"]["mask"] == [True] * 6 + [False]
        assert len(stats["proprio"]["mean"]) == 9
        assert (stats["num_transitions"], stats["num_trajectories"]) == (101, 1)


def _delete(name):
    def change(group):
        del group[name]

    return change


def _replace(name, value):
    def change(group):
        del group[name]
        group[name] = value

    return change


def _nan(group):
    group["actions"][1, 2] = np.nan


def _unwritten(group):
    del group["obs/agent/qpos"]
    group.create_dataset("obs/agent/qpos", shape=(10**9, 9), dtype="f4", chunks=(9, 9))
    del group["success"]
    group.create_dataset("success", shape=(3,), dtype=bool)


def _text(group):
    del group["actions"]
    group.create_dataset("actions", data=["a", "b"], dtype=h5py.string_dtype())


def _outside(group):
    del group["actions"]
    group["actions"] = h5py.ExternalLink("other.h5", "/secret")


class TestBroken:
    """The second of three episodes is broken; the others are read."""

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (_delete("actions"), "missing data"),
            (_delete("obs/sensor_data/base_camera/rgb"), "missing data"),
            (_nan, "NaN in actions"),
            (_replace("obs/agent/qpos", np.full((4, 9), np.inf)), "NaN in the state"),
            (_replace("obs/agent/qpos", np.zeros((3, 9))), "wrong length"),
            (_replace("terminated", np.zeros(7, bool)), "wrong length"),
            (_replace("actions", demo_files.actions(1, 2)), "wrong length"),
            (_replace("actions", np.zeros((0, 7), np.float32)), "wrong length"),
            (_unwritten, "truncated data"),
            (_text, "no plain numbers"),
            (_outside, "link to elsewhere"),
            (
                _replace("obs/sensor_data/base_camera/rgb", np.zeros((4, 4, 6, 3))),
                "no RGB pictures",
            ),
        ],
    )
    def test_is_left_out_and_counted(self, tmp_path, change, reason):
        path = demo_files.write(tmp_path / "a.h5", (3, 3, 3))
        with h5py.File(path, "a") as file:
            change(file["traj_1"])
        demos = ManiSkillDemos(path)
        assert demos.skipped_by_reason == {reason: 1}
        assert demos.skipped[0].source == "a.h5:traj_1"
        assert [e.seed for e in demos.episodes] == [100, 102]
        assert len(demos) == 6

    def test_unreadable_chunk(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (3, 3))
        with h5py.File(path, "r") as file:
            data = file["traj_0/obs/sensor_data/base_camera/rgb"]
            where = data.id.get_chunk_info(0)
        raw = bytearray(path.read_bytes())
        end = where.byte_offset + where.size
        raw[where.byte_offset : end] = bytes(where.size)
        path.write_bytes(raw)
        demos = ManiSkillDemos(path)
        assert demos.skipped_by_reason == {"unreadable data": 1}
        assert [e.seed for e in demos.episodes] == [101]

    def test_json_and_groups_differ(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (3, 3, 3))
        with h5py.File(path, "a") as file:
            file.move("traj_2", "traj_7")
        demos = ManiSkillDemos(path)
        assert demos.skipped_by_reason == {"no such group": 1, "not in the JSON": 1}
        assert len(demos.episodes) == 2

    def test_none_left(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", (3, 3), success=(False, False))
        with pytest.raises(
            ValueError, match=r"No episode can be used.*'no success': 2"
        ):
            ManiSkillDemos(path)

    def test_objects_are_never_unpickled(self, tmp_path):
        """What h5py and NumPy would call an object stays bytes on the disk."""
        path = demo_files.write(tmp_path / "a.h5", (3, 3))

        class Bomb:
            def __reduce__(self):
                return (pytest.fail, ("unpickled",))

        payload = np.frombuffer(pickle.dumps(Bomb()), np.uint8)
        with h5py.File(path, "a") as file:
            del file["traj_0/actions"]
            kind = h5py.vlen_dtype(np.uint8)
            stored = file.create_dataset("traj_0/actions", (1,), dtype=kind)
            stored[0] = payload
        assert ManiSkillDemos(path).skipped_by_reason == {"no plain numbers": 1}


class TestErrors:
    def test_no_hdf5(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5")
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(ValueError, match="cannot be opened as HDF5"):
            ManiSkillDemos(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
            ManiSkillDemos(tmp_path / "nowhere.h5")
        with pytest.raises(FileNotFoundError, match=r"no \.h5 file"):
            ManiSkillDemos(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", '{"episodes": [1]}'])
    def test_no_json(self, tmp_path, text):
        path = demo_files.write(tmp_path / "a.h5")
        path.with_suffix(".json").write_text(text)
        with pytest.raises(
            ValueError, match=r"cannot be read as JSON|no list of episod"
        ):
            ManiSkillDemos(path)

    def test_control_mode(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", control_mode="pd_joint_pos")
        with pytest.raises(ValueError, match=r"pd_joint_pos, not.*-c pd_ee_delta_pose"):
            ManiSkillDemos(path)
        assert (
            ManiSkillDemos(path, control_mode=None).metadata.action_space == "unknown"
        )
        other = demo_files.write(tmp_path / "b.h5")
        with pytest.raises(ValueError, match="control modes differ"):
            ManiSkillDemos([path, other], control_mode=None)

    def test_camera(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5")
        with pytest.raises(ValueError, match=r"no pictures of \['hum'\].*base_camera"):
            ManiSkillDemos(path, cameras="hum")

    def test_no_pictures(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", obs_mode="state")
        with pytest.raises(ValueError, match=r"obs_mode='state'.*replay_trajectory"):
            ManiSkillDemos(path, cameras="base_camera")

    def test_no_observations(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5", obs_mode="none")
        with pytest.raises(ValueError, match=r"no observations.*obs_mode='none'"):
            ManiSkillDemos(path)

    def test_state_path(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5")
        with pytest.raises(ValueError, match=r"no \['agent/qpso'\].*'agent/qpos'"):
            ManiSkillDemos(path, state="agent/qpso")

    def test_files_that_do_not_fit_together(self, tmp_path):
        a = demo_files.write(tmp_path / "a.h5")
        b = demo_files.write(tmp_path / "b.h5", obs_mode="state")
        with pytest.raises(ValueError, match=r"a\.h5:traj_0.*b\.h5:traj_0.*state=None"):
            ManiSkillDemos([a, b])

    def test_chunk_size(self, tmp_path):
        path = demo_files.write(tmp_path / "a.h5")
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            ManiSkillDemos(path, chunk_size=0)

    def test_episode_number(self, tmp_path):
        demos = ManiSkillDemos(demo_files.write(tmp_path / "a.h5"))
        with pytest.raises(IndexError, match="2 episodes"):
            demos.episode(2)


if __name__ == "__main__":
    pytest.main([__file__])
