# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""From action tokens to actions in the units of the training set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchrl.data.vla import VocabTailActionTokenizer

from torchrl_rpd.teachers.openvla._model import NUM_BINS


def choose_statistics(
    norm_stats: Mapping[str, Any], unnorm_key: str | None, source: str
) -> tuple[str, Mapping[str, Any]]:
    """The statistics to un-normalise with.

    Args:
        norm_stats (mapping): of all training sets, by name.
        unnorm_key (str, optional): which one; None where there is only one.
        source (str): names the checkpoint in an error.

    Returns:
        the name, and the statistics of its actions.

    Raises:
        KeyError: if there is no such set.
        ValueError: if the choice is not clear, or statistics are not usable.

    Examples:
        >>> stats = {"mine": {"action": {"q01": [-1.0], "q99": [1.0], "mask": [True]}}}
        >>> choose_statistics(stats, None, "a checkpoint")[0]
        'mine'
    """
    names = sorted(norm_stats)
    if not names:
        raise ValueError(f"{source} has no statistics of actions (norm_stats).")
    if unnorm_key is None:
        if len(names) > 1:
            raise ValueError(
                f"{source} has statistics of {len(names)} training sets; choose one "
                f"with unnorm_key=: {names}."
            )
        (unnorm_key,) = names
    if unnorm_key not in norm_stats:
        raise KeyError(
            f"{source} has no statistics {unnorm_key!r}; unnorm_key= may be: {names}."
        )
    action = norm_stats[unnorm_key].get("action", {})
    sizes = {name: len(action.get(name, ())) for name in ("q01", "q99")}
    if action.get("mask") is not None:
        sizes["mask"] = len(action["mask"])
    if len(set(sizes.values())) != 1 or not sizes["q01"]:
        raise ValueError(
            f"The statistics {unnorm_key!r} of {source} need 'q01', 'q99' (and 'mask') "
            f"of one length under 'action', got {sizes}."
        )
    return unnorm_key, action


class ActionDecoder:
    """Tokens to actions, and token distributions to means and standard deviations.

    Bin centres and the un-normalisation are TorchRL's
    :class:`~torchrl.data.vla.VocabTailActionTokenizer`; this adds the moments. No
    module, so that the statistics stay on the host, where that tokenizer computes:
    reading them from an accelerator would wait for it once more.

    Args:
        statistics (mapping): ``q01``, ``q99`` and ``mask`` of each action dimension.

    Keyword Args:
        vocab_size (int): ids of the language model; the last 256 are the bins.

    Examples:
        >>> import torch
        >>> statistics = {"q01": [0.0], "q99": [2.0], "mask": [True]}
        >>> decoder = ActionDecoder(statistics, vocab_size=32000)
        >>> decoder(torch.tensor([[31872]]))  # the middle of [0, 2]
        tensor([[1.]])
        >>> logits = torch.full((1, 1, 256), -torch.inf)
        >>> logits[..., 1] = logits[..., 255] = 0.0  # the two ends, equally likely
        >>> mean, std = decoder.unnormalise(*decoder.moments(logits))
        >>> round(float(mean), 4), round(float(std), 4)
        (1.0, 0.9961)
    """

    def __init__(self, statistics: Mapping[str, Any], *, vocab_size: int) -> None:
        self.tokenizer = VocabTailActionTokenizer.from_norm_stats(
            {"": {"action": statistics}}, "", full_vocab_size=vocab_size
        )
        ids = torch.arange(vocab_size - NUM_BINS, vocab_size)
        plain = VocabTailActionTokenizer(NUM_BINS, full_vocab_size=vocab_size)
        self._centres = plain.decode(ids).double()
        self._centres_at: dict[torch.device, Tensor] = {}
        self.action_dim = len(statistics["q01"])

    def __call__(self, tokens: Tensor) -> Tensor:
        """Ids ``[B, A]`` to actions ``[B, A]`` float32; ids outside the bins clip."""
        return self.tokenizer.decode(tokens)

    def moments(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, before un-normalisation.

        Args:
            logits (torch.Tensor): ``[B, A, 256]`` of the action ids.

        Returns:
            two float64 tensors ``[B, A]``, in [-1, 1] and [0, 1], under the softmax of
            the logits: exact sums over the bins, no samples.
        """
        if logits.device not in self._centres_at:
            self._centres_at[logits.device] = self._centres.to(logits.device)
        centres = self._centres_at[logits.device]
        probability = logits.double().softmax(-1)
        mean = probability @ centres
        squared = (centres - mean.unsqueeze(-1)).square()
        return mean, (probability * squared).sum(-1).sqrt()

    def unnormalise(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Moments ``[B, A]`` on the host in the training set's units, float32."""
        tokenizer = self.tokenizer
        low, high, mask = tokenizer.norm_low, tokenizer.norm_high, tokenizer.norm_mask
        half = 0.5 * (high - low + 1e-8)  # as the tokenizer has it
        mean = torch.where(mask, half * (mean + 1) + low, mean)
        std = torch.where(mask, half * std, std)
        return mean.float(), std.float()
