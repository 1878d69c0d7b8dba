# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where checkpoints come from, and what a teacher is told."""

from __future__ import annotations

import sys

import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from torchrl_rpd.teachers._hub import require, resolve_checkpoint
from torchrl_rpd.teachers._instructions import read_instructions

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    """A Hub cache that holds one repository, as huggingface_hub lays it out."""
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "cache" / "models--someone--teacher"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "cache"


class TestResolveCheckpoint:
    def test_local_folder_needs_no_hub(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert resolve_checkpoint(tmp_path) == tmp_path
        assert resolve_checkpoint(str(tmp_path)) == tmp_path

    def test_local_folder_wins_over_a_hub_id(self, tmp_path, monkeypatch):
        (tmp_path / "someone" / "teacher").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert resolve_checkpoint("someone/teacher").is_dir()

    def test_local_folder_has_no_revision(self, tmp_path):
        with pytest.raises(ValueError, match="has no revision 'main'"):
            resolve_checkpoint(tmp_path, revision="main")

    def test_no_such_folder(self, tmp_path):
        for path in (
            tmp_path / "no",
            "./no/where",
            "~/no-such-folder-here",
            "one-word",
        ):
            with pytest.raises(FileNotFoundError, match="There is no folder"):
                resolve_checkpoint(path)

    def test_file_is_no_checkpoint(self, tmp_path):
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(FileNotFoundError, match="is a file"):
            resolve_checkpoint(tmp_path / "model.safetensors")

    def test_reads_the_cache(self, cache):
        folder = resolve_checkpoint(
            "someone/teacher", cache_dir=cache, local_files_only=True
        )
        assert (folder / "config.json").read_text() == "{}"
        assert folder.name == COMMIT
        pinned = resolve_checkpoint(
            "someone/teacher", revision=COMMIT, cache_dir=cache, local_files_only=True
        )
        assert pinned == folder

    def test_says_what_to_do_without_cache_and_network(self, cache):
        with pytest.raises(
            FileNotFoundError, match="hf download someone/else"
        ) as error:
            resolve_checkpoint("someone/else", cache_dir=cache, local_files_only=True)
        assert "HF_HOME" in str(error.value)
        with pytest.raises(FileNotFoundError, match="at revision 'v2'"):
            resolve_checkpoint(
                "someone/teacher", revision="v2", cache_dir=cache, local_files_only=True
            )

    def test_arguments_reach_the_hub(self, tmp_path, monkeypatch):
        hub = pytest.importorskip("huggingface_hub")
        calls = []

        def download(repo, **kwargs):
            calls.append((repo, kwargs))
            return str(tmp_path)

        monkeypatch.setattr(hub, "snapshot_download", download)
        resolve_checkpoint("a/b", revision="v1", allow_patterns=("*.json",))
        assert calls == [
            (
                "a/b",
                {
                    "revision": "v1",
                    "allow_patterns": ["*.json"],
                    "cache_dir": None,
                    "local_files_only": False,
                },
            )
        ]

    def test_hub_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ImportError, match=r"torchrl_rpd\[openvla\]"):
            resolve_checkpoint("someone/teacher")


class TestRequire:
    def test_names_the_extra(self):
        with pytest.raises(ImportError, match=r"torchrl_rpd\[octo\]") as error:
            require("no_such_package.part", extra="octo")
        assert "no_such_package" in str(error.value)

    def test_does_not_hide_what_a_package_itself_lacks(self, tmp_path, monkeypatch):
        (tmp_path / "broken_package.py").write_text("import lacking_package")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="lacking_package"):
            require("broken_package")


class TestInstructions:
    def test_fixed_wins_and_needs_no_entry(self):
        td = TensorDict({"language_instruction": "push"}, [2])
        assert read_instructions(td, "pull") == ["pull", "pull"]
        assert read_instructions(TensorDict({}, [3]), "pull") == ["pull"] * 3

    @pytest.mark.parametrize(
        "value", ["push", NonTensorData("push", batch_size=[2, 3])]
    )
    def test_one_for_all_rows(self, value):
        td = TensorDict({"language_instruction": value}, [2, 3])
        assert read_instructions(td, None) == ["push"] * 6

    def test_one_for_each_row_in_order(self):
        td = TensorDict({"language_instruction": NonTensorStack("a", "b", "c")}, [3])
        assert read_instructions(td, None) == ["a", "b", "c"]
        assert read_instructions(td[torch.tensor([True, False, True])], None) == [
            "a",
            "c",
        ]

    def test_several_batch_dimensions(self):
        rows = [NonTensorStack("a", "b"), NonTensorStack("c", "d")]
        td = TensorDict({"language_instruction": NonTensorStack(*rows)}, [2, 2])
        assert read_instructions(td, None) == ["a", "b", "c", "d"]
        assert read_instructions(td.reshape(-1), None) == ["a", "b", "c", "d"]

    def test_no_batch_dimension(self):
        td = TensorDict({"language_instruction": "push"}, [])
        assert read_instructions(td, None) == ["push"]

    def test_nested_key(self):
        td = TensorDict({"task": {"text": NonTensorStack("a", "b")}}, [2])
        assert read_instructions(td, None, ("task", "text")) == ["a", "b"]

    def test_missing(self):
        with pytest.raises(KeyError, match="without an instruction"):
            read_instructions(TensorDict({"observation": torch.ones(2)}, [2]), None)

    def test_no_text(self):
        td = TensorDict({"language_instruction": torch.ones(2, 1)}, [2])
        with pytest.raises(TypeError, match="float"):
            read_instructions(td, None)

    def test_wrong_number(self):
        td = TensorDict({"language_instruction": NonTensorData(["a", "b"])}, [3])
        with pytest.raises(ValueError, match="2 instructions for 3 rows"):
            read_instructions(td, None)


if __name__ == "__main__":
    pytest.main([__file__])
