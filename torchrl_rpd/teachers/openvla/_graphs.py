# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Decodes by replaying a CUDA graph: launching small kernels would take longer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchrl_rpd.teachers.openvla._model import Decoded, OpenVLAModel, Prefilled

_MOST_GRAPHS = 16


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Prefilled
    outputs: Decoded


class GraphedDecode:
    """Captures :meth:`OpenVLAModel.decode` once for each shape, then replays it.

    A graph is bound to the memory of the key-value cache; when that is allocated anew,
    all graphs are captured again.

    Args:
        model (OpenVLAModel): on a CUDA device.
    """

    def __init__(self, model: OpenVLAModel) -> None:
        self._model = model
        self._graphs: dict[tuple[int, int, bool, int], _Captured] = {}
        self._allocation = 0

    def __call__(self, state: Prefilled, *, num_tokens: int) -> Decoded:
        """As :meth:`OpenVLAModel.decode`; the result is valid until the next call."""
        if self._allocation != self._model.cache.allocations:
            self._graphs.clear()
            self._allocation = self._model.cache.allocations
        padded = state.visible is not None
        key = (state.logits.shape[0], state.columns, padded, num_tokens)
        captured = self._graphs.get(key)
        if captured is None:
            if len(self._graphs) >= _MOST_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            captured = self._graphs[key] = self._capture(state, num_tokens)
        for static, tensor in zip(
            _tensors(captured.inputs), _tensors(state), strict=True
        ):
            static.copy_(tensor)
        captured.graph.replay()
        return captured.outputs

    def _capture(self, state: Prefilled, num_tokens: int) -> _Captured:
        inputs = Prefilled(
            state.logits.clone(),
            (state.rope[0].clone(), state.rope[1].clone()),
            None if state.visible is None else state.visible.clone(),
            state.columns,
        )
        cache = self._model.cache
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: libraries allocate their workspaces
            self._model.decode(inputs, num_tokens=num_tokens)
        torch.cuda.current_stream().wait_stream(side)
        cache.rewind(state.columns)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._model.decode(inputs, num_tokens=num_tokens)
        return _Captured(graph, inputs, outputs)


def _tensors(state: Prefilled) -> list[Tensor]:
    visible = [] if state.visible is None else [state.visible]
    return [state.logits, *state.rope, *visible]
