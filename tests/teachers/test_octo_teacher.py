# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Octo as a teacher: keys, text, windows, draws, and its place in an env."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.data import Bounded
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.envs.custom.vla import ToyVLAEnv
from torchrl.envs.transforms import Compose

from torchrl_rpd.teachers import TeacherCheckError, check_teacher
from torchrl_rpd.teachers.octo import OctoTeacher, write_random_checkpoint
from torchrl_rpd.teachers.octo._lanczos import lanczos_resize
from torchrl_rpd.teachers.octo._language import load_tokenizer
from torchrl_rpd.transforms import TeacherActionTransform

pytest.importorskip("transformers")

IMAGE = ("observation", "image")
CHUNK = ("vla_action", "chunk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("octo"))


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (4, 3, 256, 256), dtype=torch.uint8, generator=generator)


def build(folder, **kwargs) -> OctoTeacher:
    kwargs.setdefault("instruction", "pick up the cube")
    return OctoTeacher.from_pretrained(folder, **kwargs)


def chunks(teacher, images, **entries) -> torch.Tensor:
    td = TensorDict({IMAGE: images, **entries}, images.shape[:1])
    return teacher(td)[CHUNK]


class TestKeys:
    def test_defaults(self, folder, images):
        teacher = build(folder)
        assert teacher.in_keys == [IMAGE]
        assert teacher.out_keys == [CHUNK]
        assert (teacher.history_window, teacher.history_keys) == (1, [IMAGE])
        chunk = chunks(teacher, images)
        assert (chunk.shape, chunk.dtype) == ((4, 4, 7), torch.float32)
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())

    def test_any_batch_shape(self, folder, images):
        flat = chunks(build(folder), images)
        td = TensorDict({IMAGE: images.view(2, 2, 3, 256, 256)}, [2, 2])
        assert torch.equal(build(folder)(td)[CHUNK].view(4, 4, 7), flat)
        td = TensorDict({IMAGE: images[0]}, [])
        torch.testing.assert_close(build(folder)(td)[CHUNK], flat[0])

    def test_own_keys(self, folder, images):
        teacher = build(
            folder,
            instruction=None,
            num_samples=2,
            image_key=("cameras", "front"),
            wrist_image_key=("cameras", "hand"),
            instruction_key=("task", "text"),
            std_key=("vla_action", "spread"),
        )
        teacher.set_keys(action_chunk=("out", "chunk"))
        td = TensorDict(
            {
                "cameras": {"front": images[:2], "hand": images[:2]},
                "task": {"text": "pull"},
            },
            [2],
        )
        assert teacher.in_keys == [
            ("cameras", "front"),
            ("cameras", "hand"),
            ("task", "text"),
        ]
        out = teacher(td)
        assert out["out", "chunk"].shape == (2, 4, 7)

    def test_wrist_camera_is_seen(self, folder, images):
        wrist = ("observation", "wrist_image")
        teacher = build(folder, wrist_image_key=wrist)
        actions = []
        for hand in (images, images.flip(0)):
            teacher.manual_seed(0)
            td = TensorDict({IMAGE: images, wrist: hand}, [4])
            actions.append(teacher(td)[CHUNK])
        assert (actions[0] - actions[1]).abs().max() > 1e-3

    @pytest.mark.parametrize(
        ("entries", "error", "message"),
        [
            ({"observation": {}}, KeyError, "reads images from"),
            (
                {"observation": {"image": torch.zeros(2, 3, 8, 8)}},
                TypeError,
                "uint8.*float32",
            ),
            (
                {"observation": {"image": torch.zeros(2, 8, 8, 3).byte()}},
                ValueError,
                r"shape \[2, 8, 8, 3\]",
            ),
        ],
        ids=["missing", "float", "channels last"],
    )
    def test_bad_images(self, folder, entries, error, message):
        with pytest.raises(error, match=message):
            build(folder)(TensorDict(entries, [2]))


class TestText:
    def test_each_distinct_text_is_read_once(self, folder, images):
        teacher = build(folder, instruction=None)
        read = []
        encode = teacher.model.encode_text
        teacher.model.encode_text = lambda ids, mask: (
            read.append(len(ids)) or encode(ids, mask)
        )
        texts = ["push", "pull", "push", "lift"]
        chunks(teacher, images, language_instruction=NonTensorStack(*texts))
        chunks(teacher, images, language_instruction=NonTensorStack(*texts[::-1]))
        assert read == [3]
        chunks(
            teacher, images, language_instruction=NonTensorStack(*["pull", "open"] * 2)
        )
        assert read == [3, 1]

    def test_fixed_text_is_read_at_the_start(self, folder, images):
        teacher = build(folder)
        teacher.model.encode_text = None
        assert chunks(teacher, images).isfinite().all()

    def test_rows_get_their_own(self, folder, images):
        texts = ["push", "pull", "push", "lift the peg upright"]
        mixed = chunks(
            build(folder, instruction=None),
            images,
            language_instruction=NonTensorStack(*texts),
        )
        for row, text in enumerate(texts):
            alone = chunks(build(folder, instruction=text), images)[row]
            torch.testing.assert_close(mixed[row], alone, rtol=0, atol=1e-5)
        assert (
            chunks(build(folder, instruction="push"), images)[1] - mixed[1]
        ).abs().max() > 1e-3

    def test_missing_instruction(self, folder, images):
        with pytest.raises(KeyError, match="language_instruction"):
            chunks(build(folder, instruction=None), images)

    def test_missing_tokenizer_shows_at_the_start(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        write_random_checkpoint(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
        teacher = OctoTeacher.from_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match="tokenizer of t5-base"):
            teacher._texts(["push"])
        with pytest.raises(FileNotFoundError, match="tokenizer="):
            OctoTeacher.from_pretrained(
                tmp_path, instruction="push", local_files_only=True
            )

    def test_padding_and_truncation(self, folder):
        ids, mask = load_tokenizer(folder, 6)(["ab", "abcdefgh"])
        # One token a character, a leading word mark, and </s> (1) at the end; <pad> is 0.
        mark, a = 3, 4
        assert ids.tolist() == [
            [mark, a, a + 1, 1, 0, 0],
            [mark, a, a + 1, a + 2, a + 3, 1],
        ]
        assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]

    def test_other_tokenizers_are_refused(self, folder, tmp_path):
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["post_processor"] = None
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(ValueError, match="no T5 tokenizer"):
            load_tokenizer(tmp_path, 16)


class TestDraws:
    def test_seeded(self, folder, images):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        first, again = (chunks(build(folder, seed=5), images) for _ in range(2))
        other = chunks(build(folder, seed=6), images)
        assert torch.equal(first, again)
        assert (first - other).abs().max() > 1e-3
        assert torch.equal(torch.get_rng_state(), before)

    def test_each_call_draws_anew(self, folder, images):
        teacher = build(folder)
        assert (chunks(teacher, images) - chunks(teacher, images)).abs().max() > 1e-3

    def test_state_of_the_generator(self, folder, images):
        teacher = build(folder)
        chunks(teacher, images)
        state = teacher.get_rng_state()
        want = chunks(teacher, images)
        resumed = build(folder, seed=99)
        resumed.set_rng_state(state)
        assert torch.equal(chunks(resumed, images), want)

    @pytest.mark.parametrize("num_samples", [1, 3])
    def test_splitting_a_batch_changes_nothing(self, folder, images, num_samples):
        whole = chunks(build(folder, num_samples=num_samples), images)
        teacher = build(folder, num_samples=num_samples)
        parts = [chunks(teacher, part) for part in images.split([1, 3])]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)

    def test_mean_and_spread(self, folder, images):
        e = {
            "input_ids": torch.ones(4, 16, dtype=torch.int64),
            "attention_mask": torch.ones(4, 16, dtype=torch.int64),
            "timestep_pad_mask": torch.ones(4, 1, dtype=torch.bool),
        }
        teacher = build(folder, num_samples=5)
        draws = teacher.sample_chunk(images.movedim(1, -1).unsqueeze(1), **e)
        assert draws.shape == (5, 4, 4, 7)
        text = teacher.model.encode_text(e["input_ids"], e["attention_mask"])
        teacher._texts = lambda texts: (text, torch.arange(4))
        teacher.manual_seed(0)
        td = teacher(TensorDict({IMAGE: images}, [4]))
        torch.testing.assert_close(td[CHUNK], draws.mean(0), rtol=0, atol=1e-5)
        # Population standard deviation of the first action, as the released code's.
        first = draws[:, :, 0].double()
        variance = (first - first.mean(0)).square().sum(0) / 5
        torch.testing.assert_close(
            td["teacher_std"].double(), variance.sqrt(), rtol=0, atol=1e-5
        )
        assert (td["teacher_std"] > 1e-3).all()

    def test_given_noise_decides(self, folder, images):
        teacher = build(folder)
        e = (
            images[:, None].movedim(2, -1),
            torch.ones(4, 16, dtype=torch.int64),
            torch.ones(4, 16, dtype=torch.int64),
            torch.ones(4, 1, dtype=torch.bool),
        )
        start, steps = torch.randn(4, 1, 28), torch.randn(20, 4, 1, 28)
        state = teacher.get_rng_state()
        first = teacher.sample_chunk(*e, start, steps)
        assert torch.equal(teacher.get_rng_state(), state)
        # The noise of the last step is not used, that of the one before is.
        unused, used = steps.clone(), steps.clone()
        unused[19] += 1
        used[18] += 1
        assert torch.equal(teacher.sample_chunk(*e, start, unused), first)
        assert not torch.equal(teacher.sample_chunk(*e, start, used), first)
        # Half given: the rest is drawn.
        assert teacher.sample_chunk(*e, initial_noise=start).shape == (4, 4, 7)
        several = teacher.sample_chunk(*e, step_noise=torch.randn(20, 2, 4, 1, 28))
        assert several.shape == (2, 4, 4, 7)

    def test_num_samples_is_checked(self, folder):
        with pytest.raises(ValueError, match="num_samples"):
            build(folder, num_samples=0)


class TestWindow:
    def test_range(self, folder):
        for window in (0, 3):
            with pytest.raises(ValueError, match=r"in \[1, 2\]"):
                build(folder, window_size=window)

    def test_shapes(self, folder, images):
        teacher = build(folder, window_size=2)
        windows = images.view(2, 2, 3, 256, 256)
        mask = torch.tensor([[True, True], [False, True]])
        chunk = chunks(teacher, windows, timestep_pad_mask=mask)
        assert chunk.shape == (2, 4, 7)
        with pytest.raises(KeyError, match="timestep_pad_mask"):
            chunks(teacher, windows)
        with pytest.raises(ValueError, match=r"expected \[2, 2, 3, 'H', 'W'\]"):
            chunks(teacher, images[:2], timestep_pad_mask=mask)
        with pytest.raises(ValueError, match=r"expected \[1, 2, 3, 'H', 'W'\]"):
            chunks(teacher, images[None], timestep_pad_mask=mask[:1])

    def test_padded_step_is_not_looked_at(self, folder, images):
        windows = images.view(2, 2, 3, 256, 256)
        changed = windows.clone()
        changed[:, 0] = 0
        for real in (False, True):
            mask = torch.tensor([[real, True]]).expand(2, 2)
            a, b = (
                chunks(build(folder, window_size=2), shown, timestep_pad_mask=mask)
                for shown in (windows, changed)
            )
            assert torch.allclose(a, b, atol=1e-5) is not real


class TestGripper:
    def test_map(self, folder, images):
        raw = chunks(build(folder), images)
        with pytest.warns(UserWarning, match=r"gripper in \[-1, 1\]"):
            teacher = build(folder, gripper="01_to_pm1")
        mapped = chunks(teacher, images)
        assert torch.equal(mapped[..., :6], raw[..., :6])
        torch.testing.assert_close(mapped[..., 6], 2 * raw[..., 6] - 1)

    def test_warning(self, tmp_path):
        write_random_checkpoint(tmp_path)
        file = tmp_path / "dataset_statistics.json"
        statistics = json.loads(file.read_text())
        statistics["action"]["min"][6] = 0.0
        file.write_text(json.dumps(statistics))
        with pytest.warns(UserWarning, match=r"gripper in \[0, 1\]"):
            build(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build(tmp_path, gripper="01_to_pm1")

    def test_unknown(self, folder):
        with pytest.raises(ValueError, match="gripper must be"):
            build(folder, gripper="open")


class TestResize:
    @pytest.mark.parametrize("shape", [(256, 256), (128, 128), (200, 312), (480, 640)])
    def test_against_pillow_in_floating_point(self, shape):
        # Pillow has the same filter; in mode "F" it does not round in between.
        image = pytest.importorskip("PIL.Image")
        generator = torch.Generator().manual_seed(2)
        noise = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        got = lanczos_resize(noise.expand(1, 3, *shape), 256)
        assert (got.shape, got.dtype) == ((1, 3, 256, 256), torch.uint8)
        picture = image.fromarray(noise.numpy().astype(np.float32))
        want = np.asarray(picture.resize((256, 256), image.Resampling.LANCZOS))
        want = np.clip(want, 0, 255)
        error = np.abs(got[0, 0].numpy().astype(np.float32) - want).max()
        # Only the rounding to whole levels lies between them.
        assert error <= 0.5 + 1e-3

    def test_right_size_is_left_alone(self):
        images = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
        assert lanczos_resize(images, 256) is images

    def test_teacher_takes_any_size(self, folder, images):
        small = images[..., ::2, ::4].contiguous()
        assert chunks(build(folder), small).shape == (4, 4, 7)


class TestCheckTeacher:
    """The stand-in passes what a real teacher must pass."""

    @pytest.mark.parametrize(
        "kwargs", [{}, {"num_samples": 3}, {"window_size": 2}], ids=str
    )
    def test_passes(self, folder, images, kwargs):
        report = check_teacher(
            build(folder, **kwargs),
            TensorDict({IMAGE: images}, [4]),
            action_spec=Bounded(-1.0, 1.0, (7,)),
        )
        assert "passed" in str(report)

    def test_frozen_actions_fail(self, folder, images):
        teacher = build(folder)
        teacher.model.head.output.weight.data.zero_()
        teacher._noise = lambda count, shape, like: torch.ones(
            count, *shape, like.shape[0], 28
        )
        with pytest.raises(TeacherCheckError, match="constant"):
            check_teacher(teacher, TensorDict({IMAGE: images}, [4]))


class TestInEnv:
    INSTRUCTION = "push the T-shaped block"

    def env(self, teacher, steps=3, **kwargs):
        base = ToyVLAEnv(7, 7, (3, 16, 16), self.INSTRUCTION, batch_size=[2])
        transform = TeacherActionTransform(teacher, **kwargs)
        return TransformedEnv(base, Compose(StepCounter(steps), transform))

    def test_one_query_per_frame(self, folder):
        teacher = build(folder, instruction=None, num_samples=2)
        env = self.env(teacher, teacher_std_key="teacher_std", max_batch_size=1)
        env.set_seed(0)
        rollout = env.rollout(5, break_when_any_done=False, auto_cast_to_device=True)
        assert rollout["teacher_action"].shape == (2, 5, 7)
        assert rollout["teacher_mask"].all()
        assert (rollout["teacher_std"] > 0).all()
        stats = env.transform[-1].stats()
        assert stats["queries"] == 2 * 5 + 2
        assert not any("model" in key for key in env.state_dict())

    def test_window_follows_each_env(self, folder):
        teacher = build(folder, window_size=2)
        seen = []
        forward = teacher.forward
        teacher.forward = lambda td: seen.append(td.clone()) or forward(td)
        env = self.env(teacher, steps=2)
        env.set_seed(0)
        env.rollout(4, break_when_any_done=False)
        # reset, step, reset (the terminal observation is not asked about), step
        masks = [td["timestep_pad_mask"][:, 0].tolist() for td in seen]
        assert masks == [[False] * 2, [True] * 2] * 2
        first, second = seen[0][IMAGE], seen[1][IMAGE]
        assert torch.equal(first[:, 0], first[:, 1])
        assert torch.equal(second[:, 0], first[:, 1])
        assert not torch.equal(second[:, 0], second[:, 1])


if __name__ == "__main__":
    pytest.main([__file__])
