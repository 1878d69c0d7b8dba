# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""PPO with a KL penalty and a distillation term."""

from __future__ import annotations

from torchrl.objectives import KLPENPPOLoss

from torchrl_rpd.objectives._distill import DistillMixin

__all__ = ["DistillKLPENPPOLoss"]


class DistillKLPENPPOLoss(DistillMixin, KLPENPPOLoss):
    r"""PPO loss with a KL penalty, plus a distance between student and label.

    :class:`~torchrl_rpd.objectives.DistillPPOLoss` on top of
    :class:`~torchrl.objectives.KLPENPPOLoss` instead of ``ClipPPOLoss``:

    .. math::
        L = L_{\text{surrogate}} + \beta \, \mathrm{KL}(\pi_{\text{old}} \| \pi_\theta)
            + L_{\text{critic}} + L_{\text{entropy}} + \lambda \,
            \frac{1}{|M|} \sum_{i \in M} d(\pi_\theta(s_i), a^T_i)

    Options, keys, shapes, outputs and errors of the term are those of
    ``DistillPPOLoss``, except ``ratio_weighted=True``, which needs a clip range and is
    refused. ``KLPENPPOLoss`` runs the actor twice per call (for the ratio and for its
    penalty), reads the parameters of the old distribution (``loc`` and ``scale``) from
    the minibatch and adapts :math:`\beta` in every call; the term changes none of this.
    RPD's authors used the clipped loss.

    Args:
        actor_network (ProbabilisticTensorDictSequential): the student.
        critic_network (TensorDictModule): the critic.

    Keyword Args:
        **kwargs: ``distill_type``, ``distill_coeff``, ``cosine_parts``,
            ``cosine_min_norm`` and ``kl_direction`` as in
            :class:`~torchrl_rpd.objectives.DistillPPOLoss`; the rest as in
            :class:`~torchrl.objectives.KLPENPPOLoss` (``dtarg``, ``beta``,
            ``increment``, ``decrement``, ...).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.objectives import DistillKLPENPPOLoss
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> student = mlp_actor_critic(observation_dim=4, action_dim=2)
        >>> loss = DistillKLPENPPOLoss(student.actor, student.critic, distill_coeff=0.5)
        >>> data = TensorDict({"observation": torch.randn(8, 4)}, [8])
        >>> data = student.actor(data).detach()
        >>> data["advantage"] = torch.randn(8, 1)
        >>> data["value_target"] = torch.randn(8, 1)
        >>> data["teacher_action"] = data["loc"] + 1.0
        >>> print(f"{loss(data)['loss_distill']:.2f}")
        0.50
    """
