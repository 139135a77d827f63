"""Steps: which of them run again, and that a killed run resumes to the same files."""

import hashlib
import json
import os
import shutil

import pytest

from lasar_hf.steps import Step, check_outputs, run_steps
from tests.disks import DAMAGES


def chain(folder, one=1, two=2, extra=True):
    """Two sources, a step that reads both, and one that reads that step; each writes its setting and its inputs."""

    def writer(name, setting, reads=(), extra=False):
        def run(out):
            text = "".join((folder / read / "text").read_text() for read in reads)
            (out / name).mkdir()
            (out / name / "text").write_text(f"{name}{setting}({text})")
            (out / name / "zzz").write_text("")  # moved after the text
            if name != "both":
                (out / f"{name}.done").write_text("")
            if extra:
                (out / "extra").write_text("x")

        return Step(name, run, {"setting": setting, "extra": extra}, tuple(reads))

    first, second = writer("one", one), writer("two", two, extra=extra)
    return [first, second, writer("both", 0, ("one", "two")), writer("last", 0, ("both",))]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_nothing_runs_without_a_change(tmp_path):
    assert run_steps(tmp_path, chain(tmp_path)) == ["one", "two", "both", "last"]
    assert (tmp_path / "last" / "text").read_text() == "last0(both0(one1()two2()))"
    before = {name: os.stat(tmp_path / name).st_mtime_ns for name in files(tmp_path)}
    assert run_steps(tmp_path, chain(tmp_path)) == []
    assert {name: os.stat(tmp_path / name).st_mtime_ns for name in files(tmp_path)} == before


def test_a_changed_setting_runs_its_step_and_those_after_it(tmp_path):
    run_steps(tmp_path, chain(tmp_path))
    assert run_steps(tmp_path, chain(tmp_path, two=3)) == ["two", "both", "last"]
    assert (tmp_path / "last" / "text").read_text() == "last0(both0(one1()two3()))"


def test_a_lost_file_is_written_again(tmp_path):
    run_steps(tmp_path, chain(tmp_path))
    (tmp_path / "two.done").unlink()
    assert run_steps(tmp_path, chain(tmp_path)) == ["two", "both", "last"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_written_again(tmp_path, damage):
    run_steps(tmp_path, chain(tmp_path))
    DAMAGES[damage](tmp_path / "two" / "text")
    with pytest.raises(ValueError, match="two/text is"):
        check_outputs(tmp_path, ["one", "two"])
    check_outputs(tmp_path, ["one"])
    assert run_steps(tmp_path, chain(tmp_path)) == ["two", "both", "last"]
    check_outputs(tmp_path, ["one", "two"])


def test_a_mark_deletes_no_files_outside_of_the_folder(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    run_steps(folder, chain(folder))
    for name in (str(outside), "../outside"):
        mark = json.loads((folder / "steps" / "two.json").read_text())
        (folder / "steps" / "two.json").write_text(json.dumps(mark | {"fingerprint": None, "outputs": {name: "x"}}))
        run_steps(folder, chain(folder))
    assert outside.exists()


def test_files_of_steps_that_no_longer_exist_are_deleted(tmp_path):
    run_steps(tmp_path, chain(tmp_path))
    assert run_steps(tmp_path, chain(tmp_path)[:2]) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "extra", "one", "one.done", "steps", "two", "two.done"
    ]  # fmt: skip


def test_files_no_longer_written_are_deleted(tmp_path):
    run_steps(tmp_path, chain(tmp_path))
    assert (tmp_path / "extra").exists()
    run_steps(tmp_path, chain(tmp_path, extra=False))
    assert not (tmp_path / "extra").exists()


def test_one_step_runs_alone(tmp_path):
    assert run_steps(tmp_path, chain(tmp_path), ["one"]) == ["one"]


def test_a_step_needs_the_steps_it_reads(tmp_path):
    run_steps(tmp_path, chain(tmp_path), ["one"])
    with pytest.raises(ValueError, match="'both' .*'two'"):
        run_steps(tmp_path, chain(tmp_path), ["both"])


def test_an_unknown_step_is_named(tmp_path):
    with pytest.raises(ValueError, match="'three'"):
        run_steps(tmp_path, chain(tmp_path), ["three"])


def test_files_made_of_old_files_are_deleted(tmp_path):
    run_steps(tmp_path, chain(tmp_path))
    run_steps(tmp_path, chain(tmp_path, one=5), ["one"])
    assert not (tmp_path / "both").exists()
    assert not (tmp_path / "last.done").exists()
    assert (tmp_path / "two").exists()


def test_files_without_marks_are_replaced(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "old").write_text("x")
    run_steps(tmp_path, chain(tmp_path))
    assert not (tmp_path / "one" / "old").exists()


class Killed(BaseException):
    """Stands for kill -9: the package must not catch it."""


def dying(monkeypatch, operations, at):
    """These file operations raise from the `at`-th on."""
    count = iter(range(10_000))

    def wrap(operation):
        def run(*args, **kwargs):
            if next(count) >= at:
                raise Killed
            return operation(*args, **kwargs)

        return run

    for module, name in operations:
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))


def test_killed_between_any_two_file_operations(tmp_path, monkeypatch):
    run_steps(tmp_path / "calm", chain(tmp_path / "calm"))
    run_steps(tmp_path / "calm", chain(tmp_path / "calm", two=3, extra=False))
    expected = files(tmp_path / "calm")
    run_steps(tmp_path / "old", chain(tmp_path / "old"))
    operations = [(os, name) for name in ("replace", "unlink", "rmdir", "mkdir")]
    for at in range(1000):
        folder = tmp_path / str(at)
        run_steps(folder, chain(folder))
        with monkeypatch.context() as patch:
            dying(patch, operations, at)
            try:
                run_steps(folder, chain(folder, two=3, extra=False))
            except Killed:
                if (folder / "last.done").exists():  # what looks complete must not mix old and new
                    assert (folder / "two" / "text").read_text() in (folder / "last" / "text").read_text()
            else:
                break
        back = shutil.copytree(folder, tmp_path / f"{at}-back")
        run_steps(folder, chain(folder, two=3, extra=False))
        assert files(folder) == expected, at
        run_steps(back, chain(back))  # or the old settings come back
        assert files(back) == files(tmp_path / "old"), at
    assert at > 20


def test_a_failing_step_leaves_no_files(tmp_path):
    def run(out):
        (out / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_steps(tmp_path, [Step("bad", run)])
    assert not (tmp_path / "half").exists() and not (tmp_path / "steps" / "bad.json").exists()
    assert run_steps(tmp_path, [Step("bad", lambda out: (out / "half").write_text("y"))]) == ["bad"]
    assert json.loads((tmp_path / "steps" / "bad.json").read_text())["outputs"] == {
        "half": hashlib.sha256(b"y").hexdigest()
    }
