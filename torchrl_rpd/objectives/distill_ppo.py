# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PPO-clip with a distillation term: the objective of Refined Policy Distillation."""

from __future__ import annotations

from torch import Tensor
from torchrl.objectives import ClipPPOLoss

from torchrl_rpd.objectives._distill import DistillMixin, DistillType, KLDirection

__all__ = ["DistillPPOLoss", "DistillType", "KLDirection"]


class DistillPPOLoss(DistillMixin, ClipPPOLoss):
    r"""Clipped PPO loss plus a distance between the student and a teacher's label.

    The objective of Refined Policy Distillation (RPD, https://arxiv.org/abs/2503.05833):

    .. math::
        L = L_{\text{clip}} + L_{\text{critic}} + L_{\text{entropy}}
            + \lambda \, \frac{1}{|M|} \sum_{i \in M} d(\pi_\theta(s_i), a^T_i)

    with :math:`\lambda` = ``distill_coeff``, :math:`a^T_i` the teacher's action for row
    :math:`i`, and :math:`M` the rows that count: ``teacher_mask`` is True and so is
    every validity mask TorchRL itself writes (see ``loss_mask_key``). With :math:`m`
    the action that the student takes without exploring and :math:`A` its size:

    ============= ================================================== ==================
    distill_type  :math:`d`                                          gradient reaches
    ============= ================================================== ==================
    "mse"         :math:`\frac1A \|m - a^T\|^2` (RPD)                mean
    "l1"          :math:`\frac1A \|m - a^T\|_1`                      mean
    "smooth_l1"   the same with Huber's distance, threshold 1        mean
    "cosine"      1 - cos, averaged over ``cosine_parts``            mean
    "nll", "bc"   :math:`-\log \pi_\theta(a^T)`, summed over dims    mean and std
    "kl"          KL to :math:`\mathcal N(a^T, \sigma^T)`            mean and std
    ============= ================================================== ==================

    :math:`m` is TorchRL's ``deterministic_sample``, in the units of the environment's
    action: the mean of an ``IndependentNormal``; for a ``TanhNormal`` the underlying
    normal's mean, squashed and scaled to ``low``, ``high``. That is the median of the
    squashed distribution; its mean and its mode have no closed form.

    mse, l1 and smooth_l1 average over the action dimensions, as the released code does
    (the paper's formula has the squared norm, :math:`A` times as much).

    A row with ``teacher_mask`` False never counts, whatever its label holds, NaN
    included; without any row that counts the term is 0. With ``distill_coeff`` 0 every
    other loss and every gradient is bit for bit :class:`ClipPPOLoss`'s, NaN labels
    included, and no host synchronisation is needed to find that out. The actor runs
    once per call: the distillation term re-uses the distribution that the PPO ratio is
    made of.

    Args:
        actor_network (ProbabilisticTensorDictSequential): the student. Its
            distribution has an event dimension (``IndependentNormal``, ``TanhNormal``)
            or is a ``CompositeDistribution``; a plain ``torch.distributions.Normal`` is
            refused, since PPO would clip a ratio per action dimension.
        critic_network (TensorDictModule): the critic.

    Keyword Args:
        distill_type (str): the distance, see the table. Defaults to ``"mse"``.
        distill_coeff (float or Tensor): :math:`\lambda`, >= 0. A buffer, so that
            ``loss.distill_coeff = 0.3`` schedules it. Defaults to 1.0.
        cosine_parts (sequence of sequences of int): action dimensions whose directions
            are compared. Defaults to ``((0, 1, 2), (3, 4, 5))``, translation and
            rotation of an end-effector action; a gripper has no direction.
        cosine_min_norm (float): parts whose label is shorter are left out, > 0, in
            action units. Defaults to 0.05.
        kl_direction (str): ``"forward"``, KL(teacher || student), or ``"reverse"``,
            KL(student || teacher) as in Proximal Policy Distillation (PPD) as RPD's
            authors ran it. Defaults to ``"forward"``.
        ratio_weighted (bool): with "kl", multiply each row with PPD's
            :math:`\max(r_i, 1 - \epsilon)`, :math:`r_i` being the PPO ratio, through
            which the gradient runs as well. With ``delay_actor=True`` it is the ratio
            to the proximal policy, the one that is clipped. Defaults to ``False``.
        **kwargs: see :class:`~torchrl.objectives.ClipPPOLoss`. RPD's released settings
            are ``loss_critic_type="l2", critic_coeff=0.25, entropy_coeff=0.0,
            normalize_advantage=True``.

    Keys (:meth:`set_keys`), next to those of ``ClipPPOLoss``:

    - ``teacher_action``, ``[*B, A]``: the label, in the environment's convention.
    - ``teacher_mask``, ``[*B, 1]`` bool: is there a label; absent means everywhere.
    - ``teacher_std``, ``[*B, A]``: only for "kl", > 0 where there is a label.
    - ``distill_action``: with a ``CompositeDistribution``, the head to distil. Defaults
      to the action key if that is a single one.

    Outputs next to those of ``ClipPPOLoss``:

    - ``loss_distill`` (differentiable): :math:`\lambda` times the term, reduced by
      ``reduction``: "mean" and "sum" over the rows that count, "none" one value per
      row, ``[*B]``, 0 where a row does not count.
    - ``distill_error`` (detached): mean of :math:`d` over the rows that count, with
      neither :math:`\lambda` nor the ratio weight.
    - ``distill_coverage`` (detached): share of labelled rows, in [0, 1] (with "cosine",
      a label counts if at least one of its parts is long enough).
    - ``kl_k3`` (detached): :math:`\frac1N \sum_i (r_i - 1) - \log r_i`, the estimate of
      the policy's KL that RPD's ``target_kl`` (0.2) is compared with. Like TorchRL's
      ``kl_approx`` it is taken to the proximal policy with ``delay_actor=True``.

    Raises:
        ValueError: at construction for unknown or contradicting options; in a call for
            a label of the wrong shape, a student without event dimension or, with "kl",
            a label's standard deviation that is not positive (on an accelerator or in a
            compiled call an asynchronous assertion says so instead).
        KeyError: if the input holds no label, or no ``teacher_std`` with "kl".
        TypeError: at construction for an unknown argument (``PPOLoss`` would ignore it);
            in a call if the student's actions are discrete or, with "kl", if it is not
            Gaussian.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import (
        ...     AddStateIndependentNormalScale,
        ...     ProbabilisticTensorDictModule,
        ...     ProbabilisticTensorDictSequential,
        ...     TensorDictModule,
        ... )
        >>> from torchrl.modules import IndependentNormal
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 2), AddStateIndependentNormalScale(2)
        ... )
        >>> actor = ProbabilisticTensorDictSequential(
        ...     TensorDictModule(net, ["observation"], ["loc", "scale"]),
        ...     ProbabilisticTensorDictModule(
        ...         ["loc", "scale"],
        ...         ["action"],
        ...         distribution_class=IndependentNormal,
        ...         return_log_prob=True,
        ...     ),
        ... )
        >>> critic = TensorDictModule(
        ...     torch.nn.Linear(4, 1), ["observation"], ["state_value"]
        ... )
        >>> loss = DistillPPOLoss(actor, critic, distill_coeff=1.0)
        >>> data = actor(TensorDict({"observation": torch.randn(8, 4)}, [8])).detach()
        >>> data["advantage"] = torch.randn(8, 1)
        >>> data["value_target"] = torch.randn(8, 1)
        >>> data["teacher_action"] = data["loc"] + 0.5  # a teacher's labels
        >>> data["teacher_mask"] = torch.arange(8).unsqueeze(-1) < 6
        >>> out = loss(data)
        >>> print(f"{out['loss_distill']:.2f} {out['distill_coverage']:.2f}")
        0.25 0.75
        >>> loss.distill_coeff = 0.1
        >>> print(f"{loss(data)['loss_distill']:.3f}")
        0.025
        >>> sum(v for k, v in out.items() if k.startswith("loss_")).backward()
    """

    _clips_ratio = True

    @property
    def _lower_clip(self) -> Tensor:
        return self.clip_epsilon_low if self._asymmetric_clip else self.clip_epsilon
