# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PPO-clip with a distillation term: the objective of Refined Policy Distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    dispatch,
)
from tensordict.utils import NestedKey
from torch import Tensor
from torch import distributions as d
from torchrl.objectives import ClipPPOLoss

from torchrl_rpd.objectives import distances
from torchrl_rpd.objectives._student import (
    distilled_head,
    gate,
    gaussian_parameters,
    point_estimate,
)

__all__ = ["DistillPPOLoss", "DistillType", "KLDirection"]

DistillType = Literal["mse", "l1", "smooth_l1", "cosine", "nll", "bc", "kl"]
KLDirection = Literal["forward", "reverse"]

_POINT_DISTANCES = {
    "mse": distances.mse_distance,
    "l1": distances.l1_distance,
    "smooth_l1": distances.smooth_l1_distance,
}
_BAD_STD = (
    "distill_type='kl' needs a positive teacher standard deviation in every row that "
    "teacher_mask marks as labelled; use 'mse' for teachers without a spread."
)


class DistillPPOLoss(ClipPPOLoss):
    r"""Clipped PPO loss plus a distance between the student and a teacher's label.

    The objective of Refined Policy Distillation (RPD, https://arxiv.org/abs/2503.05833):

    .. math::
        L = L_{\text{clip}} + L_{\text{critic}} + L_{\text{entropy}}
            + \lambda \, \frac{1}{|M|} \sum_{i \in M} d(\pi_\theta(s_i), a^T_i)

    with :math:`\lambda` = ``distill_coeff``, :math:`a^T_i` the teacher's action for row
    :math:`i`, and :math:`M` the rows that count: ``teacher_mask`` is True and so is
    every validity mask TorchRL itself writes (see ``loss_mask_key``). With :math:`m`
    the student's mean action (squashed, for ``TanhNormal``) and :math:`A` its size:

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
            which the gradient runs as well. Defaults to ``False``.
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
      the policy's KL that RPD's ``target_kl`` (0.2) is compared with.

    Raises:
        ValueError: at construction for unknown or contradicting options; in a call for
            a label of the wrong shape, a student without event dimension or, with "kl",
            a label's standard deviation that is not positive (on an accelerator or in a
            compiled call an asynchronous assertion says so instead).
        KeyError: if the input holds no label, or no ``teacher_std`` with "kl".
        TypeError: with "kl" if the student is not Gaussian.

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

    @dataclass
    class _AcceptedKeys(ClipPPOLoss._AcceptedKeys):
        """Adds the teacher's keys to those of ``ClipPPOLoss``.

        Attributes:
            teacher_action (NestedKey): the label. Defaults to ``"teacher_action"``.
            teacher_mask (NestedKey): is there a label in this row. Defaults to
                ``"teacher_mask"``.
            teacher_std (NestedKey): the label's spread, for "kl". Defaults to
                ``"teacher_std"``.
            distill_action (NestedKey or None): the head of a ``CompositeDistribution``
                that is distilled. Defaults to ``None``, the single action key.
        """

        teacher_action: NestedKey = "teacher_action"
        teacher_mask: NestedKey = "teacher_mask"
        teacher_std: NestedKey = "teacher_std"
        distill_action: NestedKey | None = None

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    _schedulable_buffers = frozenset({"distill_coeff"})

    distill_coeff: Tensor
    _out_keys: list[NestedKey] | None

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential | None = None,
        critic_network: TensorDictModule | None = None,
        *,
        distill_type: DistillType = "mse",
        distill_coeff: float | Tensor = 1.0,
        cosine_parts: Sequence[Sequence[int]] = ((0, 1, 2), (3, 4, 5)),
        cosine_min_norm: float = 0.05,
        kl_direction: KLDirection = "forward",
        ratio_weighted: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_choice("distill_type", distill_type, DistillType)
        _check_choice("kl_direction", kl_direction, KLDirection)
        if distill_coeff < 0:
            raise ValueError(f"distill_coeff must be >= 0, got {distill_coeff}.")
        if not cosine_parts or not all(cosine_parts):
            raise ValueError(
                "cosine_parts must name the action dimensions of at least one part, "
                f"for example ((0, 1, 2), (3, 4, 5)); got {cosine_parts!r}."
            )
        if cosine_min_norm <= 0:
            raise ValueError(f"cosine_min_norm must be > 0, got {cosine_min_norm}.")
        if ratio_weighted and distill_type != "kl":
            raise ValueError(
                "ratio_weighted=True belongs to distill_type='kl' (Proximal Policy "
                f"Distillation), but distill_type is {distill_type!r}."
            )
        # Before the parent's constructor, which reads in_keys.
        self.distill_type = "nll" if distill_type == "bc" else distill_type
        self.cosine_parts = tuple(tuple(part) for part in cosine_parts)
        self.cosine_min_norm = cosine_min_norm
        self.kl_direction = kl_direction
        self.ratio_weighted = ratio_weighted
        super().__init__(actor_network, critic_network, **kwargs)
        # A float whatever the caller gave: an integer buffer would round what a
        # schedule assigns later.
        self.register_coeff_buffer(
            "distill_coeff",
            distill_coeff,
            device=self.entropy_coeff.device,
            dtype=torch.get_default_dtype(),
        )
        self._distill_out: dict[str, Tensor] | None = None

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        keys = [self.tensor_keys.teacher_action, self.tensor_keys.teacher_mask]
        if self.distill_type == "kl":
            keys.append(self.tensor_keys.teacher_std)
        self._in_keys.extend(key for key in keys if key not in self._in_keys)

    @property
    def out_keys(self) -> list[NestedKey]:
        """The entries that :meth:`forward` returns."""
        if self._out_keys is None:
            self._out_keys = [
                *super().out_keys,
                "loss_distill",
                "distill_error",
                "distill_coverage",
                "kl_k3",
            ]
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Computes the PPO losses and the distillation term.

        Args:
            tensordict (TensorDictBase): a minibatch with the entries of
                :attr:`in_keys`, and the advantage and value target or what they are
                computed from.

        Returns:
            TensorDictBase: the entries of :attr:`out_keys`, as the class describes.
        """
        try:
            td_out = super().forward(tensordict)
            td_out.update(self._distill_out)
        finally:
            # Kept, it would hold the graph of this minibatch until the next one.
            self._distill_out = None
        return td_out

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> tuple:
        # The one place that sees the student's distribution of this call. The length of
        # the tuple differs between TorchRL versions.
        out = super()._log_weight(tensordict, adv_shape)
        self._distill_out = self._distill(tensordict, out[0], out[1])
        return out

    def _distill(
        self, tensordict: TensorDictBase, log_weight: Tensor, dist: d.Distribution
    ) -> dict[str, Tensor]:
        student = distilled_head(
            dist, self.tensor_keys.distill_action or self.tensor_keys.action
        )
        log_weight = log_weight.squeeze(-1)
        rows = log_weight.shape
        # What TorchRL's own masks leave over, as 1 or 0 for each row.
        valid = self._reduce_loss(
            torch.ones(rows, device=log_weight.device), tensordict, reduction="none"
        ).bool()
        labelled = valid & self._teacher_mask(tensordict, rows, log_weight.device)
        # A copy: a schedule may assign the buffer in place before the backward pass.
        coeff = self.distill_coeff.clone()
        active = coeff != 0

        error, counted = self._row_error(tensordict, student, labelled, active)
        error = torch.where(counted, error, 0.0)
        total = error
        if self.ratio_weighted:
            weight = gate(log_weight, counted & active).exp()
            total = error * torch.where(
                counted, weight.clamp_min(1 - self._lower_clip), 0.0
            )
        number = counted.sum()
        if self.reduction != "none":
            total = total.sum()
        if self.reduction == "mean":
            total = total / number.clamp_min(1)
        with torch.no_grad():
            n_valid = valid.sum().clamp_min(1)
            k3 = torch.where(valid, log_weight.expm1() - log_weight, 0.0)
            diagnostics = {
                "distill_error": error.sum() / number.clamp_min(1),
                "distill_coverage": number / n_valid,
                "kl_k3": k3.sum() / n_valid,
            }
        # Selected, since the error may be NaN where the coefficient is 0.
        loss = torch.where(active, coeff * total, 0.0)
        return {"loss_distill": loss, **diagnostics}

    def _row_error(
        self,
        tensordict: TensorDictBase,
        student: d.Distribution,
        labelled: Tensor,
        active: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Distance in each row, and which rows count."""
        mean = point_estimate(student)
        label = self._label(tensordict, "teacher_action", mean)
        keep = (labelled & active).unsqueeze(-1)

        if self.distill_type in _POINT_DISTANCES:
            distance = _POINT_DISTANCES[self.distill_type]
            return distance(gate(mean, keep), label), labelled
        if self.distill_type == "cosine":
            error, long_enough = distances.cosine_distance(
                gate(mean, keep), label, self.cosine_parts, self.cosine_min_norm
            )
            return error, labelled & long_enough

        gaussian = gaussian_parameters(student)
        if gaussian is not None:
            loc, scale = (gate(parameter, keep) for parameter in gaussian)
            if self.distill_type == "nll":
                return distances.gaussian_nll(loc, scale, label), labelled
            std = self._label(tensordict, "teacher_std", mean)
            _check_positive(torch.where(keep, std, 1.0))
            if self.kl_direction == "forward":
                return distances.gaussian_kl(label, std, loc, scale), labelled
            return distances.gaussian_kl(loc, scale, label, std), labelled
        if self.distill_type == "kl":
            raise TypeError(
                "distill_type='kl' needs a Gaussian student (IndependentNormal), got "
                f"{type(student).__name__}. Use 'nll' or 'mse' with it."
            )
        # The label of a row that gives no gradient is used only if it is a number.
        usable = keep | (labelled.unsqueeze(-1) & label.isfinite())
        log_prob = student.log_prob(torch.where(usable, label, mean.detach()))
        return -log_prob.reshape(*labelled.shape, -1).sum(-1), labelled

    def _label(
        self,
        tensordict: TensorDictBase,
        name: Literal["teacher_action", "teacher_std"],
        mean: Tensor,
    ) -> Tensor:
        key = getattr(self.tensor_keys, name)
        label = tensordict.get(key, None)
        if label is None:
            raise KeyError(
                f"The input holds no {name} under {key!r}. Add a "
                "TeacherActionTransform to the environment or to the collector's "
                f"postproc, or name the entry with loss.set_keys({name}=...)."
            )
        if label.shape != mean.shape:
            raise ValueError(
                f"{name} (key {key!r}) has shape {tuple(label.shape)}, but the "
                f"student's action has shape {tuple(mean.shape)}."
            )
        # At least single precision, also for a student under autocast.
        return label.detach().to(torch.promote_types(mean.dtype, torch.float32))

    def _teacher_mask(
        self, tensordict: TensorDictBase, rows: torch.Size, device: torch.device
    ) -> Tensor:
        key = self.tensor_keys.teacher_mask
        mask = tensordict.get(key, None)
        if mask is None:
            return torch.ones(rows, dtype=torch.bool, device=device)
        if mask.shape == (*rows, 1):
            mask = mask.squeeze(-1)
        if mask.shape != rows:
            raise ValueError(
                f"teacher_mask (key {key!r}) has shape {tuple(mask.shape)}, but must "
                f"have {(*rows, 1)}."
            )
        return mask.bool()

    @property
    def _lower_clip(self) -> Tensor:
        return self.clip_epsilon_low if self._asymmetric_clip else self.clip_epsilon


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}.")


def _check_positive(std: Tensor) -> None:
    positive = (std > 0).all()
    if torch.compiler.is_compiling() or std.device.type != "cpu":
        # Reading the answer would make the host wait for the device.
        torch._assert_async(positive, _BAD_STD)
    elif not positive:
        raise ValueError(_BAD_STD)
