"""The recipes' YAML files and scripts, and the stages of training from one checkpoint to the next."""

import dataclasses
import functools
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from peft import get_peft_model

from lasar_hf import (
    ItemMemory,
    LasarForGenerativeRec,
    LasarGRPOConfig,
    LasarGRPOTrainer,
    LasarProcessor,
    LasarSFTConfig,
    SidCatalog,
)
from lasar_hf.commands.parser import ScriptParser
from lasar_hf.data import (
    ALIGNMENT_TASKS,
    PreparedData,
    alignment_examples,
    history_examples,
    sft_examples,
    stage1_examples,
)
from lasar_hf.model.memory_lasar import catalog_hash
from lasar_hf.reasoning import encode_anchors
from lasar_hf.trainers import LasarModelConfig, lasar_lora_config
from tests.recipes import ROOT, load_recipe, save_checkpoint, save_prepared
from tests.tiny import tiny_tokenizer


RECIPES = ROOT / "recipes"
SCRIPT_OF = {
    "stage1": "sft", "stage2": "sft", "stage2_eight": "sft", "explicit": "sft", "grpo_eight": "grpo",
    "study": "reproduce", "sweep": "reproduce", "reading": "reproduce",
}  # fmt: skip
SHARED = {"sft": (LasarSFTConfig, LasarModelConfig), "grpo": (LasarGRPOConfig, LasarModelConfig)}
FILES = sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name != "accelerate_configs")
BACKBONE = {
    "model_type": "gpt_neox",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


@functools.cache
def argument_classes(script: str) -> tuple[type, ...]:
    names = vars(load_recipe(script))
    own = [part for name, part in names.items() if name.endswith("Arguments") and dataclasses.is_dataclass(part)]
    return *own, *SHARED.get(script, ())


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_key_is_an_argument(path):
    script = SCRIPT_OF.get(path.stem, path.stem)
    names = {field.name for part in argument_classes(script) for field in dataclasses.fields(part)}
    assert set(yaml.safe_load(path.read_text())) <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_first_line_is_the_command(path):
    script = SCRIPT_OF.get(path.stem, path.stem)
    command = f"recipes/{script}.py --config recipes/{path.parent.name}/{path.name}"
    assert command in path.read_text().splitlines()[0]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/run.sh")), ids=lambda path: path.parent.name)
def test_run_sh_runs_every_stage(path):
    text = path.read_text()
    subprocess.run(["bash", "-n", path], check=True)
    stages = re.findall(rf"--config recipes/{re.escape(path.parent.name)}/(\w+)\.yaml", text)
    if path.parent.name == "routines":  # its users have nothing in common that a memory could know
        ablations, eight = ["stage2", "stage2"], ["stage2_eight", "grpo_eight"]
        assert stages == ["prepare", "stage1", "stage2", "grpo", "explicit", *ablations, *eight, "eval"]
    else:
        assert stages == ["prepare", "stage1", "stage2", "grpo", "memory", "eval"]


@pytest.mark.parametrize("recipe", ["amazon_qwen3_0.6b", "amazon_qwen3_1.7b_lora"])
@pytest.mark.parametrize(("stage", "script"), [("stage1", "sft"), ("stage2", "sft"), ("grpo", "grpo")])
def test_one_card_takes_the_steps_of_eight(recipe, stage, script, tmp_path):
    """The options of run.sh for one card parse, and change neither the examples of a step nor the loss."""
    options = re.search(rf'{script.upper()}="(--.*)"', (RECIPES / recipe / "run.sh").read_text())[1].split()
    parser = ScriptParser(argument_classes(script))
    settings = ["--config", str(RECIPES / recipe / f"{stage}.yaml"), "--output_dir", str(tmp_path)]
    settings += ["--use_cpu", "true", "--bf16", "false"]
    (_, eight, eight_model), (_, one, one_model) = (
        parser.parse_args_and_config(arguments) for arguments in (settings, settings + options)
    )
    examples = [args.per_device_train_batch_size * args.gradient_accumulation_steps for args in (eight, one)]
    assert examples[1] == 8 * examples[0]
    assert one.gradient_checkpointing and one_model == eight_model
    changed = {"per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
    assert {name.removeprefix("--") for name in options[::2]} == changed


@pytest.mark.parametrize("script", sorted(path.stem for path in RECIPES.glob("*.py")))
def test_scripts_leave_the_import_path_alone(script):
    before = list(sys.path)
    load_recipe(script)
    assert sys.path == before


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    "line", ["lerning_rate: 0.1", "load_in_4bit: true", "stage: 3", "sid_loss: Catalog", "rows: [history]"]
)
def test_wrong_keys_and_values_are_refused(tmp_path, line):
    config = tmp_path / "stage1.yaml"
    config.write_text((RECIPES / "toy/stage1.yaml").read_text() + f"{line}\n")
    with pytest.raises(ValueError, match=line.split(":")[0]):
        ScriptParser(argument_classes("sft")).parse_args_and_config(["--config", str(config)])


@pytest.mark.parametrize("script", ["grpo", "recommend"])
@pytest.mark.parametrize("line", ["instruction: Buy this.", "max_history: 7"])
def test_the_prompt_format_is_not_an_argument_after_training(tmp_path, script, line):
    config = tmp_path / "config.yaml"
    config.write_text((RECIPES / f"scientific/{script}.yaml").read_text() + f"{line}\n")
    with pytest.raises(ValueError, match=line.split(":")[0]):
        ScriptParser(argument_classes(script)).parse_args_and_config(["--config", str(config)])


@pytest.mark.parametrize("value", [BACKBONE, json.dumps(BACKBONE)])
def test_backbone_config_may_be_json(value):
    assert load_recipe("sft").SFTScriptArguments(data_dir="x", backbone_config=value).backbone_config == BACKBONE


@pytest.mark.parametrize("value", ["qwen3", "[1]", "{}", {"model_type": "qwen33"}])
def test_other_backbone_configs_are_refused(value):
    with pytest.raises(ValueError, match="backbone_config"):
        load_recipe("sft").SFTScriptArguments(data_dir="x", backbone_config=value)


@pytest.mark.parametrize("heads", [{"num_attention_heads": 2}, {"num_attention_heads": 6, "num_key_value_heads": 4}])
def test_key_value_heads_that_do_not_divide_are_named(heads):
    """Llama and Qwen3 have a default of their own for the number of key-value heads."""
    recipe = load_recipe("sft")
    backbone = {"model_type": "qwen3", "hidden_size": 24, "num_hidden_layers": 1, "head_dim": 4, **heads}
    script = recipe.SFTScriptArguments(data_dir="x", backbone_config=backbone)
    with pytest.raises(ValueError, match="num_key_value_heads"):
        recipe.new_backbone(script, LasarModelConfig(), tiny_tokenizer())


@pytest.mark.parametrize("path", [None, "some/model"])
def test_stage_1_starts_from_one_backbone(folder, path):
    recipe = load_recipe("sft")
    script = recipe.SFTScriptArguments(data_dir=str(folder), backbone_config=None if path is None else BACKBONE)
    with pytest.raises(ValueError, match="set one of them"):
        recipe.stage1_model(script, LasarModelConfig(model_name_or_path=path), PreparedData.load(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Tasks of stage 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared data with a tokenizer for a backbone from scratch."""
    folder = tmp_path_factory.mktemp("data")
    save_prepared(folder, users=12)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return PreparedData.load(folder)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def pairs(*tables) -> list[tuple]:
    return [(tuple(example["input_ids"]), tuple(example["labels"])) for table in tables for example in table]


def test_tasks_without_weights_are_concatenated(data, processor):
    history = history_examples(data.split, processor)
    alignment = alignment_examples(data.interactions, data.split, processor)
    assert pairs(stage1_examples(data, processor, ["history", "alignment"])) == pairs(history, alignment)


def test_weights_repeat_and_draw_examples(data, processor):
    next_item = sft_examples(data.samples["train"], processor)
    alignment = alignment_examples(data.interactions, data.split, processor)
    mixed = pairs(stage1_examples(data, processor, ["next_item=2", "alignment=0.5", "history=0"]))
    assert mixed[: 2 * len(next_item)] == 2 * pairs(next_item)
    drawn = mixed[2 * len(next_item) :]
    assert len(drawn) == round(len(alignment) / 2)
    assert set(drawn) <= set(pairs(alignment))


def test_only_reasoning_says_how_many_steps_are_needed(data, processor):
    depths = np.arange(len(data.samples["train"])) % 3
    mixed = stage1_examples(data, processor, ["reasoning", "next_item", "sid_to_title"], depths=depths)
    assert mixed["depth"][: len(depths)] == depths.tolist()
    assert set(mixed["depth"][len(depths) :]) == {-1}


def test_alignment_is_all_of_its_tasks(data, processor):
    alignment = alignment_examples(data.interactions, data.split, processor)
    examples = stage1_examples(data, processor, [task for task in ALIGNMENT_TASKS if task != "description_to_sid"])
    assert sorted(pairs(examples)) == sorted(pairs(alignment))


@pytest.mark.parametrize("tasks", [["next_itme"], ["history=much"], ["history", "history=2"], ["history=-1"]])
def test_tasks_that_cannot_be_read_are_refused(data, processor, tasks):
    with pytest.raises(ValueError, match="tasks|history"):
        stage1_examples(data, processor, tasks)


# ---------------------------------------------------------------------------------------------------------------------
# From stage to stage


def settings(output_dir: Path, **options: object) -> dict:
    """Two small steps on a CPU."""
    return dict(
        output_dir=str(output_dir),
        max_steps=2,
        per_device_train_batch_size=8,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )


@pytest.fixture(scope="module")
def stage1(folder, tmp_path_factory):
    """Checkpoint of recipes/sft.py, stage 1, with a prompt format that is not the default one."""
    recipe, output_dir = load_recipe("sft"), tmp_path_factory.mktemp("stage1")
    script = recipe.SFTScriptArguments(
        data_dir=str(folder),
        backbone_config=BACKBONE,
        max_latent_steps=4,
        tasks=["next_item"],
        instruction="the item",
        max_history=3,
        eval_users=4,
    )
    training_args = LasarSFTConfig(**settings(output_dir, eval_strategy="steps", eval_steps=2))
    recipe.main(script, training_args, LasarModelConfig())
    return output_dir


@pytest.fixture(scope="module")
def stage2(folder, stage1, tmp_path_factory):
    """Checkpoint of recipes/sft.py, stage 2."""
    recipe, output_dir = load_recipe("sft"), tmp_path_factory.mktemp("stage2")
    script = recipe.SFTScriptArguments(data_dir=str(folder), stage=2)
    recipe.main(script, LasarSFTConfig(**settings(output_dir)), LasarModelConfig(model_name_or_path=str(stage1)))
    return output_dir


def prompt_format(checkpoint: Path) -> tuple[str, int]:
    processor = LasarProcessor.from_pretrained(checkpoint)
    return processor.instruction, processor.max_history


def test_stage1_saves_its_prompt_format(stage1):
    assert prompt_format(stage1) == ("the item", 3)


def test_stage2_keeps_the_prompt_format(stage2):
    assert prompt_format(stage2) == ("the item", 3)


@pytest.mark.parametrize("setting", [{"instruction": ""}, {"max_history": 4}])
def test_stage2_refuses_another_prompt_format(folder, stage1, tmp_path, setting):
    recipe = load_recipe("sft")
    script = recipe.SFTScriptArguments(data_dir=str(folder), stage=2, **setting)
    with pytest.raises(ValueError, match=next(iter(setting))):
        recipe.main(script, LasarSFTConfig(**settings(tmp_path)), LasarModelConfig(model_name_or_path=str(stage1)))


def test_a_run_resumes_after_its_start_got_a_memory(folder, stage1, tmp_path):
    """recipes/memory.py writes into the checkpoint that stage 2 began with."""
    recipe, start = load_recipe("sft"), tmp_path / "stage1"
    shutil.copytree(stage1, start)
    for _ in range(2):
        script = recipe.SFTScriptArguments(data_dir=str(folder), stage=2)
        args = LasarSFTConfig(**settings(tmp_path / "stage2") | dict(save_strategy="steps", save_steps=1))
        recipe.main(script, args, LasarModelConfig(model_name_or_path=str(start)))
        assert prompt_format(tmp_path / "stage2") == prompt_format(start)
        item_ids, empty = catalog_hash(SidCatalog.from_pretrained(start)), torch.zeros(0)
        ItemMemory(torch.zeros(21), empty, empty, item_ids).save_pretrained(start)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_texts_decide_a_run_with_neighbours(folder, stage1, tmp_path, monkeypatch, share):
    recipe, data_dir = load_recipe("sft"), tmp_path / "data"
    shutil.copytree(folder, data_dir)
    neighbours = np.zeros((12, 2), dtype=np.int64) if share else None
    monkeypatch.setattr(recipe, "draw_neighbours", lambda data, args: neighbours)

    def train():
        np.save(data_dir / "embeddings.npy", np.random.default_rng(len(list(tmp_path.iterdir()))).normal(size=(20, 3)))
        args = LasarSFTConfig(
            **settings(tmp_path / "stage2") | dict(save_strategy="steps", save_steps=1), neighbour_targets=share
        )
        script = recipe.SFTScriptArguments(data_dir=str(data_dir), stage=2)
        recipe.main(script, args, LasarModelConfig(model_name_or_path=str(stage1)))

    train()
    if not share:
        return train()
    with pytest.raises(ValueError, match=r"different settings \(data\)"):
        train()


def test_stage2_evaluates_with_latent_slots(folder, stage1, tmp_path, monkeypatch):
    recipe, trainers = load_recipe("sft"), []
    make = recipe.LasarSFTTrainer
    monkeypatch.setattr(recipe, "LasarSFTTrainer", lambda *a, **k: (trainers.append(make(*a, **k)), trainers[0])[1])
    script = recipe.SFTScriptArguments(data_dir=str(folder), stage=2, eval_users=4)
    args = LasarSFTConfig(**settings(tmp_path, eval_strategy="steps", eval_steps=2, policy_weight=0.1))
    recipe.main(script, args, LasarModelConfig(model_name_or_path=str(stage1)))
    (trainer,) = trainers
    slots = [ids.count(trainer.processor.latent_token_id) for ids in trainer.eval_dataset["input_ids"]]
    assert slots == [2] * 4  # most training samples have two segments
    assert any("eval_loss" in log for log in trainer.state.log_history)


@pytest.mark.parametrize(("source", "expected"), [("uniform", {1, 2, 3, 4}), (3, {3})])
def test_depths_need_not_follow_the_chains(folder, stage1, tmp_path, monkeypatch, source, expected):
    """The anchor of a step is then that at the same place in the chain of thought."""
    recipe, trainers = load_recipe("sft"), []
    make = recipe.LasarSFTTrainer
    monkeypatch.setattr(recipe, "LasarSFTTrainer", lambda *a, **k: (trainers.append(make(*a, **k)), trainers[0])[1])
    script = recipe.SFTScriptArguments(data_dir=str(folder), stage=2, depth_source=source)
    recipe.main(script, LasarSFTConfig(**settings(tmp_path)), LasarModelConfig(model_name_or_path=str(stage1)))
    (trainer,) = trainers
    examples = [dict(trainer.train_dataset[index]) for index in range(len(trainer.train_dataset))]
    depths = [example["input_ids"].count(trainer.processor.latent_token_id) for example in examples]
    assert set(depths) == expected
    anchors = trainer.data_collator(examples)["anchors"]
    store = trainer.data_collator.anchors
    for row, (depth, example) in enumerate(zip(depths, examples, strict=True)):
        own = store[example["sample_index"]]
        for step in range(1, depth + 1):
            assert (anchors[row, step - 1].numpy() == own[math.ceil(step * len(own) / depth) - 1]).all()


@pytest.mark.parametrize(
    ("options", "weights", "message"),
    [
        ({"depth_source": 5}, None, "depth_source is 5; expected 0 to 4"),
        ({}, [1.0] * 6, "depth_weights is 5; expected 0 to 4"),
    ],
)
def test_depths_beyond_the_model_are_refused_before_anchors(
    folder, stage1, tmp_path, monkeypatch, options, weights, message
):
    recipe = load_recipe("sft")
    monkeypatch.setattr(recipe, "stage2_anchors", None)
    script = recipe.SFTScriptArguments(data_dir=str(folder), stage=2, **options)
    args = LasarSFTConfig(**settings(tmp_path, depth_weights=weights))
    with pytest.raises(ValueError, match=message):
        recipe.main(script, args, LasarModelConfig(model_name_or_path=str(stage1)))


def test_chains_with_more_segments_than_steps_are_refused_before_anchors(folder, stage1, tmp_path, monkeypatch):
    recipe, start = load_recipe("sft"), tmp_path / "stage1"
    shutil.copytree(stage1, start)
    config = LasarForGenerativeRec.from_pretrained(start).config
    config.max_latent_steps = 1  # the chains have two segments
    monkeypatch.setattr(recipe, "stage2_anchors", None)
    monkeypatch.setattr(recipe, "load_model", lambda path, **options: SimpleNamespace(config=config))
    script = recipe.SFTScriptArguments(data_dir=str(folder), stage=2)
    with pytest.raises(ValueError, match="segments of a chain of thought .* is 2; expected 0 to 1"):
        recipe.main(script, LasarSFTConfig(**settings(tmp_path)), LasarModelConfig(model_name_or_path=str(start)))


def test_depths_can_be_those_of_the_starting_policy(folder, stage1):
    recipe, model = load_recipe("sft"), LasarForGenerativeRec.from_pretrained(stage1)
    processor = LasarProcessor.from_pretrained(stage1)
    histories = PreparedData.load(folder).samples["train"]["history"]
    ids = [[processor.catalog.item_ids[item] for item in history] for history in histories]
    expected = model.recommend(**processor(ids), catalog=processor.catalog).latent_steps
    assert recipe.policy_depths(model, processor, histories, batch_size=3).tolist() == expected.tolist()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("weights", "warned"), [([1.0, 1.0, 0.0, 0.0, 1.0], 1), ([0.0, 1.0, 1.0, 1.0, 1.0], 0)])
def test_depths_that_the_policy_learns_need_a_weight(folder, stage1, tmp_path, weights, warned, stage):
    recipe = load_recipe("sft")
    script = recipe.SFTScriptArguments(data_dir=str(folder), stage=stage, tasks=["reasoning"], depth_source="uniform")
    args = LasarSFTConfig(**settings(tmp_path, depth_weights=weights, policy_weight=0.1, alignment="none"))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        recipe.main(script, args, LasarModelConfig(model_name_or_path=str(stage1)))
    assert sum("[2, 3] latent steps, but depth_weights" in str(warning.message) for warning in found) == warned


def test_controls_of_stage_2(folder, stage1, tmp_path, monkeypatch):
    """Another input of the latent slots, all depths, and the anchors of other samples."""
    recipe, trainers = load_recipe("sft"), []
    make = recipe.LasarSFTTrainer
    monkeypatch.setattr(recipe, "LasarSFTTrainer", lambda *a, **k: (trainers.append(make(*a, **k)), trainers[0])[1])
    script = recipe.SFTScriptArguments(
        data_dir=str(folder), stage=2, latent_input="normalized", shuffle_anchors=True, depth_source="uniform"
    )
    args = LasarSFTConfig(**settings(tmp_path, depth_weights=[1.0, 1.0, 1.0]))
    recipe.main(script, args, LasarModelConfig(model_name_or_path=str(stage1)))
    indices = trainers[0].train_dataset["sample_index"]
    assert sorted(indices) == list(range(len(indices))) != list(indices)
    model = LasarForGenerativeRec.from_pretrained(tmp_path)
    assert model.config.latent_input == "normalized"
    assert not torch.equal(model.model.latent_input.norm.bias, torch.zeros(model.config.hidden_size))  # trained


@pytest.mark.parametrize(
    ("stage", "source", "policy_weight", "expected"),
    [
        (1, "segments", 0.0, 0),
        (1, "segments", 0.1, None),
        (2, "uniform", 0.0, None),
        (2, "0", 0.0, 0),
        (2, "3", 0.1, None),
    ],
)
def test_ranking_without_a_policy_uses_the_depth_of_training(tmp_path, stage, source, policy_weight, expected):
    recipe = load_recipe("sft")
    script = recipe.SFTScriptArguments(data_dir="x", stage=stage, depth_source=source)
    args = LasarSFTConfig(**settings(tmp_path, policy_weight=policy_weight))
    assert recipe.ranking_depth(script, args) == expected


def test_an_adapter_keeps_the_latent_input(folder, stage1, tmp_path):
    recipe = load_recipe("sft")
    model = LasarForGenerativeRec.from_pretrained(stage1)
    adapted = get_peft_model(model, lasar_lora_config(model))
    with pytest.raises(ValueError, match="latent_input is 'pause'"):
        recipe.set_latent_input(adapted, "pause")


@pytest.mark.parametrize("source", ["politics", "-1", "2.5"])
def test_unknown_depth_sources_are_refused(source):
    with pytest.raises(ValueError, match="depth_source"):
        load_recipe("sft").SFTScriptArguments(data_dir="x", depth_source=source)


@pytest.mark.parametrize(("choice", "is_excluded"), [("auto", True), (False, False)])
def test_stage1_excludes_the_history_as_the_data_says(folder, tmp_path, choice, is_excluded):
    recipe = load_recipe("sft")
    script = recipe.SFTScriptArguments(
        data_dir=str(folder), backbone_config=BACKBONE, tasks=["history"], exclude_history=choice
    )
    recipe.main(script, LasarSFTConfig(**settings(tmp_path)), LasarModelConfig())
    assert LasarForGenerativeRec.from_pretrained(tmp_path).config.exclude_history is is_excluded


def test_grpo_ranks_validation_users_at_the_depth_of_training(folder, stage2, tmp_path):
    recipe = load_recipe("grpo")
    script = recipe.GRPOScriptArguments(data_dir=str(folder), eval_users=4)
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, logging_steps=1)
    args = LasarGRPOConfig(
        **settings(tmp_path) | options,
        num_generations=4,
        fixed_depth=0,
        depth_weight=0.0,
        load_best_model_at_end=True,
        metric_for_best_model="eval_NDCG@10",
    )
    recipe.main(script, args, LasarModelConfig(model_name_or_path=str(stage2)))
    history = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [log["eval_mean_depth"] for log in history if "eval_NDCG@10" in log] == [0, 0]
    assert {log["mean_depth"] for log in history if "mean_depth" in log} == {0}


@pytest.mark.parametrize(("learning_rate", "is_kept"), [(0.0, True), (1.0, False)])
def test_grpo_saves_its_start_if_training_made_it_worse(folder, stage2, tmp_path, monkeypatch, learning_rate, is_kept):
    """A learning rate of 1 destroys the model; with 0 nothing changes, which is not worse."""
    recipe, saved = load_recipe("grpo"), []
    save = LasarGRPOTrainer.save_complete
    monkeypatch.setattr(LasarGRPOTrainer, "save_complete", lambda self, path: (saved.append(path), save(self, path)))
    script = recipe.GRPOScriptArguments(data_dir=str(folder), eval_users=100)
    args = LasarGRPOConfig(**settings(tmp_path, num_generations=4, learning_rate=learning_rate))
    recipe.main(script, args, LasarModelConfig(model_name_or_path=str(stage2)))
    assert bool(saved) is is_kept
    start, result = (LasarForGenerativeRec.from_pretrained(path).state_dict() for path in (stage2, tmp_path))
    assert all(torch.equal(start[name], result[name]) for name in start)
    assert prompt_format(tmp_path) == prompt_format(stage2)
    assert ("made the model worse" in (tmp_path / "README.md").read_text()) is not is_kept


@pytest.mark.parametrize("use_peft", [False, True])
def test_grpo_continues_stage2(folder, stage1, stage2, tmp_path, use_peft):
    recipe = load_recipe("grpo")
    script = recipe.GRPOScriptArguments(
        data_dir=str(folder),
        anchors_dir=str(stage2 / "anchors"),
        stage1_model=str(stage1),
        reward_funcs=["exact_match", "tests.recipes.first_code_reward"],
    )
    model_args = LasarModelConfig(model_name_or_path=str(stage2), use_peft=use_peft)
    recipe.main(script, LasarGRPOConfig(**settings(tmp_path, num_generations=4)), model_args)
    model, processor = LasarForGenerativeRec.from_pretrained(tmp_path), LasarProcessor.from_pretrained(tmp_path)
    output = model.recommend(**processor([["item-1"]]), catalog=processor.catalog, top_k=2)
    assert prompt_format(tmp_path) == ("the item", 3)
    assert output.items.min() >= 0


@pytest.fixture(scope="module")
def stage2_adapter(folder, stage1, tmp_path_factory):
    """Folder of recipes/sft.py, stage 2 with LoRA; its adapter is in `adapter`."""
    recipe, output_dir = load_recipe("sft"), tmp_path_factory.mktemp("stage2_adapter")
    script = recipe.SFTScriptArguments(data_dir=str(folder), stage=2)
    model_args = LasarModelConfig(model_name_or_path=str(stage1), use_peft=True)
    recipe.main(script, LasarSFTConfig(**settings(output_dir)), model_args)
    return output_dir


def weights(path: Path) -> list:
    return [parameter for _, parameter in sorted(LasarForGenerativeRec.from_pretrained(path).named_parameters())]


def test_grpo_continues_an_adapter(folder, stage1, stage2_adapter, tmp_path):
    recipe = load_recipe("grpo")
    script = recipe.GRPOScriptArguments(
        data_dir=str(folder),
        anchors_dir=str(stage2_adapter / "anchors"),
        stage1_model=str(stage1),
    )
    model_args = LasarModelConfig(model_name_or_path=str(stage2_adapter / "adapter"))
    args = LasarGRPOConfig(**settings(tmp_path, num_generations=4), learning_rate=0.0)
    recipe.main(script, args, model_args)
    for ours, theirs in zip(weights(tmp_path), weights(stage2_adapter), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_stage2_continues_an_adapter(folder, stage2_adapter, tmp_path):
    """Also its anchors are encoded with the adapter, and recipes/grpo.py accepts them."""
    adapter = str(stage2_adapter / "adapter")
    recipe, script = load_recipe("sft"), dict(data_dir=str(folder), stage=2)
    args = LasarSFTConfig(**settings(tmp_path), learning_rate=0.0)
    recipe.main(recipe.SFTScriptArguments(**script), args, LasarModelConfig(model_name_or_path=adapter))
    for ours, theirs in zip(weights(tmp_path), weights(stage2_adapter), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    grpo = load_recipe("grpo")
    script = grpo.GRPOScriptArguments(
        data_dir=str(folder), anchors_dir=str(tmp_path / "anchors"), stage1_model=adapter
    )
    assert len(grpo.terminal_anchors(script, "float32")) == 12


def test_grpo_refuses_anchors_without_their_checkpoint(folder, stage2, tmp_path):
    recipe = load_recipe("grpo")
    script = recipe.GRPOScriptArguments(data_dir=str(folder), anchors_dir=str(stage2 / "anchors"))
    with pytest.raises(ValueError, match="stage1_model"):
        recipe.main(script, LasarGRPOConfig(**settings(tmp_path)), LasarModelConfig(model_name_or_path=str(stage2)))


@pytest.mark.parametrize("context", ["segment", "chain"])
def test_anchors_of_stage2(data, tmp_path, context):
    recipe, processor = load_recipe("sft"), save_checkpoint(tmp_path / "checkpoint")
    model = LasarForGenerativeRec.from_pretrained(tmp_path / "checkpoint")
    script = recipe.SFTScriptArguments(data_dir="", anchor_context=context)
    store = recipe.stage2_anchors(script, model, data, processor, tmp_path / "anchors")
    samples = data.samples["train"]
    prompts = [processor.prompt_ids(history) for history in samples["history"]] if context == "chain" else None
    expected = encode_anchors(model, processor, samples["segments"], prompts=prompts)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(store, expected, strict=True))
