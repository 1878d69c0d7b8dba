# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which teachers are understood, and that they never become part of an env."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from counting_env import CountingEnv, RecordingTeacher, assert_labels_belong
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import nn
from torchrl.data.vla import VLAAction
from torchrl.envs import Compose, RewardSum, TransformedEnv, check_env_specs

from torchrl_rpd.transforms import TeacherActionTransform
from torchrl_rpd.transforms._handle import TeacherHandle


class ChunkTeacher(TensorDictModuleBase):
    """Writes a chunk whose entry ``h`` is the first observation entry plus ``10 h``."""

    def __init__(self, horizon: int = 3, out: str = "nested") -> None:
        super().__init__()
        self.in_keys = ["observation"]
        self.out_keys = [("vla_action", "chunk"), ("vla_action", "tokens")]
        self.horizon = horizon
        self.out = out

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        first = tensordict["observation"][:, :1]
        chunk = torch.stack([first + 10 * h for h in range(self.horizon)], 1)
        if self.out == "tensorclass":
            action = VLAAction(chunk=chunk, batch_size=tensordict.batch_size)
            return tensordict.set("vla_action", action)
        if self.out == "fresh":
            return TensorDict({"vla_action": {"chunk": chunk}}, tensordict.batch_size)
        return tensordict.set(("vla_action", "chunk"), chunk)


def frames(rows: int = 4) -> TensorDict:
    return TensorDict({"observation": torch.rand(rows, 3)}, [rows])


@pytest.mark.parametrize("out", ["nested", "tensorclass", "fresh"])
def test_chunk_teacher_gives_its_first_action(out: str) -> None:
    td = frames()
    label = TeacherActionTransform(ChunkTeacher(out=out), max_batch_size=3)
    assert torch.equal(label(td)["teacher_action"], td["observation"][:, :1])


def test_module_teacher_is_frozen_and_in_eval_mode() -> None:
    norm = nn.BatchNorm1d(2)
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.9), norm)
    teacher = TensorDictModule(net, in_keys=["observation"], out_keys=["a"])
    label = TeacherActionTransform(teacher)
    td = frames()
    running = copy.deepcopy(norm.state_dict())
    out = label(td)["teacher_action"]
    assert torch.equal(out, label(td)["teacher_action"])  # no dropout
    assert torch.equal(norm.state_dict()["running_mean"], running["running_mean"])
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not out.requires_grad and not teacher.training


def test_half_precision_and_integers_become_float32() -> None:
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        action = torch.ones(4, 2, dtype=dtype)
        label = TeacherActionTransform(functools.partial(lambda out, td: out, action))
        assert label(frames())["teacher_action"].dtype == torch.float32


def test_function_that_returns_a_tensordict() -> None:
    td = frames()
    label = TeacherActionTransform(lambda batch: ChunkTeacher()(batch))
    assert torch.equal(label(td)["teacher_action"], td["observation"][:, :1])


def test_std_is_stored_on_request() -> None:
    def teacher(td: TensorDict) -> TensorDict:
        mean = td["observation"][:, :2]
        std = mean + 0.5
        std[1] = torch.inf
        vla = {"chunk": mean.unsqueeze(1), "std": std}
        return TensorDict({"vla_action": vla}, td.batch_size)

    td = frames()
    out = TeacherActionTransform(teacher, teacher_std_key=("teacher", "std"))(td)
    # a row whose spread is not finite is no label
    assert out["teacher_mask"].squeeze(-1).tolist() == [True, False, True, True]
    expected = td["observation"][:, :2] + 0.5
    expected[1] = 0
    assert torch.equal(out["teacher", "std"], expected)
    assert "teacher_std" not in TeacherActionTransform(teacher)(td)
    with pytest.raises(KeyError, match="writes neither 'teacher_std'"):
        TeacherActionTransform(ChunkTeacher(), teacher_std_key="teacher_std")(td)


def test_std_in_an_env() -> None:
    net = TensorDictModule(
        lambda obs: (obs[:, :2] * 0, obs[:, :2] + 1),
        ["observation"],
        ["a", "teacher_std"],
    )
    label = TeacherActionTransform(net, teacher_std_key="teacher_std")
    env = TransformedEnv(CountingEnv(), label)
    check_env_specs(env)
    out = env.rollout(7, break_when_any_done=False)
    torch.testing.assert_close(out["teacher_std"], out["observation"][..., :2] + 1)
    assert not out["next", "teacher_std"][out["next", "done"].squeeze(-1)].any()


@pytest.mark.parametrize(
    ("shape", "found"),
    [((4,), r"\[4\]"), ((3, 2), r"\[3, 2\]"), ((4, 3, 2), r"\[4, 3, 2\]")],
)
def test_wrong_shapes_are_named(shape: tuple[int, ...], found: str) -> None:
    label = TeacherActionTransform(lambda td: torch.zeros(shape))
    with pytest.raises(
        ValueError, match=rf"shape {found} for 4 rows; expected .*\[4, A"
    ):
        label(frames())


def test_chunk_without_horizon_is_refused() -> None:
    def teacher(td: TensorDict) -> TensorDict:
        return TensorDict({"vla_action": {"chunk": torch.zeros(4, 2)}}, [4])

    with pytest.raises(ValueError, match=r"expected an action of shape \[4, H, A\]"):
        TeacherActionTransform(teacher)(frames())


def test_outputs_that_are_no_action() -> None:
    with pytest.raises(TypeError, match="returned dict"):
        TeacherActionTransform(lambda td: {})(frames())
    with pytest.raises(KeyError, match=r"wrote no .*chunk.*found"):
        TeacherActionTransform(lambda td: td)(frames())
    many = TensorDictModule(lambda x: (x, x), ["observation"], ["loc", "scale"])
    with pytest.raises(KeyError, match="which one is the action"):
        TeacherActionTransform(many)(frames())


def test_exactly_one_teacher() -> None:
    with pytest.raises(ValueError, match="got neither"):
        TeacherActionTransform()
    with pytest.raises(ValueError, match="got both"):
        TeacherActionTransform(RecordingTeacher(), teacher_factory=RecordingTeacher)
    with pytest.raises(TypeError, match="got int"):
        TeacherActionTransform(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="without arguments"):
        TeacherActionTransform(teacher_factory=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got list"):
        label = TeacherActionTransform(teacher_factory=list)  # type: ignore[arg-type]
        label(frames())


def test_factory_is_called_once_and_late() -> None:
    built: list[RecordingTeacher] = []

    def factory() -> RecordingTeacher:
        built.append(RecordingTeacher())
        return built[-1]

    env = TransformedEnv(CountingEnv(), TeacherActionTransform(teacher_factory=factory))
    assert env.observation_spec["teacher_action"].shape == (3, 2)
    env.transform.enabled = False
    env.reset()
    assert not built
    env.transform.enabled = True
    env.rollout(5, break_when_any_done=False)
    env.transform.clone(), copy.deepcopy(env.transform)
    assert len(built) == 1


def teacher_net() -> TensorDictModule:
    return TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["a"])


def test_repr_names_the_teacher_and_builds_nothing() -> None:
    text = repr(TeacherActionTransform(teacher_factory=RecordingTeacher))
    assert "RecordingTeacher" in text and "teacher_action" in text


def test_teacher_is_no_part_of_the_env() -> None:
    teacher = teacher_net()
    label = TeacherActionTransform(teacher)
    env = TransformedEnv(CountingEnv(), Compose(RewardSum(), label))
    env.reset()
    assert not list(env.parameters()) and not list(env.buffers())
    assert teacher not in set(env.modules())
    assert not any("weight" in key for key in env.state_dict())
    env.load_state_dict(env.state_dict())
    env.transform.double()
    assert teacher.module.weight.dtype == torch.float32
    with pytest.raises(RuntimeError, match="teacher_factory="):
        pickle.dumps(label)


def test_deepcopy_shares_the_teacher_and_nothing_else() -> None:
    teacher = RecordingTeacher()
    env = TransformedEnv(CountingEnv(), TeacherActionTransform(teacher))
    other = copy.deepcopy(env)
    assert_labels_belong(other.rollout(5, break_when_any_done=False))
    assert teacher.calls and other.transform.stats()["queries"] == len(teacher.asked)
    assert env.transform.stats()["queries"] == 0
    other.transform.enabled = False
    assert env.transform.enabled


def test_factory_travels_through_pickle() -> None:
    label = TeacherActionTransform(
        teacher_factory=lambda: lambda td: td["observation"][:, :2], query_fraction=0.5
    )
    td = frames(50)
    label(td)
    arrived = pickle.loads(pickle.dumps(label))
    expected, got = label(td), arrived(td)
    assert torch.equal(got["teacher_mask"], expected["teacher_mask"])
    assert torch.equal(got["teacher_action"], expected["teacher_action"])


def test_modules_on_one_device_are_given_their_data_there() -> None:
    seen: list[torch.device] = []

    def record(module: nn.Module, args: tuple) -> None:
        seen.append(args[0].device)

    net = teacher_net()
    net.module.register_forward_pre_hook(record)
    handle = TeacherHandle(net.to("meta"))
    chunk, _ = handle(frames())
    assert seen == [torch.device("meta")] and chunk.shape == (4, 1, 2)


def test_argument_ranges() -> None:
    teacher = RecordingTeacher()
    for kwargs, match in (
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"query_fraction": 1.5}, "query_fraction"),
        ({"query_fraction": -0.1}, "query_fraction"),
        ({"replan_interval": 0}, "replan_interval"),
        ({"replan_interval": 2, "query_fraction": 0.5}, "query_fraction"),
        ({"replan_interval": 2, "teacher_std_key": "teacher_std"}, "teacher_std_key"),
        ({"on_non_finite": "ignore"}, "on_non_finite"),
        ({"low": 1.0, "high": -1.0}, "low must not be above high"),
        ({"low": [0.0, 0.0], "high": [1.0]}, "high is of shape"),
    ):
        with pytest.raises(ValueError, match=match):
            TeacherActionTransform(teacher, **kwargs)


if __name__ == "__main__":
    pytest.main([__file__])
