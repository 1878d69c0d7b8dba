# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What TorchRL's test suite asks of every loss module, of both of ours."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import IndependentNormal
from torchrl.objectives import ClipPPOLoss, KLPENPPOLoss, ValueEstimators

from torchrl_rpd.objectives import DistillKLPENPPOLoss, DistillPPOLoss

LOSSES = [DistillPPOLoss, DistillKLPENPPOLoss]
PARENT = {DistillPPOLoss: ClipPPOLoss, DistillKLPENPPOLoss: KLPENPPOLoss}
DEFAULT_KEYS = {
    "advantage": "advantage",
    "value_target": "value_target",
    "value": "state_value",
    "sample_log_prob": "action_log_prob",
    "action": "action",
    "reward": "reward",
    "done": "done",
    "terminated": "terminated",
    "teacher_action": "teacher_action",
    "teacher_mask": "teacher_mask",
    "teacher_std": "teacher_std",
    "distill_action": None,
}
EXTRA = ["loss_distill", "distill_error", "distill_coverage", "kl_k3"]
ESTIMATORS = [
    ValueEstimators.TD0,
    ValueEstimators.TD1,
    ValueEstimators.TDLambda,
    ValueEstimators.GAE,
]

pytestmark = pytest.mark.parametrize("cls", LOSSES)


def with_next(data):
    """Adds what an advantage is computed from."""
    shape = data.batch_size
    data["next"] = TensorDict(
        {
            "observation": torch.randn(*shape, 5, dtype=torch.float64),
            "reward": torch.randn(*shape, 1, dtype=torch.float64),
            "done": torch.zeros(*shape, 1, dtype=torch.bool),
            "terminated": torch.zeros(*shape, 1, dtype=torch.bool),
        },
        shape,
    )
    return data


@pytest.fixture
def parts(build, cls):
    """A loss, its networks and a minibatch."""
    actor, critic = build.actor(), build.critic()
    return cls(actor, critic), actor, critic, build.minibatch(actor)


class TestKeys:
    def test_unknown(self, parts, cls):
        with pytest.raises(ValueError):
            parts[0].set_keys(unknown_key="test2")

    def test_defaults(self, parts, cls):
        for name, value in DEFAULT_KEYS.items():
            assert getattr(parts[0].tensor_keys, name) == value
        assert set(vars(cls.default_keys())) == set(DEFAULT_KEYS)

    @pytest.mark.parametrize("key", ["test1", ("a", "test1")])
    def test_set_one_by_one_and_all_at_once(self, parts, cls, key):
        loss = copy.deepcopy(parts[0])
        for name in DEFAULT_KEYS:
            loss.set_keys(**{name: key})
            assert getattr(loss.tensor_keys, name) == key
        loss = copy.deepcopy(parts[0])
        loss.set_keys(**dict.fromkeys(DEFAULT_KEYS, key))
        assert all(getattr(loss.tensor_keys, name) == key for name in DEFAULT_KEYS)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_reach_the_value_estimator(self, parts, cls, estimator):
        loss = parts[0]
        new = {
            "advantage": "adv_test",
            "value_target": "target_test",
            "reward": "reward_test",
            "done": ("done", "test"),
            "terminated": ("terminated", "test"),
        }
        loss.set_keys(**new)
        loss.make_value_estimator(estimator)
        for name, key in new.items():
            assert getattr(loss.value_estimator.tensor_keys, name) == key

    def test_all_keys_renamed_give_the_same_losses(self, parts, cls):
        loss, actor, _, data = parts
        expected = loss(data)
        other = cls(actor, parts[2])
        for name in ("advantage", "value_target", "teacher_action", "teacher_mask"):
            data.rename_key_(name, ("nested", name))
            other.set_keys(**{name: ("nested", name)})
        out = other(data)
        for key in [*EXTRA, "loss_objective", "loss_critic"]:
            assert torch.equal(out[key], expected[key])


class TestDispatch:
    def test_keyword_arguments_equal_the_tensordict(self, parts, cls):
        loss, _, _, data = parts
        loss = cls(parts[1], parts[2], entropy_bonus=False)
        data = with_next(data)
        # A loss that finds an advantage in the input does not compute one, but it is no
        # in_key: through keyword arguments the loss computes its own.
        expected = copy.deepcopy(loss)(data.exclude("advantage", "value_target"))
        kwargs = {
            "_".join([key] if isinstance(key, str) else key): data[key]
            for key in loss.in_keys
        }
        values = loss(**kwargs)
        assert len(values) == len(loss.out_keys)
        for key, value in zip(loss.out_keys, values, strict=True):
            torch.testing.assert_close(value, expected[key])

    def test_selected_outputs_come_in_order(self, parts, cls):
        loss, _, _, data = parts
        data = with_next(data)
        kwargs = {
            "_".join([key] if isinstance(key, str) else key): data[key]
            for key in loss.in_keys
        }
        loss.select_out_keys("loss_distill", "loss_objective")
        distill, objective = loss(**kwargs)
        out = copy.deepcopy(loss)(data.exclude("advantage", "value_target"))
        torch.testing.assert_close(distill, out["loss_distill"])
        torch.testing.assert_close(objective, out["loss_objective"])

    def test_every_out_key_is_there(self, parts, cls):
        loss, _, _, data = parts
        out = loss(data)
        assert set(loss.out_keys) <= set(out.keys())
        assert loss.out_keys[-4:] == EXTRA

    def test_a_label_mask_is_optional(self, parts, cls):
        loss, _, _, data = parts
        data = with_next(data)
        kwargs = {
            "_".join([key] if isinstance(key, str) else key): data[key]
            for key in loss.in_keys
            if key != "teacher_mask"
        }
        values = dict(zip(loss.out_keys, loss(**kwargs), strict=True))
        assert values["distill_coverage"] == 1


class TestReduction:
    @pytest.mark.parametrize("reduction", [None, "none", "mean", "sum"])
    def test_shapes_and_values(self, build, cls, reduction):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor, (3, 4))
        out = cls(actor, critic, reduction=reduction)(data)
        rows = cls(actor, critic, reduction="none")(data)
        for key in ("loss_objective", "loss_critic", "loss_entropy", "loss_distill"):
            assert rows[key].shape == (3, 4)
            reduce = {"none": lambda x: x, "sum": torch.sum}.get(reduction, torch.mean)
            torch.testing.assert_close(out[key], reduce(rows[key]))


class TestNetworks:
    """Each loss trains its own network, as the parents' tests have it."""

    def test_gradients_stay_where_they_belong(self, parts, cls):
        loss, actor, critic, data = parts
        out = loss(data)
        nets = {"actor": list(actor.parameters()), "critic": list(critic.parameters())}
        owner = {"loss_critic": "critic"}
        for key in [k for k in out.keys() if k.startswith("loss_")]:
            for name, params in nets.items():
                grads = torch.autograd.grad(
                    out[key], params, retain_graph=True, allow_unused=True
                )
                touched = [g is not None for g in grads]
                assert any(touched) == (owner.get(key, "actor") == name), (key, name)

    def test_input_is_left_as_it_was(self, parts, cls):
        loss, _, _, data = parts
        before = data.clone()
        loss(data)
        assert set(data.keys(True, True)) == set(before.keys(True, True))
        assert (data == before).all()

    def test_reset_parameters_recursive(self, parts, cls):
        loss = parts[0]
        with torch.no_grad():
            for p in loss.parameters():
                p.add_(1000)
        old = {name: p.detach().clone() for name, p in loss.named_parameters()}
        loss.reset_parameters_recursive()
        reset = {n for n, p in loss.named_parameters() if (p != old[n]).all()}
        # The free standard deviation has no reset of its own in TensorDict.
        assert {n for n in old if "scale" not in n} <= reset

    @pytest.mark.parametrize("separate", [False, True])
    def test_shared_trunk(self, build, cls, separate):
        """``separate_losses`` keeps the critic's gradient out of what is shared."""
        torch.manual_seed(0)
        trunk = TensorDictModule(
            nn.Sequential(nn.Linear(5, 8), nn.Tanh()).double(),
            ["observation"],
            ["hidden"],
        )
        full, actor_net = build.actor(), nn.Linear(8, 14).double()

        class Split(nn.Module):
            def forward(self, x):
                loc, scale = x.chunk(2, -1)
                return loc, scale.exp()

        actor = type(full)(
            trunk,
            TensorDictModule(
                nn.Sequential(actor_net, Split()), ["hidden"], ["loc", "scale"]
            ),
            full[1],
        )
        head = TensorDictModule(nn.Linear(8, 1).double(), ["hidden"], ["state_value"])
        data = build.minibatch(actor).exclude("hidden")
        loss = cls(actor, head, separate_losses=separate)
        out = loss(data)
        params = list(trunk.parameters())
        for key, reaches in [("loss_critic", not separate), ("loss_distill", True)]:
            grads = torch.autograd.grad(
                out[key], params, retain_graph=True, allow_unused=True
            )
            assert all((g is not None) == reaches for g in grads), key
        # Nothing is held twice.
        names = [id(p) for p in loss.parameters()]
        assert len(names) == len(set(names)) == 2 + 2 + 2


class TestState:
    def test_state_dict_round_trip_is_strict(self, build, cls):
        loss = cls(build.actor(), build.critic(), distill_coeff=0.25)
        with torch.no_grad():
            for p in loss.parameters():
                p.add_(0.1)
        other = cls(build.actor(), build.critic())
        missing = other.load_state_dict(loss.state_dict(), strict=True)
        assert not missing.missing_keys and not missing.unexpected_keys
        data = build.minibatch(build.actor())
        expected = copy.deepcopy(loss)(data)
        for key, value in other(data).items():
            assert torch.equal(value, expected[key]), key

    def test_moves_with_the_module(self, parts, cls):
        loss = parts[0]
        # "meta" stands in for an accelerator: everything has to move.
        moved = copy.deepcopy(loss).to("meta")
        tensors = [*moved.parameters(), *moved.buffers()]
        assert {t.device.type for t in tensors} == {"meta"}

    def test_single_and_double_precision(self, build, cls):
        for dtype in (torch.float32, torch.float64):
            actor, critic = build.actor(dtype=dtype), build.critic(dtype)
            out = cls(actor, critic)(build.minibatch(actor, dtype=dtype))
            assert out["loss_distill"].dtype == dtype

    @pytest.mark.gpu
    def test_on_an_accelerator(self, build, cls):
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        expected = cls(actor, critic)(data)
        loss = cls(actor, critic).to("cuda")
        out = loss(data.to("cuda"))
        for key, value in out.items():
            assert value.device.type == "cuda"
            torch.testing.assert_close(value.cpu(), expected[key])


class TestConstructor:
    def test_a_misspelt_argument_is_refused(self, build, cls):
        # PPOLoss takes and ignores any keyword.
        with pytest.raises(TypeError, match=f"{cls.__name__}.*distil_coeff"):
            cls(build.actor(), build.critic(), distil_coeff=0.1)

    def test_every_argument_of_the_parent_is_accepted(self, build, cls):
        values = {
            "clip_epsilon": 0.1,
            "entropy_bonus": False,
            "samples_mc_entropy": 2,
            "entropy_coeff": 0.02,
            "critic_coeff": 0.3,
            "loss_critic_type": "l2",
            "normalize_advantage": True,
            "separate_losses": True,
            "reduction": "sum",
            "functional": True,
            "log_explained_variance": False,
            "dtarg": 0.02,
            "beta": 0.5,
            "max_importance_ratio": 3.0,
        }
        known = set(inspect.signature(PARENT[cls].__init__).parameters)
        known |= {"functional", "log_explained_variance"}
        kwargs = {k: v for k, v in values.items() if k in known}
        actor, critic = build.actor(), build.critic()
        data = build.minibatch(actor)
        out = cls(actor, critic, distill_coeff=0.0, **kwargs)(data)
        expected = PARENT[cls](actor, critic, **kwargs)(data)
        for key, value in expected.items():
            assert torch.equal(out[key], value), key

    def test_deprecated_names_get_the_parents_error(self, build, cls):
        with pytest.raises(TypeError, match="critic_coeff"):
            cls(build.actor(), build.critic(), critic_coef=1.0)

    @pytest.mark.parametrize("value", [float("nan"), -0.1])
    def test_coefficient_is_not_negative(self, build, cls, value):
        with pytest.raises(ValueError, match="distill_coeff must be >= 0"):
            cls(build.actor(), build.critic(), distill_coeff=value)


@pytest.mark.parametrize("kind", ["mse", "nll", "kl"])
def test_same_term_on_both_parents(build, cls, kind):
    """The term, its gradient and zero do not depend on the loss it is added to."""
    actor, critic = build.actor(IndependentNormal), build.critic()
    data = build.minibatch(actor)
    data["teacher_std"] = torch.full((12, 7), 0.3)
    data["teacher_mask"][::3] = False
    data["teacher_action"][::3] = float("nan")
    ours = cls(actor, critic, distill_type=kind)
    clip = DistillPPOLoss(actor, critic, distill_type=kind)
    out, expected = ours(data), clip(data)
    for key in EXTRA:
        assert torch.equal(out[key], expected[key])
    params = list(actor.parameters())
    for a, b in zip(
        torch.autograd.grad(out["loss_distill"], params, allow_unused=True),
        torch.autograd.grad(expected["loss_distill"], params, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    # Fresh ones: the KL penalty's coefficient adapts in every call.
    off, parent = cls(actor, critic, distill_coeff=0.0), PARENT[cls](actor, critic)
    zero, plain = off(data), parent(data)
    for key, value in plain.items():
        assert torch.equal(zero[key], value), key

    def gradients(output):
        loss = sum(v for k, v in output.items() if k.startswith("loss_"))
        return torch.autograd.grad(loss, params)

    for a, b in zip(gradients(zero), gradients(plain), strict=True):
        assert torch.equal(a.view(torch.int64), b.view(torch.int64))


def test_ratio_weight_needs_a_clip_range(build, cls):
    options = {"distill_type": "kl", "ratio_weighted": True}
    if cls is DistillPPOLoss:
        cls(build.actor(), build.critic(), **options)
    else:
        with pytest.raises(ValueError, match="clip range"):
            cls(build.actor(), build.critic(), **options)


if __name__ == "__main__":
    pytest.main([__file__])
