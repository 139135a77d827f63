"""recipes/eval.py: the report, the prompt format, and two processes against one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lasar_hf import LasarConfig, LasarForGenerativeRec
from lasar_hf.commands.parser import ScriptParser
from lasar_hf.data import PreparedData
from lasar_hf.evaluation import has_sasrec
from lasar_hf.locks import locked
from tests.recipes import ROOT, load_recipe, report, save_checkpoint, save_prepared
from tests.tiny import tiny_catalog


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and prepared data of 23 users."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_checkpoint(folder / "checkpoint", instruction="")
    save_prepared(folder / "data")
    return folder


def arguments(folder: Path, out: Path) -> dict:
    models = [f"direct={folder / 'checkpoint'}@0", f"policy={folder / 'checkpoint'}"]
    return dict(data_dir=str(folder / "data"), output_dir=str(out), models=models, batch_size=3, num_beams=8)


def test_report_has_baselines_and_models(recipe, folder, tmp_path):
    recipe.main(recipe.EvaluateArguments(**arguments(folder, tmp_path)))
    names = ["popularity", "Markov", "item-kNN", "EASE", *["SASRec"] * has_sasrec(), "memory alone"]
    names += ["direct", "policy"]
    content = report(tmp_path)
    assert list(content["results"]) == names
    assert list(content["slices"]["all"]["results"]) == names
    assert content["slices"]["pair seen"]["n"] + content["slices"]["pair unseen"]["n"] == 23
    assert content["details"]["baselines"]["item-kNN"]["settings_tried"] == 27
    for metric in ("HR@10", "NDCG@10"):
        tests, rows = content["details"][f"{metric}_against_item-kNN"], content["results"]
        assert list(tests)[-2:] == ["direct - item-kNN", "policy - item-kNN"]
        difference = rows["policy"][metric] - rows["item-kNN"][metric]
        assert tests["policy - item-kNN"]["difference"] == pytest.approx(difference)


def test_users_are_drawn_and_named_in_the_lists(recipe, folder, tmp_path):
    args = arguments(folder, tmp_path / "all") | dict(baselines=False)
    recipe.main(recipe.EvaluateArguments(**args))
    recipe.main(recipe.EvaluateArguments(**args | dict(output_dir=str(tmp_path / "some")), users=7))
    with np.load(tmp_path / "all" / "lists.npz") as every, np.load(tmp_path / "some" / "lists.npz") as some:
        users = some["users"]
        assert every["users"].tolist() == list(range(23))
        assert len(users) == 7 and users.tolist() != list(range(7))
        for name in ("items/direct", "items/policy", "depths/policy"):
            np.testing.assert_array_equal(some[name], every[name][users])
    assert report(tmp_path / "some")["results"]["policy"]["n"] == 7


def test_a_checkpoint_in_use_keeps_its_card(recipe, folder, tmp_path, caplog):
    args = recipe.EvaluateArguments(**arguments(folder, tmp_path), baselines=False)
    card = folder / "checkpoint" / "README.md"
    card.unlink(missing_ok=True)
    with locked(folder / "checkpoint"):
        recipe.main(args)
    assert list(report(tmp_path)["results"]) == ["direct", "policy"]
    assert "The card of" in caplog.text and "in use by process" in caplog.text
    assert not card.exists()


def test_results_may_be_written_into_the_folder_of_the_checkpoint(recipe, folder, tmp_path):
    checkpoint = shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    args = arguments(folder, checkpoint) | dict(models=[f"direct={checkpoint}@0"])
    recipe.main(recipe.EvaluateArguments(**args, baselines=False))
    assert (checkpoint / "report.json").exists()
    assert "model-index" in (checkpoint / "README.md").read_text()


@pytest.mark.parametrize("choice", [True, "false", "auto"])
def test_exclusion_holds_in_every_row_and_is_said(recipe, folder, tmp_path, choice):
    """No user of the prepared data takes an item twice, so `auto` leaves the history out."""
    args = recipe.EvaluateArguments(**arguments(folder, tmp_path), exclude_history=choice)
    recipe.main(args)
    content, is_excluded = report(tmp_path), choice != "false"
    assert content["details"]["exclude_history"] is is_excluded
    assert all((row["repeats"] == 0) is is_excluded for row in content["results"].values())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert ("are left out" if is_excluded else "are not left out") in text
    assert "best of 27 settings" in text


def test_exclusion_is_read_from_yaml(recipe, tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text("data_dir: data\noutput_dir: out\nexclude_history: false\n")
    (args,) = ScriptParser((recipe.EvaluateArguments,)).parse_args_and_config(["--config", str(config)])
    assert args.exclude_history is False
    with pytest.raises(ValueError, match="exclude_history"):
        recipe.EvaluateArguments("data", "out", exclude_history="sometimes")


def test_significance_draws_users(recipe, folder, tmp_path, monkeypatch):
    drawn, paired_bootstrap = [], recipe.paired_bootstrap
    monkeypatch.setattr(
        recipe, "paired_bootstrap", lambda a, b, users: (drawn.append(list(users)), paired_bootstrap(a, b, users))[1]
    )
    recipe.main(recipe.EvaluateArguments(**arguments(folder, tmp_path)))
    num_tests = 6 + has_sasrec() + 2 * (4 + has_sasrec())  # neighbours, and both metrics of the rows below item-kNN
    assert drawn == num_tests * [list(PreparedData.load(folder / "data").samples["test"]["user_id"])]


def test_a_model_that_cannot_recommend_the_history_is_refused_first(recipe, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "evaluate_baselines", lambda *_: pytest.fail("the baselines were tuned first"))
    save_checkpoint(tmp_path / "model")
    config = LasarConfig.from_pretrained(tmp_path / "model")
    config.exclude_history = True
    config.save_pretrained(tmp_path / "model")
    options = arguments(folder, tmp_path) | dict(models=[f"x={tmp_path / 'model'}"], exclude_history=False)
    with pytest.raises(ValueError, match="exclude_history"):
        recipe.main(recipe.EvaluateArguments(**options))


def test_names_of_rows_with_memory_are_reserved(recipe):
    with pytest.raises(ValueError, match="memory"):
        recipe.parse_models(["x=path", "x + memory=path"])


def test_table_is_printed_even_if_saving_fails(recipe, folder, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(recipe, "save_report", fail)
    with pytest.raises(OSError, match="disk full"):
        recipe.main(recipe.EvaluateArguments(**arguments(folder, tmp_path) | {"users": 3}))
    assert "| policy |" in capsys.readouterr().out


def test_unusable_output_dir_fails_before_the_work(recipe, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "evaluate_model", lambda *_: pytest.fail("the models were evaluated first"))
    (tmp_path / "file").write_text("a file is in the way of the folder")
    with pytest.raises(OSError):
        recipe.main(recipe.EvaluateArguments(**arguments(folder, tmp_path / "file")))


def test_another_instruction_is_refused(recipe, folder, tmp_path):
    """The prompt format belongs to the checkpoint, so there is no argument for it."""
    options = [f"--data_dir={folder / 'data'}", f"--output_dir={tmp_path}", "--instruction", "Buy this."]
    with pytest.raises(ValueError, match="instruction"):
        ScriptParser((recipe.EvaluateArguments,)).parse_args_and_config(options)


def test_another_catalogue_is_refused(recipe, folder, tmp_path):
    save_checkpoint(tmp_path / "other")
    tiny_catalog(seed=1).save_pretrained(tmp_path / "other")  # other Semantic IDs
    args = arguments(folder, tmp_path / "report") | {"models": [f"other={tmp_path / 'other'}"]}
    with pytest.raises(ValueError, match="other"):
        recipe.main(recipe.EvaluateArguments(**args))


def test_samples_that_keep_less_than_the_prompts_show_give_a_warning(recipe, folder, tmp_path):
    save_prepared(tmp_path / "data", max_history=2)
    args = arguments(folder, tmp_path / "report") | {"data_dir": str(tmp_path / "data"), "users": 3}
    with pytest.warns(UserWarning, match="max_history"):
        recipe.main(recipe.EvaluateArguments(**args))


@pytest.mark.parametrize("models", [["path/only"], ["a=x", "a=y"], ["Markov=x"], ["a=x@half"]])
def test_models_that_cannot_be_read_are_refused(recipe, models):
    with pytest.raises(ValueError, match="models"):
        recipe.parse_models(models)


def test_processes_share_the_batches_of_one(recipe, folder, tmp_path, monkeypatch):
    """Two processes, run one after the other, recommend for the users of one, in the same batches."""
    args = recipe.EvaluateArguments(**arguments(folder, tmp_path))
    data, batches = PreparedData.load(args.data_dir), []
    recommend = LasarForGenerativeRec.recommend

    def record(self, input_ids, *rest, **options):
        batches.append(input_ids.tolist())
        return recommend(self, input_ids, *rest, **options)

    monkeypatch.setattr(LasarForGenerativeRec, "recommend", record)

    def evaluate(index: int, count: int) -> tuple[np.ndarray, list]:
        state = SimpleNamespace(process_index=index, num_processes=count, is_main_process=index == 0, device="cpu")
        monkeypatch.setattr(recipe, "PartialState", lambda: state)
        batches.clear()
        items, _, _ = recipe.evaluate_model(args, data, data.samples["test"], str(folder / "checkpoint"), "")
        return items, batches[1:]  # without the batch that warms up

    (one, all_batches), (first, first_batches), (second, second_batches) = (
        evaluate(0, 1),
        evaluate(0, 2),
        evaluate(1, 2),
    )
    assert [len(batch) for batch in all_batches] == [3] * 7 + [2]
    assert first_batches == all_batches[::2]
    assert second_batches == all_batches[1::2]
    assert (first[:, 0] >= 0).sum() == 12
    assert np.array_equal(np.maximum(first, second), one)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_report_the_same_as_one(recipe, folder, tmp_path):
    args = arguments(folder, tmp_path / "one")
    recipe.main(recipe.EvaluateArguments(**args))
    options = ["--models", *args.pop("models")]
    args["output_dir"] = str(tmp_path / "two")
    options += [part for name, value in args.items() for part in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, "recipes/eval.py", *options],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n| policy |") == 1  # two processes that do not find each other would both print it
    assert report(tmp_path / "two") == report(tmp_path / "one")


def test_more_steps_than_the_model_takes_are_refused_before_the_baselines(recipe, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "evaluate_baselines", None)
    models = [f"deep={folder / 'checkpoint'}@5"]
    args = recipe.EvaluateArguments(**arguments(folder, tmp_path) | {"models": models})
    with pytest.raises(ValueError, match="The depth of 'deep' in models is 5; expected 0 to 4"):
        recipe.main(args)
