"""Model cards: a header that the Hub reads, usage that runs, true settings, results that can be replaced."""

import re
import subprocess
import sys

import pytest
from huggingface_hub import EvalResult, ModelCard

from lasar_hf import LasarProcessor, LasarSFTConfig, LasarSFTTrainer
from lasar_hf.card import add_results, base_model_of, changed_arguments, hub_name, model_card, renamed
from tests.recipes import load_recipe, save_checkpoint, save_prepared
from tests.tiny import tiny_catalog, tiny_model
from tests.training import COMMON, sft_setup


FACTS = {
    "dataset": "Shop", "counts": {"users": 1234, "items": 20, "interactions": 5000},
    "semantic_ids": {"levels": [{"codes_used": 4}, {"codes_used": 3}], "collisions": 0},
}  # fmt: skip


def trained(folder, **options) -> LasarSFTTrainer:
    """A trainer that saved its model and card."""
    model, tokenizer, catalog, rows, anchors = sft_setup()
    trainer = LasarSFTTrainer(
        model, LasarSFTConfig(str(folder), **COMMON | dict(policy_weight=0.25) | options), anchors=anchors,
        train_dataset=rows, processing_class=LasarProcessor(tokenizer, catalog),
    )  # fmt: skip
    trainer.card_facts = FACTS
    trainer.save_model()
    return trainer


def test_the_card_has_settings_data_and_prompt_but_no_local_path(tmp_path):
    trainer = trained(tmp_path / "shop", license="mit", dataset="Books")
    card = ModelCard.load(tmp_path / "shop" / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    assert {"sft", "lasar"} <= set(card.data.tags)
    for text in ("# shop", "| `policy_weight` | `0.25` |", "| Users | 1,234 |", "| Data set | Shop |", "4, 3",
                 trainer.processor.prompt_text([0, 1])):  # fmt: skip
        assert text in card.content
    assert str(tmp_path) not in card.content
    assert "licence" not in card.content


def test_a_renamed_card_has_the_new_name_everywhere(tmp_path):
    trained(tmp_path / "grpo")
    add_results(tmp_path / "grpo", "| a | table |", {"LASAR": {"HR@10": 0.5}}, "Shop", "test")
    text = (tmp_path / "grpo" / "README.md").read_text()
    new = renamed(text, "ann/shop")
    assert new.replace("ann/shop", "grpo") == text
    assert "# ann/shop\n" in new and new.count('from_pretrained("ann/shop"') == 2
    assert ModelCard(new).data.model_name == "ann/shop"


def test_a_card_without_a_licence_says_so(tmp_path):
    trained(tmp_path)
    assert "No licence has been chosen" in (tmp_path / "README.md").read_text()


def test_usage_runs_when_pasted(tmp_path):
    trainer = trained(tmp_path / "shop")
    trainer.create_model_card(model_name=str(tmp_path / "shop"))
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "shop" / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("item-") >= 6


def test_results_are_written_and_replaced(tmp_path):
    trained(tmp_path)
    path = tmp_path / "README.md"
    before = path.read_text()
    for value in (0.5, 0.25):
        add_results(tmp_path, f"HR@10 is {value}.", {"mine": {"HR@10": value}}, "Shop", "test")
    card = ModelCard.load(path)
    (result,) = card.data.eval_results
    assert isinstance(result, EvalResult)
    assert (result.metric_name, result.metric_value, result.dataset_name) == ("HR@10 (mine)", 0.25, "Shop")
    assert "HR@10 is 0.25." in card.text and "HR@10 is 0.5." not in card.text and "Not evaluated" not in card.text
    for section in re.findall(r"^## .*", before, re.M):
        assert card.text.count(f"\n{section}\n") == 1


def test_eval_writes_results_into_the_cards(tmp_path):
    save_prepared(tmp_path / "data")
    save_checkpoint(tmp_path / "model")
    model, tokenizer = tiny_model()
    text = model_card("m", "", model, LasarProcessor(tokenizer, tiny_catalog()), LasarSFTConfig(**COMMON), [])
    (tmp_path / "model" / "README.md").write_text(text)
    recipe = load_recipe("eval")
    recipe.main(recipe.EvaluateArguments(
        str(tmp_path / "data"), str(tmp_path / "report"), [f"LASAR={tmp_path / 'model'}"], dataset="Shop",
    ))  # fmt: skip
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert {result.metric_name for result in card.data.eval_results} == {"HR@10 (LASAR)", "NDCG@10 (LASAR)"}
    assert re.search(r"\* LASAR, HR@10: 0\.\d{4} \(0\.\d{4} to 0\.\d{4}\)", card.text)
    assert "| item-kNN |" in card.text and "| latent steps | users |" in card.text
    assert str(tmp_path) not in card.text


@pytest.mark.parametrize(
    "path, name", [("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("gpt2", "gpt2"), ("./model", None), ("/home/me", None),
                   ("outputs/mine/stage1", None), (None, None)]
)  # fmt: skip
def test_only_names_on_the_hub_are_base_models(path, name):
    assert hub_name(path) == name


def test_later_stages_know_the_base_model_of_the_first(tmp_path):
    model, tokenizer = tiny_model()
    facts = {"base_model": "Qwen/Qwen3-0.6B"}
    (tmp_path / "README.md").write_text(model_card("x", "", model, None, LasarSFTConfig(**COMMON), [], facts))
    assert base_model_of(str(tmp_path)) == "Qwen/Qwen3-0.6B"
    assert base_model_of("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"
    assert base_model_of(str(tmp_path / "none")) is None


def test_secrets_and_folders_are_not_among_the_settings(tmp_path):
    args = LasarSFTConfig(str(tmp_path), **COMMON | dict(hub_token="secret", learning_rate=0.125))
    settings = changed_arguments(args)
    assert settings["`learning_rate`"] == "`0.125`"
    assert "secret" not in str(settings) and str(tmp_path) not in str(settings)
