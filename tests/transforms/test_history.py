# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Teachers that are shown the last observations of every env."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting_env import (
    CountingEnv,
    LookingBack,
    RecordingTeacher,
    assert_labels_belong,
    label_of_window,
    windows_of,
)
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import (
    Compose,
    EnvBase,
    SerialEnv,
    TransformedEnv,
    check_env_specs,
)

from torchrl_rpd.transforms import TeacherActionTransform
from torchrl_rpd.transforms._history import HistoryWindow

LENGTHS = (2, 3, 5, 9)


def expected(observation: torch.Tensor, window: int) -> torch.Tensor:
    return label_of_window(*windows_of(observation, window))


def move(env: EnvBase, root: TensorDictBase) -> TensorDictBase:
    action = torch.zeros(*env.batch_size, 2)
    return env.step_and_maybe_reset(root.set("action", action))[1]


def test_windows_by_hand() -> None:
    # Three places, two envs. Env 0 shows 10, 11, 12, 13; env 1 shows 20, 21, starts
    # anew with 30 and shows 31. The first of an episode stands in for what is not there.
    history = HistoryWindow(3, ["x"])
    both = torch.arange(2)

    def record(x: list[int], rows: torch.Tensor, fresh: bool) -> TensorDict:
        frame = TensorDict({"x": torch.tensor(x)}, [2])
        history.record(frame, rows, fresh=fresh)
        return history.show(frame.copy(), both)

    shown = record([10, 20], both, True)
    assert shown["x"].tolist() == [[10, 10, 10], [20, 20, 20]]
    assert shown["timestep_pad_mask"].tolist() == [[False, False, True]] * 2
    shown = record([11, 21], both, False)
    assert shown["x"].tolist() == [[10, 10, 11], [20, 20, 21]]
    assert shown["timestep_pad_mask"].tolist() == [[False, True, True]] * 2
    record([12, 22], both, False)  # env 1 ended here
    shown = record([0, 30], both[1:], True)
    assert shown["x"].tolist() == [[10, 11, 12], [30, 30, 30]]
    assert shown["timestep_pad_mask"].tolist() == [[True] * 3, [False, False, True]]
    shown = record([13, 31], both, False)
    assert shown["x"].tolist() == [[11, 12, 13], [30, 30, 31]]
    assert history.complete(both).all()
    history.forget()
    for step, known in enumerate((False, False, True, True)):
        shown = record([14 + step, 32 + step], both, False)
        assert history.complete(both).tolist() == [known] * 2
    assert shown["x"].tolist() == [[15, 16, 17], [33, 34, 35]]
    assert shown["timestep_pad_mask"].all()


@pytest.mark.parametrize("window", [2, 3, 4])
@pytest.mark.parametrize("batch", [[4], [2, 2], [], None], ids=str)
def test_labels_over_staggered_resets_and_batch_borders(
    window: int, batch: list[int] | None
) -> None:
    if batch is None:
        base: EnvBase = SerialEnv(
            2,
            [
                lambda: CountingEnv(LENGTHS[:2]),
                lambda: CountingEnv(LENGTHS[2:], None, 2),
            ],
        )
    else:
        base = CountingEnv(LENGTHS if batch else (4,), batch_size=batch)
    teacher = LookingBack(window)
    label = TeacherActionTransform(teacher, max_batch_size=3)
    env = TransformedEnv(base, label)
    num_envs = base.batch_size.numel()
    collector = Collector(
        env, None, frames_per_batch=7 * num_envs, total_frames=49 * num_envs
    )
    for frames in collector:
        assert frames["teacher_mask"].all()
        exact = expected(frames["observation"], window)
        torch.testing.assert_close(frames["teacher_action"], exact, rtol=0, atol=1e-7)
    # looking back costs no queries
    assert teacher.rows == label.stats()["queries"] == 50 * num_envs
    assert label.stats()["incomplete"] == 0


def test_what_is_stored_has_no_history() -> None:
    env = TransformedEnv(CountingEnv(), TeacherActionTransform(LookingBack(3)))
    check_env_specs(env)
    frames = env.rollout(4)
    assert frames["observation"].shape == (3, frames.shape[1], 3)
    assert "timestep_pad_mask" not in frames.keys(True)


def test_arguments_stand_before_what_the_teacher_says() -> None:
    seen: list[TensorDictBase] = []

    def teacher(td: TensorDictBase) -> torch.Tensor:
        seen.append(td)
        return torch.zeros(3, 2)

    label = TeacherActionTransform(
        teacher, history_window=2, history_keys=["observation"]
    )
    TransformedEnv(CountingEnv(), label).reset()
    assert seen[-1]["observation"].shape == (3, 2, 3)
    teacher.history_window, teacher.history_keys = 5, ["observation"]  # type: ignore[attr-defined]
    TransformedEnv(CountingEnv(), TeacherActionTransform(teacher)).reset()
    assert seen[-1]["observation"].shape == (3, 5, 3)
    # nothing is stacked, and no mask written
    one = TeacherActionTransform(teacher, history_window=1)
    TransformedEnv(CountingEnv(), one).reset()
    assert seen[-1]["observation"].shape == (3, 3)
    assert "timestep_pad_mask" not in seen[-1].keys()
    plain = TeacherActionTransform(RecordingTeacher())
    assert_labels_belong(TransformedEnv(CountingEnv(), plain).rollout(2))


def test_in_keys_of_the_teacher_may_name_the_mask() -> None:
    # Entries that it reads without history are given as they are.
    class Teacher(LookingBack):
        def __call__(self, tensordict: TensorDictBase) -> torch.Tensor:
            assert set(tensordict.keys()) == {"observation", "now", "timestep_pad_mask"}
            assert torch.equal(tensordict["now"], tensordict["observation"][:, -1])
            return super().__call__(tensordict)

    def add_now(td: TensorDictBase) -> TensorDictBase:
        return td.set("now", td["observation"])

    teacher = Teacher(2, in_keys=["now", "timestep_pad_mask"])
    env = TransformedEnv(CountingEnv(), add_now)
    env.append_transform(TeacherActionTransform(teacher))
    frames = env.rollout(6, break_when_any_done=False)
    torch.testing.assert_close(
        frames["teacher_action"], expected(frames["observation"], 2), rtol=0, atol=1e-7
    )


def test_images_and_nested_keys() -> None:
    seen: list[TensorDictBase] = []

    def look(td: TensorDictBase) -> TensorDictBase:
        image = td["observation"][..., None, :2, None].to(torch.uint8)
        return td.set(("camera", "image"), image.expand(*td.batch_size, 3, 2, 4))

    def teacher(td: TensorDictBase) -> torch.Tensor:
        seen.append(td)
        return torch.zeros(len(td), 2)

    label = TeacherActionTransform(
        teacher, history_window=2, history_keys=[("camera", "image"), "observation"]
    )
    env = TransformedEnv(CountingEnv((3, 3)), look)
    env.append_transform(label)
    move(env, env.reset())
    image = seen[-1]["camera", "image"]
    assert image.shape == (2, 2, 3, 2, 4) and image.dtype == torch.uint8
    assert seen[-1]["observation"][:, :, 2].tolist() == [[0, 1], [0, 1]]


def test_steps_that_nobody_was_asked_about_are_remembered() -> None:
    label = TeacherActionTransform(LookingBack(3), query_fraction=0.4)
    env = TransformedEnv(CountingEnv((4, 6, 9) * 5), label)
    frames = env.rollout(40, break_when_any_done=False)
    share = frames["teacher_mask"].float().mean()
    assert 0.3 < share < 0.5
    exact = expected(frames["observation"], 3) * frames["teacher_mask"]
    torch.testing.assert_close(frames["teacher_action"], exact, rtol=0, atol=1e-7)


class Planner(LookingBack):
    """Entry ``h`` of a chunk is the window's label, plus ``h / 100`` in the second."""

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        entry = torch.tensor([[0.0, h / 100] for h in range(4)])
        chunk = super().__call__(tensordict)[:, None] + entry
        return TensorDict({"vla_action": {"chunk": chunk}}, tensordict.batch_size)


@pytest.mark.parametrize("interval", [2, 3])
def test_chunks_with_history(interval: int) -> None:
    teacher = Planner(3)
    label = TeacherActionTransform(teacher, replan_interval=interval)
    env = TransformedEnv(CountingEnv(LENGTHS), label)
    for frames in Collector(env, None, frames_per_batch=28, total_frames=280):
        assert frames["teacher_mask"].all()
        asked_at = frames["observation"].clone()
        entry = asked_at[..., 2] % interval
        asked_at[..., 2] -= entry
        exact = expected(asked_at, 3)
        exact[..., 1] += entry / 100
        torch.testing.assert_close(frames["teacher_action"], exact, rtol=0, atol=1e-6)
    assert teacher.rows < 0.7 * 280


def test_rows_that_stand_still_see_nothing_new() -> None:
    env = TransformedEnv(CountingEnv((20, 20)), TeacherActionTransform(LookingBack(3)))
    root = env.reset()
    for moves in ([1, 0], [1, 0], [1, 1], [0, 1], [1, 1]):
        root["action"] = torch.zeros(2, 2)
        root["_step"] = torch.tensor(moves, dtype=torch.bool).unsqueeze(-1)
        following = env.step(root)["next"]
        exact = expected(following["observation"], 3)
        torch.testing.assert_close(following["teacher_action"], exact)
        root = following.exclude("reward")


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_a_pipe(state: dict[str, Any]) -> dict[str, Any]:
    """What a multi-process collector does with the state of its workers' envs."""
    return TensorDict(state).clone().to_dict()


class NestedPlanner(Planner):
    """The same; reads its observation elsewhere."""

    history_keys = (("deep", "observation"),)

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        tensordict["observation"] = tensordict["deep", "observation"]
        return super().__call__(tensordict)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("stop", [0, 1, 4, 11])
@pytest.mark.parametrize("through", [through_a_file, through_a_pipe])
def test_resume(stop: int, interval: int, through: Callable) -> None:
    """Interrupt, save, load into a fresh env and transform: the same labels."""

    def make(base: CountingEnv) -> TransformedEnv:
        def nest(td: TensorDictBase) -> TensorDictBase:
            return td.set(("deep", "observation"), td["observation"])

        label = TeacherActionTransform(NestedPlanner(3), replan_interval=interval)
        return TransformedEnv(base, Compose(nest, label))

    env = make(CountingEnv(LENGTHS))
    root = env.reset()
    for _ in range(stop):
        root = move(env, root)
    other = make(copy.deepcopy(env.base_env))
    other.load_state_dict(through(env.state_dict()))
    # what was loaded and not used yet is saved again
    (saved,), (again,) = (
        e.transform[-1].get_extra_state()["memory"]["history"]["values"].values()
        for e in (env, other)
    )
    assert torch.equal(saved, again)
    resumed = root.clone()
    for _ in range(12):
        root, resumed = move(env, root), move(other, resumed)
        assert torch.equal(resumed["observation"], root["observation"])
        assert torch.equal(resumed["teacher_action"], root["teacher_action"])
        assert torch.equal(resumed["teacher_mask"], root["teacher_mask"])
        assert root["teacher_mask"].all()
    saved, again = (e.transform[-1].stats() | {"seconds": 0} for e in (env, other))
    assert saved == again


def test_a_state_of_other_envs_is_passed_over() -> None:
    env = TransformedEnv(CountingEnv(LENGTHS), TeacherActionTransform(LookingBack(2)))
    env.reset()
    for base, window in ((CountingEnv((3, 3)), 2), (CountingEnv(LENGTHS), 4)):
        other = TransformedEnv(base, TeacherActionTransform(LookingBack(window)))
        other.load_state_dict(copy.deepcopy(env.state_dict()))
        frames = other.rollout(6, break_when_any_done=False)
        assert frames["teacher_mask"].all()
        torch.testing.assert_close(
            frames["teacher_action"], expected(frames["observation"], window)
        )


@pytest.mark.parametrize("gap", ["disabled", "loaded"])
@pytest.mark.parametrize("interval", [1, 2])
def test_after_a_gap_windows_are_exact_or_missing(gap: str, interval: int) -> None:
    label = TeacherActionTransform(Planner(3), replan_interval=interval)
    env = TransformedEnv(CountingEnv((30, 4)), label)
    root = env.reset()
    root = move(env, move(env, root))
    if gap == "disabled":
        label.enabled = False
        root = move(env, root)
        assert not root["teacher_mask"].any()
        label.enabled = True
    else:
        env.load_state_dict(env.state_dict())
    # Env 0 must see three more steps; env 1 (4 steps) starts an episode before that.
    labelled = []
    asked_at: list[Any] = [None, None]
    for _ in range(5):
        root = move(env, root)
        labelled.append(root["teacher_mask"].squeeze(-1).tolist())
        observation = root["observation"]
        for row in range(2):
            if not labelled[-1][row]:
                continue
            if asked_at[row] is None or observation[row, 2] - asked_at[row][2] in (
                interval,
                -asked_at[row][2],
            ):
                asked_at[row] = observation[row].clone()
            exact = expected(asked_at[row], 3)
            exact[1] += (observation[row, 2] - asked_at[row][2]) / 100
            torch.testing.assert_close(root["teacher_action"][row], exact)
    if gap == "disabled":  # env 1 is at step 3 when the gap ends
        assert labelled == [[False, True], [False, True]] + [[True, True]] * 3
    else:  # and at step 2 here
        assert labelled == [[False, False], [False, True]] + [[True, True]] * 3
    assert label.stats()["incomplete"] == (2 if gap == "disabled" else 3)


def test_copies_remember_on_their_own() -> None:
    env = TransformedEnv(CountingEnv((20, 20)), TeacherActionTransform(LookingBack(3)))
    root = move(env, env.reset())
    other = copy.deepcopy(env)
    for this in (env, other):
        following = move(this, move(this, root.clone()))
        torch.testing.assert_close(
            following["teacher_action"], expected(following["observation"], 3)
        )


@pytest.mark.parametrize("extra", [{}, {"history_window": 2}])
def test_frames_are_refused(extra: dict[str, int]) -> None:
    frames = CountingEnv().rollout(2)
    match = "needs the transform in the env.*postproc, replay buffer"
    label = TeacherActionTransform(LookingBack(2), **extra)
    with pytest.raises(ValueError, match=match):
        label(frames)
    buffer = ReplayBuffer(storage=LazyTensorStorage(10), transform=label)
    with pytest.raises(ValueError, match=match):
        buffer.extend(frames.reshape(-1))
    collector = Collector(
        CountingEnv(), None, frames_per_batch=6, total_frames=6, postproc=label
    )
    with pytest.raises(ValueError, match=match):
        next(iter(collector))


def test_errors() -> None:
    def reset(**kwargs: Any) -> None:
        base = TransformedEnv(
            CountingEnv((2,)),
            lambda td: td.set("text", NonTensorStack("push")),
        )
        label = TeacherActionTransform(lambda td: torch.zeros(1, 2), **kwargs)
        TransformedEnv(base, label, auto_unwrap=False).reset()

    with pytest.raises(ValueError, match="history_window must be at least 1, got 0"):
        reset(history_window=0)
    with pytest.raises(ValueError, match="needs history_keys="):
        reset(history_window=2)
    with pytest.raises(KeyError, match=r"history of 'image'.*found.*'observation'"):
        reset(history_window=2, history_keys=["image"])
    with pytest.raises(TypeError, match="'text' is NonTensor"):
        reset(history_window=2, history_keys=["text"])


def test_a_changing_number_of_envs_is_refused() -> None:
    label = TeacherActionTransform(LookingBack(2))
    TransformedEnv(CountingEnv((2, 2)), label).reset()
    label.reset_parent()
    with pytest.raises(RuntimeError, match=r"follows 2 environments.*but 3"):
        TransformedEnv(CountingEnv((2, 2, 2)), label).reset()


def test_module_teacher() -> None:
    module = TensorDictModule(
        label_of_window, ["observation", "timestep_pad_mask"], ["a"]
    )
    label = TeacherActionTransform(
        module, history_window=2, history_keys=["observation"]
    )
    env = TransformedEnv(CountingEnv(), label)
    frames = env.rollout(6, break_when_any_done=False)
    torch.testing.assert_close(
        frames["teacher_action"], expected(frames["observation"], 2)
    )


if __name__ == "__main__":
    pytest.main([__file__])
