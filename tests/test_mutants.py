"""The list of the mutation check fits the code, and the check tells what is caught from what survives."""

import ast
import os
import subprocess
import sys
import time
from collections import Counter
from importlib.util import module_from_spec

import pytest
import torch

from lasar_hf.trainers import bidirectional_kl
from tests.mutants import ROOT, ChangedSource, Mutant, read_table, seen_by


MUTANTS = read_table()


def test_every_change_applies():
    for mutant in MUTANTS:
        assert mutant.old != mutant.new
        ast.parse(mutant.source())


def test_names_are_unique():
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []
    assert len(MUTANTS) >= 100


def test_every_named_test_exists():
    sources = {path.name: path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    for mutant in MUTANTS:
        assert mutant.tests
        for test in mutant.tests:
            file, _, name = test.removeprefix("tests/").partition("::")
            assert f"\ndef {name or 'test_'}" in sources[file], f"{mutant.name}: no test {test}"


def test_a_change_that_does_not_apply_is_named():
    with pytest.raises(ValueError, match="stale: lasar_hf/files.py has 'no such code' 0 times"):
        Mutant("stale", "lasar_hf/files.py", "no such code", "", ()).source()


def test_the_changed_source_is_what_is_imported():
    finder = ChangedSource(Mutant("half", "lasar_hf/trainers/losses.py", "return 0.5 * (", "return (", ()))
    assert finder.find_spec("lasar_hf.trainers.rewards") is None
    spec = finder.find_spec("lasar_hf.trainers.losses")
    changed = module_from_spec(spec)
    spec.loader.exec_module(changed)
    states = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    torch.testing.assert_close(changed.bidirectional_kl(*states), 2 * bidirectional_kl(*states))


def test_a_failure_counts_and_tests_that_cannot_run_do_not():
    assert seen_by(0, "3 passed") == ""
    assert seen_by(1, "FAILED tests/test_a.py::test_b - assert") == "test_a.py::test_b"
    for status in (2, 4, 5, -9):
        with pytest.raises(RuntimeError, match="did not run"):
            seen_by(status, "")


NAMES = ["metric cut-off: the k-th entry does not count", "exact gradient: depths are counted from 0"]
COMMAND = [sys.executable, str(ROOT / "tests" / "mutants.py"), "--only", *NAMES]


@pytest.mark.slow
def test_the_command_reports_what_it_caught():
    run = subprocess.run(COMMAND, capture_output=True, text=True, check=True)
    assert "1 of 1 caught" in run.stdout and "1 equivalent" in run.stdout


@pytest.mark.slow
def test_a_kill_leaves_nothing_behind(tmp_path):
    before = {mutant.file: (ROOT / mutant.file).read_bytes() for mutant in MUTANTS}
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(tmp_path)}) as run:
        run.stdout.readline()  # the head of the table: the first change is tried now
        assert list(tmp_path.iterdir())
        run.kill()
    for _ in range(600):  # the tests of that change end first
        if not list(tmp_path.iterdir()):
            break
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())
    assert before == {file: (ROOT / file).read_bytes() for file in before}
