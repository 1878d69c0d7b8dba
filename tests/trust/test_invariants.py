# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What holds for any numbers: schedules, messages, the resize, configurations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from torchrl_rpd import configs
from torchrl_rpd.objectives import DistillPPOLoss
from torchrl_rpd.students import mlp_actor_critic
from torchrl_rpd.teachers._resize import PILResize
from torchrl_rpd.trainers import (
    DistillCoeffSchedule,
    distill_coeff_at,
    return_ratio_coeff,
)

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
some = settings(few, max_examples=60)

# Coefficients of a loss, as somebody might set them.
COEFFS = st.floats(0, 1e3)
FRAMES = st.integers(0, 10**8)


@st.composite
def frame_schedules(draw):
    """Arguments of ``distill_coeff_at``."""
    start = draw(st.integers(0, 10**6))
    return {
        "kind": draw(st.sampled_from(["constant", "linear", "cosine"])),
        "init": draw(COEFFS),
        "end": draw(COEFFS),
        "start_frames": start,
        "end_frames": start + draw(st.integers(1, 10**7)),
    }


def slack(*values: float) -> float:
    """A few roundings of numbers of this size."""
    return 4 * math.ulp(max(map(abs, values)))


class TestFrameSchedules:
    @some
    @given(frame_schedules(), FRAMES)
    def test_between_its_ends(self, at, frames):
        low, high = sorted((at["init"], at["end"]))
        tiny = slack(low, high)
        assert low - tiny <= distill_coeff_at(frames, **at) <= high + tiny

    @some
    @given(frame_schedules(), FRAMES, FRAMES)
    def test_never_turns_back(self, at, one, other):
        one, other = sorted((one, other))
        step = distill_coeff_at(other, **at) - distill_coeff_at(one, **at)
        direction = at["end"] - at["init"]
        assert step * math.copysign(1, direction) >= -slack(at["init"], at["end"])

    @some
    @given(frame_schedules(), st.integers(0, 10**6))
    def test_end_points(self, at, beyond):
        early = max(0, at["start_frames"] - beyond)
        assert distill_coeff_at(early, **at) == at["init"]
        last = at["init"] if at["kind"] == "constant" else at["end"]
        assert distill_coeff_at(at["end_frames"] + beyond, **at) == last

    @some
    @given(frame_schedules())
    def test_half_way_is_the_middle(self, at):
        if at["kind"] == "constant" or (at["start_frames"] + at["end_frames"]) % 2:
            return
        middle = distill_coeff_at((at["start_frames"] + at["end_frames"]) // 2, **at)
        assert middle == pytest.approx((at["init"] + at["end"]) / 2)


class TestReturnRatio:
    SCORES = st.floats(-1e3, 1e3)

    @some
    @given(SCORES, SCORES, st.floats(1e-3, 1e3), COEFFS, COEFFS)
    def test_falls_with_the_students_score(self, one, other, teacher, a, b):
        end, init = sorted((a, b))
        one, other = sorted((one, other))
        worse, better = (
            return_ratio_coeff(s, teacher, init=init, end=end) for s in (one, other)
        )
        tiny = slack(init, end)
        assert end - tiny <= better <= worse + tiny <= init + 2 * tiny

    @some
    @given(st.floats(0, 1e3), st.floats(1e-3, 1e3), COEFFS, COEFFS)
    def test_end_points(self, more, teacher, init, end):
        best = return_ratio_coeff(teacher + more, teacher, init=init, end=end)
        assert best == end
        worst = return_ratio_coeff(-more, teacher, init=init, end=end)
        assert worst == pytest.approx(init)


ARRAYS = npst.arrays(
    dtype=st.sampled_from([np.dtype(n) for n in ("?", "u1", "<i4", "<f4", "<f8")]),
    shape=npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
MESSAGES = st.dictionaries(
    st.text(max_size=8),
    st.one_of(
        *(ARRAYS, st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1)),
        *(st.floats(allow_nan=False), st.text(max_size=8), st.binary(max_size=8)),
        st.lists(st.one_of(st.integers(0, 9), ARRAYS), max_size=3),
    ),
    max_size=5,
)


class TestMessages:
    """More of them: tests/teachers/test_remote_messages.py, test_remote_views.py."""

    @few
    @given(MESSAGES)
    def test_there_back_and_there_again(self, message):
        pytest.importorskip("msgpack")
        from torchrl_rpd.teachers.remote import pack, unpack

        packed = pack(message)
        read = unpack(packed)
        assert list(read) == list(message)
        for key, value in message.items():
            assert type(read[key]) is type(value)
            if isinstance(value, np.ndarray):
                assert (read[key].dtype, read[key].shape) == (value.dtype, value.shape)
                assert read[key].tobytes() == value.tobytes()
        assert pack(read) == packed

    @few
    @given(MESSAGES, st.data())
    def test_a_part_or_more_than_a_message_is_none(self, message, data):
        pytest.importorskip("msgpack")
        from torchrl_rpd.teachers.remote import MessageError, pack, unpack

        packed = pack(message)
        cut = data.draw(st.integers(0, len(packed) - 1))
        for wrong in (packed[:cut], packed + packed[: cut + 1]):
            with pytest.raises(MessageError):
                unpack(wrong)


SIDES = st.integers(1, 48)
FILTERS = st.sampled_from(["bicubic", "lanczos"])


class TestResize:
    """Pictures of kinds and sizes of its own: tests/teachers/test_resize.py."""

    @few
    @given(SIDES, SIDES, SIDES, SIDES, FILTERS, st.integers(0, 255))
    def test_a_constant_stays(self, height, width, to_height, to_width, filter, value):
        image = torch.full((2, 3, height, width), value, dtype=torch.uint8)
        out = PILResize((to_height, to_width), filter)(image)
        assert out.shape == (2, 3, to_height, to_width) and out.dtype == torch.uint8
        assert bool((out == value).all())

    @few
    @given(SIDES, SIDES, FILTERS, st.integers(0, 2**32 - 1))
    def test_the_same_size_is_the_same_image(self, height, width, filter, seed):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randint(
            256, (3, height, width), dtype=torch.uint8, generator=generator
        )
        assert torch.equal(PILResize((height, width), filter)(image), image)

    @few
    @given(SIDES, SIDES, SIDES, FILTERS, st.integers(0, 2**32 - 1))
    def test_as_pillow(self, height, width, after, filter, seed):
        image_module = pytest.importorskip("PIL.Image")
        pixels = np.random.default_rng(seed).integers(
            256, size=(height, width, 3), dtype=np.uint8
        )
        how = image_module.Resampling[filter.upper()]
        # Width first, then height, as in the versions that teachers were trained with.
        columns = image_module.fromarray(pixels).resize((after, height), how)
        expected = np.asarray(columns.resize((after, after), how))
        planes = torch.from_numpy(pixels).permute(2, 0, 1)
        ours = PILResize(after, filter)(planes).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ours, expected)

    @few
    @given(SIDES, SIDES, FILTERS, st.integers(0, 2**32 - 1))
    def test_planes_do_not_mix(self, before, after, filter, seed):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randint(
            256, (3, before, before), dtype=torch.uint8, generator=generator
        )
        resize = PILResize(after, filter)
        one_by_one = torch.cat([resize(plane[None]) for plane in image])
        assert torch.equal(resize(image), one_by_one)


NAMES = st.text("abcdefgh_", min_size=1, max_size=6)
KEYS = st.one_of(NAMES, st.lists(NAMES, min_size=2, max_size=3))


def through_yaml(config: object) -> object:
    """What Hydra instantiates after the configuration was in a file."""
    return OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))


def plain_key(key: str | list[str]) -> str | tuple[str, ...]:
    return key if isinstance(key, str) else tuple(key)


@pytest.fixture(scope="module")
def loss() -> DistillPPOLoss:
    """Whose coefficient is set."""
    student = mlp_actor_critic(4, 2, num_cells=(4,))
    return DistillPPOLoss(student.actor, student.critic)


class TestConfigs:
    """A value in a configuration is the argument that arrives, also through a file."""

    @few
    @given(at=frame_schedules(), frames=FRAMES)
    def test_schedule(self, loss, at, frames):
        from hydra.utils import instantiate

        config = through_yaml(configs.DistillCoeffScheduleConfig(**at))
        made = instantiate(config, _partial_=True)(loss=loss)
        assert isinstance(made, DistillCoeffSchedule)
        made.set(frames)
        expected = torch.tensor(distill_coeff_at(frames, **at))
        torch.testing.assert_close(loss.distill_coeff, expected, rtol=0, atol=0)

    @few
    @given(
        st.lists(KEYS, max_size=4),
        KEYS,
        st.one_of(st.none(), st.floats(1e-6, 1e6)),
        st.one_of(st.none(), st.floats(0, 1)),
    )
    def test_guard(self, keys, mask, max_kl, min_ess):
        from hydra.utils import instantiate

        config = configs.NumericalGuardConfig(
            directory="x",
            keys=keys,
            teacher_mask_key=mask,
            max_kl=max_kl,
            min_ess=min_ess,
        )
        made = instantiate(through_yaml(config))
        assert made.keys == [plain_key(key) for key in keys]
        assert made.teacher_mask_key == plain_key(mask)
        assert (made.max_kl, made.min_ess) == (max_kl, min_ess)

    @few
    @given(
        st.one_of(st.none(), st.floats(1e-9, 1e9)),
        st.sampled_from(["stop", "distill_only", "adaptive_lr"]),
        st.floats(1e-12, 1),
        st.one_of(st.none(), st.floats(0, 1, exclude_max=True)),
    )
    def test_target_kl(self, target_kl, rule, min_lr, anneal_from):
        from hydra.utils import instantiate

        from torchrl_rpd.configs.hooks import make_target_kl_stepper

        seen = {}

        class Trainer:
            def register_module(self, name, module):
                seen["made"] = module

        config = configs.TargetKLStepperConfig(
            target_kl=target_kl, rule=rule, min_lr=min_lr, anneal_from=anneal_from
        )
        late = instantiate(through_yaml(config))
        assert type(late) is type(make_target_kl_stepper(target_kl=1.0))
        late.register(Trainer())
        made = seen["made"]
        assert (made.target_kl, made.rule) == (target_kl, rule)
        assert (made.min_lr, made.anneal_from) == (min_lr, anneal_from)

    @few
    @given(
        st.lists(st.integers(1, 8), min_size=1, max_size=3),
        st.integers(1, 6),
        st.integers(1, 4),
        st.floats(-3, 1),
    )
    def test_student(self, cells, observation_dim, action_dim, log_std_init):
        from hydra.utils import instantiate

        config = configs.MLPStudentConfig(
            observation_dim=observation_dim,
            action_dim=action_dim,
            num_cells=cells,
            log_std_init=log_std_init,
        )
        made = instantiate(through_yaml(config)).config
        assert list(made["num_cells"]) == cells
        assert made["log_std_init"] == log_std_init
        assert (made["observation_dim"], made["action_dim"]) == (
            observation_dim,
            action_dim,
        )


if __name__ == "__main__":
    pytest.main([__file__])
