# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""LeRobotTeacher on a stand-in for lerobot (see lerobot_standin.py)."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import lerobot_standin as standin
import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from torchrl_rpd.teachers import check_teacher
from torchrl_rpd.teachers.lerobot import LeRobotTeacher
from torchrl_rpd.transforms import TeacherActionTransform

IMAGE, WRIST = ("observation", "image"), ("observation", "wrist_image")
STATE, CHUNK = ("observation", "state"), ("vla_action", "chunk")


@pytest.fixture(autouse=True)
def lerobot(monkeypatch):
    standin.install(monkeypatch)


def frames(*levels, batch=None, wrist=None, size=8):
    """Grey images of these levels, states (i, 2 i), instructions of i + 1 words."""
    count = len(levels)
    level = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None]
    index = torch.arange(count, dtype=torch.float32)
    entries = {
        IMAGE: level.expand(count, 3, size, size),
        STATE: torch.stack([index, 2 * index], 1),
        "language_instruction": NonTensorStack(
            *(" ".join(["push"] * (i + 1)) for i in range(count))
        ),
    }
    if wrist is not None:
        entries[WRIST] = torch.full((count, 3, size, size), wrist, dtype=torch.uint8)
    td = TensorDict(entries, [count])
    return td if batch is None else td.reshape(batch)


def load(folder, type="act", *, instruction="", **kwargs):
    own = {"cameras", "seed", "device", "state_key", "instruction_key", "revision"}
    options = {name: kwargs.pop(name) for name in own & set(kwargs)}
    if "views" in kwargs:
        kwargs["cameras"] = kwargs.pop("views")
    standin.save(folder, type, **kwargs)
    return LeRobotTeacher.from_pretrained(folder, instruction=instruction, **options)


class TestNumbers:
    def test_worked_by_hand(self, tmp_path):
        teacher = load(tmp_path, gain=10.0)
        td = teacher(frames(51, 255))
        # Row 0: grey 51/255 = 0.2, times the gain 10 -> 2. State (0, 0) normalised by
        # mean (0, 1), std (1, 0.5): (0, -2), sum -2. Together 0, 1, 2 over the chunk.
        # Row 1: 255/255 times 10 = 10; state (1, 2) -> (1, 2), sum 3: 13, 14, 15.
        raw = torch.tensor([[0.0, 1.0, 2.0], [13.0, 14.0, 15.0]])
        # Un-normalised: times std 2 plus mean 0.5; times std 4 plus mean -1.
        expected = torch.stack([2 * raw + 0.5, 4 * raw - 1], -1)
        torch.testing.assert_close(td[CHUNK], expected, rtol=0, atol=1e-5)
        assert td[CHUNK].dtype == torch.float32

    def test_relative_actions_are_made_absolute(self, tmp_path):
        plain = load(tmp_path / "a", gain=10.0)(frames(51, 255))[CHUNK]
        teacher = load(tmp_path / "b", gain=10.0, relative=True)
        # every step of the chunk is relative to the state of the frame: row 1 at (1, 2)
        moved = teacher(frames(51, 255))[CHUNK] - plain
        expected = torch.tensor([[0.0, 0.0], [1.0, 2.0]])[:, None].expand(-1, 3, -1)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)

    def test_what_the_policy_sees(self, tmp_path):
        cameras = {"observation.images.top": IMAGE, "observation.images.wrist": WRIST}
        teacher = load(tmp_path, views=("top", "wrist"), cameras=cameras)
        td = frames(0, 102, wrist=255)
        td[IMAGE] = td[IMAGE].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        teacher(td)
        (batch,) = teacher.policy.asked
        top = batch["observation.images.top"]
        assert top.dtype == torch.float32 and top.shape == (2, 3, 8, 8)
        assert top.is_contiguous()  # whatever the memory of the given images is
        assert top[0].eq(0).all() and top[1].eq(102 / 255).all()
        assert batch["observation.images.wrist"].eq(1).all()
        assert batch["task"] == ["", ""]

    @pytest.mark.parametrize("batch", [(), (2,), (2, 1), (1, 2)])
    def test_any_batch(self, tmp_path, batch):
        teacher = load(tmp_path)
        td = frames(51, 255)
        flat = teacher(td.copy())[CHUNK]
        if batch == ():
            row = td[0]
            assert teacher(row)[CHUNK].equal(flat[0])
        else:
            assert teacher(td.reshape(batch))[CHUNK].equal(flat.reshape(*batch, 3, 2))

    def test_input_is_left_alone(self, tmp_path):
        # the policy flips a state in place, which must not reach the environment's
        teacher = load(tmp_path, "smolvla", instruction=None)
        td = frames(51, 255)
        before = td.clone()
        teacher.preprocessor.steps.pop("normalizer_processor")
        teacher(td)
        assert teacher.policy.asked[0]["observation.state"][1, 0] == -1
        assert (td.select(IMAGE, STATE) == before.select(IMAGE, STATE)).all()

    def test_frozen(self, tmp_path):
        teacher = load(tmp_path)
        assert not teacher.training
        assert not teacher(frames(3))[CHUNK].requires_grad


class TestKeys:
    def test_defaults(self, tmp_path):
        teacher = load(tmp_path, instruction=None)
        assert teacher.in_keys == [IMAGE, STATE, "language_instruction"]
        assert teacher.out_keys == [CHUNK]
        assert (teacher.chunk_size, teacher.action_dim) == (3, 2)

    def test_own_keys(self, tmp_path):
        teacher = load(
            tmp_path,
            "smolvla",
            instruction=None,
            cameras={"observation.images.top": ("eyes", "left")},
            state_key="joints",
            instruction_key=("told", "text"),
        )
        assert teacher.in_keys == [("eyes", "left"), "joints", ("told", "text")]
        td = frames(0, 9)
        renamed = TensorDict(
            {
                ("eyes", "left"): td[IMAGE],
                "joints": td[STATE],
                ("told", "text"): td.get("language_instruction"),
            },
            [2],
        )
        assert teacher(renamed)[CHUNK].shape == (2, 3, 2)
        assert teacher.policy.asked[0]["task"] == ["push", "push push"]

    def test_policy_without_a_state(self, tmp_path):
        visual = {"type": "VISUAL", "shape": [3, 8, 8]}
        teacher = load(
            tmp_path, "smolvla", input_features={"observation.images.top": visual}
        )
        assert teacher.in_keys == [IMAGE]
        batch = teacher._to_lerobot_batch(frames(3))
        assert set(batch) == {"observation.images.top", "task"}

    def test_cameras_that_the_policy_fills_in(self, tmp_path):
        teacher = load(tmp_path, "smolvla", views=("top", "empty_camera_0"))
        assert teacher.in_keys == [IMAGE, STATE]
        teacher(frames(3))
        assert "observation.images.empty_camera_0" not in teacher.policy.asked[0]

    def test_several_cameras_are_not_guessed(self, tmp_path):
        with pytest.raises(ValueError, match=r"\['observation.images.top', .*wrist"):
            load(tmp_path, views=("top", "wrist"))

    def test_unknown_camera(self, tmp_path):
        cameras = {"observation.images.top": IMAGE, "front": WRIST}
        with pytest.raises(ValueError, match=r"does not know \['front'\]"):
            load(tmp_path, cameras=cameras)

    def test_camera_left_out(self, tmp_path):
        # the policy's own affair: this one has a place for it ...
        cameras = {"observation.images.wrist": IMAGE}
        views = ("top", "wrist")
        teacher = load(tmp_path / "a", "smolvla", views=views, cameras=cameras)
        assert teacher(frames(3))[CHUNK].isfinite().all()
        # ... and this one does not
        teacher = load(tmp_path / "b", "act", views=views, cameras=cameras)
        with pytest.raises(KeyError, match=r"observation\.images\.top"):
            teacher(frames(3))


class TestText:
    def test_instruction_of_each_row(self, tmp_path):
        teacher = load(tmp_path, "smolvla", instruction=None)
        levels = teacher(frames(0, 0, 0))[CHUNK]
        state = teacher.get_rng_state()
        teacher.manual_seed(0)
        same = load(tmp_path, "smolvla", instruction="push")(frames(0, 0, 0))[CHUNK]
        # same draws; one word more in each row is one more, times std (2, 4)
        extra = torch.arange(3.0)[:, None, None] * torch.tensor([2.0, 4.0])
        expected = extra.expand(3, 3, 2)
        torch.testing.assert_close(levels - same, expected, rtol=0, atol=1e-5)
        assert not state.equal(teacher.get_rng_state())

    def test_missing_instruction(self, tmp_path):
        teacher = load(tmp_path, instruction=None)
        with pytest.raises(KeyError, match="language_instruction"):
            teacher(frames(3).exclude("language_instruction"))


class TestDraws:
    def test_own_generator(self, tmp_path):
        teacher = load(tmp_path, "smolvla", seed=5)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = teacher(frames(3, 4))[CHUNK]
        # torch's own generator is not moved ...
        assert torch.get_rng_state().equal(before)
        # ... nor read
        torch.manual_seed(2)
        again = load(tmp_path, "smolvla", seed=5)
        assert again(frames(3, 4))[CHUNK].equal(first)
        assert not again(frames(3, 4))[CHUNK].equal(first)
        other = load(tmp_path, "smolvla", seed=6)
        assert not other(frames(3, 4))[CHUNK].equal(first)

    def test_rewind(self, tmp_path):
        teacher = load(tmp_path, "smolvla")
        teacher(frames(3))
        state = teacher.get_rng_state()
        second, third = (teacher(frames(3))[CHUNK] for _ in range(2))
        teacher.set_rng_state(state)
        assert teacher(frames(3))[CHUNK].equal(second)
        assert teacher(frames(3))[CHUNK].equal(third)
        teacher.manual_seed(0)
        teacher(frames(3))
        assert teacher(frames(3))[CHUNK].equal(second)


class TestLoading:
    def test_the_device_of_training_is_overridden(self, tmp_path):
        # as saved, the preprocessor moves everything to cuda:7
        teacher = load(tmp_path)
        assert teacher.preprocessor.steps["device_processor"]["device"] == "cpu"
        assert teacher(frames(3))[CHUNK].device.type == "cpu"

    def test_device(self, tmp_path):
        teacher = load(tmp_path, device="meta")
        steps = teacher.preprocessor.steps
        assert teacher.policy.gain.device.type == "meta"
        assert steps["device_processor"]["device"] == "meta"
        batch = teacher._to_lerobot_batch(frames(3))
        assert batch["observation.images.top"].device.type == "meta"
        assert batch["observation.state"].device.type == "meta"

    def test_weights_are_loaded(self, tmp_path):
        assert load(tmp_path, gain=7.0).policy.gain.item() == 7.0

    def test_adapter(self, tmp_path):
        with pytest.raises(ValueError, match="adapter"):
            load(tmp_path, use_peft=True)

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            LeRobotTeacher.from_pretrained(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"n_obs_steps": 2}, "n_obs_steps=2"),
            ({"output_features": {}}, "'action'"),
            (
                {
                    "input_features": {
                        "observation.images.top": {
                            "type": "VISUAL",
                            "shape": [3, 8, 8],
                        },
                        "observation.environment_state": {"type": "ENV", "shape": [4]},
                    }
                },
                "environment_state",
            ),
        ],
    )
    def test_policies_that_read_more(self, tmp_path, fields, match):
        with pytest.raises(ValueError, match=match):
            load(tmp_path, **fields)

    @pytest.mark.parametrize("missing", ["lerobot", "lerobot.policies"])
    def test_without_lerobot(self, tmp_path, monkeypatch, missing):
        for name in list(sys.modules):
            if name.startswith(missing):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ImportError, match=r"lerobot>=0\.5") as caught:
            LeRobotTeacher.from_pretrained(tmp_path)
        for word in ("Python 3.12", "torchrl_rpd.teachers.serve", "RemoteTeacher"):
            assert word in str(caught.value)

    def test_a_dependency_that_lerobot_lacks(self, tmp_path, monkeypatch):
        real = importlib.import_module

        def broken(name, *args):
            if name.startswith("lerobot"):
                raise ModuleNotFoundError("No module named 'draccus'", name="draccus")
            return real(name, *args)

        monkeypatch.setattr(importlib, "import_module", broken)
        with pytest.raises(ModuleNotFoundError, match="draccus"):
            LeRobotTeacher.from_pretrained(tmp_path)


class TestBadInput:
    @pytest.fixture
    def teacher(self, tmp_path):
        return load(tmp_path)

    def test_missing_image(self, teacher):
        with pytest.raises(KeyError, match=r"image.*missing"):
            teacher(frames(3).exclude(IMAGE))

    def test_missing_state(self, teacher):
        with pytest.raises(KeyError, match=r"state.*missing"):
            teacher(frames(3).exclude(STATE))

    def test_float_images(self, teacher):
        td = frames(3)
        td[IMAGE] = td[IMAGE].float()
        with pytest.raises(TypeError, match="uint8"):
            teacher(td)

    def test_channels_last(self, teacher):
        td = frames(3)
        td[IMAGE] = td[IMAGE].permute(0, 2, 3, 1)
        with pytest.raises(ValueError, match="channels first"):
            teacher(td)

    @pytest.mark.parametrize("width", [1, 3])
    def test_state_of_another_robot(self, teacher, width):
        td = frames(3)
        td[STATE] = torch.zeros(1, width)
        with pytest.raises(ValueError, match=f"{width} entries.*reads 2"):
            teacher(td)

    def test_state_that_the_policy_pads(self, tmp_path):
        teacher = load(tmp_path, "smolvla", max_state_dim=2)
        narrow, wide = (
            TensorDict({IMAGE: frames(3)[IMAGE], STATE: torch.ones(1, n)}, [1])
            for n in (1, 3)
        )
        assert teacher._to_lerobot_batch(narrow)["observation.state"].shape == (1, 1)
        with pytest.raises(ValueError, match="3 entries"):
            teacher(wide)

    def test_answer_of_another_shape(self, teacher):
        teacher.policy.predict_action_chunk = lambda batch: torch.zeros(1, 4, 2)
        with pytest.raises(ValueError, match=r"\[..., 3, 2\], got \(1, 4, 2\)"):
            teacher(frames(3))


class TestAsATeacher:
    def test_transform(self, tmp_path):
        # on a tensordict, as a collector's postproc
        teacher = load(tmp_path, gain=10.0)
        transform = TeacherActionTransform(teacher)
        td = transform(frames(51, 255))
        # first actions of the chunks worked out in TestNumbers: raw 0 and 13
        expected = torch.tensor([[0.5, -1.0], [26.5, 51.0]])
        torch.testing.assert_close(td["teacher_action"], expected, rtol=0, atol=1e-5)
        assert td["teacher_mask"].all()

    @pytest.mark.parametrize("type", ["act", "smolvla"])
    def test_check_teacher(self, tmp_path, type):
        text = None if type == "smolvla" else ""
        # smolvla's stand-in is blind: its noise and words alone make the action
        skip = {"act": ["instruction"], "smolvla": ["image", "state"]}[type]
        teacher = load(tmp_path, type, instruction=text)
        report = check_teacher(teacher, frames(0, 60, 120, 255), skip=skip)
        assert report.passed, str(report)
        assert report["batch"].status == ("ok" if type == "act" else "skipped")

    def test_served(self, tmp_path):
        pytest.importorskip("websockets")
        pytest.importorskip("msgpack")
        from torchrl_rpd.teachers.remote import RemoteTeacher, TeacherServer
        from torchrl_rpd.teachers.serve import _teacher

        # as `serve torchrl_rpd.teachers.lerobot:LeRobotTeacher.from_pretrained` makes it
        standin.save(tmp_path, "smolvla", cameras=("top", "wrist"))
        cameras = {"observation.images.top": IMAGE, "observation.images.wrist": WRIST}
        options = [f"path_or_repo={tmp_path}", f"cameras={cameras}", "seed=3"]
        nothing = ("path", "task", "instruction", "unnorm_key", "dtype")
        teacher = _teacher(
            SimpleNamespace(
                teacher="torchrl_rpd.teachers.lerobot:LeRobotTeacher.from_pretrained",
                option=options,
                device="cpu",
                **dict.fromkeys(nothing),
            )
        )
        td = frames(0, 9, 200, wrist=7)
        here = teacher(td.copy())[CHUNK]
        teacher.manual_seed(3)
        with (
            TeacherServer(teacher, port=0).running() as server,
            RemoteTeacher(server.address) as remote,
        ):
            assert set(remote.in_keys) == set(teacher.in_keys)
            assert (remote.action_dim, remote.chunk_size) == (2, 3)
            assert remote(td.copy())[CHUNK].equal(here)
        batch = teacher.policy.asked[-1]
        assert batch["observation.images.wrist"].eq(7 / 255).all()
        assert batch["task"] == ["push", "push push", "push push push"]

    def test_mixed_precision_is_the_policys_choice(self, tmp_path):
        used = []
        for use_amp in (False, True):
            teacher = load(tmp_path, use_amp=use_amp)
            asked = teacher.policy.predict_action_chunk

            def spy(batch, asked=asked):
                used.append(torch.is_autocast_enabled("cpu"))
                return asked(batch)

            teacher.policy.predict_action_chunk = spy
            teacher(frames(3))
        assert used == [False, True]


def test_any_policy_with_a_config():
    # the constructor needs no lerobot: an object of that shape will do
    config = SimpleNamespace(
        n_obs_steps=1,
        n_action_steps=4,  # a policy without chunk_size
        device="cpu",
        use_amp=False,
        image_features={"observation.image": None},
        robot_state_feature=None,
        env_state_feature=None,
        action_feature=SimpleNamespace(shape=(7,)),
    )
    policy = SimpleNamespace(
        config=config,
        predict_action_chunk=lambda batch: torch.ones(2, 4, 7, dtype=torch.bfloat16),
    )
    teacher = LeRobotTeacher(policy, lambda b: b, lambda a: a / 2, instruction="")
    chunk = teacher(frames(3, 4))[CHUNK]
    assert chunk.shape == (2, 4, 7) and chunk.dtype == torch.float32
    assert chunk.eq(0.5).all()


if __name__ == "__main__":
    pytest.main([__file__])
