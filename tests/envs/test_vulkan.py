# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchrl_rpd.envs import _vulkan

DATA = Path(__file__).parents[1] / "data"
# Recorded with Mesa 25.0.7 (lavapipe) by the command in record_state_observations.py.
RECORDED = json.loads((DATA / "state_observations.json").read_text())
ROOT = Path(__file__).parents[2]

NO_DRIVER = {"VK_ICD_FILENAMES": "/none", "VK_DRIVER_FILES": "/none"}


def run(*args: str, driver: bool) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, with or without Vulkan's drivers."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    env.update({} if driver else NO_DRIVER)
    return subprocess.run(
        [sys.executable, *args], env=env, capture_output=True, text=True, timeout=300
    )


def record(*, driver: bool) -> dict:
    script = str(DATA / "record_state_observations.py")
    done = run(script, *([] if driver else ["--without-vulkan"]), driver=driver)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


MAKE = """
import gymnasium, mani_skill.envs
from torchrl_rpd.envs import _vulkan
{before}
env = gymnasium.make({task!r}, obs_mode="state", render_backend="none")
env.reset(seed=0)
env.step(env.action_space.sample())
print("built")
"""


class TestNotDrawn:
    def test_forgets_everything(self):
        material = _vulkan._NotDrawn([1, 0, 0, 1], roughness=0.5)
        material.base_color = [0, 0, 0, 1]
        assert material.set_base_color_texture(None) is None
        assert not hasattr(material, "metallic")


class TestHasRenderDevice:
    @pytest.fixture(autouse=True)
    def forget(self):
        _vulkan.has_render_device.cache_clear()
        yield
        _vulkan.has_render_device.cache_clear()

    def test_false_without_driver(self, monkeypatch, capfd):
        for name, value in NO_DRIVER.items():
            monkeypatch.setenv(name, value)
        assert _vulkan.has_render_device() is False
        assert capfd.readouterr() == ("", "")

    def test_crash_of_the_driver_is_no_device(self, monkeypatch):
        monkeypatch.setattr(_vulkan, "_PROBE", "import os; os.abort()")
        assert _vulkan.has_render_device() is False

    def test_kept(self, monkeypatch):
        monkeypatch.setattr(_vulkan, "_PROBE", "")
        assert _vulkan.has_render_device() is True
        monkeypatch.setattr(_vulkan, "_PROBE", "raise SystemExit(1)")
        assert _vulkan.has_render_device() is True


@pytest.fixture(scope="module")
def observed():
    return record(driver=False)


@pytest.mark.maniskill
class TestWithoutVulkan:
    @pytest.mark.parametrize("task_id", RECORDED)
    def test_observations_of_a_machine_with_a_driver(self, observed, task_id):
        # 20 steps of every task. Another CPU may round differently, which contacts
        # amplify, hence a tolerance here and bits in test_bit_for_bit.
        assert observed[task_id]["last"] == pytest.approx(
            RECORDED[task_id]["last"], abs=1e-3
        )

    def test_stock_fails(self):
        # If this stops failing, the replacement is no longer needed.
        code = MAKE.format(before="", task="PushCube-v1")
        done = run("-c", code, driver=False)
        assert "failed to find a rendering device" in done.stderr

    def test_robot_from_mjcf(self):
        code = MAKE.format(
            before="_vulkan.use_without_vulkan()", task="MS-CartpoleBalance-v1"
        )
        done = run("-c", code, driver=False)
        assert done.stdout.endswith("built\n"), done.stderr[-2000:]

    @pytest.mark.render
    def test_bit_for_bit(self, observed):
        assert record(driver=True) == observed

    @pytest.mark.render
    def test_push_t_is_not_drawn_with_a_driver(self):
        code = MAKE.format(
            before="_vulkan.allow_push_t_without_rendering()", task="PushT-v1"
        )
        done = run("-c", code, driver=True)
        assert done.stdout.endswith("built\n"), done.stderr[-2000:]


if __name__ == "__main__":
    pytest.main([__file__])
