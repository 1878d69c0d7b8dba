# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Finite-horizon generalised advantage estimation."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.value import GAE

__all__ = ["BootstrapAtDone", "FiniteHorizonGAE"]

BootstrapAtDone = Literal["truncated", "always", "never"]


class FiniteHorizonGAE(GAE):
    r"""GAE whose weights are normalised over the steps that really follow.

    The usual estimator weighs the n-step returns with
    :math:`(1-\lambda)\lambda^{n-1}`, as if the trajectory never ended, and gives
    what is left of the weight to the last of them. This one uses only the :math:`K`
    n-step returns that exist between step :math:`t` and the end of its trajectory
    piece (end of the episode or of the batch) and normalises by the sum of
    their weights:

    .. math::
        A_t = \frac{\sum_{n=1}^{K} \lambda^{n-1} G_t^{(n)}}
                   {\sum_{n=1}^{K} \lambda^{n-1}} - V(s_t), \qquad
        G_t^{(n)} = \sum_{k=0}^{n-1} \gamma^k r_{t+k} + \gamma^n b_{t+n}

    computed backwards in one pass, with :math:`\kappa_t = 0` where the piece ends at
    step :math:`t` and 1 elsewhere:

    .. math::
        c_t &= 1 + \lambda \kappa_t c_{t+1} \\
        S_t &= c_t r_t + \gamma b_{t+1} + \lambda \gamma \kappa_t S_{t+1} \\
        A_t &= S_t / c_t - V(s_t)

    The bootstrap :math:`b_{t+1}` is the value of the observation *after* step
    :math:`t`, the terminal one at the end of an episode, or zero:

    =================================== =============== ============ ===========
    step :math:`t`                      ``"truncated"`` ``"always"`` ``"never"``
    =================================== =============== ============ ===========
    not done (last of the batch too)    value           value        value
    truncated, not terminated           value           value        0
    terminated (also truncated at once) 0               value        0
    =================================== =============== ============ ===========

    ``"truncated"`` is TorchRL's own rule. ``"always"`` is what the released RPD code
    does, which is why a success that ends an episode costs the student nothing there.

    Source: ``finite_horizon_gae`` of ManiSkill's ``ppo_rgb.py``, on by default in
    the released code of RPD (https://arxiv.org/abs/2503.05833).

    Keyword Args:
        gamma (float or Tensor): discount, in [0, 1].
        lmbda (float or Tensor): :math:`\lambda`, in [0, 1].
        value_network (TensorDictModule, optional): the critic. If ``None``,
            ``"state_value"`` and ``("next", "state_value")`` are read from the input.
        bootstrap_at_done (str): ``"truncated"``, ``"always"`` or ``"never"``, see the
            table. Defaults to ``"truncated"``.
        average_gae (bool): standardise the advantages of the whole batch. Defaults to
            ``False``, because RPD standardises in every minibatch instead
            (``normalize_advantage=True`` in the loss); doing both is a third estimator.
        **kwargs: see :class:`~torchrl.objectives.value.GAE` (``time_dim``,
            ``num_chunks``, ``deactivate_vmap``, ``shifted``, ...). ``vectorized`` has
            no effect: the recursion is a loop over time. ``auto_reset_env`` is refused,
            as it replaces the terminal observations that are bootstrapped from.

    The input has shape ``[*B, T]``; time is the dimension ``time_dim`` if given, else
    the one named ``"time"``, else the last. Reads ``("next", "reward")``,
    ``("next", "done")`` and ``("next", "terminated")``, each ``[*B, T, 1]``; writes
    ``"advantage"``, ``"value_target"`` (:math:`A_t + V(s_t)`), ``"state_value"`` and
    ``("next", "state_value")`` in the same shape. All keys follow :meth:`set_keys`.
    The outputs are detached unless ``differentiable=True``.

    Raises:
        ValueError: for an unknown ``bootstrap_at_done``, or ``auto_reset_env=True``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> gae = FiniteHorizonGAE(gamma=0.5, lmbda=1.0, value_network=None)
        >>> done = torch.tensor([[False], [True]])
        >>> data = TensorDict(
        ...     {
        ...         "state_value": torch.zeros(2, 1),
        ...         "next": {
        ...             "state_value": torch.tensor([[2.0], [8.0]]),
        ...             "reward": torch.ones(2, 1),
        ...             "done": done,
        ...             "terminated": done,
        ...         },
        ...     },
        ...     [2],
        ... )
        >>> gae(data)["advantage"].squeeze(-1)  # (2 * 1 + .5 * 2 + .5 * 1) / 2, 1
        tensor([1.7500, 1.0000])
    """

    def __init__(
        self,
        *,
        gamma: float | Tensor,
        lmbda: float | Tensor,
        value_network: TensorDictModule | None,
        bootstrap_at_done: BootstrapAtDone = "truncated",
        average_gae: bool = False,
        **kwargs: Any,
    ) -> None:
        if bootstrap_at_done not in get_args(BootstrapAtDone):
            raise ValueError(
                f"bootstrap_at_done must be one of {get_args(BootstrapAtDone)}, "
                f"got {bootstrap_at_done!r}."
            )
        if kwargs.get("auto_reset_env"):
            raise ValueError(
                "FiniteHorizonGAE bootstraps from terminal observations, which "
                "auto_reset_env=True replaces. Let TorchRL reset the environment "
                "instead, so that ('next', ...) holds them."
            )
        super().__init__(
            gamma=gamma,
            lmbda=lmbda,
            value_network=value_network,
            average_gae=average_gae,
            **kwargs,
        )
        self.bootstrap_at_done = bootstrap_at_done

    @dispatch
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
    ) -> TensorDictBase:
        """Writes advantage and value target into ``tensordict``.

        Args:
            tensordict (TensorDictBase): a batch ``[*B, T]`` of trajectory pieces.

        Keyword Args:
            params (TensorDictBase, optional): parameters of the value network.
            target_params (TensorDictBase, optional): parameters for the values of the
                next observations.
            time_dim (int, optional): the time dimension of ``tensordict``.

        Returns:
            TensorDictBase: the input, updated.
        """
        # The parent evaluates the critic in every way it supports (vmap, chunks,
        # shifted, given parameters); its advantage is then replaced.
        super().forward(
            tensordict, params=params, target_params=target_params, time_dim=time_dim
        )
        with torch.set_grad_enabled(self.differentiable):
            valid = tensordict.get("shifted_valid", default=None)
            advantage, value_target = self._finite_horizon(
                tensordict, self._get_time_dim(time_dim, tensordict), valid
            )
            if self.average_gae:
                advantage = self._normalize_advantage(
                    advantage, valid, groups=self._group_ids(tensordict)
                )
            tensordict.set(self.tensor_keys.advantage, advantage)
            tensordict.set(self.tensor_keys.value_target, value_target)
            self._mask_shifted_output(tensordict, valid)
        return tensordict

    def value_estimate(
        self,
        tensordict: TensorDictBase,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the value target alone; the input is not changed."""
        output = self.forward(
            tensordict.copy(),
            params=params,
            target_params=target_params,
            time_dim=time_dim,
        )
        return output.get(self.tensor_keys.value_target)

    def _call_value_nets(
        self, data: TensorDictBase, *args: Any, value_key: NestedKey, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        given = (kwargs.get(name) for name in ("params", "next_params", "value_net"))
        chunked = self.value_chunk_size is not None or self.num_chunks is not None
        if (
            chunked
            and not kwargs.get("single_call")
            and all(net is None for net in given)
            and "is_init" not in data
        ):
            values = self._chunked_values(data, value_key)
        else:
            values = super()._call_value_nets(
                data, *args, value_key=value_key, **kwargs
            )
        # Where next observations hold NaN the parent works on a copy of data, so that
        # data itself lacks the values (or keeps older ones).
        data.set(value_key, values[0])
        data.set(("next", value_key), values[1])
        return values

    def _chunked_values(
        self, data: TensorDictBase, value_key: NestedKey
    ) -> tuple[Tensor, Tensor, None]:
        """The parent's values of both observations, without its copy of them.

        It stacks all observations and the next ones before it makes chunks, which
        doubles the memory of a batch of pictures.
        """
        keys = self.value_network.in_keys
        data = self._sanitize_next_obs_nan(data, keys)
        dim = self._resolve_value_chunk_dim(data.ndim)
        value, next_value = (
            torch.cat(
                [
                    self.value_network(chunk).get(value_key)
                    for chunk in self._split_value_net_input(part.select(*keys))
                ],
                dim,
            )
            for part in (data, data.get("next"))
        )
        return value, next_value.detach(), None

    def _finite_horizon(
        self, tensordict: TensorDictBase, time_dim: int, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        keys = self.tensor_keys
        value = tensordict.get(keys.value)
        next_value = tensordict.get(("next", keys.value))
        reward = tensordict.get(("next", keys.reward))
        done = tensordict.get(("next", keys.done))
        gamma = self.gamma
        steps = tensordict.get(keys.steps_to_next_obs, None)
        if steps is not None:
            gamma = gamma ** steps.view_as(reward)

        # Selected, never multiplied: a value that does not count may be NaN.
        if self.bootstrap_at_done == "truncated":
            stop = tensordict.get(("next", keys.terminated), default=done)
            next_value = torch.where(stop, 0.0, next_value)
        elif self.bootstrap_at_done == "never":
            next_value = torch.where(done, 0.0, next_value)
        bootstrap = gamma * next_value

        end = done
        if valid is not None:
            # A piece also ends where shifted=True drops the rest of the rows.
            end = end | self._expand_to_match(
                self._shifted_last_valid(valid, time_dim), done
            )
        discount = (self.lmbda * gamma).expand_as(reward)

        c = s = torch.zeros_like(next_value.select(time_dim, 0))
        targets = []
        for r, b, d, e in zip(
            *(x.unbind(time_dim)[::-1] for x in (reward, bootstrap, discount, end)),
            strict=True,
        ):
            c = 1 + self.lmbda * torch.where(e, 0.0, c)
            s = c * r + b + d * torch.where(e, 0.0, s)
            targets.append(s / c)
        value_target = torch.stack(targets[::-1], time_dim)
        return value_target - value, value_target
