# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Writes a fine-tuned OpenVLA in the published layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl_rpd.finetune._files import new_folder
from torchrl_rpd.finetune._lora import merged_weight
from torchrl_rpd.teachers._hub import require, resolve_checkpoint
from torchrl_rpd.teachers.openvla import OpenVLATeacher
from torchrl_rpd.teachers.openvla._checkpoint import _shards
from torchrl_rpd.teachers.openvla._config import read_json

# Tokenizer, processor and the original's own code, which its users load.
_COPIED = (".json", ".py", ".model", ".txt", ".jinja")
_WRITTEN = ("config.json", "dataset_statistics.json")


def export_openvla(
    teacher: OpenVLATeacher,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    statistics: Mapping[str, Any],
    unnorm_key: str,
    **hub: Any,
) -> Path:
    """Writes a fine-tuned OpenVLA as the original publishes its own.

    Adapters are added into the weights; the teacher is left as it is and may be trained
    on. Shards, names and dtypes are those of the base checkpoint, tensors that are not
    used (each tower's last block) and all other files are copied from it. The
    statistics go to ``dataset_statistics.json``, and beside the base model's to
    ``norm_stats`` of ``config.json``, as the original and
    :meth:`OpenVLATeacher.from_pretrained` look for them. One shard at a time is in
    memory. Written beside and moved: an interrupted export leaves no half checkpoint.

    Args:
        teacher (OpenVLATeacher): from :func:`load_openvla`, trained.
        folder (str or path): must not exist, or be empty.

    Keyword Args:
        base (str or path): the checkpoint that it was loaded from.
        statistics (mapping): that it was trained with.
        unnorm_key (str): their name.
        **hub: ``revision``, ``cache_dir`` and ``local_files_only`` of the base.

    Returns:
        the folder.

    Raises:
        FileExistsError: if there is something in the folder.
        ValueError: for an empty ``unnorm_key``, or a base of another shape.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from torchrl_rpd.finetune import (
        ...     action_statistics,
        ...     export_openvla,
        ...     load_openvla,
        ... )
        >>> from torchrl_rpd.teachers.openvla import (
        ...     OpenVLATeacher,
        ...     write_tiny_checkpoint,
        ... )
        >>> base = write_tiny_checkpoint(tempfile.mkdtemp())
        >>> statistics = action_statistics(2 * torch.rand(50, 7) - 1)
        >>> tuned = export_openvla(
        ...     load_openvla(base, statistics),
        ...     Path(tempfile.mkdtemp()) / "tuned",
        ...     base=base,
        ...     statistics=statistics,
        ...     unnorm_key="my_demos",
        ... )
        >>> OpenVLATeacher.from_pretrained(tuned, unnorm_key="my_demos").action_dim
        7
    """
    if not unnorm_key:
        raise ValueError("Name the statistics: unnorm_key is empty.")
    source = resolve_checkpoint(base, **hub)
    safetensors = require("safetensors")
    save_file = require("safetensors.torch").save_file
    entry = dict(statistics)
    config = read_json(source / "config.json")
    norm_stats = {**(config.get("norm_stats") or {}), unnorm_key: entry}
    files = {
        "config.json": {**config, "norm_stats": norm_stats},
        "dataset_statistics.json": {unnorm_key: entry},
    }
    # Layers with adapters name their weights otherwise.
    own = {
        name.replace(".base_layer.", ".")
        for name in teacher.model.state_dict()
        if ".lora_" not in name
    }
    with new_folder(folder) as partial:
        for file, names in _shards(source, safetensors.safe_open).items():
            tensors = {}
            with safetensors.safe_open(str(file), framework="pt") as shard:
                for name in names:
                    tensor = shard.get_tensor(name)
                    if name in own:
                        tuned = merged_weight(teacher.model, name)
                        if tuned.shape != tensor.shape:
                            raise ValueError(
                                f"{name} is {list(tuned.shape)}, and in the base "
                                f"{list(tensor.shape)}: is {source} what was loaded?"
                            )
                        tensor = tuned.to("cpu", tensor.dtype).contiguous()
                    tensors[name] = tensor
            save_file(tensors, str(partial / file.name), metadata={"format": "pt"})
        for path in sorted(source.iterdir()):
            if path.suffix in _COPIED and path.name not in _WRITTEN and path.is_file():
                shutil.copyfile(path, partial / path.name)
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2))
    return Path(folder)
