"""Model cards: a header that the Hub reads, usage that runs, true settings, results that can be replaced."""

import json
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from lasar_hf import LasarForGenerativeRec, LasarProcessor, LasarSFTConfig, LasarSFTTrainer, SidCatalog
from lasar_hf.card import CardFacts, add_results, add_section, find_card, folder_card, hub_name
from lasar_hf.card.headings import join_headings, split_headings
from lasar_hf.model.recommender_lasar import renamed_card
from tests.recipes import ROOT, load_recipe, save_checkpoint, save_prepared
from tests.tiny import tiny_backbone, tiny_catalog, tiny_tokenizer
from tests.training import COMMON, grpo_trainer, sft_setup


DATA_CARD = {
    "arguments": {"source": "table", "source_args": {"interactions": "/home/me/ratings.csv"}, "teacher_model": "/llm"},
    "counts": {"users": 1234, "items": 20, "interactions": 5000, "train_samples": 3000, "validation_samples": 900,
               "test_samples": 800},
    "data": {"repeat_rate": 0.125, "split": {"kind": "leave-one-out"},
             "history_length": {"min": 3, "median": 4.0, "mean": 4.0, "max": 9}},
    "semantic_ids": {"items": 20, "collisions": 0, "levels": [
        {"codes_used": 4, "entropy_bits": 1.75, "prefixes": 4, "neighbours_kept": 0.5, "neighbours_by_chance": 0.25},
    ]},
    "chains": {"teacher": "openai"},
}  # fmt: skip


def trainer_of(folder, facts=None, **options) -> LasarSFTTrainer:
    model, tokenizer, catalog, rows, anchors = sft_setup()
    catalog = SidCatalog(catalog.codes, catalog.item_ids, titles=[f"Book {number}" for number in range(20)])
    trainer = LasarSFTTrainer(
        model, LasarSFTConfig(str(folder), **COMMON | dict(policy_weight=0.25) | options), anchors=anchors,
        train_dataset=rows, processing_class=LasarProcessor(tokenizer, catalog),
    )  # fmt: skip
    trainer.card_facts = facts or CardFacts(data_card=DATA_CARD, settings={"tasks": ["history"]}, title="Stage 2")
    return trainer


def card_of(folder, facts=None, **options) -> ModelCard:
    """The card of a model that was saved without training."""
    trainer_of(folder, facts, **options).save_model()
    return ModelCard.load(folder / "README.md")


def test_the_card_has_data_settings_and_prompt(tmp_path):
    trainer = trainer_of(tmp_path / "shop", license="mit")
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "shop" / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "other" and {"sft", "lasar"} <= set(card.data.tags)
    for text in (
        "# shop", "### Stage 2", "+ 0.1 × alignment (kl) + 0.25 × depth policy.", "2 updates", "tasks: [history]",
        "policy_weight: 0.25", "seed: 42", "table (ratings.csv): 1,234 users, 20 items, 5,000 interactions",
        "12.50% of the training", "| 1 | 4 | 1.75 |", trainer.processor.prompt_text([0, 1]), "chosen for each user",
    ):  # fmt: skip
        assert text in card.content
    assert "none stated" not in card.content


def test_no_local_path_and_no_secret_is_in_the_card(tmp_path):
    facts = CardFacts(str(tmp_path), DATA_CARD)
    card = card_of(tmp_path / "shop", facts, hub_token="secret", run_name=str(tmp_path))
    assert not re.search(r"[\s\"'(`]/\w", card.content)
    assert str(tmp_path) not in card.content and "secret" not in card.content and card.data.base_model is None


def test_a_card_without_a_licence_says_so(tmp_path):
    card = card_of(tmp_path)
    assert card.data.license is None and "| Licence | none stated" in card.content


def test_usage_runs_when_pasted(tmp_path):
    card_of(tmp_path / "shop")
    usage = split_headings((tmp_path / "shop" / "README.md").read_text())["Usage"]
    blocks = re.findall(r"```python\n(.*?)```", usage, re.S)
    assert len(blocks) == 3
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"Book \d+", done.stdout)) == 15


def test_a_card_has_the_settings_that_the_run_learned_with(tmp_path):
    card = card_of(tmp_path, max_grad_norm=0.5, eval_on_start=False, save_steps=7)
    assert "max_grad_norm: 0.5" in card.content
    for executed in ("accelerator_config", "use_cpu", "save_steps", "max_steps"):
        assert f"{executed}:" not in card.content


def test_an_untrained_depth_policy_is_not_used(tmp_path):
    card = card_of(tmp_path, policy_weight=0.0)
    assert "whose number must be given" in card.content and "top_k=5, latent_steps=0)" in card.content


def test_a_later_stage_takes_over_the_card_of_its_start(tmp_path):
    card = card_of(tmp_path / "a", CardFacts(None, DATA_CARD, title="Stage 1"), license="mit")
    card.data.base_model = "Qwen/Qwen3-0.6B"
    card.save(tmp_path / "a" / "README.md")
    trainer = grpo_trainer(tmp_path / "b")
    trainer.card_facts = CardFacts(str(tmp_path / "a"), note="It was worse.")
    trainer.create_model_card()
    later = ModelCard.load(tmp_path / "b" / "README.md")
    assert (later.data.license, later.data.base_model) == ("mit", "Qwen/Qwen3-0.6B")
    parts, before = split_headings(later.text), split_headings(card.text)
    assert parts["Data"] == before["Data"] and "Stage 1, then Reinforcement learning" in parts[""]
    stages = split_headings(parts["Training"], 3)
    assert stages["Stage 1"] == split_headings(before["Training"], 3)["Stage 1"]
    assert "It was worse." in stages["Reinforcement learning"]
    assert "GRPO with the rewards exact_match, ranking" in stages["Reinforcement learning"]


def report(folder, split="test", value=0.5) -> dict:
    row = {"HR@10": value, "NDCG@10": value / 2, "n": 40}
    return {
        "results": {"item-kNN": row, "other": row | {"HR@10": 0.875}, "mine": row | {"mean_depth": 1.25}},
        "details": {
            "arguments": {"models": [f"mine={folder}", "other=elsewhere@3"], "split": split},
            "exclude_history": True, "intervals": {"mine": {"HR@10": [0.25, 0.75], "NDCG@10": [0.125, 0.5]}},
            "depths": {"mine": [0, 30, 10]},
            "NDCG@10_against_item-kNN": {
                "mine - item-kNN": {"difference": 0.0, "low": -0.0625, "high": 0.0625, "p_value": 1.0}
            },
        },
    }  # fmt: skip


def test_results_are_written_by_split_and_replaced(tmp_path):
    card_of(tmp_path)
    for split, value in (("test", 0.5), ("validation", 0.375), ("test", 0.75)):
        add_results(tmp_path, report(tmp_path, split, value), "Shop")
    card = ModelCard.load(tmp_path / "README.md")
    values = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert values == {
        ("validation", "hit_rate"): 0.375, ("validation", "ndcg"): 0.1875,
        ("test", "hit_rate"): 0.75, ("test", "ndcg"): 0.375,
    }  # fmt: skip
    assert len(card.data.eval_results) == 4
    first = card.data.eval_results[0]
    assert first.dataset_name == "Shop" and first.metric_name == "HR@10 (this model)"
    assert first.metric_args == {"k": 10, "interval_95": [0.25, 0.75]}
    text = split_headings(card.text)["Results"]
    assert set(split_headings(text, 3)) == {"", "Test", "Validation"}
    assert "| **this model** | 0.7500 (0.2500 – 0.7500) |" in text and "| item-kNN | 0.7500 |" in text
    assert "| samples | 0.0% | 75.0% | 25.0% |" in text and "without those of the history" in text
    assert "p = 1.0000" in text and "0.5000 (" not in text and "other" not in text and "Not evaluated" not in text


def test_results_of_other_checkpoints_are_refused(tmp_path):
    card_of(tmp_path)
    with pytest.raises(ValueError, match="no results"):
        add_results(tmp_path, report(tmp_path / "elsewhere"))


def test_eval_writes_results_into_the_cards(tmp_path):
    """Also into that of a checkpoint without a card, and both rows of a checkpoint that was ranked twice."""
    save_prepared(tmp_path / "data")
    save_checkpoint(tmp_path / "model")
    recipe, model = load_recipe("eval"), tmp_path / "model"
    args = recipe.EvaluateArguments(
        str(tmp_path / "data"), str(tmp_path / "report"), [f"a={model}", f"b={model}@0"], dataset="Shop"
    )
    recipe.main(args)
    card = ModelCard.load(model / "README.md")
    names = {result.metric_name.partition(" ")[2] for result in card.data.eval_results}
    assert names == {"(this model)", "(this model, 0 latent steps)"}
    intervals = json.loads((tmp_path / "report" / "report.json").read_text())["details"]["intervals"]
    assert card.data.eval_results[0].metric_args["interval_95"] == intervals["a"]["HR@10"]
    assert intervals["a"]["HR@10"][0] <= card.data.eval_results[0].metric_value <= intervals["a"]["HR@10"][1]
    assert str(tmp_path) not in card.content


@pytest.mark.parametrize(
    "path, name", [("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("gpt2", "gpt2"), ("./model", None), ("/home/me", None),
                   ("outputs/mine/stage1", None), (None, None)]
)  # fmt: skip
def test_only_names_on_the_hub_are_base_models(path, name):
    assert hub_name(path) == name


def test_the_configuration_names_a_backbone_on_the_hub_only(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    for name in (str(tmp_path / "backbone"), "Qwen/Qwen3-0.6B"):
        backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
        backbone.config._name_or_path = name
        model = LasarForGenerativeRec.from_backbone(backbone, tiny_tokenizer(), 3, 4)
        model.save_pretrained(tmp_path / "model")
        text = (tmp_path / "model" / "config.json").read_text()
        assert str(tmp_path) not in text and (name in text) is (hub_name(name) is not None)


def test_a_missing_card_is_none_and_does_not_end_a_training(tmp_path):
    assert find_card(None) is find_card(tmp_path) is find_card(tmp_path / "gone") is find_card("user/unknown") is None


def test_another_name_changes_title_and_usage(tmp_path):
    card_of(tmp_path / "shop")
    add_results(tmp_path / "shop", report(tmp_path / "shop"))
    text = renamed_card((tmp_path / "shop" / "README.md").read_text(), "user/shop")
    assert ModelCard(text).data.model_name == "user/shop"
    assert "\n# user/shop\n" in text and '\nname = "user/shop"  # the folder' in text
    assert not re.search(r"\bshop", text.replace("user/shop", ""))


def test_a_section_is_added_before_the_training(tmp_path):
    save_checkpoint(tmp_path)
    card = folder_card(tmp_path)
    before = split_headings(card.text)
    for text in ("first", "second"):
        add_section(card, "Item memory", text)
    parts = split_headings(card.text)
    assert parts == before | {"Item memory": "second"}
    assert list(parts)[list(parts).index("Item memory") + 1] == "Training"
    assert split_headings(join_headings(parts)) == parts
    assert tiny_catalog().item_ids[0] in parts["Usage"]
