"""The `lasar` command: fast help, settings that fit the data, errors of one sentence, and a project of a CSV file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import lasar_cli
from lasar_hf import Recommender
from lasar_hf.commands import project
from lasar_hf.commands.automatic import core_size, find_column, prepare_settings, train_settings
from lasar_hf.commands.prepare import PrepareArguments
from lasar_hf.commands.project import (
    STAGES,
    check_keys,
    project_settings,
    run_stage,
    stage_settings,
    table_arguments,
)
from lasar_hf.data import read_table, toy_shop
from lasar_hf.files import write_json
from tests.recipes import save_checkpoint


ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["prepare", "train", "evaluate", "recommend", "serve", "push", "plot"]


def lasar(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "300"}
    command = [sys.executable, "-m", "lasar_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


@pytest.fixture
def ratings(tmp_path) -> Path:
    """Interactions and titles of a generated shop."""
    shop = toy_shop(num_users=60, num_items=48, seed=3)
    rows = [(user, shop.item_ids[item], 10 + time) for user, history in zip(shop.user_ids, shop.histories, strict=True)
            for time, item in enumerate(history)]  # fmt: skip
    path = tmp_path / "ratings.csv"
    path.write_text("user,item,time\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows))
    titles = "".join(f'{name},"{item["title"]}"\n' for name, item in zip(shop.item_ids, shop.items, strict=True))
    (tmp_path / "items.csv").write_text("item,title\n" + titles)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Help and options


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys, lasar_cli\ntry:\n    lasar_cli.app()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'lasar_hf'} & set(sys.modules)\n"
    )
    before = os.times()
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    after = os.times()
    assert run.returncode == 0 and "Usage" in run.stdout, run.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2  # seconds


def test_version():
    result = CliRunner().invoke(lasar_cli.app, ["--version"])
    assert re.fullmatch(r"lasar_hf \d+\.\d+\.\d+", result.output.strip())


def test_a_mistyped_option_names_the_near_one():
    result = CliRunner().invoke(lasar_cli.app, ["recommend", "x", "--topk", "3"])
    assert result.exit_code == 2 and "--top-k" in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prepare", "missing.csv"], "missing.csv: no such file."),
        (["prepare", "names.csv"], "no column with a usual name of a user; its columns are a, b. Set --user-column."),
        (["prepare", "ratings.csv", "--title-column", "name"], "has no column 'name'"),
        (["prepare", "ratings.csv", "--set", "codebok_size=3"], "(did you mean 'codebook_size'?)"),
        (["train", "nowhere"], "nowhere/data"),
        (["recommend", "model"], "Give either --history"),
        (["recommend", "model", "--history", "item-1,gone"], "The catalogue has no item 'gone'."),
        (["recommend", "model", "--history", "<a_1>"], "is a Semantic ID"),
        (["plot", "nowhere"], "nowhere has no logs"),
    ],
)
def test_bad_input_ends_with_one_sentence(ratings, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(ratings.parent)
    Path("names.csv").write_text("a,b\n1,2\n")
    save_checkpoint(ratings.parent / "model")
    monkeypatch.setattr(sys, "argv", ["lasar", *arguments])
    monkeypatch.setattr(lasar_cli.errors, "_width", 300)
    with pytest.raises(SystemExit) as ended:
        lasar_cli.run()
    assert ended.value.code == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_one_history_gives_a_table(tmp_path):
    save_checkpoint(tmp_path)
    arguments = ["recommend", str(tmp_path), "--history", "item-1, item-2", "--top-k", "3"]
    result = CliRunner().invoke(lasar_cli.app, arguments)
    assert result.exit_code == 0
    assert len(re.findall(r"item-\d+", result.output)) == 3


def test_push_uploads_all_parts_under_the_name_on_the_hub(tmp_path, monkeypatch):
    save_checkpoint(tmp_path)
    (tmp_path / "README.md").write_text('---\nlicense: mit\n---\n\n# grpo\n\nfrom_pretrained("grpo")\n')
    uploads = []
    monkeypatch.setattr(
        Recommender, "push_to_hub", lambda self, repo_id, **options: uploads.append((self.card, repo_id, options))
    )
    result = CliRunner().invoke(lasar_cli.app, ["push", str(tmp_path), "ann/shop", "--private"])
    assert result.exit_code == 0, result.output
    ((card, repo_id, options),) = uploads
    assert repo_id == "ann/shop" and options == {"private": True}
    assert "# ann/shop" in card and 'from_pretrained("ann/shop")' in card


# ---------------------------------------------------------------------------------------------------------------------
# Settings that fit the data


@pytest.mark.parametrize(
    "users, items, interactions", [(200, 60, 1500), (10_000, 5_000, 80_000), (10**6, 10**6, 10**7)]
)
def test_settings_fit_the_size_of_the_data(users, items, interactions):
    prepared = prepare_settings(items)
    check_keys("prepare", prepared, (PrepareArguments,))
    assert prepared["codebook_size"] <= items
    assert prepared["codebook_size"] ** prepared["num_sid_levels"] >= 4 * items
    stages = train_settings(users, items, interactions, prepared["num_sid_levels"])
    for name, settings in stages.items():
        check_keys(name, settings, STAGES[name][1])
    first = stages["stage1"]
    tokens = 2 * interactions * prepared["num_sid_levels"] * first["num_train_epochs"]
    assert 400 <= tokens / first["max_tokens_per_batch"] <= 8000  # updates
    assert first["backbone_config"]["hidden_size"] % first["backbone_config"]["num_attention_heads"] == 0
    assert core_size(interactions) == (1 if interactions < 100_000 else 5)


def test_the_settings_of_ten_thousand_users_are_those_of_the_recipe():
    """Data of the size of recipes/scientific get nearly its settings."""
    recipe = yaml.safe_load((ROOT / "recipes/scientific/stage1.yaml").read_text())
    settings = train_settings(8317, 4344, 41_858, 2)["stage1"]
    names = "backbone_config", "learning_rate", "weight_decay", "max_tokens_per_batch", "neighbour_targets", "tasks"
    assert {name: settings[name] for name in names} == {name: recipe[name] for name in names}


def test_columns_are_found_by_their_names():
    assert find_column("user", ["userId", "movieId", "rating", "timestamp"], "x") == "userId"
    assert find_column("item", ["userId", "movieId", "rating", "timestamp"], "x") == "movieId"
    assert find_column("time", ["user_id:token", "item_id:token", "timestamp:float"], "x") == "timestamp"


def test_titles_may_stand_in_the_interactions(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,name\nu1,1,Apple\nu1,2,Pear\nu2,1,Apple\nu2,2,Pear\n")
    arguments = table_arguments(str(path))
    assert arguments["time_column"] is None
    data = read_table(**arguments, k_core=1)
    assert [item["title"] for item in data.items] == ["Apple", "Pear"]


def test_train_yaml_keeps_changes_and_wins_over_the_size(tmp_path):
    (tmp_path / "train.yaml").write_text("stage1: {learning_rate: 0.5}\n")
    settings = project_settings(tmp_path, ["stage1.num_train_epochs=3", "evaluate.users=7"])
    assert settings == project_settings(tmp_path) == {
        "stage1": {"learning_rate": 0.5, "num_train_epochs": 3}, "evaluate": {"users": 7}
    }  # fmt: skip
    stages = stage_settings(str(tmp_path), settings)
    assert stages["stage1"]["learning_rate"] == 0.5 and stages["evaluate"]["users"] == 7
    assert stages["stage2"]["model_name_or_path"] == stages["stage1"]["output_dir"]
    (tmp_path / "other.yaml").write_text("grpo: {max_steps: 5}\nevaluate:\n")
    other = project_settings(tmp_path, config=str(tmp_path / "other.yaml"))
    assert other == project_settings(tmp_path) == {"grpo": {"max_steps": 5}, "evaluate": {}}
    for change in ("stage1.num_train_epoch=3", "stage9.seed=1", "stage1.seed"):
        with pytest.raises(ValueError, match="expected|did you mean"):
            project_settings(tmp_path, [change])


def test_a_file_without_sections_is_refused(tmp_path):
    (tmp_path / "train.yaml").write_text("learning_rate: 0.5\n")
    with pytest.raises(ValueError, match="not made of sections"):
        project_settings(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# A project


@pytest.fixture
def started(tmp_path, monkeypatch) -> list[tuple[str, str | None]]:
    """Replaces the stages of a project; says which were started, with their `report_to`."""
    started = []

    def run_stage(name, config, launch):
        started.append((name, yaml.safe_load(config.read_text()).get("report_to")))
        if name == "grpo":
            save_checkpoint(tmp_path / "grpo")
        write_json(tmp_path / "report" / "report.json", {"results": {}})

    (tmp_path / "data" / "steps").mkdir(parents=True)
    (tmp_path / "report").mkdir()
    (tmp_path / "train.yaml").write_text("stage1: {seed: 1}\n")
    monkeypatch.setattr(project, "run_stage", run_stage)
    return started


def test_only_stages_whose_settings_changed_run_again(tmp_path, started):
    project.train_project(tmp_path)
    assert [name for name, _ in started] == list(STAGES)
    (tmp_path / "grpo" / "earlier").touch()
    project.train_project(tmp_path, report_to="tensorboard")  # changes no result
    assert len(started) == len(STAGES)
    project_settings(tmp_path, ["grpo.max_steps=7"])
    project.train_project(tmp_path, report_to="tensorboard")
    assert started[len(STAGES) :] == [("grpo", "tensorboard"), ("memory", None), ("evaluate", None)]
    assert (tmp_path / "old" / "grpo" / "earlier").exists() and not (tmp_path / "grpo" / "earlier").exists()


def test_a_stage_that_was_interrupted_goes_on_in_its_folder(tmp_path, started, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    run_stage = project.run_stage
    monkeypatch.setattr(project, "run_stage", stop)
    with pytest.raises(KeyboardInterrupt):
        project.train_project(tmp_path)
    (tmp_path / "stage1").mkdir()
    monkeypatch.setattr(project, "run_stage", run_stage)
    project.train_project(tmp_path)
    assert len(started) == len(STAGES) and (tmp_path / "stage1").exists() and not (tmp_path / "old").exists()


def test_a_failed_stage_shows_the_end_of_its_output(tmp_path):
    (tmp_path / "launcher.py").write_text("print('starting')\nraise ValueError('the disk is full')\n")
    launch = f"{sys.executable} {tmp_path / 'launcher.py'}"
    with pytest.raises(RuntimeError, match="stage1 ended with exit code 1: ValueError: the disk is full.*stage1.log"):
        run_stage("stage1", tmp_path / "stage1.yaml", launch)


@pytest.mark.slow
def test_three_commands_make_recommendations_with_titles(ratings):
    folder = ratings.parent
    few = ["stage1.num_train_epochs=2", "stage2.num_train_epochs=1", "grpo.max_steps=4", "grpo.eval_steps=4",
           "grpo.save_steps=4"]  # fmt: skip
    run = lasar("prepare", "ratings.csv", "--items", "items.csv", cwd=folder)
    assert run.returncode == 0 and "codebook_size" in run.stdout, run.stderr
    run = lasar("train", "mine", *(part for change in few for part in ("--set", change)), cwd=folder)
    assert run.returncode == 0 and "LASAR-RL + memory" in run.stdout, run.stdout + run.stderr
    first = lasar("recommend", "mine", "--history", "item-0,item-1", "--top-k", "2", cwd=folder)
    assert first.stdout.count("Volume") == 2, first.stdout + first.stderr
    assert lasar("plot", "mine", cwd=folder).returncode == 0 and (folder / "mine/training.png").exists()
    card = (folder / "mine/model/README.md").read_text()
    assert 'from_pretrained("mine/model"' in card and "LASAR-RL + memory, NDCG@10" in card
    again = lasar("train", "mine", cwd=folder)
    assert again.stderr.count("done before") == 5, again.stderr
    assert lasar("recommend", "mine", "--history", "item-0,item-1", "--top-k", "2", cwd=folder).stdout == first.stdout
    run = lasar("train", "mine", "--set", "grpo.learning_rate=0.001", cwd=folder)
    assert run.returncode == 0 and run.stderr.count("done before") == 2, run.stdout + run.stderr
