# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLATeacher as a module on tensordicts: keys, batches, conventions, memory."""

from __future__ import annotations

import warnings

import openvla_tiny as tiny
import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torchrl.modules.vla import VLAWrapperBase

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from torchrl_rpd.teachers.openvla import OpenVLATeacher
from torchrl_rpd.teachers.openvla._cache import StaticKVCache
from torchrl_rpd.teachers.openvla._graphs import GraphedDecode
from torchrl_rpd.transforms import TeacherActionTransform

TASK = tiny.INSTRUCTIONS[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("openvla"))


@pytest.fixture(scope="module")
def teacher(folder):
    return tiny.load(folder, instruction=TASK)


def frames(rows: int = 6, **entries: object) -> TensorDict:
    images = tiny.images()[:rows]
    return TensorDict({"observation": {"image": images}, **entries}, [rows])


def expected_actions() -> torch.Tensor:
    return tiny.expected()["actions_first_instruction"].float()


class TestKeys:
    def test_is_a_vla_wrapper(self, teacher, folder):
        assert isinstance(teacher, VLAWrapperBase)
        assert teacher.in_keys == [("observation", "image")]
        assert teacher.out_keys == [("vla_action", "chunk")]
        asked = tiny.load(folder, spread=True)
        assert asked.in_keys == [("observation", "image"), "language_instruction"]
        names = ("chunk", "mean", "std")
        assert asked.out_keys == [("vla_action", name) for name in names]

    def test_writes_chunks_of_one_action(self, teacher):
        td = frames()
        out = teacher(td)
        assert out is td
        chunk = out["vla_action", "chunk"]
        assert chunk.shape == (6, 1, 7)
        assert chunk.dtype == torch.float32
        assert not chunk.requires_grad
        torch.testing.assert_close(chunk[:, 0], expected_actions(), rtol=0, atol=1e-6)

    def test_other_keys(self, folder):
        teacher = tiny.load(
            folder,
            image_key=("camera", "rgb"),
            instruction_key=("task", "text"),
            action_chunk_key="plan",
        )
        td = TensorDict(
            {
                "camera": {"rgb": tiny.images()},
                "task": {"text": NonTensorStack(*tiny.INSTRUCTIONS)},
            },
            [6],
        )
        assert teacher.in_keys == [("camera", "rgb"), ("task", "text")]
        expected = tiny.expected()["actions"].float()
        torch.testing.assert_close(
            teacher(td)["plan"][:, 0], expected, rtol=0, atol=1e-6
        )

    def test_set_keys(self, folder):
        teacher = tiny.load(folder, instruction=TASK)
        teacher.set_keys(image=("observation", "wrist_image"))
        assert teacher.in_keys == [("observation", "wrist_image")]

    @pytest.mark.parametrize("batch", [(), (2, 3), (1, 6, 1)])
    def test_batch_dimensions(self, teacher, batch):
        rows = max(torch.Size(batch).numel(), 1)
        images = tiny.images()[:rows].reshape(*batch, 3, 256, 256)
        out = teacher(TensorDict({"observation": {"image": images}}, batch))
        chunk = out["vla_action", "chunk"]
        assert chunk.shape == (*batch, 1, 7)
        expected = expected_actions()[:rows]
        torch.testing.assert_close(chunk.reshape(-1, 7), expected, rtol=0, atol=1e-6)

    def test_no_rows(self, teacher):
        assert teacher(frames(0))["vla_action", "chunk"].shape == (0, 1, 7)

    def test_instructions_of_several_batch_dimensions(self, folder):
        texts = [NonTensorStack(*tiny.INSTRUCTIONS[i : i + 3]) for i in (0, 3)]
        td = TensorDict(
            {
                "observation": {"image": tiny.images().reshape(2, 3, 3, 256, 256)},
                "language_instruction": NonTensorStack(*texts),
            },
            [2, 3],
        )
        out = tiny.load(folder)(td)["vla_action", "chunk"].reshape(6, 7)
        expected = tiny.expected()["actions"].float()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


class TestBadInput:
    def test_no_image(self, teacher):
        td = TensorDict({"observation": {"state": torch.ones(2, 3)}}, [2])
        with pytest.raises(KeyError, match="image_key="):
            teacher(td)

    def test_no_instruction(self, folder):
        with pytest.raises(KeyError, match="language_instruction"):
            tiny.load(folder)(frames())

    def test_float_images(self, teacher):
        td = TensorDict({"observation": {"image": torch.ones(2, 3, 8, 8)}}, [2])
        with pytest.raises(TypeError, match=r"uint8.*float32"):
            teacher(td)

    @pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 4, 8, 8), (2, 2, 3, 8, 8)])
    def test_shape(self, teacher, shape):
        image = torch.zeros(shape, dtype=torch.uint8)
        with pytest.raises(ValueError, match="channels first"):
            teacher(TensorDict({"observation": {"image": image}}, [2]))

    def test_long_instruction(self, folder):
        teacher = tiny.load(folder, instruction="push the cube " * 500)
        with pytest.raises(ValueError, match="too long"):
            teacher(frames(1))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"readout": "sample"}, "'greedy' or 'mean'"),
            ({"gripper": "pm1"}, "01_to_pm1"),
            ({"max_batch_size": 0}, "at least 1"),
            ({"min_std": -1.0}, "at least 0"),
        ],
    )
    def test_options(self, folder, options, words):
        with pytest.raises(ValueError, match=words):
            tiny.load(folder, **options)


class TestGripper:
    """The recorded statistics have the gripper in [0, 1]."""

    def test_warns_where_statistics_and_action_space_disagree(self, folder):
        with pytest.warns(UserWarning, match=r"gripper in \[0, 1\].*01_to_pm1"):
            OpenVLATeacher.from_pretrained(folder)

    def test_silent_where_they_agree(self, folder, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            OpenVLATeacher.from_pretrained(folder, gripper="01_to_pm1")

    def test_warns_of_a_map_that_does_not_fit(self, tmp_path):
        folder = tiny.write_checkpoint(tmp_path)
        action = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
        file = folder / "dataset_statistics.json"
        file.unlink()
        file.write_text("{}")
        tiny.edit(file, mine={"action": action})
        with pytest.warns(UserWarning, match=r"not in \[0, 1\]"):
            OpenVLATeacher.from_pretrained(folder, gripper="01_to_pm1")

    def test_maps_only_the_gripper(self, folder):
        options = {"instruction": TASK, "spread": True}
        raw = tiny.load(folder, **options)(frames())["vla_action"]
        mapped = tiny.load(folder, gripper="01_to_pm1", **options)(frames())
        mapped = mapped["vla_action"]
        for name in ("chunk", "mean", "std"):
            assert torch.equal(mapped[name][..., :6], raw[name][..., :6])
        torch.testing.assert_close(
            mapped["chunk"][..., 6], 2 * raw["chunk"][..., 6] - 1
        )
        torch.testing.assert_close(mapped["mean"][..., 6], 2 * raw["mean"][..., 6] - 1)
        torch.testing.assert_close(mapped["std"][..., 6], 2 * raw["std"][..., 6])


class TestMemory:
    def test_max_batch_size(self, folder):
        teacher = tiny.load(folder, max_batch_size=4)
        seen = []
        prefill = teacher._prefill

        def counted(patches, prompts, **kwargs):
            seen.append(patches.shape[0])
            return prefill(patches, prompts, **kwargs)

        teacher._prefill = counted
        td = frames(language_instruction=NonTensorStack(*tiny.INSTRUCTIONS))
        out = teacher(td)["vla_action", "chunk"][:, 0]
        assert seen == [4, 2]
        expected = tiny.expected()["actions"].float()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)

    def test_cache_is_allocated_once(self, folder):
        teacher = tiny.load(folder, instruction=TASK)
        cache = teacher.model.cache
        teacher(frames(4))
        place = cache._memory.data_ptr()
        for rows in (4, 1, 3, 4):
            teacher(frames(rows))
        assert cache.allocations == 1
        assert cache._memory.data_ptr() == place
        teacher(frames(6))
        assert cache.allocations == 2  # a larger batch needs more
        out = teacher(frames(6))["vla_action", "chunk"][:, 0]
        assert cache.allocations == 2
        torch.testing.assert_close(out, expected_actions(), rtol=0, atol=1e-6)

    def test_what_an_earlier_batch_left_has_no_effect(self, teacher):
        first = teacher(frames(6))["vla_action", "chunk"]
        teacher.model.cache._memory.fill_(float("nan"))
        assert torch.equal(teacher(frames(6))["vla_action", "chunk"], first)

    def test_longer_prompts_and_other_dtypes_need_another(self):
        cache = StaticKVCache(num_layers=2, num_heads=1, head_dim=4)
        like = torch.zeros(())
        cache.start(2, 30, like)
        cache.start(1, 32, like)  # rounded up to 32 columns
        assert cache.allocations == 1
        cache.start(1, 33, like)
        assert cache.allocations == 2
        assert cache._memory.shape == (2, 2, 2, 1, 64, 4)  # rows stay
        cache.start(1, 33, like.bfloat16())
        assert cache.allocations == 3
        cache.release()
        cache.start(1, 1, like)
        assert cache.allocations == 4

    @pytest.mark.parametrize(
        ("rows", "limit", "words"),
        [
            (6, None, r"6 images.*max_batch_size=3"),
            (6, 2, r"2 images.*max_batch_size=1"),
            (1, None, "not even one image"),
        ],
    )
    def test_out_of_memory_says_what_to_try(self, folder, rows, limit, words):
        teacher = tiny.load(folder, instruction=TASK, max_batch_size=limit)
        teacher(frames(1))

        def full(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        teacher._prefill = full
        with pytest.raises(torch.OutOfMemoryError, match=words):
            teacher(frames(rows))
        assert teacher.model.cache._memory is None  # given back for the next try

    def test_mixtures_of_prompts_are_forgotten(self, teacher):
        prompts = teacher._prompts
        for i in range(200):
            prompts.batch(["push", f"push {i}"], torch.device("cpu"))
        assert len(prompts._batches) <= 64


class TestGraphs:
    """Bookkeeping only; capturing needs a CUDA device (test_openvla_parity)."""

    def test_forgets_graphs_of_memory_that_is_gone(self, folder, monkeypatch):
        teacher = tiny.load(folder, instruction=TASK)
        graphed = GraphedDecode(teacher.model)
        captures = []

        class Graph:
            def replay(self):
                pass

        def capture(state, num_tokens):
            from torchrl_rpd.teachers.openvla import _graphs

            captures.append(state.logits.shape[0])
            decoded = teacher.model.decode(state, num_tokens=num_tokens)
            return _graphs._Captured(Graph(), state, decoded)

        monkeypatch.setattr(graphed, "_capture", capture)
        teacher._decode = graphed
        for rows in (2, 2, 1, 1, 2):
            teacher(frames(rows))
        assert captures == [2, 1]
        teacher(frames(4))  # more memory
        teacher(frames(2))
        assert captures == [2, 1, 4, 2]


class TestInTheTransform:
    def test_labels_frames(self, teacher):
        transform = TeacherActionTransform(teacher, low=-1.0, high=1.0)
        out = transform(frames())
        torch.testing.assert_close(
            out["teacher_action"], expected_actions(), rtol=0, atol=1e-6
        )
        assert out["teacher_mask"].all()
        assert transform.stats()["calls"] == 1

    def test_spread_becomes_teacher_std(self, folder):
        teacher = tiny.load(folder, instruction=TASK, spread=True)
        transform = TeacherActionTransform(teacher, teacher_std_key="teacher_std")
        out = transform(frames())
        assert torch.equal(
            out["teacher_std"], teacher(frames())["vla_action", "std"].squeeze(1)
        )
        assert (out["teacher_std"] > 0).all()

    def test_global_generator_is_left_alone(self, folder):
        before = torch.get_rng_state()
        tiny.load(folder, instruction=TASK)(frames(2))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_teacher_and_simulator_on_different_devices(folder):
    """*Not run where there is no CUDA device.*"""
    teacher = tiny.load(folder, instruction=TASK, device="cuda", spread=True)
    out = teacher(frames())
    for value in out["vla_action"].values():
        assert value.device.type == "cpu"
    torch.testing.assert_close(
        out["vla_action", "chunk"][:, 0], expected_actions(), rtol=0, atol=1e-6
    )


if __name__ == "__main__":
    pytest.main([__file__])
