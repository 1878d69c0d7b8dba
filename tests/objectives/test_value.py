# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""FiniteHorizonGAE against the released recursion, by hand, and against stock GAE."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_rpd.objectives import FiniteHorizonGAE

CHOICES = ["truncated", "always", "never"]
GAMMA, LMBDA = 0.8, 0.9


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def critic():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    return TensorDictModule(net, ["observation"], ["state_value"])


def estimator(choice, network, **kwargs):
    return FiniteHorizonGAE(
        gamma=f64(kwargs.pop("gamma", GAMMA)),
        lmbda=f64(kwargs.pop("lmbda", LMBDA)),
        value_network=network,
        bootstrap_at_done=choice,
        **kwargs,
    )


def rollout(batch, seed=0, p_done=0.2):
    """A batch ``[*batch]``, time last, with staggered ends of both kinds."""
    torch.manual_seed(seed)
    obs = torch.randn(*batch, 4, dtype=torch.float64)
    next_obs = torch.randn(*batch, 4, dtype=torch.float64)
    terminated = torch.rand(*batch, 1) < p_done
    truncated = torch.rand(*batch, 1) < p_done
    done = terminated | truncated
    # Inside an episode the next observation is the one of the next row.
    inside = ~done[..., :-1, :]
    next_obs[..., :-1, :] = torch.where(inside, obs[..., 1:, :], next_obs[..., :-1, :])
    return TensorDict(
        {
            "observation": obs,
            "next": {
                "observation": next_obs,
                "reward": torch.randn(*batch, 1, dtype=torch.float64),
                "done": done,
                "terminated": terminated,
                "truncated": truncated,
            },
        },
        batch,
    )


def definition(data, network, choice, t):
    """The advantage of row ``t`` of a ``[T]`` batch from its definition, in floats.

    Weighted mean of the n-step returns that exist, each summed up on its own.
    """
    reward = data["next", "reward"].squeeze(-1).tolist()
    done = data["next", "done"].squeeze(-1).tolist()
    terminated = data["next", "terminated"].squeeze(-1).tolist()
    value = network.module(data["observation"]).squeeze(-1).tolist()
    after = network.module(data["next", "observation"]).squeeze(-1).tolist()
    numerator = denominator = 0.0
    for n in range(1, len(reward) - t + 1):
        last = t + n - 1
        bootstrap = after[last]
        if choice == "never" and done[last]:
            bootstrap = 0.0
        if choice == "truncated" and terminated[last]:
            bootstrap = 0.0
        n_step = sum(GAMMA**k * reward[t + k] for k in range(n)) + GAMMA**n * bootstrap
        numerator += LMBDA ** (n - 1) * n_step
        denominator += LMBDA ** (n - 1)
        if done[last]:
            break
    return numerator / denominator - value[t]


def released(data, network, choice):
    """The loop of the released code, in its own buffers, for ``[N, T]``.

    ``dones[t]`` says that step ``t`` begins a new episode, and ``final_values[t]`` is
    the value of the terminal observation of the episode that step ``t`` ended, zero if
    it is not bootstrapped from.
    """
    reward = data["next", "reward"].squeeze(-1).T
    ended = data["next", "done"].squeeze(-1).T
    stop = {
        "always": torch.zeros_like(ended),
        "never": ended,
        "truncated": data["next", "terminated"].squeeze(-1).T,
    }[choice]
    with torch.no_grad():
        value = network.module(data["observation"]).squeeze(-1).T
        after = network.module(data["next", "observation"]).squeeze(-1).T
    final_values = torch.where(ended & ~stop, after, 0.0)
    n_steps = len(reward)
    advantage = torch.zeros_like(reward)
    for t in reversed(range(n_steps)):
        not_done = 1.0 - ended[t].double()
        following = after[t] if t == n_steps - 1 else value[t + 1]
        real_next = not_done * following + final_values[t]
        if t == n_steps - 1:
            coefficients = rewards = values = torch.zeros_like(real_next)
        coefficients = 1 + LMBDA * coefficients * not_done
        rewards = LMBDA * GAMMA * rewards * not_done + coefficients * reward[t]
        values = LMBDA * GAMMA * values * not_done + GAMMA * real_next
        advantage[t] = (rewards + values) / coefficients - value[t]
    return advantage.T.unsqueeze(-1), (advantage + value).T.unsqueeze(-1)


class TestReleased:
    @pytest.mark.parametrize("choice", CHOICES)
    @pytest.mark.parametrize("batch", [(1, 1), (3, 1), (1, 9), (6, 50)])
    def test_loop(self, choice, batch):
        network = critic()
        data = rollout(batch)
        advantage, target = released(data, network, choice)
        estimator(choice, network)(data)
        torch.testing.assert_close(data["advantage"], advantage)
        torch.testing.assert_close(data["value_target"], target)

    @pytest.mark.parametrize("choice", CHOICES)
    def test_definition(self, choice):
        network = critic()
        data = rollout((30,))
        for key in ("done", "terminated", "truncated"):
            data["next", key][-1] = False
        assert (data["next", "terminated"] ^ data["next", "truncated"]).sum() > 3
        estimator(choice, network)(data)
        expected = [definition(data, network, choice, t) for t in range(30)]
        torch.testing.assert_close(data["advantage"].squeeze(-1), f64(expected))

    def test_the_choices_differ(self):
        network = critic()
        data = rollout((6, 50))
        seen = [estimator(c, network)(data.copy())["advantage"] for c in CHOICES]
        assert not any(
            torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[i + 1 :]
        )


class TestByHand:
    """gamma = lambda = 1/2, V(s) = 1, 2, 3, V(terminal) = 4, r = 1, 2, 3."""

    def run(self, choice, terminated, truncated):
        end = torch.tensor([[False], [False], [terminated or truncated]])
        data = TensorDict(
            {
                "state_value": f64([[1], [2], [3]]),
                "next": {
                    "state_value": f64([[2], [3], [4]]),
                    "reward": f64([[1], [2], [3]]),
                    "done": end,
                    "terminated": end & terminated,
                },
            },
            [3],
        )
        gae = estimator(choice, None, gamma=0.5, lmbda=0.5)
        return gae(data)["advantage"].squeeze(-1).tolist()

    # With the terminal value:
    #   step 2: S = 3 + .5 * 4 = 5,                      c = 1,    A = 5 - 3 = 2
    #   step 1: S = 1.5 * 2 + .5 * 3 + .25 * 5 = 5.75,   c = 1.5,  A = 23/6 - 2 = 11/6
    #   step 0: S = 1.75 + .5 * 2 + .25 * 5.75 = 4.1875, c = 1.75, A = 4.1875/1.75 - 1
    WITH = (4.1875 / 1.75 - 1, 11 / 6, 2.0)
    # Without it:
    #   step 2: S = 3,                                   c = 1,    A = 0
    #   step 1: S = 3 + 1.5 + .25 * 3 = 5.25,            c = 1.5,  A = 3.5 - 2 = 1.5
    #   step 0: S = 1.75 + 1 + .25 * 5.25 = 4.0625,      c = 1.75, A = 4.0625/1.75 - 1
    WITHOUT = (4.0625 / 1.75 - 1, 1.5, 0.0)

    @pytest.mark.parametrize(
        "choice, terminated, truncated, bootstrapped",
        [
            ("truncated", True, False, False),
            ("truncated", True, True, False),
            ("truncated", False, True, True),
            ("truncated", False, False, True),
            ("always", True, False, True),
            ("always", True, True, True),
            ("always", False, True, True),
            ("always", False, False, True),
            ("never", True, False, False),
            ("never", True, True, False),
            ("never", False, True, False),
            ("never", False, False, True),
        ],
    )
    def test_table_of_the_docstring(self, choice, terminated, truncated, bootstrapped):
        expected = self.WITH if bootstrapped else self.WITHOUT
        got = self.run(choice, terminated, truncated)
        assert tuple(got) == pytest.approx(expected)


class TestLayouts:
    @pytest.mark.parametrize("choice", CHOICES)
    def test_workers_envs_time(self, choice):
        network = critic()
        data = rollout((2, 3, 20))
        gae = estimator(choice, network)
        whole = gae(data.copy())["advantage"]
        assert whole.shape == (2, 3, 20, 1)
        for w in range(2):
            part = gae(data[w].copy())["advantage"]
            torch.testing.assert_close(whole[w], part)
            for n in range(3):
                torch.testing.assert_close(part[n], gae(data[w, n].copy())["advantage"])

    @pytest.mark.parametrize("how", ["name", "call", "constructor"])
    def test_time_is_not_last(self, how):
        network = critic()
        data = rollout((3, 20))
        expected = estimator("always", network)(data.copy())["advantage"]
        turned = data.transpose(0, 1).contiguous()
        if how == "name":
            turned.names = ["time", None]
        dim = {"time_dim": 0}
        gae = estimator("always", network, **(dim if how == "constructor" else {}))
        gae(turned, **(dim if how == "call" else {}))
        torch.testing.assert_close(turned["advantage"].transpose(0, 1), expected)

    def test_an_episode_knows_nothing_of_the_next(self):
        network = critic()
        data = rollout((40,))
        first = int(data["next", "done"].squeeze(-1).nonzero()[0])
        expected = estimator("always", network)(data.copy())["advantage"]
        data["next", "reward"][first + 1 :] = math.nan
        got = estimator("always", network)(data)["advantage"]
        assert torch.equal(got[: first + 1], expected[: first + 1])
        assert got[first + 1].isnan()


class TestAgainstStockGAE:
    def pair(self, choice, lmbda, data, **kwargs):
        network = critic()
        stock = GAE(gamma=f64(GAMMA), lmbda=f64(lmbda), value_network=network, **kwargs)
        ours = estimator(choice, network, lmbda=lmbda, **kwargs)
        return ours(data.copy()), stock(data.copy())

    def test_lambda_zero_agrees(self):
        ours, stock = self.pair("truncated", 0.0, rollout((4, 30)))
        for key in (
            "advantage",
            "value_target",
            "state_value",
            ("next", "state_value"),
        ):
            torch.testing.assert_close(ours[key], stock[key])

    def test_lambda_zero_disagrees_where_terminations_are_bootstrapped(self):
        ours, stock = self.pair("always", 0.0, rollout((4, 30)))
        differ = ~torch.isclose(ours["advantage"], stock["advantage"])
        assert torch.equal(differ, ours["next", "terminated"])

    def test_last_step_of_an_episode_agrees_and_others_do_not(self):
        ours, stock = self.pair("truncated", 0.9, rollout((4, 30)))
        same = torch.isclose(ours["advantage"], stock["advantage"])
        last = ours["next", "done"].clone()
        last[:, -1] = True
        assert torch.equal(same, last)

    def test_far_from_the_end_agrees(self):
        # The weight that stock GAE puts on the last return is .9^200 = 7e-10.
        ours, stock = self.pair("truncated", 0.9, rollout((200,), p_done=0.0))
        torch.testing.assert_close(ours["advantage"][0], stock["advantage"][0])
        assert not torch.isclose(ours["advantage"][-3], stock["advantage"][-3])

    def test_average_gae(self):
        ours, _ = self.pair("always", 0.9, rollout((4, 30)), average_gae=True)
        torch.testing.assert_close(ours["advantage"].mean().item(), 0.0)
        torch.testing.assert_close(ours["advantage"].std().item(), 1.0)
        plain, _ = self.pair("always", 0.9, rollout((4, 30)))
        # The value target is not standardised.
        assert torch.equal(ours["value_target"], plain["value_target"])
        assert not FiniteHorizonGAE(
            gamma=0.9, lmbda=0.9, value_network=None
        ).average_gae


class TestHost:
    def test_keys(self):
        network = critic()
        data = rollout((3, 10))
        expected = estimator("always", network)(data.copy())
        network = TensorDictModule(network.module, ["observation"], [("critic", "v")])
        gae = estimator("always", network)
        gae.set_keys(
            value=("critic", "v"),
            advantage=("ppo", "adv"),
            value_target=("ppo", "target"),
            reward=("task", "reward"),
            done=("task", "done"),
            terminated=("task", "terminated"),
        )
        for key in ("reward", "done", "terminated"):
            data.rename_key_(("next", key), ("next", "task", key))
        gae(data)
        assert torch.equal(data["ppo", "adv"], expected["advantage"])
        assert torch.equal(data["ppo", "target"], expected["value_target"])
        assert torch.equal(data["critic", "v"], expected["state_value"])

    def test_dispatch(self):
        network = critic()
        data = rollout((3, 10))
        gae = estimator("always", network)
        advantage, target = gae(
            observation=data["observation"],
            next_observation=data["next", "observation"],
            next_reward=data["next", "reward"],
            next_done=data["next", "done"],
            next_terminated=data["next", "terminated"],
        )
        gae(data)
        assert torch.equal(advantage, data["advantage"])
        assert torch.equal(target, data["value_target"])

    def test_value_estimate_leaves_its_input_alone(self):
        data = rollout((3, 10))
        gae = estimator("always", critic())
        target = gae.value_estimate(data)
        assert set(data.keys()) == {"observation", "next"}
        assert torch.equal(target, gae(data)["value_target"])

    def test_buffers_are_respected(self):
        network = critic()
        gae = FiniteHorizonGAE(gamma=0.1, lmbda=0.2, value_network=network)
        gae.double()
        gae.gamma.fill_(GAMMA)
        gae.lmbda.fill_(LMBDA)
        assert {"gamma", "lmbda"} <= set(gae.state_dict())
        data = rollout((3, 10))
        expected = estimator("truncated", network)(data.copy())["advantage"]
        assert torch.equal(gae(data)["advantage"], expected)

    def test_parameters_given_to_the_call(self):
        network = critic()
        data = rollout((3, 10))
        expected = estimator("always", network)(data.copy())["advantage"]
        params = TensorDict.from_module(network).data.clone()
        with torch.no_grad():
            for p in network.parameters():
                p.zero_()
        gae = estimator("always", network)
        torch.testing.assert_close(gae(data, params=params)["advantage"], expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"num_chunks": 3},
            {"value_chunk_size": 4},
            {"value_chunk_size": 3, "value_chunk_dim": 1},
            {"deactivate_vmap": True},
        ],
    )
    def test_ways_to_call_the_critic(self, options):
        data = rollout((6, 10))
        expected = estimator("always", critic())(data.copy())
        got = estimator("always", critic(), **options)(data)
        for key in ("advantage", "state_value", ("next", "state_value")):
            torch.testing.assert_close(got[key], expected[key])

    def test_chunks_are_all_that_the_critic_sees(self):
        """Nothing larger than a chunk is made: a batch of pictures fills the memory."""
        network, seen = critic(), []
        network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        data = rollout((6, 10))
        estimator("always", network, value_chunk_size=2)(data)
        assert [td.shape for td in seen] == 6 * [torch.Size([2, 10])]
        shared = data["observation"].untyped_storage().data_ptr()
        assert all(
            td["observation"].untyped_storage().data_ptr() == shared for td in seen[:3]
        )

    def test_shifted_cuts_where_rows_are_dropped(self):
        network = critic()
        data = rollout((40,), p_done=0.05)
        whole = estimator("never", network)(data.copy())["advantage"]
        gae = estimator("never", network, shifted=True, shifted_budget=1)
        got = gae(data.refine_names("time"))
        valid = got["shifted_valid"]
        n = int(valid.sum())
        assert 0 < n < 40 and valid[:n].all()
        assert (got["advantage"][n:] == 0).all()
        # The rows kept, as if the batch ended there.
        expected = estimator("never", network)(data[:n].copy())["advantage"]
        torch.testing.assert_close(got["advantage"][:n], expected)
        assert not torch.allclose(expected, whole[:n])

    @pytest.mark.parametrize("options", [{}, {"value_chunk_size": 2}])
    def test_missing_next_observations(self, options):
        # Collectors that compact observations leave NaN at the end of an episode;
        # stock TorchRL then takes the observation before it.
        network = critic()
        data = rollout((3, 20))
        ended = data["next", "done"]
        nan = torch.where(ended, math.nan, data["next", "observation"])
        data["next", "observation"] = nan
        stale = torch.full((3, 20, 1), 1e6, dtype=torch.float64)
        data["state_value"] = data["next", "state_value"] = stale
        gae = estimator("always", network, **options)
        filled = data.copy()
        filled["next", "observation"] = torch.where(ended, data["observation"], nan)
        expected = gae(filled)["advantage"]
        torch.testing.assert_close(gae(data)["advantage"], expected)

    def test_nan_value_that_is_not_bootstrapped(self):
        data = rollout((3, 20)).exclude("observation")
        data["state_value"] = torch.randn(3, 20, 1).double()
        after = torch.randn(3, 20, 1).double()
        data["next", "state_value"] = after.masked_fill(data["next", "done"], math.nan)
        assert estimator("never", None)(data)["advantage"].isfinite().all()

    @pytest.mark.parametrize("differentiable", [False, True])
    def test_gradient(self, differentiable):
        data = rollout((3, 10)).exclude("observation")
        data["next", "state_value"] = torch.randn(3, 10, 1).double()
        value = torch.randn(3, 10, 1).double().requires_grad_()
        data["state_value"] = value
        gae = estimator("always", None, differentiable=differentiable)
        assert gae(data)["advantage"].requires_grad == differentiable

    def test_in_a_loss(self):
        from tensordict.nn import (
            NormalParamExtractor,
            ProbabilisticTensorDictModule,
            ProbabilisticTensorDictSequential,
        )
        from torchrl.modules import IndependentNormal

        network = critic()
        actor = ProbabilisticTensorDictSequential(
            TensorDictModule(
                nn.Sequential(nn.Linear(4, 4).double(), NormalParamExtractor()),
                ["observation"],
                ["loc", "scale"],
            ),
            ProbabilisticTensorDictModule(
                ["loc", "scale"],
                ["action"],
                distribution_class=IndependentNormal,
                return_log_prob=True,
            ),
        )
        loss = ClipPPOLoss(actor, network)
        loss.make_value_estimator(estimator("always", network))
        data = actor(rollout((3, 10))).detach()
        out = loss(data.copy())
        estimator("always", network)(data)
        torch.testing.assert_close(out["loss_objective"], loss(data)["loss_objective"])

    def test_compile(self):
        torch._dynamo.reset()
        gae = estimator("truncated", None)
        data = rollout((3, 6)).exclude("observation")
        data["state_value"] = torch.randn(3, 6, 1).double()
        data["next", "state_value"] = torch.randn(3, 6, 1).double()
        expected = gae(data.copy())["advantage"]
        compiled = torch.compile(gae, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(data.copy())["advantage"], expected)

    def test_deepcopy(self):
        gae = copy.deepcopy(estimator("never", critic()))
        assert gae.bootstrap_at_done == "never"
        expected = estimator("never", critic())(rollout((3, 6)))["advantage"]
        assert torch.equal(gae(rollout((3, 6)))["advantage"], expected)

    def test_bad_options(self):
        with pytest.raises(ValueError, match="bootstrap_at_done must be one of"):
            estimator("sometimes", None)
        with pytest.raises(ValueError, match="auto_reset_env"):
            estimator("always", None, auto_reset_env=True)


if __name__ == "__main__":
    pytest.main([__file__])
