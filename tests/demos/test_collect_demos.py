# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""examples/collect_demos.py: what it says and what it leaves behind."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from torchrl_rpd.data import ManiSkillDemos

EXAMPLE = Path(__file__).parents[2] / "examples" / "collect_demos.py"
spec = importlib.util.spec_from_file_location("collect_demos", EXAMPLE)
collect_demos = importlib.util.module_from_spec(spec)
spec.loader.exec_module(collect_demos)


def test_demonstrator_reads_either_form_of_the_state():
    flat = torch.rand(2, 35)
    parts = {
        "agent": {"qpos": flat[:, :9], "qvel": flat[:, 9:18]},
        "extra": {
            "tcp_pose": flat[:, 18:25],
            "goal_pos": flat[:, 25:28],
            "obj_pose": flat[:, 28:],
        },
    }
    act = collect_demos.demonstrator("PushCube-v1", {})
    seed = torch.zeros(2, 1, dtype=torch.int64)
    one = act(TensorDict({"observation": flat, "episode_seed": seed}, [2]))
    two = act(TensorDict({"observation": parts, "episode_seed": seed}, [2]))
    assert one.shape == (2, 7)
    assert torch.equal(one, two)


def test_flaws():
    words = ["--flaw", "jitter=0.1", "cube_offset=(0, 0.01, 0)"]
    assert dict(collect_demos.parse(words).flaw) == {
        "jitter": 0.1,
        "cube_offset": (0, 0.01, 0),
    }
    with pytest.raises(SystemExit):
        collect_demos.parse(["--flaw", "jitter"])


@pytest.mark.maniskill
def test_pulling_where_another_would_push(tmp_path):
    words = [
        "PushCube-v1",
        "--act-as",
        "PullCube-v1",
        "--state-only",
        "--episodes",
        "2",
    ]
    collect_demos.main([*words, "--fast-controller", "--out", str(tmp_path)])
    demos = ManiSkillDemos(
        tmp_path / "PushCube-v1-as-PullCube-v1.h5", state="", success_only=False
    )
    assert demos.instructions == ["pull the cube towards the robot base"]
    assert [info.length for info in demos.episodes] == [18, 18]
    for i in range(2):
        cube = demos.episode(i)["observation", "state"][:, 28]
        assert cube[-1] - cube[0] < -0.1  # metres along x: towards the robot


def test_acting_as_somebody_else_only_where_it_can_be_mirrored(tmp_path):
    words = ["PickCube-v1", "--act-as", "PullCube-v1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="got PullCube-v1 for PickCube-v1"):
        collect_demos.main(words)


class TestPlanner:
    """ManiSkill's planner is somebody else's program: what if it fails?"""

    def interpreter(self, tmp_path, script: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    def run(self, tmp_path, python: str) -> None:
        words = ["PushCube-v1", "--episodes", "2", "--out", str(tmp_path / "demos")]
        collect_demos.main([*words, "--planner", "--planner-python", python])

    def test_commands(self, tmp_path, capfd):
        self.run(tmp_path, self.interpreter(tmp_path, 'echo ran "$@"'))
        planned, replayed = [
            line for line in capfd.readouterr().out.splitlines() if line[:3] == "ran"
        ]
        assert "motionplanning.panda.run -e PushCube-v1 -n 2" in planned
        assert "replay_trajectory --traj-path" in replayed
        assert "-c pd_ee_delta_pose --save-traj -o rgb" in replayed

    def test_crash(self, tmp_path):
        with pytest.raises(SystemExit, match=r"crashed.*numpy 2.*numpy<2"):
            self.run(tmp_path, self.interpreter(tmp_path, "kill -SEGV $$"))

    def test_failure(self, tmp_path):
        with pytest.raises(SystemExit, match=r"failed \(exit status 3\).*numpy<2"):
            self.run(tmp_path, self.interpreter(tmp_path, "exit 3"))

    def test_no_interpreter(self, tmp_path):
        with pytest.raises(SystemExit, match="cannot be started"):
            self.run(tmp_path, str(tmp_path / "nothing"))


@pytest.mark.maniskill
def test_from_the_state(tmp_path, capsys):
    words = ["PushCube-v1", "--out", str(tmp_path), "--state-only", "--fast-controller"]
    words += ["--flaw", "jitter=0.05", "goal_offset=(0.0, 0.01, 0.0)"]
    collect_demos.main([*words, "--episodes", "1"])
    assert "PushCube-v1.h5: 1 episodes" in capsys.readouterr().out
    collect_demos.main([*words, "--episodes", "2"])
    demos = ManiSkillDemos(tmp_path / "PushCube-v1.h5")
    assert len(demos.episodes) == 2
    assert demos.episodes[0].seed != demos.episodes[1].seed


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
