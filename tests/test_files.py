"""Atomic writes, JSON and hashes."""

import errno
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file

from lasar_hf.files import (
    atomic_file,
    check_writable,
    file_hash,
    folder_hashes,
    naming_full_disk,
    read_json,
    remove_temporary_files,
    write_json,
)
from tests.disks import full_disk, read_only


def test_atomic_file_replaces_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "report.md"
    for text in ("old", "new"):
        with atomic_file(path) as temporary:
            temporary.write_text(text)
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_sees_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "report.md"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"


def test_a_failing_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.md"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["vectors.npy", "model.safetensors", "notes"])
def test_the_temporary_file_keeps_the_suffix(tmp_path, name):
    with atomic_file(tmp_path / name) as temporary:
        assert temporary.suffix == (tmp_path / name).suffix or "." not in name
        assert temporary.parent == tmp_path
        temporary.touch()


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "kept.json").touch()
    with atomic_file(tmp_path / "new.json") as temporary:
        temporary.touch()
        temporary.with_name(temporary.name.replace("new", "killed")).touch()
    remove_temporary_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "new.json"]


def test_a_folder_is_made_and_tried(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "new", tmp_path / "new" / "other", tmp_path / "file"):
        with read_only(tmp_path / "new"), pytest.raises(OSError, match=str(folder)):
            check_writable(folder)


def test_a_full_disk_is_named(tmp_path):
    array = np.zeros(1000)
    writers = {
        "a.npy": lambda path: np.save(path, array),
        "a.parquet": lambda path: pq.write_table(pa.table({"x": np.random.default_rng(0).random(1000)}), path),
        "a.safetensors": lambda path: save_file({"x": array}, path),
        "a.pt": lambda path: torch.save(torch.zeros(1000), path),
    }
    with full_disk(500):
        for name, write in writers.items():
            with pytest.raises(OSError, match=str(tmp_path)), naming_full_disk(tmp_path):
                write(tmp_path / name)
            if name != "a.pt":  # torch's errors are those of many causes
                with pytest.raises(OSError, match=name), atomic_file(tmp_path / name) as temporary:
                    write(temporary)
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_elsewhere_keeps_its_name(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(OSError) as raised, naming_full_disk(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache))
    assert raised.value.filename == str(cache)


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(ValueError, match="^other$"), naming_full_disk(tmp_path):
        raise ValueError("other")


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"text": "é", "number": 1.5})
    assert read_json(tmp_path / "a.json") == {"text": "é", "number": 1.5}


@pytest.mark.parametrize("text", ["{", "[" * 200_000])
def test_broken_json_names_the_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json"):
        read_json(tmp_path / "a.json")


def test_file_hash_depends_on_the_content_only(tmp_path):
    for name, text in {"a": "x", "b": "x", "c": "y"}.items():
        (tmp_path / name).write_text(text)
    assert file_hash(tmp_path / "a") == file_hash(tmp_path / "b")
    assert file_hash(tmp_path / "a") != file_hash(tmp_path / "c")


def test_folder_hashes_are_relative_to_the_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "data-0.arrow").write_text("x")
    (tmp_path / "sub" / "cache-0.arrow").write_text("x")
    assert folder_hashes(tmp_path, "**/data-*.arrow") == {"sub/data-0.arrow": file_hash(tmp_path / "sub/data-0.arrow")}
    assert folder_hashes(None, "*") == {}


def test_only_temporary_files_of_writers_are_removed(tmp_path):
    left = [".report.12.tmp.md", ".model.3.tmp", ".tmpA1b2C3"]
    kept = [".tmprc", "report.tmp", ".vimrc.tmp.swp", ".report.12.tmp.md.swp", ".tmp_names", "report.md"]
    for name in left + kept:
        (tmp_path / name).write_text("x")
    (tmp_path / ".tmp_mine").mkdir()
    remove_temporary_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".tmp_mine"])
