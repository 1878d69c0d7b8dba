# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""check_teacher: healthy teachers pass; each kind of broken one fails its own check."""

from __future__ import annotations

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_rpd.teachers import (
    ScriptedTeacher,
    TeacherCheckError,
    TeacherReport,
    check_teacher,
)

IMAGE, STATE = ("observation", "image"), ("observation", "state")
CHUNK, TEXT, MASK = ("vla_action", "chunk"), "language_instruction", "timestep_pad_mask"
BOX = Bounded(-1.0, 1.0, (7,))


class Toy:
    """A teacher from a function ``rows -> [n, A]`` or ``[n, H, A]``."""

    def __init__(self, function, in_keys, out_key=CHUNK, **attributes):
        self.function = function
        self.in_keys, self.out_keys = in_keys, [out_key]
        self.sizes = []
        self.__dict__.update(attributes)

    def __call__(self, td):
        self.sizes.append(td.batch_size[0])
        action = self.function(self, td) if "instruction" in vars(self) else None
        action = self.function(td) if action is None else action
        if self.out_keys == [CHUNK] and action.ndim == 2:
            action = action.unsqueeze(1)
        return td.set(self.out_keys[0], action)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = normal(3, 7) * 0.5


def look(images):
    """``[..., 3, H, W]`` uint8 to ``[..., 7]`` in (-1, 1)."""
    colour = images.to(torch.float32).mean((-1, -2)) / 255
    return torch.tanh((colour - 0.3) @ WEIGHT.to(colour) * 2)


def frames(n=6, **more):
    generator = torch.Generator().manual_seed(1)
    # every row has a tint of its own, or their mean colours would hardly differ
    tint = torch.rand(n, 3, 1, 1, generator=generator)
    noise = torch.rand(n, 3, 8, 8, generator=generator)
    images = (255 * tint * noise).to(torch.uint8)
    return TensorDict({IMAGE: images, STATE: normal(n, 3), **more}, [n])


def check(teacher, batch=None, **kwargs) -> TeacherReport:
    batch = frames() if batch is None else batch
    kwargs.setdefault("action_spec", BOX)
    return check_teacher(teacher, batch, raise_on_failure=False, **kwargs)


def failed(report: TeacherReport) -> list[str]:
    return [check.name for check in report.failures]


def seeing(td):
    return look(td[IMAGE])


class TestHealthy:
    def test_image(self):
        report = check(Toy(seeing, [IMAGE]))
        assert report.passed, report
        assert report["image"].status == report["batch"].status == "ok"
        assert report["state"].detail == "no real numbers among the inputs"
        assert report["instruction"].status == report["padding"].status == "skipped"

    def test_state_as_a_function(self):
        batch = frames().exclude(IMAGE)
        report = check(lambda td: torch.tanh(td[STATE] @ WEIGHT), batch)
        assert report.passed, report
        assert report["state"].status == "ok"
        assert report["image"].detail == "no image among the inputs"

    def test_image_and_state(self):
        teacher = Toy(
            lambda td: look(td[IMAGE]) * td[STATE][:, :1].tanh(), [IMAGE, STATE]
        )
        report = check(teacher)
        assert report.passed, report
        assert report["image"].status == report["state"].status == "ok"

    def test_function_that_leaves_part_of_the_observation_alone(self):
        """It does not say what it reads: one kind of input is enough."""
        by_state = check(lambda td: torch.tanh(td[STATE] @ WEIGHT))
        assert by_state.passed and by_state["state"].status == "ok"
        assert "does not look at" in by_state["image"].detail
        by_image = check(seeing)
        assert by_image.passed and by_image["image"].status == "ok"
        assert "does not look at" in by_image["state"].detail

    def test_single_out_key_and_float_image(self):
        batch = frames()
        batch[IMAGE] = batch[IMAGE].float() / 255
        teacher = Toy(lambda td: look(td[IMAGE] * 255), [IMAGE], "action")
        report = check(teacher, batch)
        assert report.passed and report["image"].status == "ok", report

    def test_chunks(self):
        teacher = Toy(lambda td: torch.stack([seeing(td)] * 4, 1), [IMAGE])
        report = check(teacher)
        assert report.passed and report["shape"].detail == "chunks of 4 x 7"

    def test_any_batch_shape_and_at_most_rows(self):
        teacher = Toy(seeing, [IMAGE])
        report = check(teacher, frames(24).reshape(2, 3, 4), rows=5)
        assert report.passed and report.rows == 5
        assert set(teacher.sizes) == {1, 5}

    def test_one_row(self):
        report = check(Toy(seeing, [IMAGE]), frames(1))
        assert report.passed
        assert report["batch"].detail == report["constant"].detail == "one row only"

    def test_rows_that_are_the_same(self):
        batch = frames(1).expand(4).clone()
        report = check(Toy(seeing, [IMAGE]), batch)
        assert report["constant"].detail == "all observations are the same"


def speak(text: str) -> float:
    """A text as a number in [-0.3, 0.3] (Python's own hash is salted)."""
    return (sum(text.encode()) % 61) / 100 - 0.3


class TestLanguage:
    @staticmethod
    def heeding(td):
        told = td.get(TEXT)
        told = told.tolist() if hasattr(told, "tolist") else told
        told = [told] * td.batch_size[0] if isinstance(told, str) else told
        offset = torch.tensor([speak(text) for text in told])
        return (look(td[IMAGE]) + offset[:, None]).clamp(-1, 1)

    @pytest.mark.parametrize("per_row", [False, True])
    def test_healthy(self, per_row):
        text = NonTensorStack(*["lift it", "push it"] * 3) if per_row else "lift it"
        report = check(Toy(self.heeding, [IMAGE, TEXT]), frames(**{TEXT: text}))
        assert report.passed, report
        assert report["instruction"].status == "ok"

    def test_deaf(self):
        report = check(Toy(seeing, [IMAGE, TEXT]), frames(**{TEXT: "lift it"}))
        assert failed(report) == ["instruction"]
        assert "tokenizer" in report["instruction"].advice

    def test_fixed_instruction(self):
        def heeding(teacher, td):
            return look(td[IMAGE]) * (0.5 + speak(teacher.instruction))

        teacher = Toy(heeding, [IMAGE], instruction="lift it")
        report = check(teacher)
        assert report.passed and report["instruction"].status == "ok"
        assert teacher.instruction == "lift it"  # as it was
        deaf = Toy(lambda teacher, td: seeing(td), [IMAGE], instruction="lift it")
        assert failed(check(deaf)) == ["instruction"]


class TestBlind:
    def test_constant(self):
        teacher = Toy(lambda td: torch.full((td.batch_size[0], 7), 0.3), [IMAGE])
        assert failed(check(teacher)) == ["constant", "image"]

    def test_image(self):
        """What the published OpenVLA code does under newer transformers versions."""
        teacher = Toy(lambda td: torch.tanh(td[STATE] @ WEIGHT), [IMAGE, STATE])
        report = check(teacher)
        assert failed(report) == ["image"]
        assert "('observation', 'image')" in report["image"].detail

    def test_one_camera_of_two(self):
        batch = frames()
        batch["observation", "wrist_image"] = batch[IMAGE].flip(0)
        teacher = Toy(seeing, [IMAGE, ("observation", "wrist_image")])
        report = check(teacher, batch)
        assert failed(report) == ["image"]
        assert "wrist_image" in report["image"].detail
        assert "'image'" not in report["image"].detail

    def test_state(self):
        assert failed(check(Toy(seeing, [IMAGE, STATE]))) == ["state"]

    def test_function_that_sees_nothing(self):
        report = check(lambda td: torch.linspace(-0.5, 0.5, td.batch_size[0])[:, None])
        # (it looks at the number of rows alone, and has a wrong width)
        assert {"shape", "image"} <= set(failed(report))


class TestBatch:
    class Normed(nn.Module):
        in_keys, out_keys = (IMAGE,), ("action",)

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(7)

        def forward(self, td):
            return td.set("action", self.norm(look(td[IMAGE])).clamp(-1, 1))

    def test_batch_norm_in_train_mode(self):
        report = check(self.Normed())  # modules are born in train mode
        assert "batch" in failed(report)
        # BatchNorm1d refuses single rows
        assert "more than 1 value" in report["batch"].detail
        assert "teacher.eval()" in report["batch"].advice

    def test_batch_statistics(self):
        teacher = Toy(
            lambda td: (look(td[IMAGE]) - look(td[IMAGE]).mean(0)).clamp(-1, 1),
            [IMAGE],
        )
        report = check(teacher)
        # every all-black batch equals its own mean, as every all-white one does
        assert failed(report) == ["batch", "image"]
        assert "teacher.eval()" in report["batch"].advice

    def test_eval_mode_is_healthy_and_kept(self):
        teacher = self.Normed().eval()
        assert check(teacher).passed
        assert not teacher.training

    def test_first_row_leaks_into_the_others(self):
        def leaking(td):
            return 0.5 * (look(td[IMAGE]) + look(td[IMAGE][:1]))

        assert failed(check(Toy(leaking, [IMAGE]))) == ["batch"]

    def test_tolerance(self):
        def rounding(td):  # 0.02 off in batches
            return seeing(td) * 0.9 + 0.02 * (td.batch_size[0] > 1)

        report = check(Toy(rounding, [IMAGE]))
        assert failed(report) == ["batch"]
        assert "0.02" in report["batch"].detail
        assert check(Toy(rounding, [IMAGE]), batch_tolerance=0.03).passed


class Drawing:
    """A stochastic teacher with a seeded generator."""

    def __init__(self, row_by_row: bool):
        self.generator = torch.Generator().manual_seed(3)
        self.row_by_row = row_by_row
        self.in_keys, self.out_keys = [IMAGE], ["action"]

    def draw(self, n):
        if self.row_by_row:
            rows = [torch.randn(7, generator=self.generator) for _ in range(n)]
            return torch.stack(rows)
        # one row too many is thrown away
        return torch.randn(n + 1, 7, generator=self.generator)[1:]

    def __call__(self, td):
        return td.set("action", seeing(td) * 0.5 + 0.1 * self.draw(td.batch_size[0]))


class TestStochastic:
    def test_generator_is_rewound_and_left_as_it_was(self):
        teacher = Drawing(row_by_row=True)
        before = teacher.generator.get_state()
        report = check(teacher)
        assert report.passed, report
        assert report["repeat"].status == report["batch"].status == "ok"
        assert teacher.generator.get_state().equal(before)

    def test_methods_of_the_state(self):
        class Hidden(Drawing):
            def __init__(self):
                super().__init__(row_by_row=True)
                self._own = self.generator
                del self.generator

            def draw(self, n):
                return torch.stack(
                    [torch.randn(7, generator=self._own) for _ in range(n)]
                )

            def get_rng_state(self):
                return self._own.get_state()

            def set_rng_state(self, state):
                self._own.set_state(state)

        assert check(Hidden()).passed

    def test_draws_that_depend_on_the_batch_are_not_decided(self):
        report = check(Drawing(row_by_row=False))
        assert report.passed
        assert "draws depend" in report["batch"].detail

    def test_rewind(self):
        def noisy(td):
            noise = torch.stack([torch.randn(7) for _ in range(td.batch_size[0])])
            return seeing(td) * 0.5 + 0.1 * noise

        with torch.random.fork_rng():
            report = check(Toy(noisy, [IMAGE]))
            assert failed(report) == ["repeat"]
            assert "rewind=" in report["repeat"].advice
            # nothing else can be told from answers that differ anyway
            assert report["image"].detail == "not decided: see repeat"
            assert check(
                Toy(noisy, [IMAGE]), rewind=lambda: torch.manual_seed(0)
            ).passed

    def test_dropout(self):
        class Dropping(nn.Module):
            in_keys, out_keys = (IMAGE,), ("action",)

            def forward(self, td):
                action = nn.functional.dropout(seeing(td), 0.3, self.training)
                return td.set("action", action.clamp(-1, 1))

        teacher = Dropping()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            report = check(teacher)
        assert failed(report) == ["repeat"]
        assert "teacher.eval()" in report["repeat"].advice
        assert check(teacher.eval()).passed

    def test_memory(self):
        class Counting(Toy):
            def __call__(self, td):
                td = super().__call__(td)
                return td.set(CHUNK, td[CHUNK] * 0.99 ** len(self.sizes))

        assert failed(check(Counting(seeing, [IMAGE]))) == ["repeat"]


class TestFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_in_one_row(self, value):
        def broken(td):
            action = seeing(td)
            return torch.where(td[STATE][:, :1] > 1.0, value, action)

        batch = frames()
        batch[STATE] = torch.zeros(6, 3)
        batch[STATE][2] = 1.5
        report = check(Toy(broken, [IMAGE, STATE]), batch)
        assert "finite" in failed(report)
        # one row of 7 numbers
        assert "7 of 42" in report["finite"].detail
        assert "bfloat16" in report["finite"].advice

    def test_under_other_inputs(self):
        def overflows(td):  # in a white picture
            white = td[IMAGE].float().mean((-1, -2, -3)) > 250
            return torch.where(white[:, None], float("inf"), seeing(td))

        assert failed(check(Toy(overflows, [IMAGE]))) == ["finite"]

    def test_hidden_by_the_action_transform(self):
        def broken(td):
            action = seeing(td)
            action[:, 6] = float("nan")
            return action

        def sign(action):  # NaN > 0 is False
            closed = torch.where(action[:, 6:] > 0, 1.0, -1.0)
            return torch.cat([action[:, :6], closed], -1)

        report = check(Toy(broken, [IMAGE]), action_transform=sign)
        assert failed(report) == ["finite"]


def with_gripper(values):
    """Sees; the gripper of row i is ``values[i]``, as its state's first entry says."""

    def act(td):
        return torch.cat([seeing(td)[:, :6], td[STATE][:, :1]], -1)

    batch = frames(len(values))
    batch[STATE][:, 0] = torch.tensor(values)
    return Toy(act, [IMAGE, STATE]), batch


class TestActionSpace:
    def test_gripper_from_zero_to_one(self):
        teacher, batch = with_gripper([0.0, 1.0, 1.0, 0.004, 0.0, 1.0])
        report = check(teacher, batch)
        assert failed(report) == ["gripper"]
        assert "01_to_pm1" in report["gripper"].advice

        def convert(action):
            return torch.cat([action[:, :6], 2 * action[:, 6:] - 1], -1)

        assert check(teacher, batch, action_transform=convert)["gripper"].status == "ok"
        assert check(teacher, batch, skip=["gripper"]).passed

    def test_gripper_that_closes(self):
        report = check(*with_gripper([-1.0, 1.0, 0.0, 0.0, 1.0, 1.0]))
        assert report.passed and report["gripper"].detail == "from -1 to 1"

    @pytest.mark.parametrize(
        "values", [[1.0] * 6, [1.0, 1.0, 0.2, 0.3, 1.0, 1.0], [1, 1, 1, 0.05, 1, 1]]
    )
    def test_gripper_that_never_closes(self, values):
        report = check(*with_gripper([float(v) for v in values]))
        assert report.passed
        assert "never closed" in report["gripper"].detail

    def test_gripper_elsewhere_or_nowhere(self):
        teacher, batch = with_gripper([0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
        assert "no gripper" in check(teacher, batch, gripper=None)["gripper"].detail
        assert check(teacher, batch, gripper=0)["gripper"].status == "ok"
        from_zero = Bounded(torch.tensor([-1.0] * 6 + [0.0]), torch.ones(7))
        report = check(teacher, batch, action_spec=from_zero)
        assert report.passed and "[0, 1]" in report["gripper"].detail
        with pytest.raises(ValueError, match="entry of the 7"):
            check(teacher, batch, gripper=7)

    def test_too_large(self):
        report = check(Toy(lambda td: 255 * seeing(td), [IMAGE]))
        assert failed(report) == ["range", "saturated"]
        assert "unnorm_key" in report["range"].advice

    def test_slight_overshoot_is_clipped_and_no_error(self):
        assert check(Toy(lambda td: 1.1 * seeing(td), [IMAGE])).passed

    def test_metres(self):
        report = check(Toy(lambda td: 0.005 * seeing(td), [IMAGE]), gripper=None)
        assert failed(report) == ["range"]
        assert "metres" in report["range"].advice

    def test_saturated(self):
        report = check(Toy(lambda td: seeing(td).sign(), [IMAGE]))
        assert failed(report) == ["saturated"]

    def test_width(self):
        report = check(Toy(lambda td: seeing(td)[:, :6], [IMAGE]))
        assert failed(report) == ["shape"]
        assert "actions of 6 entries for an action space of 7" in report["shape"].detail

    def test_unknown(self):
        report = check(Toy(lambda td: 99 * seeing(td), [IMAGE]), action_spec=None)
        assert report.passed
        for name in ("range", "saturated", "gripper"):
            assert "action_spec=" in report[name].detail

    def test_other_limits(self):
        """Half of a box from 0 to 10 is no overshoot."""
        box = Bounded(0.0, 10.0, (7,))
        teacher = Toy(lambda td: 5 + 4 * seeing(td), [IMAGE])
        assert check(teacher, action_spec=box).passed
        # differences are in half widths: 0.1 of 5 is 0.02
        off = Toy(lambda td: 5 + 4 * seeing(td) + 0.1 * (len(td) > 1), [IMAGE])
        assert "0.02" in check(off, action_spec=box)["batch"].detail


class TestHistory:
    @staticmethod
    def teacher(heed: bool, window: int = 2):
        def act(td):
            seen = look(td[IMAGE])  # [n, W, 7]
            mask = td[MASK].unsqueeze(-1).float() if heed else torch.ones_like(seen)
            return (seen * mask).sum(1) / mask.sum(1)

        return Toy(act, [IMAGE], history_window=window, history_keys=[IMAGE])

    def test_frames_become_windows(self):
        report = check(self.teacher(heed=True, window=3))
        assert report.passed, report
        assert report["padding"].status == report["image"].status == "ok"

    def test_mask_not_heeded(self):
        report = check(self.teacher(heed=False))
        assert failed(report) == ["padding"]
        assert MASK in report["padding"].advice

    def test_windows_of_ones_own(self):
        images = torch.stack([frames(6)[IMAGE], frames(6)[IMAGE].flip(0)], 1)
        mask = torch.ones(6, 2, dtype=torch.bool)
        batch = TensorDict({IMAGE: images, MASK: mask}, [6])
        report = check(self.teacher(heed=False), batch)
        assert report.passed
        assert report["padding"].detail == "the mask leaves nothing out"

    def test_window_of_one_gets_plain_frames(self):
        teacher = Toy(seeing, [IMAGE], history_window=1, history_keys=[IMAGE])
        report = check(teacher)
        assert report.passed and report["padding"].detail == "no history"


class Track(EnvBase):
    """Points on a line; every action is recorded. An episode takes 5 steps."""

    def __init__(self, *batch_size, width=7):
        super().__init__(batch_size=torch.Size(batch_size))
        shape = self.batch_size
        self.observation_spec = Composite(
            observation=Unbounded((*shape, 3)), shape=shape
        )
        self.action_spec = Bounded(-1.0, 1.0, (*shape, width))
        self.reward_spec = Unbounded((*shape, 1))
        self.generator = torch.Generator().manual_seed(0)
        self.actions = []

    def _observe(self):
        return torch.randn(*self.batch_size, 3, generator=self.generator)

    def _reset(self, tensordict=None):
        self.time = 0
        return TensorDict({"observation": self._observe()}, self.batch_size)

    def _step(self, tensordict):
        self.time += 1
        self.actions.append(tensordict["action"].clone())
        flag = torch.full((*self.batch_size, 1), self.time >= 5)
        return TensorDict(
            {
                "observation": self._observe(),
                "reward": torch.zeros(*self.batch_size, 1),
                "done": flag,
                "terminated": flag.clone(),
            },
            self.batch_size,
        )

    def _set_seed(self, seed):
        pass


def steering(td):
    return torch.tanh(td["observation"] @ WEIGHT)


class TestEnv:
    @pytest.mark.parametrize("batch_size", [(), (1,), (6,), (2, 3)])
    def test_healthy(self, batch_size):
        env = Track(*batch_size)
        report = check_teacher(Toy(steering, ["observation"]), env, steps=7)
        assert report.passed and report.rows == 8
        assert len(env.actions) == 7  # over the end of an episode
        assert report["range"].status == "ok"  # the space is the environment's

    def test_four_follow_and_the_others_act_at_random(self):
        env = Track(6)
        teacher = Toy(lambda td: 0.5 * steering(td), ["observation"])
        check_teacher(teacher, env, steps=3, gripper=None)
        # asked about four at the root and after each step, then about rows
        assert teacher.sizes[:4] == [4] * 4
        assert set(teacher.sizes[4:]) == {1, 8}
        actions = torch.stack(env.actions)
        assert actions[:, :4].abs().max() <= 0.5 < actions[:, 4:].abs().max()

    def test_gripper_seen_on_the_way_counts(self):
        def acting(td):
            action = steering(td)
            first = td["observation"][:, :1]
            return torch.cat([action[:, :6], (first > 0).float()], -1)

        report = check_teacher(
            Toy(acting, ["observation"]), Track(4), raise_on_failure=False
        )
        assert failed(report) == ["gripper"]

    def test_wrong_width_is_reported(self):
        report = check_teacher(
            Toy(steering, ["observation"]), Track(4, width=6), raise_on_failure=False
        )
        assert failed(report) == ["shape"]

    def test_global_generator_is_left_alone(self):
        before = torch.get_rng_state()
        check_teacher(Toy(steering, ["observation"]), Track(6))
        assert torch.get_rng_state().equal(before)


class TestInterface:
    def test_raises_with_every_failed_check_and_what_to_do(self):
        with pytest.raises(TeacherCheckError) as caught:
            check_teacher(
                Toy(lambda td: 255 * td[STATE] @ WEIGHT, [IMAGE, STATE]),
                frames(),
                action_spec=BOX,
            )
        message = str(caught.value)
        assert "failed: image, range" in message
        assert "keys, preprocessing" in message and "unnorm_key" in message
        assert failed(caught.value.report) == ["image", "range", "saturated"]

    def test_report(self):
        report = check(Toy(seeing, [IMAGE, STATE]), skip=["gripper", "batch"])
        lines = str(report).splitlines()
        assert lines[0] == "check_teacher: Toy, 6 observations: 1 FAILED"
        assert len(lines) <= 16 and max(map(len, lines)) <= 88
        assert "gripper (as asked)" in str(report).replace("\n    ", " ")
        with pytest.raises(KeyError, match="no check 'colour'"):
            report["colour"]

    def test_batch_is_left_alone(self):
        batch = frames(**{TEXT: "lift it"})
        before = batch.clone()
        check(Toy(TestLanguage.heeding, [IMAGE, TEXT]), batch)
        assert (batch == before).all() and set(batch.keys()) == set(before.keys())

    def test_next_and_labels_are_not_shown_to_a_function(self):
        shown = set()

        def spy(td):
            shown.update(td.keys())
            return seeing(td)

        more = {"action": torch.zeros(6, 7), "teacher_action": torch.zeros(6, 7)}
        check(spy, frames(**more, next=frames()))
        assert shown == {"observation"}

    def test_missing_entry(self):
        with pytest.raises(KeyError, match=r"reads \['depth'\].*in_keys="):
            check(Toy(seeing, ["depth"]))
        assert check(Toy(seeing, ["depth"]), in_keys=[IMAGE]).passed

    @pytest.mark.parametrize("shape", [(6,), (5, 7), (6, 0), (6, 1, 1, 7)])
    def test_no_action_shape(self, shape):
        with pytest.raises(ValueError, match=r"expected \[6, A\]"):
            check(lambda td: torch.zeros(shape))

    def test_which_out_key(self):
        teacher = Toy(seeing, [IMAGE], "action")
        teacher.out_keys = ["loc", "scale"]
        with pytest.raises(KeyError, match="which one is the action"):
            check(teacher)

    def test_arguments(self):
        with pytest.raises(KeyError, match=r"skip names.*colour"):
            check(seeing, skip=["colour"])
        with pytest.raises(ValueError, match="rows and steps"):
            check(seeing, rows=0)
        with pytest.raises(TypeError, match="callable"):
            check(None)
        with pytest.raises(TypeError, match="environment or a tensordict"):
            check_teacher(seeing, [frames()])


class TestRealTeachers:
    """Random weights in the published architectures."""

    def test_octo(self, tmp_path):
        pytest.importorskip("transformers")
        from torchrl_rpd.teachers.octo import OctoTeacher, write_random_checkpoint

        folder = write_random_checkpoint(tmp_path)
        teacher = OctoTeacher.from_pretrained(folder, window_size=2)
        before = teacher.get_rng_state()
        # random weights give numbers of any size
        report = check(teacher, frames(3, **{TEXT: "lift it"}), skip=["range"])
        assert report.passed, report
        for name in ("repeat", "batch", "image", "instruction", "padding"):
            assert report[name].status == "ok"
        assert teacher.get_rng_state().equal(before)

    def test_openvla(self, tmp_path):
        pytest.importorskip("transformers")
        from torchrl_rpd.teachers.openvla import OpenVLATeacher, write_tiny_checkpoint

        folder = write_tiny_checkpoint(tmp_path)
        teacher = OpenVLATeacher.from_pretrained(folder, instruction="lift it")
        report = check(teacher, frames(3))
        assert report.passed, report
        for name in ("repeat", "batch", "image", "instruction"):
            assert report[name].status == "ok"


@pytest.fixture(scope="module")
def env():
    from torchrl_rpd.envs import ManiSkillEnv

    env = ManiSkillEnv("PickCube-v1", num_envs=4, fast_controller=True)
    yield env
    env.close()


@pytest.mark.maniskill
class TestManiSkill:
    @pytest.mark.parametrize("flaws", [{}, {"cube_offset_std": 0.016, "jitter": 0.3}])
    def test_scripted_teachers_pass(self, env, flaws):
        env.set_seed(0)
        report = check_teacher(ScriptedTeacher("PickCube-v1", **flaws), env)
        assert report.passed

    def test_gripper_convention_shows_within_a_few_steps(self, env):
        def from_zero(action):
            return torch.cat([action[:, :6], (action[:, 6:] + 1) / 2], -1)

        env.set_seed(0)
        teacher = ScriptedTeacher("PickCube-v1")
        assert check_teacher(teacher, env)["gripper"].status == "ok"
        env.set_seed(0)
        report = check_teacher(
            teacher, env, action_transform=from_zero, raise_on_failure=False
        )
        assert failed(report) == ["gripper"]

    def test_teacher_of_another_task(self, env):
        with pytest.raises(
            ValueError, match="StackCube-v1 has a flat state of size 48"
        ):
            check_teacher(ScriptedTeacher("StackCube-v1"), env)


if __name__ == "__main__":
    pytest.main([__file__])
