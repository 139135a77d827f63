"""Atomic writes, JSON and hashes."""

import pytest

from lasar_hf.files import (
    atomic_file,
    file_hash,
    folder_hashes,
    read_json,
    remove_temporary_files,
    write_json,
)


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
