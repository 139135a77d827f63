"""A revision holds for every part that is loaded: the main branch of the Hub's cache here has nothing but a config."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import uvicorn
from typer.testing import CliRunner

import lasar_cli
from lasar_hf import LasarGRPOConfig, LasarGRPOTrainer, LasarSFTConfig, Recommender
from lasar_hf.card import find_card
from lasar_hf.commands import evaluate, grpo, recommend, sft
from lasar_hf.serving import serve
from lasar_hf.trainers import LasarModelConfig
from tests.recipes import save_checkpoint, save_prepared
from tests.tiny import tiny_backbone, tiny_tokenizer
from tests.training import COMMON, grpo_setup


STEPS = COMMON | {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
PINNED = {"model_name_or_path": "user/shop", "model_revision": "v1"}


def cache_repository(cache: Path, name: str, save) -> None:
    """Put a repository into the Hub's cache: the branch v1 has what is saved, the branch main another config only."""
    folder = cache / f"models--{name.replace('/', '--')}"
    for branch, commit in (("main", "0" * 40), ("v1", "1" * 40)):
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / branch).write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
    save(folder / "snapshots" / ("1" * 40))
    config = json.loads((folder / "snapshots" / ("1" * 40) / "config.json").read_text())
    # TRL reads the class of a model from the main branch, whatever the revision is.
    other = config | {"model_type": "gpt2"} if name == "user/backbone" else config | {"max_latent_steps": 7}
    (folder / "snapshots" / ("0" * 40) / "config.json").write_text(json.dumps(other))


def save_backbone(folder: Path) -> None:
    tiny_backbone().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    cache_repository(folder, "user/shop", save_checkpoint)
    cache_repository(folder, "user/backbone", save_backbone)
    card = "---\ntags:\n- lasar\nlicense: mit\n---\n\n# shop\n\n## Training\n\n### Stage 1\n\nOf the Hub.\n"
    (folder / "models--user--shop" / "snapshots" / ("1" * 40) / "README.md").write_text(card)
    return folder


@pytest.fixture(autouse=True)
def hub(cache, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    save_prepared(folder)
    return str(folder)


def test_the_main_branch_does_not_load():
    with pytest.raises((OSError, ValueError)):
        Recommender.from_pretrained("user/shop")
    assert find_card("user/shop") is None
    assert "Of the Hub" in find_card("user/shop", "v1").text


def test_command(tmp_path):
    arguments = ["recommend", "user/shop", "--history", "item-1", "--top-k", "3"]
    assert CliRunner().invoke(lasar_cli.app, arguments).exit_code != 0
    result = CliRunner().invoke(lasar_cli.app, [*arguments, "--revision", "v1"])
    assert result.exit_code == 0 and result.output.count("item-") == 3


def test_server(monkeypatch):
    started = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, **kwargs: started.append(self.config.app))
    serve("user/shop", port=0, device="cpu", revision="v1")
    assert len(started[0].state.service.recommender.catalog) == 20


def test_batches(tmp_path):
    (tmp_path / "users.jsonl").write_text('{"user_id": "a", "history": ["item-1", "item-2"]}\n')
    args = recommend.RecommendArguments(
        "user/shop", str(tmp_path / "users.jsonl"), str(tmp_path / "out"), revision="v1"
    )
    recommend.main(args)
    assert (tmp_path / "out" / "part-00000.parquet").exists()


def test_evaluation(data, tmp_path):
    args = evaluate.EvaluateArguments(data, str(tmp_path), ["model=user/shop"], revision="v1", baselines=False)
    evaluate.main(args)
    assert "model" in (tmp_path / "report.md").read_text()


def test_stage_1_starts_from_a_language_model(data, tmp_path):
    script = sft.SFTScriptArguments(data_dir=data, tasks=["next_item"], max_latent_steps=4)
    names = LasarModelConfig(model_name_or_path="user/backbone", model_revision="v1")
    sft.main(script, LasarSFTConfig(str(tmp_path), **STEPS), names)
    assert Recommender.from_pretrained(tmp_path).catalog.num_items == 20


def test_stage_1_continues_a_checkpoint(data, tmp_path):
    script = sft.SFTScriptArguments(data_dir=data, tasks=["next_item"])
    sft.main(script, LasarSFTConfig(str(tmp_path), **STEPS), LasarModelConfig(**PINNED))
    assert "license: mit" in (tmp_path / "README.md").read_text()  # of the card of the checkpoint


def test_reinforcement_learning(data, tmp_path):
    args = LasarGRPOConfig(str(tmp_path), **STEPS, num_generations=4)
    grpo.main(grpo.GRPOScriptArguments(data_dir=data), args, LasarModelConfig(**PINNED))
    assert "license: mit" in (tmp_path / "README.md").read_text()


def test_trainer_that_loads_all_by_name(tmp_path):
    examples = grpo_setup()[-1]
    options = {"model_init_kwargs": {"revision": "v1"}, "num_generations": 4}
    trainer = LasarGRPOTrainer("user/shop", LasarGRPOConfig(str(tmp_path), **STEPS, **options), train_dataset=examples)
    assert trainer.processor.catalog.num_items == 20
    assert trainer.model.config.max_latent_steps == 4
