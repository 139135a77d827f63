"""Explicit chains of thought: the examples, the text that a model writes, and the item after it."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from lasar_hf import LasarConfig, LasarProcessor, LasarSFTConfig
from lasar_hf.data import explicit_examples
from lasar_hf.evaluation import recommend_samples, write_chains
from lasar_hf.trainers import LasarModelConfig
from tests.recipes import load_recipe, report, save_checkpoint, save_prepared
from tests.references import score_every_item
from tests.tiny import tiny_catalog, tiny_model


def setup(seed: int = 0):
    model, tokenizer = tiny_model(seed=seed)
    return model, LasarProcessor(tokenizer, tiny_catalog(), instruction="")


def greedy_text(model, processor, prompt: list[int], max_text_tokens: int) -> list[int]:
    """One whole forward pass per token, until `<|latent_start|>`."""
    text, forbidden = [], [processor.latent_token_id, processor.latent_end_token_id]
    forbidden += processor.sid_token_ids.unique().tolist()
    while len(text) < max_text_tokens:
        logits = model(torch.tensor([prompt[:-1] + text])).logits[0, -1].clone()
        logits[forbidden] = -torch.inf
        token = int(logits.argmax())
        if token == processor.latent_start_token_id:
            break
        text.append(token)
    return text


def test_examples_are_history_text_and_item():
    _, processor = setup()
    segments = [["red book.", "blue chair."], ["the item"]]
    samples = Dataset.from_dict({"history": [[1, 2], [3]], "segments": segments, "target": [4, 5]})
    first, second = explicit_examples(samples, processor, max_text_tokens=5)
    start, end = processor.latent_start_token_id, processor.latent_end_token_id
    history, answer = processor.prompt_ids([1, 2])[:-1], processor.answer_ids([4])[0]
    text = processor.text_ids(["red book. blue chair."])[0][:5]
    assert len(text) == 5 < len(processor.text_ids(["red book. blue chair."])[0])  # cut
    assert first["input_ids"] == [*history, *text, start, end, *answer]
    assert first["labels"] == [-100] * len(history) + [*text, start, -100, *answer]
    text = processor.text_ids(["the item"])[0]
    assert second["input_ids"] == [*processor.prompt_ids([3])[:-1], *text, start, end, *processor.answer_ids([5])[0]]


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_writes_what_each_prompt_writes_alone(seed):
    model, processor = setup(seed)
    prompts = [processor.prompt_ids(history) for history in ([0], [1, 2, 3], [4, 5])]
    expected = [greedy_text(model, processor, prompt, 6) for prompt in prompts]
    written = write_chains(model, processor, prompts, max_text_tokens=6)
    start = processor.latent_start_token_id
    assert written == [[*prompt[:-1], *text, start] for prompt, text in zip(prompts, expected, strict=True)]


def test_items_are_ranked_after_the_text():
    model, processor = setup()
    samples = Dataset.from_dict({"history": [[0], [1, 2, 3], [4, 5]]})
    output = recommend_samples(model, samples, processor, 20, 20, batch_size=2, write_text=True)
    for user, history in enumerate(samples["history"]):
        prompt = processor.prompt_ids(history)
        text = greedy_text(model, processor, prompt, output.text_tokens[user])
        expected = score_every_item(model, prompt[:-1] + text + prompt[-1:], 0, processor.catalog)
        assert output.items[user].tolist() == expected.argsort(descending=True).tolist()
    assert output.latent_steps.tolist() == [0, 0, 0]


def test_text_ends_where_the_positions_end():
    model, processor = setup()
    model.config.backbone_config.max_position_embeddings = 20
    prompt = processor.prompt_ids([0, 1, 2])  # 9 codes and <|latent_start|>
    (written,) = write_chains(model, processor, [prompt])
    assert len(written) + 1 + model.config.num_sid_levels <= 20
    model.recommend(**processor.pad([written]), catalog=processor.catalog, latent_steps=0)
    model.config.backbone_config.max_position_embeddings = 14
    with pytest.raises(ValueError, match="max_position_embeddings"):
        write_chains(model, processor, [prompt])


def test_text_and_latent_steps_exclude_each_other():
    model, processor = setup()
    samples = Dataset.from_dict({"history": [[0]]})
    with pytest.raises(ValueError, match="latent_steps"):
        recommend_samples(model, samples, processor, latent_steps=2, write_text=True)


def test_a_trained_model_writes_its_chain(tmp_path):
    """recipes/sft.py continues a checkpoint with the task, and recipes/eval.py reads `@text`."""
    save_checkpoint(tmp_path / "start", instruction="", max_history=3)
    save_prepared(tmp_path / "data")
    sft, evaluate = load_recipe("sft"), load_recipe("eval")
    script = sft.SFTScriptArguments(data_dir=str(tmp_path / "data"), tasks=["explicit"])
    args = LasarSFTConfig(
        str(tmp_path / "explicit"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=60,
        learning_rate=1e-2, save_strategy="no", per_device_train_batch_size=8,
    )  # fmt: skip
    sft.main(script, args, LasarModelConfig(model_name_or_path=str(tmp_path / "start")))
    processor = LasarProcessor.from_pretrained(tmp_path / "explicit")
    assert (processor.instruction, processor.max_history) == ("", 3)
    assert LasarConfig.from_pretrained(tmp_path / "explicit").max_latent_steps == 4  # as the start

    models = [f"{name}={tmp_path / 'explicit'}@{how}" for name, how in (("text", "text"), ("direct", "0"))]
    evaluate.main(evaluate.EvaluateArguments(str(tmp_path / "data"), str(tmp_path / "report"), models, batch_size=4))
    rows = report(tmp_path / "report")["results"]
    assert rows["text"]["text_tokens"] == len(processor.text_ids(["red book. blue chair."])[0])
    assert rows["text"]["mean_depth"] == 0 and "text_tokens" not in rows["direct"]
    assert np.isfinite(rows["text"]["HR@10"])
