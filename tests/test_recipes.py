"""The recipes' YAML files name arguments that exist, and unknown ones are refused."""

import dataclasses
import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lasar_hf import LasarGRPOConfig, LasarSFTConfig
from lasar_hf.data import (
    ALIGNMENT_TASKS,
    PreparedData,
    SourceArguments,
    alignment_examples,
    history_examples,
    sft_examples,
    stage1_examples,
)
from lasar_hf.reasoning import encode_anchors
from lasar_hf.trainers import LasarModelConfig
from tests.preparing import processor_of, run
from tests.tiny import tiny_model


ROOT = Path(__file__).resolve().parents[1]
SCRIPT_OF = {"stage1": "sft", "stage2": "sft"}
SHARED = {
    "prepare": (SourceArguments,),
    "sft": (LasarSFTConfig, LasarModelConfig),
    "grpo": (LasarGRPOConfig, LasarModelConfig),
}
FILES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate_configs")


@functools.cache
def arguments_of(script: str) -> set[str]:
    """Every key that a recipe's parser knows."""
    names = runpy.run_path(str(ROOT / "recipes" / f"{script}.py"))
    own = [part for name, part in names.items() if name.endswith("Arguments") and dataclasses.is_dataclass(part)]
    assert own, f"recipes/{script}.py defines no arguments"
    return {field.name for part in (*own, *SHARED.get(script, ())) for field in dataclasses.fields(part)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_key_is_an_argument(path):
    script = SCRIPT_OF.get(path.stem, path.stem)
    unknown = set(yaml.safe_load(path.read_text())) - arguments_of(script)
    assert not unknown
    # The header is the literal command.
    assert f"recipes/{script}.py --config recipes/{path.parent.name}/{path.name}" in path.read_text().splitlines()[0]


def test_a_dictionary_is_json_on_the_command_line_and_itself_in_yaml():
    arguments = runpy.run_path(str(ROOT / "recipes" / "sft.py"))["SFTScriptArguments"]
    said = {"model_type": "qwen3", "hidden_size": 8}
    for value in (said, json.dumps(said)):
        assert arguments(data_dir="x", backbone_config=value).backbone_config == said
    for wrong, message in (
        ("qwen3", "expected JSON"), ("[1]", "expected an object"), ("{}", "the model_type None: name one"),
        ({"model_type": "qwen33"}, "the model_type 'qwen33': name one"),
    ):
        with pytest.raises(ValueError, match=f"backbone_config .*{message}"):
            arguments(data_dir="x", backbone_config=wrong)


@pytest.mark.parametrize("key", ["lerning_rate: 0.1", "load_in_4bit: true", "stage: 3", "sid_loss: Catalog"])
def test_an_unknown_key_is_refused(tmp_path, key):
    config = tmp_path / "stage1.yaml"
    config.write_text((ROOT / "recipes/toy/stage1.yaml").read_text() + f"{key}\n")
    command = [sys.executable, str(ROOT / "recipes/sft.py"), "--config", str(config)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0 and key.split(":")[0] in done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    run(folder, toy_users=12)
    data = PreparedData.load(folder)
    return data, processor_of(folder, data)


def stage1(prepared, *rows):
    """What recipes/sft.py trains on, as pairs of tuples."""
    return pairs(stage1_examples(*prepared, rows))


def pairs(*tables):
    return [(tuple(row["input_ids"]), tuple(row["labels"])) for table in tables for row in table]


def test_rows_of_stage_1_are_mixed_by_weights(prepared):
    data, processor = prepared
    main, history = sft_examples(data.samples["train"], processor), history_examples(data.split, processor)
    alignment = alignment_examples(data.interactions, data.split, processor)
    assert stage1(prepared, "history", "alignment") == pairs(history, alignment)  # no weight: each row once, in order
    mixed = stage1(prepared, "next_item=2", "alignment=0.5", "history=0")
    assert mixed[: 2 * len(main)] == 2 * pairs(main)
    drawn = mixed[2 * len(main) :]
    assert len(drawn) == round(len(alignment) / 2) and set(drawn) < set(pairs(alignment))
    assert sorted(stage1(prepared, *ALIGNMENT_TASKS)) == sorted(pairs(alignment))
    titles = alignment_examples(data.interactions, data.split, processor, ["title_to_sid"])
    assert stage1(prepared, "title_to_sid") == pairs(titles)


@pytest.mark.parametrize("context", ["segment", "chain"])
def test_anchors_of_stage_2(prepared, tmp_path, context):
    data, processor = prepared
    model, _ = tiny_model()
    model.resize_token_embeddings(len(processor.tokenizer))
    names = runpy.run_path(str(ROOT / "recipes/sft.py"))
    script = names["SFTScriptArguments"](data_dir="", anchor_context=context)
    store = names["stage2_anchors"](script, model, data, processor, tmp_path)
    samples = data.samples["train"]
    prompts = [processor.prompt_ids(history) for history in samples["history"]] if context == "chain" else None
    options = {"context": context, "prompts": prompts}
    expected = encode_anchors(model.model.backbone, processor.tokenizer, samples["segments"], "", **options)
    assert all(np.array_equal(one, other) for one, other in zip(store, expected, strict=True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["next_itme"], r"rows holds \['next_itme'\]: choose among"),
        (["history=much"], "rows holds 'history=much': expected a name, or name=weight"),
        (["history", "history=2"], "rows holds 'history' twice"),
        (["history=-1"], "the weight of 'history' is -1"),
        (["history=0"], "the mix has no rows"),
    ],
)
def test_rows_that_are_refused(prepared, rows, message):
    with pytest.raises(ValueError, match=message):
        stage1(prepared, *rows)
