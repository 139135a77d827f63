"""`min_latent_steps=0`: the policy may choose to answer at once."""

import pytest
import torch
from datasets import Dataset

from lasar_hf import LasarConfig, LasarForGenerativeRec, LasarSFTConfig, LasarSFTTrainer
from tests.tiny import batch, row, tiny_backbone, tiny_catalog, tiny_tokenizer
from tests.training import COMMON, sft_setup


def model_from_zero():
    torch.manual_seed(0)
    return LasarForGenerativeRec.from_backbone(
        tiny_backbone(), tiny_tokenizer(), num_sid_levels=3, codebook_size=4, max_latent_steps=4, min_latent_steps=0
    ).eval()


def test_the_first_class_is_depth_zero(tmp_path):
    model = model_from_zero()
    prompts = batch([row(model, length, 0, seed=length) for length in (4, 6)])
    for steps in (0, 4):
        torch.nn.init.zeros_(model.model.policy_head.out_proj.weight)
        model.model.policy_head.out_proj.bias.data = torch.eye(5)[steps]
        model.save_pretrained(tmp_path)
        loaded = LasarForGenerativeRec.from_pretrained(tmp_path)
        output = loaded.recommend(**prompts, catalog=tiny_catalog())
        assert output.latent_steps.tolist() == [steps, steps]


def test_a_batch_may_mix_no_steps_and_some():
    model = model_from_zero()
    head = model.model.policy_head.out_proj
    torch.nn.init.normal_(head.weight, std=20.0)
    requests = [batch([row(model, length, 0, seed=length)]) for length in range(3, 11)]
    alone = [model.recommend(**request, catalog=tiny_catalog(), top_k=5) for request in requests]
    together = model.recommend(
        **batch([row(model, length, 0, seed=length) for length in range(3, 11)]), catalog=tiny_catalog(), top_k=5
    )
    depths = together.latent_steps.tolist()
    assert 0 in depths
    assert max(depths) > 0
    assert depths == [int(output.latent_steps) for output in alone]
    assert together.items.tolist() == [output.items[0].tolist() for output in alone]


def test_examples_without_steps_are_labels_of_the_policy(tmp_path):
    _, tokenizer, catalog, examples, anchors = sft_setup([0, 1, 2, 4, 0, 3])
    args = LasarSFTConfig(str(tmp_path), **COMMON | dict(max_steps=60), policy_weight=1.0)
    model = model_from_zero()
    LasarSFTTrainer(model, args, catalog, anchors, train_dataset=examples, processing_class=tokenizer).train()
    prompts = [ids[: ids.index(model.config.latent_start_token_id) + 1] for ids in examples["input_ids"]]
    output = model.recommend(**batch(prompts), catalog=catalog)
    assert output.latent_steps.tolist() == [0, 1, 2, 4, 0, 3]


def test_answers_without_a_depth_are_no_labels_of_the_policy(tmp_path):
    """Direct examples of stage 1 (`depth` -1) and plain text do not say that no steps are needed."""
    _, tokenizer, catalog, examples, _ = sft_setup([0, 0, 0, 2, 3, 0])
    examples = examples.remove_columns("sample_index").add_column("depth", [-1, -1, 0, 2, 3, -1]).to_list()
    text = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "depth": -1}
    args = LasarSFTConfig(str(tmp_path), **COMMON, policy_weight=1.0, per_device_train_batch_size=7)
    model, losses = model_from_zero(), []
    for part in ([*examples, text], [part for part in examples if part["depth"] >= 0]):
        trainer = LasarSFTTrainer(
            model, args, catalog, train_dataset=Dataset.from_list(part), processing_class=tokenizer
        )
        trainer.compute_loss(model.train(), next(iter(trainer.get_train_dataloader())))
        losses.append(trainer._metrics["train"]["policy_loss"][0])
    assert losses[0] == pytest.approx(losses[1])


def test_plain_text_is_no_label_of_the_policy(tmp_path):
    _, tokenizer, catalog, _, _ = sft_setup()
    args = LasarSFTConfig(str(tmp_path), **COMMON, policy_weight=1.0)
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}])
    model = model_from_zero()
    trainer = LasarSFTTrainer(model, args, catalog, train_dataset=rows, processing_class=tokenizer)
    trainer.compute_loss(model.train(), next(iter(trainer.get_train_dataloader())))
    assert "policy_loss" not in trainer._metrics["train"]


def test_other_minima_are_refused():
    with pytest.raises(ValueError, match="min_latent_steps is 2"):
        LasarConfig(min_latent_steps=2)
