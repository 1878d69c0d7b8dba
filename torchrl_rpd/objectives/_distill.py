# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The distillation term, for any of TorchRL's PPO losses."""

from __future__ import annotations

import inspect
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
from torchrl.objectives import PPOLoss

from torchrl_rpd.objectives import distances
from torchrl_rpd.objectives._student import (
    distilled_head,
    gate,
    gaussian_parameters,
    point_estimate,
)

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


class DistillMixin(PPOLoss):
    """Adds the distillation term to the PPO loss that follows in the bases.

    All of TorchRL's PPO losses build the student's distribution in ``_log_weight``,
    once per call; the term is computed there and joins the output in :meth:`forward`.
    Options, keys and outputs: see
    :class:`~torchrl_rpd.objectives.DistillPPOLoss`.
    """

    @dataclass
    class _AcceptedKeys(PPOLoss._AcceptedKeys):
        """Adds the teacher's keys to those of TorchRL's PPO losses.

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
    _clips_ratio = False

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
        if not distill_coeff >= 0:  # NaN included
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
        if ratio_weighted and not self._clips_ratio:
            raise ValueError(
                "ratio_weighted=True bounds the ratio by the clip range, which "
                f"{type(self).__name__} does not have. Use DistillPPOLoss."
            )
        _check_names(type(self), kwargs)
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

    def _log_weight(
        self, tensordict: TensorDictBase, adv_shape: torch.Size
    ) -> tuple[Any, ...]:
        # The one place that sees the student's distribution of this call and that all
        # PPO losses share. The length of the tuple differs between TorchRL versions.
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
        number = counted.sum()
        at_least_one = number.clamp_min(1)
        mean_error = error.sum() / at_least_one
        if self.ratio_weighted:
            weight = gate(log_weight, counted & active).exp()
            error = error * torch.where(
                counted, weight.clamp_min(1 - self._lower_clip), 0.0
            )
        if self.reduction == "none":
            total = error
        elif self.reduction == "sum":
            total = error.sum()
        else:
            total = error.sum() / at_least_one if self.ratio_weighted else mean_error
        with torch.no_grad():
            n_valid = valid.sum().clamp_min(1)
            # At least single precision: the two terms almost cancel.
            exact = log_weight.to(torch.promote_types(log_weight.dtype, torch.float32))
            k3 = torch.where(valid, exact.expm1() - exact, 0.0)
            diagnostics = {
                "distill_error": mean_error.detach(),
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
        if "teacher_ticket" in tensordict.keys():
            raise RuntimeError(
                "These frames wait for labels that were never fetched: with "
                "TeacherActionTransform(..., deferred=True) give the transform to the "
                "collector as well, Collector(..., postproc=transform)."
            )
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
        raise NotImplementedError


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}.")


def _check_names(loss: type[PPOLoss], kwargs: dict[str, Any]) -> None:
    # PPOLoss ignores arguments that it does not know.
    known = {
        name
        for cls in loss.__mro__
        if issubclass(cls, PPOLoss) and "__init__" in vars(cls)
        for name in inspect.signature(vars(cls)["__init__"]).parameters
    }
    # Removed ones have an error of their own upstream.
    unknown = sorted(set(kwargs) - known - {"critic_coef", "entropy_coef"})
    if unknown:
        raise TypeError(f"{loss.__name__} has no argument {', '.join(unknown)}.")


def _check_positive(std: Tensor) -> None:
    positive = (std > 0).all()
    if torch.compiler.is_compiling() or std.device.type != "cpu":
        # Reading the answer would make the host wait for the device.
        torch._assert_async(positive, _BAD_STD)
    elif not positive:
        raise ValueError(_BAD_STD)
