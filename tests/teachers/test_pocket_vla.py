# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The pocket VLA: what it reads, what it writes, its file, and that it can learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.objectives import BCLoss

from torchrl_rpd.envs import TASKS
from torchrl_rpd.teachers import PocketVLATeacher, check_teacher, pocket
from torchrl_rpd.teachers.pocket import POCKET_INSTRUCTIONS, PocketVLA

CHUNK = ("vla_action", "chunk")
PUSH, PULL = POCKET_INSTRUCTIONS["PushCube-v1"], POCKET_INSTRUCTIONS["PullCube-v1"]


def small(**kwargs) -> PocketVLA:
    """A model of a few thousand weights."""
    torch.manual_seed(0)
    return PocketVLA(
        image_size=16, channels=(8, 8, 8), hidden_dim=32, text_dim=8, **kwargs
    )


def pictures(*batch: int, size: int = 16) -> torch.Tensor:
    """Noise, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    shape = (*batch, 3, size, size)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def frames(*texts: str, size: int = 16) -> TensorDict:
    """One row for each text."""
    return TensorDict(
        {
            "observation": {"image": pictures(len(texts), size=size)},
            "language_instruction": NonTensorStack(*texts),
        },
        [len(texts)],
    )


class TestModel:
    def test_rows_are_answered_alone(self):
        model = small().eval()
        together = model(frames("push it", "pull it", "push it"))[CHUNK]
        assert together.shape == (3, 4, 7)
        for i, text in enumerate(["push it", "pull it", "push it"]):
            alone = model.predict(pictures(3)[i : i + 1], [text]).reshape(4, 7)
            torch.testing.assert_close(together[i], alone)

    def test_two_batch_dimensions(self):
        td = TensorDict({"observation": {"image": pictures(2, 3)}}, [2, 3])
        model = small(instruction="push")
        assert model(td)[CHUNK].shape == (2, 3, 4, 7)
        assert model.in_keys == [("observation", "image")]

    def test_the_instruction_matters_and_its_spelling_does_not(self):
        model = small()
        image = pictures(1)
        push = model.predict(image, ["Push the cube!"])
        torch.testing.assert_close(push, model.predict(image, ["push THE  cube"]))
        assert (push - model.predict(image, ["pull the cube"])).abs().max() > 1e-4

    def test_places_by_hand(self):
        # One bright cell of 3 x 3, row 0 and column 2: y = -1, x = 1. A flat map has
        # its mean in the middle. Then how bright they are.
        features = torch.zeros(1, 2, 3, 3)
        features[0, 0, 0, 2] = 100.0
        expected = torch.tensor([[1.0, 0.0, -1.0, 0.0, 100.0, 0.0]])
        torch.testing.assert_close(pocket.model._places(features), expected)

    def test_sees_its_window_alone(self):
        model = small(crop=(0.25, 0.5, 0.5))  # rows 4 to 11, columns 8 to 15
        image = pictures(1)
        seen = model.predict(image, ["push"])
        outside = image.clone()
        outside[..., :4, :] = outside[..., 12:, :] = outside[..., :8] = 0
        assert torch.equal(model.predict(outside, ["push"]), seen)
        for row, column in [(4, 8), (11, 15)]:
            changed = image.clone()
            changed[..., row, column] = 255 - changed[..., row, column]
            assert not torch.equal(model.predict(changed, ["push"]), seen)

    @pytest.mark.parametrize("crop", [(0.5, 0.0, 0.6), (-0.1, 0.0, 0.5), (0, 0, 0.1)])
    def test_a_window_outside(self, crop):
        with pytest.raises(ValueError, match="no part of a picture of 16 pixels"):
            small(crop=crop)

    def test_convolutions_in_bfloat16(self):
        model = small()
        exact = model.predict(pictures(4), ["push"] * 4)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.predict(pictures(4), ["push"] * 4)
        assert rounded.dtype == torch.float32
        assert not torch.equal(rounded, exact)
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0.02)

    def test_other_sizes_are_resized(self):
        model = small(instruction="push")
        # A picture of one colour has that colour in every size.
        grey = torch.full((1, 3, 40, 24), 77, dtype=torch.uint8)
        same = model.predict(
            torch.full((1, 3, 16, 16), 77, dtype=torch.uint8), ["push"]
        )
        torch.testing.assert_close(model.predict(grey, ["push"]), same)

    @pytest.mark.parametrize("text", ["", " ... "])
    def test_no_words(self, text):
        with pytest.raises(ValueError, match="holds no word"):
            small().predict(pictures(1), [text])

    def test_missing_and_wrong_pictures(self):
        model = small(instruction="push")
        with pytest.raises(KeyError, match="reads images from"):
            model(TensorDict({}, [2]))
        scaled = TensorDict({("observation", "image"): pictures(2) / 255}, [2])
        with pytest.raises(TypeError, match="takes uint8"):
            model(scaled)

    def test_learns_by_behaviour_cloning(self):
        # Opposite actions for the same pictures under two instructions: neither the
        # picture nor the instruction alone tells them. By chance: an error of 1.
        model = small()
        td = frames(*[PUSH, PULL] * 8)
        td["observation", "image"] = pictures(8).repeat_interleave(2, 0)
        sign = torch.tensor([1.0, -1.0]).repeat(8)
        sign = sign * torch.tensor([1.0, -1.0]).repeat_interleave(8)
        td[CHUNK] = sign[:, None, None].expand(16, 4, 7).clone()
        td["action_is_pad"] = torch.zeros(16, 4, dtype=torch.bool)
        loss = BCLoss(model, loss_function="l1")
        loss.set_keys(action=CHUNK, pad_mask="action_is_pad")
        adam = torch.optim.Adam(loss.parameters(), lr=1e-2)
        for _ in range(300):
            value = loss(td.clone())["loss_bc"]
            adam.zero_grad()
            value.backward()
            adam.step()
        assert value < 0.1


class TestFile:
    def test_round_trip(self, tmp_path: Path):
        model = small()
        model.save(tmp_path / "own" / "vla.safetensors", episodes=3)
        teacher = PocketVLATeacher(
            instruction="push", path=tmp_path / "own/vla.safetensors"
        )
        assert teacher.metadata == {"episodes": 3}
        expected = model.predict(pictures(2), ["push"] * 2).clamp(-1, 1)
        td = teacher(TensorDict({("observation", "image"): pictures(2)}, [2]))
        assert torch.equal(td[CHUNK].flatten(1), expected)
        assert not td[CHUNK].requires_grad
        assert [file.name for file in (tmp_path / "own").iterdir()] == [
            "vla.safetensors"
        ]

    def test_no_file(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match="train_pocket_vla"):
            PocketVLATeacher("PushCube-v1", path=tmp_path / "none.safetensors")

    def test_another_file(self, tmp_path: Path):
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="holds no pocket VLA"):
            PocketVLATeacher("PushCube-v1", path=tmp_path / "other.safetensors")

    @pytest.mark.parametrize("length", [0, 7, 2000])
    def test_a_broken_file(self, tmp_path: Path, length: int):
        small().save(tmp_path / "vla.safetensors")
        whole = (tmp_path / "vla.safetensors").read_bytes()
        (tmp_path / "vla.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="no safetensors file"):
            PocketVLATeacher("PushCube-v1", path=tmp_path / "vla.safetensors")


class TestShipped:
    def test_one_small_file_for_all_tasks(self):
        file = Path(pocket.__file__).with_name("pocket_vla.safetensors")
        assert file.stat().st_size <= 8e6
        images = pictures(2, size=128)
        answers = []
        for task, words in POCKET_INSTRUCTIONS.items():
            teacher = PocketVLATeacher(task)
            td = teacher(TensorDict({("observation", "image"): images}, [2]))
            assert td[CHUNK].shape == (2, 4, 7)
            assert td[CHUNK].abs().max() <= 1
            assert words in teacher.metadata["instructions"]
            answers.append(td[CHUNK])
        assert not torch.equal(answers[1], answers[2])

    def test_told_what_the_task_table_says(self):
        # Teachers do not import environments: the texts stand in both places.
        table = {task: TASKS[task].instruction for task in POCKET_INSTRUCTIONS}
        assert table == POCKET_INSTRUCTIONS

    def test_another_task(self):
        with pytest.raises(ValueError, match="was not trained on 'PushT-v1'"):
            PocketVLATeacher("PushT-v1")
        assert PocketVLATeacher("PushT-v1", instruction="push").instruction == "push"

    @pytest.mark.maniskill
    @pytest.mark.render
    def test_in_its_environment(self):
        from torchrl_rpd.envs import ManiSkillEnv

        env = ManiSkillEnv(
            "PushCube-v1",
            obs_mode="rgb",
            camera="human",
            image_size=128,
            light_visuals=True,
            reward_mode="sparse",
        )
        report = check_teacher(PocketVLATeacher("PushCube-v1"), env)
        assert report
        env.close()


if __name__ == "__main__":
    pytest.main([__file__])
