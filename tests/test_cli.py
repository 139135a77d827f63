"""The `lasar` command: fast help, settings that fit the data, errors of one sentence, and a project of a CSV file."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

import lasar_cli
from lasar_cli import split_history
from lasar_hf.commands import project
from lasar_hf.commands.automatic import core_size, find_column, prepare_settings, train_settings
from lasar_hf.commands.grpo import NOT_BETTER
from lasar_hf.commands.prepare import PrepareArguments
from lasar_hf.commands.project import (
    STAGES,
    check_keys,
    follow,
    prepare_project,
    project_settings,
    read_value,
    run_stage,
    stage_settings,
    table_arguments,
    train_project,
)
from lasar_hf.data import PreparedData, read_table, toy_shop
from lasar_hf.files import write_json
from lasar_hf.locks import locked
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
        (["prepare", "ratings.csv", "--set", "codebook_size=abc"], "codebook_size is 'abc'; expected a whole number."),
        (["prepare", "toy", "--set", "num_item=60"], "(did you mean 'num_items'?)"),
        (["prepare", "ratings.csv", "--set", "source=toy"], "given by the data and --output"),
        (["prepare", "ratings.csv", "--output", "names.csv"], "names.csv: File exists"),
        (["prepare", "toy", "--items", "items.csv"], "--items is for a table"),
        (["train", "nowhere"], "Run: lasar prepare DATA --output nowhere"),
        (["recommend", "nowhere", "--history", "1"], "nowhere is not a folder, and no model of this name can be"),
        (["recommend", "empty", "--history", "1"], "neither a project nor a checkpoint"),
        (["recommend", "model", "--history", ""], "The history is empty"),
        (["recommend", "model", "--history", "gone", "--unknown-items", "skip"], "nothing to recommend"),
        (["recommend", "model"], "Give either --history"),
        (["recommend", "model", "--history", "item-1,gone"], "The catalogue has no item 'gone'."),
        (["recommend", "model", "--history", "<a_1>"], "is a Semantic ID"),
        (["plot", "nowhere"], "nowhere has no logs"),
    ],
)
def test_bad_input_ends_with_one_sentence(ratings, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(ratings.parent)
    Path("names.csv").write_text("a,b\n1,2\n")
    Path("empty").mkdir()
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


def test_titles_of_a_history_may_contain_commas():
    recommender = SimpleNamespace(item_index=lambda item: 0 if item == "Tea, green" else None)
    assert split_history("Tea, green", recommender) == ["Tea, green"]
    assert split_history('a, "Tea, green",,b', recommender) == ["a", "Tea, green", "b"]
    assert split_history("", recommender) == []


def test_a_warning_is_one_sentence_and_said_once(ratings):
    run = lasar("prepare", "ratings.csv", cwd=ratings.parent)
    warnings = [line for line in run.stderr.splitlines() if "arning" in line]
    assert any(line.startswith("Warning: No item has text") for line in warnings)
    assert len(set(warnings)) == len(warnings) and not any(".py" in line for line in warnings)
    assert "%|" not in run.stderr  # bars of short steps


# ---------------------------------------------------------------------------------------------------------------------
# Settings that fit the data


def test_arguments_of_the_source_are_settings_too(tmp_path, caplog):
    path, folder = tmp_path / "log.csv", str(tmp_path / "mine")
    path.write_text("user,item\nu1,1\nu1,1\nu1,2\nu1,3\nu1,4\nu2,1\nu2,2\nu2,3\nu2,4\n")
    for changes, lengths in (({}, [2, 2]), ({"keep_repeats": True}, [3, 2])):
        prepare_project(folder, "table", table_arguments(str(path)), changes)
        assert list(map(len, PreparedData.load(f"{folder}/data").split.train)) == lengths
    assert "train.yaml" not in caplog.text
    Path(folder, "train.yaml").touch()
    prepare_project(folder, "table", table_arguments(str(path)))
    assert "train.yaml is kept" in caplog.text


@pytest.mark.parametrize("text, value", [("1e-3", 0.001), ("3", 3), ("true", True), ("[1, 2]", [1, 2]), ("e3", "e3")])
def test_values_are_read_as_yaml_with_exponents(text, value):
    assert read_value(text) == value and type(read_value(text)) is type(value)


@pytest.mark.parametrize("value, fits", [(3, True), ("3", True), (3.5, False), (True, False), ("x", False)])
def test_whole_numbers_are_checked_before_anything_runs(value, fits):
    if fits:
        check_keys("grpo", {"num_generations": value}, STAGES["grpo"][1])
    else:
        with pytest.raises(ValueError, match="num_generations is .*; expected a whole number"):
            check_keys("grpo", {"num_generations": value}, STAGES["grpo"][1])


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
    assert find_column("item", ["User ID", "Item ID"], "x") == "Item ID"
    assert find_column("time", ["user_id:token", "item_id:token", "timestamp:float"], "x") == "timestamp"


def test_titles_may_stand_in_the_interactions(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,name\nu1,1,Apple\nu1,2,Pear\nu2,1,Apple\nu2,2,Pear\n")
    arguments = table_arguments(str(path))
    assert arguments["time_column"] is None
    data = read_table(**arguments, k_core=1)
    assert [item["title"] for item in data.items] == ["Apple", "Pear"]


@pytest.mark.parametrize("title, column", [("name", None), ("Title", None), ("label", "label")])
def test_a_table_of_items_may_name_its_titles_otherwise(tmp_path, title, column):
    path, items = tmp_path / "log.csv", tmp_path / "items.csv"
    path.write_text("user_id,item_id\nu1,1\nu1,2\nu2,1\nu2,2\n")
    items.write_text(f"item_id,{title},category\n1,Apple,Fruit\n2,Pear,Fruit\n")
    data = read_table(**table_arguments(str(path), str(items), title_column=column), k_core=1)
    assert [item["title"] for item in data.items] == ["Apple", "Pear"]


def test_missing_columns_are_said_with_their_option(tmp_path, caplog):
    path, items = tmp_path / "log.csv", tmp_path / "items.csv"
    path.write_text("user_id,item_id,bought\nu1,1,5\n")
    items.write_text("item_id,label,category\n1,Apple,Fruit\n")
    assert table_arguments(str(path), str(items))["items"] == str(items)
    assert "bought. Set --time-column." in caplog.text and "label, category. Set --title-column." in caplog.text


def test_train_yaml_keeps_changes_and_wins_over_the_size(tmp_path):
    (tmp_path / "train.yaml").write_text("stage1: {learning_rate: 0.5}\n")
    (tmp_path / "data").mkdir()
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
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="not made of sections"):
        project_settings(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# A project


@pytest.fixture
def started(tmp_path, monkeypatch) -> list[tuple[str, str | None]]:
    """Replaces the stages of a project; says which were started, with their `report_to`."""
    started = []

    def run_stage(name, config, *_):
        started.append((name, yaml.safe_load(config.read_text()).get("report_to")))
        write_json(tmp_path / "report" / "report.json", {"results": {}})
        if name == "grpo":
            save_checkpoint(tmp_path / "grpo")

    (tmp_path / "data" / "steps").mkdir(parents=True)
    (tmp_path / "report").mkdir()
    (tmp_path / "train.yaml").write_text("stage1: {seed: 1}\n")
    monkeypatch.setattr(project, "run_stage", run_stage)
    return started


def test_only_stages_whose_settings_changed_run_again(tmp_path, started):
    project.train_project(tmp_path)
    assert [name for name, _ in started] == list(STAGES)
    project.train_project(tmp_path, report_to="tensorboard")  # changes no result
    assert len(started) == len(STAGES)
    project_settings(tmp_path, ["grpo.max_steps=7"])
    project.train_project(tmp_path, report_to="tensorboard")
    assert started[len(STAGES) :] == [("grpo", "tensorboard"), ("memory", None), ("evaluate", None)]


def test_a_failed_stage_shows_the_end_of_its_output(tmp_path):
    (tmp_path / "launcher.py").write_text("print('starting')\nraise ValueError('the disk is full')\n")
    launch = f"{sys.executable} {tmp_path / 'launcher.py'}"
    message = "stage1 ended with exit code 1: ValueError: the disk is full.*stage1.log"
    with pytest.raises(RuntimeError, match=message), locked(tmp_path) as lock:
        run_stage("stage1", tmp_path / "stage1.yaml", launch, lock)


def test_two_trainings_do_not_share_a_project(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "train.yaml").write_text("")
    with locked(tmp_path), pytest.raises(RuntimeError, match=f"in use by process {os.getpid()} on "):
        train_project(tmp_path)


@pytest.fixture
def stage(tmp_path):
    """Runs a stage, given its launcher: a shell script."""

    def run(script: str) -> None:
        (tmp_path / "launch.sh").write_text(script)
        with locked(tmp_path) as lock:
            run_stage("stage1", tmp_path / "stage1.yaml", f"sh {tmp_path / 'launch.sh'}", lock)

    return run


def test_an_ended_training_ends_the_processes_of_its_launcher(tmp_path, stage, monkeypatch):
    def interrupted(*_):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(project, "follow", interrupted)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stage(f"sleep 60 & echo $! > {tmp_path / 'pid'}; wait")
    assert time.monotonic() - begin < 50
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("The process of the launcher still runs.")


def test_the_error_of_a_stage_is_said_and_not_its_launchers(stage):
    with pytest.raises(RuntimeError, match="exit code 1: ValueError: stage is 3. The whole"):
        stage("echo '[rank1]: ValueError: stage is 3.'; echo 'subprocess.CalledProcessError: Command'; exit 1")


def test_a_changed_stage_starts_anew_and_an_unfinished_one_resumes(tmp_path, monkeypatch, caplog):
    """The stages write nothing here but the names of the runs that they found."""
    runs = []

    def run(name, *_):
        runs.append((name, sorted(path.name for path in (tmp_path / name).glob("*"))))
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "checkpoint").touch()
        if len(runs) == 2:
            raise RuntimeError("killed")

    monkeypatch.setattr(project, "run_stage", run)
    saved = SimpleNamespace(card=NOT_BETTER, save_pretrained=lambda folder: None)
    monkeypatch.setattr(project, "Recommender", SimpleNamespace(from_pretrained=lambda *_, **__: saved))
    (tmp_path / "data").mkdir()
    (tmp_path / "train.yaml").write_text("stage1: {seed: 1}\n")
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.json").write_text('{"results": {}}')
    with pytest.raises(RuntimeError, match="killed"):
        train_project(tmp_path)
    train_project(tmp_path)
    assert NOT_BETTER in caplog.text
    names = ["stage2", "grpo", "memory", "evaluate"]
    assert runs == [("stage1", []), ("stage2", []), ("stage2", ["checkpoint"]), *((name, []) for name in names[1:])]
    runs[:] = [None, None]
    monkeypatch.chdir(tmp_path.parent)  # another path of the same project
    train_project(tmp_path.name)
    assert runs[2:] == []
    (tmp_path / "train.yaml").write_text("grpo: {seed: 1}\nstage1: {seed: 1}\n")
    train_project(tmp_path)
    assert runs[2:4] == [("grpo", []), ("memory", [])] and (tmp_path / "grpo.old/checkpoint").exists()


def test_a_missing_launcher_is_named(tmp_path):
    with locked(tmp_path) as lock, pytest.raises(ValueError, match="--launch has 'acelerate'"):
        run_stage("stage1", tmp_path / "stage1.yaml", "acelerate launch", lock)


def test_progress_is_that_of_the_outer_bar(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(project.Progress, "update", lambda self, task, **counts: shown.append(counts))
    log = tmp_path / "log"
    log.write_bytes(b"\r 10%|# | 4/40 [00:01<00:09, 4it/s]\n\r 50%|# | 1/2 [00:00<00:00]\x1b[A")
    follow(subprocess.Popen(["true"]), log, "stage1")
    assert shown[0] == {"completed": 4, "total": 40}


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
    again = lasar("train", "mine", cwd=folder)
    assert again.stderr.count("done before") == 5, again.stderr
    assert lasar("recommend", "mine", "--history", "item-0,item-1", "--top-k", "2", cwd=folder).stdout == first.stdout
