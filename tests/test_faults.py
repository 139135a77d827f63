"""Commands that are killed or interrupted; `python -m tests.faults --kills 100` is the long version."""

import subprocess
import sys

import pytest

from tests.recipes import ROOT


def assert_survives(*arguments: str) -> None:
    """In a process of its own, since it forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.slow
def test_killed_commands_go_on_to_the_same_files():
    assert_survives("--kills", "2")


@pytest.mark.slow
def test_interrupted_commands_leave_no_part_of_a_file():
    assert_survives("--signal", "INT", "--kills", "2", "--stage", "prepare", "sft1", "recommend", "add_items")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_dead_process_ends_the_others():
    assert_survives("--processes", "2", "--kills", "2", "--stage", "sft1", "recommend")
