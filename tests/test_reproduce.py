"""recipes/reproduce.py: jobs in order, resumed where they stopped, and a report of what has ended."""

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import yaml

from lasar_hf.data import PreparedData
from lasar_hf.evaluation import ndcg_per_user, ranks
from lasar_hf.locks import locked
from tests.recipes import ROOT, load_recipe, save_prepared


# A recipe that records its run, and writes what recipes/eval.py does.
STUB = """
import json, os, sys, time
from pathlib import Path
import numpy as np
import yaml
arguments = yaml.safe_load(Path(sys.argv[2]).read_text())
with open(os.environ["RUNS"], "a") as file:
    file.write(json.dumps([Path(sys.argv[0]).stem, arguments]) + "\\n")
if Path(sys.argv[0]).stem in ("sft", "grpo"):
    state = Path(arguments["output_dir"]) / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_text(json.dumps({"max_steps": 3}))
if os.environ.get("FAIL", "nothing") in json.dumps(arguments):
    sys.exit("out of memory")
if Path(sys.argv[0]).stem == "depth":
    test = {"difference": 0.01, "low": -0.02, "high": 0.04, "p_value": 0.4}
    names = ["depth 0", "depth 1", "policy", "policy, shuffled", "fitted policy, shuffled", "oracle"]
    rows = {name: {"NDCG@10": 0.1} for name in names}
    rows["fitted policy"] = {"NDCG@10": 0.2, "against best fixed": test, "against shuffled": test}
    folder = Path(arguments["output_dir"])
    folder.mkdir(parents=True)
    content = {"rows": rows, "null": {"NDCG@10": 0.3}, "best": 1, "details": {"users": 5}}
    (folder / "report.json").write_text(json.dumps(content))
if os.environ.get("SLOW", "nothing") in json.dumps(arguments):
    time.sleep(4)
    with open(os.environ["RUNS"], "a") as file:
        file.write(json.dumps(["end", arguments]) + "\\n")
if Path(sys.argv[0]).stem == "eval":
    folder = Path(arguments["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    names = [model.partition("=")[0] for model in arguments.get("models", ["item-kNN=x"])]
    names += [names[0] + " + memory"] * arguments.get("memory", False)
    count = arguments.get("users") or 23
    draw = lambda n: np.random.default_rng(list(n.encode())).permuted(np.tile(np.arange(20), (count, 1)), axis=1)
    items = {n: draw(n) for n in names}
    row = {"n": count, "HR@10": 0.5, "NDCG@10": 0.25, "mean_depth": 2.0, "ms_per_user": 1.5}
    (folder / "report.json").write_text(json.dumps({"results": {n: row for n in names}, "details": {"baselines": {}}}))
    arrays = {f"items/{n}": items[n] for n in names} | {f"depths/{n}": np.arange(count) % 2 + 1 for n in names}
    arrays["users"] = np.arange(23)[-count:]
    np.savez(folder / "lists.npz", **arrays)
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The recipe with stubs in place of the others, and prepared data."""
    recipe = load_recipe("reproduce")
    monkeypatch.setattr(recipe, "RECIPES", tmp_path / "recipes")
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    (tmp_path / "recipes").mkdir()
    for name in ("sft", "grpo", "eval", "memory", "depth"):
        (tmp_path / "recipes" / f"{name}.py").write_text(STUB)
    (tmp_path / "stage.yaml").write_text("learning_rate: 1.0e-3\n")
    save_prepared(tmp_path / "data")
    return recipe


def study(recipe, folder, rows=None, **changed):
    """A study of a direct model and a latent one that starts from it."""
    config = str(folder / "stage.yaml")
    latent = {"recipe": "sft", "config": config, "set": {"model_name_or_path": "@direct"}, "validation": True}
    rows = rows or {"latent": latent, "direct": {"recipe": "sft", "config": config, "depth": 0, "memory": True}}
    table = {"title": "All", "rows": ["item-kNN", *rows], "against": ["item-kNN"]}
    tables = [table | {"slices": True, "figure": "a.png"}]
    settings = dict(
        data_dir=str(folder / "data"),
        output_dir=str(folder / "out"),
        report_dir=str(folder / "report"),
        rows=rows,
        tables=tables,
    )
    return recipe.StudyArguments(**settings | changed)


def runs(folder):
    """Recipe and arguments of every run so far."""
    return [json.loads(line) for line in (folder / "runs").read_text().splitlines()]


def test_rows_run_after_those_they_start_from(recipe, tmp_path):
    recipe.main(study(recipe, tmp_path))
    names = [(name, arguments.get("models", [""])[0].partition("=")[0]) for name, arguments in runs(tmp_path)]
    assert sorted(names) == sorted(
        [("eval", ""), ("sft", ""), ("sft", ""), ("memory", f"{tmp_path}/out/0/direct/checkpoint@0"),
         ("eval", "direct"), ("eval", "latent"), ("eval", "latent")]
    )  # fmt: skip
    trained = [arguments for name, arguments in runs(tmp_path) if name == "sft"]
    assert trained[1]["model_name_or_path"] == trained[0]["output_dir"]
    text = (tmp_path / "report" / "study.md").read_text()
    assert "| latent | 1 | 0.5000 | 0.2500 | 2.00 | 1.50 |" in text
    assert (tmp_path / "report" / "a.png").stat().st_size > 1000
    numbers = json.loads((tmp_path / "report" / "study.json").read_text())
    assert numbers["tables"]["All"]["direct"]["NDCG@10"] == 0.25
    assert numbers["details"]["missing"] == []


def test_a_study_goes_on_where_it_stopped(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "latent/checkpoint")
    with pytest.raises(SystemExit, match="0/latent/checkpoint"):
        recipe.main(study(recipe, tmp_path))
    first = len(runs(tmp_path))
    assert "Not complete" in (tmp_path / "report" / "study.md").read_text()
    monkeypatch.setenv("FAIL", "nothing")
    recipe.main(study(recipe, tmp_path))
    again = [arguments.get("output_dir", "") for _, arguments in runs(tmp_path)[first:]]
    assert len(again) == 3
    assert all("/latent/" in folder for folder in again)
    recipe.main(study(recipe, tmp_path))
    assert len(runs(tmp_path)) == first + 3


def test_changed_settings_run_again_with_the_rows_after_them(recipe, tmp_path):
    recipe.main(study(recipe, tmp_path))
    first, changed = len(runs(tmp_path)), study(recipe, tmp_path)
    changed.rows["latent"]["set"]["seed"] = 3
    recipe.main(changed)
    assert len(runs(tmp_path)) == first + 3  # the training of one row and its two evaluations
    (tmp_path / "stage.yaml").write_text("learning_rate: 1.0e-2\n")
    recipe.main(changed)
    assert len(runs(tmp_path)) == first + 3 + 6  # all but the baselines


def test_the_order_of_settings_does_not_matter(recipe, tmp_path):
    (tmp_path / "stage.yaml").write_text("learning_rate: 1.0e-3\nwarmup_steps: 3\n")
    recipe.main(study(recipe, tmp_path))
    first = len(runs(tmp_path))
    (tmp_path / "stage.yaml").write_text("warmup_steps: 3\nlearning_rate: 1.0e-3\n")
    recipe.main(study(recipe, tmp_path))
    assert len(runs(tmp_path)) == first


def test_a_training_resumes_under_the_same_settings_only(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "latent/checkpoint")
    with pytest.raises(SystemExit):
        recipe.main(study(recipe, tmp_path))
    folder = tmp_path / "out" / "0" / "latent"
    (folder / "checkpoint" / "mark").touch()
    with pytest.raises(SystemExit):
        recipe.main(study(recipe, tmp_path))
    assert (folder / "checkpoint" / "mark").exists()
    changed = study(recipe, tmp_path)
    changed.rows["direct"]["set"] = {"learning_rate": 1.0}  # the row that the other starts from
    with pytest.raises(SystemExit):
        recipe.main(changed)
    assert not (folder / "checkpoint" / "mark").exists()
    assert (folder / "checkpoint.old" / "mark").exists()


def test_old_settings_do_not_take_the_results_of_new_ones(recipe, tmp_path, monkeypatch):
    recipe.main(study(recipe, tmp_path))
    first, changed = len(runs(tmp_path)), study(recipe, tmp_path, num_beams=7)
    changed.rows["latent"]["set"]["seed"] = 3
    monkeypatch.setenv("FAIL", "latent/")  # after it has written its files
    with pytest.raises(SystemExit):
        recipe.main(changed)
    monkeypatch.setenv("FAIL", "nothing")
    second = len(runs(tmp_path))
    assert second > first
    recipe.main(study(recipe, tmp_path))
    again = [arguments.get("output_dir", "") for _, arguments in runs(tmp_path)[second:]]
    # The jobs that ran under the new settings: the training that failed, and the evaluations of the other row.
    assert str(tmp_path / "out/0/latent/checkpoint") in again
    assert str(tmp_path / "out/0/latent/test") in again  # had not run, but its checkpoint is another one
    assert str(tmp_path / "out/0/direct/test") in again
    assert str(tmp_path / "out/0/direct/checkpoint") not in again


def test_a_study_in_the_folder_of_its_data_is_refused(recipe, tmp_path):
    part = {"set": {"source": "routines", "output_dir": str(tmp_path / "out")}}
    with pytest.raises(ValueError, match="the folder of prepared data"):
        recipe.main(study(recipe, tmp_path, prepare=[part]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jobs", 0),
        ("num_beams", 0),
        ("sweep_users", -5),
        ("max_depth", -1),
        ("seeds", []),
        ("seeds", [0, 0]),
        ("rows", ["a", "b"]),
    ],
)
def test_wrong_numbers_are_refused(recipe, tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        recipe.StudyArguments(**asdict(study(recipe, tmp_path)) | {name: value})


def test_the_report_has_the_number_of_updates(recipe, tmp_path):
    recipe.main(study(recipe, tmp_path))
    text = (tmp_path / "report" / "study.md").read_text()
    assert "| latent | `" in text and "| policy | 3 | " in text
    assert json.loads((tmp_path / "report" / "study.json").read_text())["details"]["updates"] == {
        "latent": 3,
        "direct": 3,
    }


def test_seeds_are_averaged(recipe, tmp_path):
    part = study(recipe, tmp_path, seeds=[0, 1])
    part.rows["direct"]["seeds"] = "all"
    recipe.main(part)
    assert "| direct | 2 | 0.5000 ± 0.0000 |" in (tmp_path / "report" / "study.md").read_text()


def test_null_leaves_a_setting_out(recipe, tmp_path):
    part = study(recipe, tmp_path)
    part.rows["latent"]["set"] |= {"learning_rate": None, "depth_weights": [0.5, 1], "backbone_config": {"a": 3}}
    recipe.main(part)
    direct, latent = [arguments for name, arguments in runs(tmp_path) if name == "sft"]
    assert direct["learning_rate"] == 1e-3
    assert "learning_rate" not in latent
    assert latent["depth_weights"] == [0.5, 1]
    assert latent["backbone_config"] == {"a": 3}


def test_fixed_depths_beside_the_policy(recipe, tmp_path):
    part = study(recipe, tmp_path, max_depth=2, sweep_users=10, seeds=[0, 1])
    part.rows["latent"] |= {"sweep": True, "oracle": True, "seeds": "all"}
    part.rows["direct"]["seeds"] = "all"
    recipe.main(part)
    text = (tmp_path / "report" / "study.md").read_text()
    assert "| latent | 0.5000 / 0.2500 | 0.5000 / 0.2500 | 0.5000 / 0.2500 |" in text
    assert "| depth that latent chose | 1 | 2 | all |" in text
    drawn = np.arange(23)[-10:]  # as the stub says
    assert f"| users | {(drawn % 2 == 0).sum()} | {(drawn % 2 == 1).sum()} | 10 |" in text
    # The policy's lists and the targets are those of the drawn users.
    items = np.load(tmp_path / "out/0/latent/validation/lists.npz")["items/latent"]
    targets = np.array(PreparedData.load(tmp_path / "data").samples["validation"]["target"])
    policy = ndcg_per_user(ranks(items[drawn], targets[drawn]), 10).mean()
    assert policy != pytest.approx(ndcg_per_user(ranks(items[:10], targets[:10]), 10).mean(), abs=1e-4)
    assert re.search(rf"\| NDCG@10, policy \| .* \| {policy:.4f} \|", text)
    shown = [*["0.1000"] * 3, "0.2000", "0.1000", "0.1000", "0.3000", "+0.0100 (-0.0200 to +0.0400), p = 0.400"]
    assert f"| latent | 5 | {' | '.join(shown)} |" in text
    assert not any("/out/1/latent/sweep" in json.dumps(run) for run in runs(tmp_path))  # the first seed only


def test_rows_are_compared_on_the_seeds_that_both_have(recipe, tmp_path):
    part = study(recipe, tmp_path, seeds=[0, 1])
    part.rows["direct"]["seeds"] = "all"
    recipe.main(part)
    done = tmp_path / "out" / "1" / "direct" / "test" / "lists.npz"
    np.savez(done, **{"items/direct": np.full((23, 20), -1), "items/direct + memory": np.full((23, 20), -1)})
    part.tables[0]["against"] = ["latent"]
    recipe.main(part)
    numbers = json.loads((tmp_path / "report" / "study.json").read_text())["tables"]["All"]
    with (
        np.load(tmp_path / "out/0/direct/test/lists.npz") as direct,
        np.load(tmp_path / "out/0/latent/test/lists.npz") as latent,
    ):
        targets = [5 * user % 20 for user in range(23)]
        first, other = (
            ndcg_per_user(ranks(part[name], targets), 10)
            for part, name in ((direct, "items/direct"), (latent, "items/latent"))
        )
    assert numbers["direct"]["against latent"]["difference"] == pytest.approx((first - other).mean())


def test_two_studies_do_not_share_a_folder(recipe, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(RuntimeError, match="out"):
        recipe.main(study(recipe, tmp_path))
    assert not (tmp_path / "runs").exists()


def test_missing_packages_are_named_before_anything_runs(recipe, tmp_path, monkeypatch):
    part = study(recipe, tmp_path)
    part.tables[0]["rows"] = ["SASRec", "latent"]
    monkeypatch.setattr(recipe, "has_sasrec", lambda: False)
    with pytest.raises(ValueError, match=r"lasar_hf\[baselines\]"):
        recipe.main(part)
    assert not (tmp_path / "runs").exists()
    part.report_only = True
    recipe.main(part)  # trains nothing, so it does not need them


def test_the_number_of_updates_is_that_of_a_training_that_has_ended(recipe, tmp_path):
    part = study(recipe, tmp_path)
    recipe.main(part)
    part.rows["latent"]["set"]["seed"], part.report_only = 3, True
    recipe.main(part)
    updates = json.loads((tmp_path / "report" / "study.json").read_text())["details"]["updates"]
    assert updates == {"latent": None, "direct": 3}


def test_a_job_that_outlives_its_study_has_no_double(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOW", "latent/checkpoint")
    code = "import sys; from tests.recipes import load_recipe; recipe = load_recipe('reproduce')\n"
    code += "recipe.RECIPES = recipe.Path(sys.argv[1]) / 'recipes'\n"
    code += "recipe.main(recipe.StudyArguments(**recipe.json.loads(sys.argv[2])))"
    settings = json.dumps(asdict(study(recipe, tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), settings], cwd=ROOT)
    while not (tmp_path / "runs").exists() or "latent/checkpoint" not in str(runs(tmp_path)):
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.wait()
    recipe.main(study(recipe, tmp_path))
    folder = str(tmp_path / "out/0/latent/checkpoint")
    order = [name for name, arguments in runs(tmp_path) if arguments.get("output_dir") == folder]
    assert order == ["sft", "end", "sft", "end"]


def test_a_name_that_is_there_twice_is_refused(recipe, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("rows:\n  a: {recipe: sft}\n  a: {recipe: grpo}\n")
    with pytest.raises(ValueError, match=r"\['a'\] more than once"):
        recipe.check_names(path)


def test_a_setting_can_be_chosen_without_test_users(recipe, tmp_path):
    row = {"recipe": "sft", "config": str(tmp_path / "stage.yaml"), "test": False, "validation": True}
    recipe.main(study(recipe, tmp_path, {"one": row, "two": row | {"set": {"learning_rate": 0.1}}}, baselines=False))
    assert {arguments["split"] for name, arguments in runs(tmp_path) if name == "eval"} == {"validation"}
    text = (tmp_path / "report" / "study.md").read_text()
    assert text.count("| one | 1 | 0.5000 |") == 1 and "Validation users:" in text


def test_memories_are_evaluated_on_test_users_only(recipe, tmp_path):
    row = {"recipe": "sft", "config": str(tmp_path / "stage.yaml"), "memory": True, "validation": True}
    recipe.main(study(recipe, tmp_path, {"one": row}, baselines=False))
    evaluations = [arguments for name, arguments in runs(tmp_path) if name == "eval"]
    has_memory = {arguments["split"]: arguments["memory"] for arguments in evaluations}
    assert has_memory == {"test": True, "validation": False}


STUDIES = [path for path in ROOT.glob("recipes/*/*.yaml") if "\nrows:\n" in path.read_text()]


@pytest.mark.parametrize("path", sorted(STUDIES), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_studies_of_the_recipes_have_known_rows_and_settings(monkeypatch, path):
    recipe = load_recipe("reproduce")
    monkeypatch.chdir(ROOT)
    recipe.check_names(path)
    study = recipe.StudyArguments(**yaml.safe_load(path.read_text()))
    rows = recipe.read_rows(study)
    recipe.check_prepare(study)
    recipe.check_depths(study, rows)
    recipe.check_tables(study, rows)
    assert all(job.name.startswith("prepare") or job.after for job in recipe.Jobs(study, rows).values())


@pytest.mark.parametrize(
    "part",
    [
        {"confg": "stage.yaml"}, {"config": "missing.yaml"}, {"set": None}, {"set": {"outptu_dir": "x"}},
        {"set": {"max_latent_steps": "many"}},
    ],
)  # fmt: skip
def test_wrong_preparations_are_refused(recipe, tmp_path, part):
    with pytest.raises(ValueError, match="prepare"):
        recipe.main(study(recipe, tmp_path, prepare=[part]))
    assert not (tmp_path / "runs").exists()


def test_a_report_can_be_written_alone(recipe, tmp_path):
    recipe.main(study(recipe, tmp_path, report_only=True))
    assert not (tmp_path / "runs").exists()
    assert "Not complete" in (tmp_path / "report" / "study.md").read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": {"recipe": "sft", "config": "stage.yaml", "epochs": 3}}, "epochs"),
        ({"a": {"recipe": "sft", "config": "missing.yaml"}}, "no file"),
        ({"a": {"recipe": "ppo", "config": "stage.yaml"}}, "ppo"),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "set": {"lerning_rate": 1}}}, "lerning_rate"),
        ({"a": {"of": "b"}}, "refers to 'b'"),
        ({"a": {"of": "b"}, "b": {"of": "a"}}, "circle"),
        (
            {"a": {"recipe": "sft", "config": "stage.yaml", "memory": True, "test": False, "validation": True}},
            "test users",
        ),
        ({"a/b": {"recipe": "sft", "config": "stage.yaml"}}, "use another name"),
        ({"a": {"recipe": "sft", "config": "stage.yaml"}, "b": {"of": "a", "seeds": "all"}}, "needs them too"),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "seeds": "some"}}, "expected first or all"),
        ({"EASE": {"recipe": "sft", "config": "stage.yaml"}}, "use another name"),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "depth": "deep"}}, "depth 'deep'"),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "depth": -1}}, "depth -1"),
        ({"a": {"recipe": "sft", "config": "stage.yaml"}, "b": {"of": "a", "set": {"seed": 1}}}, "trains nothing"),
        ({"a": {"recipe": "sft", "config": "stage.yaml"}, "b": {"of": "a", "memory": True}}, "'a' needs it too"),
        ({"a": {"recipe": "sft", "config": "stage.yaml"}, "b": {"of": "a"}, "c": {"of": "b"}}, "no checkpoint"),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "set": {"output_dir": "elsewhere"}}}, "sets output_dir"),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "seeds": "all", "set": {"seed": 3}}}, "sets output_dir, or"),
        ({"a": None}, "expected settings"),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "set": None}}, "expected settings"),
        ({"a": {"recipe": "sft", "config": "empty.yaml"}}, "has no settings"),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "set": {"depth_weights": 5}}}, "depth_weights 5"),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "set": {"learning_rate": "fast"}}}, "learning_rate.*'fast'"),
        (
            {
                "a": {
                    "recipe": "sft",
                    "config": "stage.yaml",
                    "depth": 8,
                    "set": {"model_name_or_path": "some/model", "max_latent_steps": 3},
                }
            },
            "'a' has 8 .* at most 3",
        ),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "test": False}}, "at least one evaluation"),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "depth": 9}}, "'a' has 9 .* at most 8"),
        (
            {
                "a": {"recipe": "sft", "config": "stage.yaml", "set": {"max_latent_steps": 3}},
                "b": {"recipe": "sft", "config": "stage.yaml", "set": {"model_name_or_path": "@a"}, "sweep": True},
            },
            "'b' has 8 .* at most 3",
        ),
        ({"a": {"recipe": "sft", "config": "stage.yaml", "set": {"depth_weights": [1.0] * 10}}}, "'a' has 9 "),
        ({"a": {"recipe": "grpo", "config": "stage.yaml", "set": {"fixed_depth": 9}}}, "'a' has 9 "),
    ],
)
def test_wrong_rows_are_refused_before_anything_runs(recipe, tmp_path, monkeypatch, rows, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ValueError, match=message):
        recipe.main(study(recipe, tmp_path, rows=rows))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "table",
    [
        {"title": "x", "rows": ["other"]},
        {"title": "x"},
        {"title": "x", "rows": [], "row": 1},
        {"title": "x", "rows": ["direct"], "links": True},
        {"title": "x", "rows": None},
        {"title": "x", "rows": ["direct"], "against": None},
    ],
)
def test_wrong_tables_are_refused(recipe, tmp_path, table):
    with pytest.raises(ValueError, match="table|Table"):
        recipe.main(study(recipe, tmp_path, tables=[table]))


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [({"title": "All"}, "All"), ({"figure": "a.png"}, "a.png"), ({"figure": "depths.png"}, "depths.png")],
)
def test_tables_and_figures_do_not_overwrite_one_another(recipe, tmp_path, changed, wrong):
    part = study(recipe, tmp_path)
    part.tables.append({"title": "Other", "rows": ["direct"]} | changed)
    with pytest.raises(ValueError, match=f"{wrong}.*more than once"):
        recipe.main(part)
    assert not (tmp_path / "runs").exists()


def test_users_beyond_the_largest_fixed_depth_are_counted(recipe, tmp_path):
    part = study(recipe, tmp_path, max_depth=1)  # the stub's policy takes 1 or 2 steps
    part.rows["latent"]["sweep"] = True
    recipe.main(part)
    text = (tmp_path / "report" / "study.md").read_text()
    assert "| depth | 0 | 1 | 2 |\n|---|---:|---:|---:|\n| latent | 0 | 12 | 11 |" in text
