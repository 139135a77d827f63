"""Every YAML file of recipes/ runs: a training takes one step of a tiny model, from the checkpoint that it names."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import yaml

from lasar_hf import LasarForGenerativeRec, LasarProcessor
from lasar_hf.commands.parser import ScriptParser
from lasar_hf.data import PreparedData
from tests import preparing
from tests.recipes import load_recipe
from tests.test_recipes import FILES, RECIPES, SCRIPT_OF, argument_classes
from tests.tiny import tiny_backbone, tiny_tokenizer


def script_of(path: Path) -> str:
    return SCRIPT_OF.get(path.stem, path.stem)


SETTINGS = {path: yaml.safe_load(path.read_text()) for path in FILES}
TRAININGS = [path for path in FILES if script_of(path) in ("sft", "grpo")]
MADE_BY = {SETTINGS[path]["output_dir"]: path for path in TRAININGS}  # checkpoint -> file
# What makes a run small. Other settings stay as they are.
STEP = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
TINY = {
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512},
}


def parse(path: Path, folder: Path, settings: dict) -> tuple:
    """The arguments of a YAML file with other settings, as its script would read them."""
    config = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(settings))
    return ScriptParser(argument_classes(script_of(path))).parse_args_and_config(["--config", str(config)])


class Runs:
    """Runs of the files in one folder, each at most once."""

    def __init__(self, folder: Path):
        self.folder = folder
        preparing.run(folder / "data")
        tiny_backbone("qwen3").save_pretrained(folder / "qwen3")
        tiny_tokenizer().save_pretrained(folder / "qwen3")

    @functools.cache  # noqa: B019
    def train(self, path: Path) -> Path:
        """Folder of the checkpoint of a training."""
        settings, out = dict(SETTINGS[path]), self.folder / path.parent.name / path.stem
        settings |= STEP | {"output_dir": str(out), "data_dir": str(self.folder / "data")}
        settings |= dict.fromkeys(settings.keys() & {"eval_users"}, 3)
        settings |= dict.fromkeys(settings.keys() & {"eval_steps"}, 1)
        if "load_best_model_at_end" in settings and "eval_steps" in settings:
            settings["save_steps"] = 1
        if "per_device_train_batch_size" in settings:
            settings["per_device_train_batch_size"] = 16 if script_of(path) == "grpo" else 4
        if "backbone_config" in settings:
            backbone = settings["backbone_config"]
            settings["backbone_config"] = backbone | TINY[backbone["model_type"]]
        for name in settings.keys() & {"model_name_or_path", "stage1_model", "anchors_dir"}:
            settings[name] = str(self.located(settings[name]))
        load_recipe(script_of(path)).main(*parse(path, out, settings))
        return out

    def located(self, name: str) -> Path:
        """Folder of what a setting names: a checkpoint, its anchors, or a language model of the Hub."""
        if not name.startswith("outputs/"):
            assert name.startswith("Qwen/Qwen3-")
            return self.folder / "qwen3"
        checkpoint, _, rest = name.partition("/anchors")
        return self.train(MADE_BY[checkpoint]) / ("anchors" if name.endswith("/anchors") else rest)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("recipes"))


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", TRAININGS, ids=name_of)
def test_a_training_takes_a_step(runs, path):
    out = runs.train(path)
    logs = json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert len(losses) == 1 and math.isfinite(losses[0])
    if "eval_strategy" in SETTINGS[path]:
        assert any("eval_NDCG@10" in log for log in logs)
    model, processor = LasarForGenerativeRec.from_pretrained(out), LasarProcessor.from_pretrained(out)
    output = model.recommend(**processor([processor.catalog.item_ids[:3]]), catalog=processor.catalog, top_k=3)
    assert output.items.min() >= 0


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in FILES if script_of(path) == "prepare"], ids=name_of)
def test_a_preparation_runs(tmp_path, path):
    """With a small generated shop, and without models and endpoints of the network."""
    settings = dict(SETTINGS[path]) | {"output_dir": str(tmp_path / "data")}
    if settings.get("source") == "routines":
        settings["source_args"] |= {"num_users": 60, "validation_users": 5, "test_users": 5}
    else:
        settings |= {"source": "toy", "source_args": dict(preparing.SHOP)}
    settings |= dict.fromkeys(settings.keys() & {"embedding_model", "segment_model"})
    settings["teacher"] = "template"
    for name in ("codebook_size", "text_dim", "collaborative_dim", "tokenizer_size"):
        if name in settings:
            settings[name] = min(settings[name], preparing.SMALL[name])
    settings = {name: value for name, value in settings.items() if value is not None}
    recipe = load_recipe("prepare")
    recipe.prepare(*parse(path, tmp_path, settings))
    data = PreparedData.load(tmp_path / "data")
    assert data.catalog.num_levels == settings.get("num_sid_levels", data.catalog.num_levels)
    assert max(map(len, data.samples["train"]["segments"])) <= settings.get("max_latent_steps", 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in FILES if script_of(path) in ("eval", "memory", "depth", "recommend")], ids=name_of
)
def test_what_follows_a_training_runs(runs, tmp_path, path):
    """Checkpoints that run.sh makes with changed settings are replaced by the family's first one."""
    settings, script = dict(SETTINGS[path]), script_of(path)
    first = next(part for part in TRAININGS if part.parent == path.parent and part.stem == "stage1")

    def located(entry: str) -> str:
        name, _, depth = entry.partition("@")
        folder = runs.train(MADE_BY.get(name, first))
        return f"{folder}@{depth}" if depth else str(folder)

    (tmp_path / "histories.jsonl").write_text('{"user_id": "A", "history": ["item-1", "item-2"]}\n')
    small = {"users": 4, "num_beams": 10, "baselines": False, "cards": False}
    small |= {"data_dir": str(runs.folder / "data"), "output_dir": str(tmp_path / "out")}
    small |= {"histories": str(tmp_path / "histories.jsonl")}
    names = {field.name for part in argument_classes(script) for field in dataclasses.fields(part)}
    settings |= {name: value for name, value in small.items() if name in names}
    if "models" in settings:
        entries = [entry.rpartition("=") for entry in settings["models"]]
        settings["models"] = [f"{name}{equals}{located(where)}" for name, equals, where in entries]
    if "model" in settings:
        settings["model"] = located(settings["model"])
    load_recipe(script).main(*parse(path, tmp_path, settings))
    written = list(runs.folder.rglob("item_memory*")) if script == "memory" else list((tmp_path / "out").iterdir())
    assert written


def test_every_file_is_run():
    others = {"prepare", "eval", "memory", "depth", "recommend", "reproduce"}  # studies: test_reproduce.py
    assert {script_of(path) for path in FILES if path not in TRAININGS} <= others
    assert len(FILES) == len(list(RECIPES.glob("*/*.yaml"))) - len(list(RECIPES.glob("accelerate_configs/*.yaml")))
