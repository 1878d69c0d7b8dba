# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A run that was killed goes on bit for bit, and its parts do what they say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_data import buffer, demonstrations
from small_octo import write_small_octo
from tensordict import TensorDict
from torch.optim.lr_scheduler import LambdaLR
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from torchrl_rpd.finetune import (
    FinetuneCheckpoints,
    ImageAugmentation,
    OctoDiffusionLoss,
    OpenVLATokenLoss,
    accumulate,
    action_statistics,
    load_octo,
    load_openvla,
    rate_factor,
    weight_decay_groups,
)
from torchrl_rpd.teachers.openvla import OpenVLATeacher, write_tiny_checkpoint

pytest.importorskip("msgpack")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
STEPS = 6


class Run:
    """What examples/finetune_vla.py does, small; built as by a new process."""

    def __init__(self, base: Path, folder: Path, **config) -> None:
        torch.manual_seed(5)
        data = demonstrations(6)
        self.demos = buffer(data, 4, ImageAugmentation(brightness=0.2, hue=0.05))
        teacher = load_octo(base, action_statistics(data["action"]))
        self.loss = OctoDiffusionLoss(teacher).train()
        self.optimizer = torch.optim.AdamW(
            weight_decay_groups(self.loss, 0.01), lr=1e-3
        )
        self.scheduler = LambdaLR(
            self.optimizer, rate_factor("cosine", warmup_steps=2, total_steps=STEPS)
        )
        self.checkpoints = FinetuneCheckpoints(
            folder,
            config={"lr": 1e-3, **config},
            module=self.loss,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            buffer=self.demos,
        )

    def train(self, until: int, *, save_at: int | None = None) -> list[float]:
        done = self.checkpoints.resume()
        losses = []
        for step in range(done + 1, until + 1):
            out = accumulate(self.loss, self.demos.sample(), micro_batch_size=2)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(float(out["loss_diffusion"]))
            if step == save_at:
                self.checkpoints.save(step)
        return losses


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_octo(tmp_path_factory.mktemp("octo") / "base")


class TestResume:
    def test_bit_for_bit(self, base, tmp_path):
        whole = Run(base, tmp_path / "whole")
        want = whole.train(STEPS)
        first = Run(base, tmp_path / "killed")
        # It is killed after the fifth step; the last checkpoint is of the third, in the
        # middle of an epoch of the sampler (batches of 4 of 6 frames).
        before = first.train(5, save_at=3)
        assert before == want[:5]
        torch.rand(7)  # whatever another process has drawn
        second = Run(base, tmp_path / "killed")
        after = second.train(STEPS)
        assert after == want[3:]
        for name, parameter in whole.loss.named_parameters():
            other = dict(second.loss.named_parameters())[name]
            assert torch.equal(parameter, other), name
        assert second.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
        for one, other in zip(
            whole.optimizer.state.values(), second.optimizer.state.values(), strict=True
        ):
            assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])

    def test_other_settings_are_refused(self, base, tmp_path):
        run = Run(base, tmp_path)
        run.checkpoints.save(1)
        with pytest.raises(ValueError, match=r"rank: \(absent\) -> 4"):
            Run(base, tmp_path, rank=4).checkpoints.resume()

    def test_other_parameters_are_refused(self, base, tmp_path):
        run = Run(base, tmp_path)
        run.checkpoints.save(1)
        other = Run(base, tmp_path)
        other.loss.teacher.model.transformer.requires_grad_(False)
        with pytest.raises(Exception, match="other parameters than are trained"):
            other.checkpoints.resume()

    def test_no_pickles(self, base, tmp_path):
        run = Run(base, tmp_path)
        path = run.checkpoints.save(1)
        files = [file for file in path.rglob("*") if file.is_file()]
        for file in files:
            assert file.suffix in (".pt", ".json"), file
            if file.suffix == ".pt":
                torch.load(file, weights_only=True)

    def test_buffers_that_cannot_be_repeated(self, base, tmp_path):
        run = Run(base, tmp_path)
        storage = LazyTensorStorage(4)
        for kwargs in ({"prefetch": 2}, {"generator": torch.Generator()}):
            demos = TensorDictReplayBuffer(storage=storage, batch_size=2, **kwargs)
            with pytest.raises(ValueError, match="cannot be repeated"):
                FinetuneCheckpoints(
                    tmp_path,
                    config={},
                    module=run.loss,
                    optimizer=run.optimizer,
                    scheduler=run.scheduler,
                    buffer=demos,
                )


class TestRates:
    def test_by_hand(self):
        # Warm-up: 0, 1/4, 2/4, 3/4; then (1 + cos(pi x)) / 2 at x = 0, 1/2, 1.
        factor = rate_factor("cosine", warmup_steps=4, total_steps=12)
        found = [factor(step) for step in (0, 1, 2, 3, 4, 8, 12, 20)]
        assert found == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.5, 0, 0])
        factor = rate_factor(total_steps=3)
        assert [factor(step) for step in range(3)] == [1.0, 1.0, 1.0]

    def test_refused(self):
        with pytest.raises(ValueError, match="schedule must be"):
            rate_factor("linear", total_steps=3)
        with pytest.raises(ValueError, match=r"warmup_steps must be in \[0, 3\)"):
            rate_factor(warmup_steps=3, total_steps=3)

    def test_nothing_to_train(self):
        frozen = torch.nn.Linear(2, 2).requires_grad_(False)
        with pytest.raises(ValueError, match="nothing to train"):
            weight_decay_groups(frozen, 0.01)


class TestStatistics:
    def test_of_a_buffer(self):
        data = demonstrations(40)
        found = action_statistics(buffer(data, 4))
        assert found == action_statistics(data["action"])
        actions = data["action"].double().numpy()
        for name, want in (
            ("mean", actions.mean(0)),
            ("std", actions.std(0)),
            ("q01", np.quantile(actions, 0.01, axis=0)),
            ("q99", np.quantile(actions, 0.99, axis=0)),
            ("min", actions.min(0)),
            ("max", actions.max(0)),
        ):
            assert found["action"][name] == pytest.approx(want), name
        assert found["num_transitions"] == 40

    def test_as_the_demonstrations_tell(self):
        data = pytest.importorskip("torchrl_rpd.data._buffer")
        actions = demonstrations(40)["action"]
        found = action_statistics(actions)["action"]
        assert {k: v for k, v in found.items() if k != "mask"} == data.spread(actions)

    def test_refused(self):
        empty = TensorDictReplayBuffer(storage=LazyTensorStorage(4), batch_size=2)
        with pytest.raises(ValueError, match="replay buffer is empty"):
            action_statistics(empty)
        with pytest.raises(ValueError, match="empty"):
            action_statistics(torch.zeros(0, 7))
        with pytest.raises(ValueError, match="NaN"):
            action_statistics(torch.tensor([[1.0, float("nan")]]))
        with pytest.raises(ValueError, match="2 entries for 7"):
            action_statistics(torch.zeros(3, 7), mask=[True, False])
        with pytest.raises(KeyError, match="no actions under 'expert'"):
            action_statistics(buffer(demonstrations(2), 2), action_key="expert")


class TestManiSkillFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        """Two episodes of 5 steps, in ManiSkill's own layout."""
        h5py = pytest.importorskip("h5py")
        numbers = np.random.default_rng(0)
        episodes = []
        with h5py.File(tmp_path / "push.h5", "w") as file:
            for i in range(2):
                group = file.create_group(f"traj_{i}")
                actions = numbers.uniform(-1, 1, (5, 7)).astype(np.float32)
                pixels = numbers.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
                group["actions"] = actions
                group["obs/sensor_data/base_camera/rgb"] = pixels
                group["success"] = np.array([False] * 4 + [True])
                episodes.append(
                    {
                        "episode_id": i,
                        "episode_seed": i,
                        "elapsed_steps": 5,
                        "control_mode": "pd_ee_delta_pose",
                        "success": True,
                    }
                )
        described = {"env_info": {"env_id": "PushCube-v1"}, "episodes": episodes}
        (tmp_path / "push.json").write_text(json.dumps(described))
        return tmp_path

    def test_both_losses_read_them(self, folder, base, tmp_path):
        from torchrl_rpd.data import ManiSkillDemos

        demos = ManiSkillDemos(
            folder,
            state=None,
            chunk_size=4,
            batch_size=4,
            transform=ImageAugmentation(brightness=0.1),
        )
        statistics = demos.statistics()
        sample = demos.sample()
        octo = load_octo(base, statistics)
        assert accumulate(OctoDiffusionLoss(octo), sample)["loss_diffusion"].isfinite()
        openvla = load_openvla(write_tiny_checkpoint(tmp_path / "tiny"), statistics)
        out = OpenVLATokenLoss(openvla)(sample)
        assert out["loss_tokens"].isfinite()
        own = action_statistics(demos)
        assert own["action"] == statistics["action"]
        assert own["num_transitions"] == statistics["num_transitions"] == 10

    @pytest.mark.slow
    def test_example_from_files(self, folder, tmp_path):
        pytest.importorskip("peft")
        tiny = write_tiny_checkpoint(tmp_path / "tiny")
        settings = ["--data", str(folder), "--name", "push", "--checkpoint", str(tiny)]
        settings += ["--steps", "2", "--batch", "3", "--rank", "2", "--augment"]
        run = example("openvla", *settings, "--out", str(tmp_path / "out"))
        text, _ = run.communicate(timeout=600)
        assert run.returncode == 0, text
        assert "10 frames of 2 episodes" in text
        teacher = OpenVLATeacher.from_pretrained(
            tmp_path / "out" / "export", unnorm_key="push"
        )
        assert teacher.action_dim == 7


def augmented(images: torch.Tensor, **kwargs) -> torch.Tensor:
    rows = TensorDict({"observation": {"image": images}}, [len(images)])
    return ImageAugmentation(**kwargs)(rows)["observation", "image"]


class TestAugmentation:
    def test_nothing_asked_for_changes_nothing(self):
        images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
        # (To hue and back is exact but for rounding down to 8 bits.)
        found = augmented(images)
        assert (images.int() - found.int()).abs().max() <= 1

    def test_brightness_and_contrast_by_hand(self):
        images = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
        images[..., 0] = 140
        # brightness: 2 u - 1 with u = 0 is -1 times 0.1: 25.5 less. Contrast 2 to 2:
        # from the mean 110 - 25.5 = 84.5 the columns at 74.5 go to 64.5, those at 114.5
        # to 144.5; rounded down.
        real, torch.rand = torch.rand, lambda *shape: torch.zeros(*shape)
        try:
            found = augmented(images, brightness=0.1, contrast=(2.0, 2.0))
        finally:
            torch.rand = real
        assert found[..., 1:].unique().tolist() == [64]
        assert found[..., 0].unique().tolist() == [144]

    def test_hue_and_saturation_by_hand(self):
        red = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
        red[:, 0] = 200
        real, torch.rand = torch.rand, lambda *shape: torch.ones(*shape)
        try:
            # A third of the circle further is green; half as saturated: the others
            # rise to half of the value.
            found = augmented(red, hue=1 / 3, saturation=(0.5, 0.5))
        finally:
            torch.rand = real
        assert found[0, :, 0, 0].tolist() == pytest.approx([100, 200, 100], abs=1)

    def test_crop_by_hand(self):
        # A ramp along both sides: where a crop begins and ends can be read off.
        ramp = torch.arange(0, 101, dtype=torch.uint8)
        images = torch.zeros(64, 3, 101, 101, dtype=torch.uint8)
        images[:, 0] = ramp
        images[:, 1] = ramp.unsqueeze(1)
        found = augmented(images, crop_scale=(0.81, 0.81)).int()
        # 0.81 of the area is 0.9 of each side: 90 of the 100 steps.
        width = found[:, 0, 50, -1] - found[:, 0, 50, 0]
        height = found[:, 1, -1, 50] - found[:, 1, 0, 50]
        assert ((width - 90).abs() <= 1).all()
        assert ((height - 90).abs() <= 1).all()
        first = found[:, 0, 50, 0]
        assert first.min() <= 2
        assert first.max() >= 8
        # Not on the diagonal alone.
        assert (first - found[:, 1, 0, 50]).abs().max() > 2

    @pytest.mark.parametrize(("preset", "size"), [("openvla", 224), ("octo", 256)])
    def test_presets(self, preset, size):
        images = torch.randint(256, (3, 3, 128, 128), dtype=torch.uint8)
        demos = buffer(demonstrations(4), 2, getattr(ImageAugmentation, preset)())
        sample = demos.sample()["observation", "image"]
        assert sample.shape == (2, 3, size, size)
        assert sample.dtype == torch.uint8
        assert augmented(images[0].unsqueeze(0)).shape == (1, 3, 128, 128)

    def test_rows_differ_and_seeds_repeat(self):
        images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8).expand(
            2, -1, -1, -1
        )
        torch.manual_seed(1)
        found = augmented(images, brightness=0.3)
        assert not torch.equal(found[0], found[1])
        torch.manual_seed(1)
        assert torch.equal(found, augmented(images, brightness=0.3))

    def test_pixels_that_are_scaled_already(self):
        with pytest.raises(TypeError, match="uint8"):
            augmented(torch.rand(1, 3, 8, 8))


def example(*arguments: str, **kwargs) -> subprocess.Popen:
    script = ROOT / "examples" / "finetune_vla.py"
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env=dict(
            os.environ,
            PYTHONPATH=str(ROOT),
            PYTHONUNBUFFERED="1",
            OMP_NUM_THREADS="1",
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["openvla", "octo"])
def test_example_killed_and_started_again(model, tmp_path):
    from safetensors.torch import load_file

    pytest.importorskip("peft")
    settings = [
        model,
        "--tiny",
        "--steps",
        "8",
        "--save-every",
        "2",
        "--log-every",
        "1",
    ]
    settings += ["--rank", "2", "--micro-batch", "2"]
    assert example(*settings, "--out", str(tmp_path / "whole")).wait(600) == 0
    killed = example(*settings, "--out", str(tmp_path / "killed"))
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("3 "):  # of 8 steps; 2 are saved
            killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    assert not (tmp_path / "killed" / "export").exists()
    again = example(*settings, "--out", str(tmp_path / "killed"))
    text, _ = again.communicate(timeout=600)
    assert again.returncode == 0, text
    assert "going on at step" in text
    one, other = (tmp_path / name / "export" for name in ("whole", "killed"))
    if model == "openvla":
        want = load_file(one / "model.safetensors")
        found = load_file(other / "model.safetensors")
        assert all(torch.equal(want[name], found[name]) for name in want)
    else:
        file = Path("8") / "default" / "checkpoint"
        assert (one / file).read_bytes() == (other / file).read_bytes()


if __name__ == "__main__":
    pytest.main([__file__])
