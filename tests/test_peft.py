"""LoRA: what is trained and what is saved, the reference without the adapter, and the same items after merging."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lasar_hf import (
    LasarForGenerativeRec,
    LasarGRPOConfig,
    LasarGRPOTrainer,
    LasarSFTConfig,
    LasarSFTTrainer,
    SidCatalog,
)
from lasar_hf.trainers import lasar_lora_config, save_trained
from lasar_hf.trainers.lora import refuse_zero3
from tests.test_modeling import DEPTHS as MIXED_DEPTHS
from tests.test_modeling import SIDES, functional, gradients, mixed_rows
from tests.test_trainers import COMMON, DEPTHS, first_code, grpo_setup, sft_setup
from tests.tiny import batch, row, tiny_catalog, tiny_model


BACKBONES = ["qwen3", "gpt_neox"]
# Adam would move the LoRA's B alone in its first step, and the A only from the second on.
OPTIONS = {**COMMON, "max_steps": 3, "per_device_train_batch_size": 3}


def sft_trainer(folder, tied=False, depths=DEPTHS, peft_config=None, **kwargs):
    model, tokenizer, catalog, rows, anchors = sft_setup(depths, tie_word_embeddings=tied)
    args = LasarSFTConfig(str(folder), **{**OPTIONS, **kwargs})
    return LasarSFTTrainer(
        model, args, catalog, anchors, train_dataset=rows, processing_class=tokenizer,
        peft_config=peft_config or lasar_lora_config(model, r=4),
    )


def grpo_trainer(folder, wrap, **kwargs):
    model, tokenizer, catalog, rows = grpo_setup()
    args = LasarGRPOConfig(
        str(folder), **{**COMMON, "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4, **kwargs}
    )
    config = lasar_lora_config(model, r=4, lora_dropout=0.0)
    model, peft_config = (get_peft_model(model, config), None) if wrap else (model, config)
    return LasarGRPOTrainer(
        model, args, catalog, [first_code], train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before, model):
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


def trained_rows(config):
    first = config.sid_token_offset
    return [*range(min(config.latent_start_token_id, first), first + config.num_sid_tokens)]


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_trained(kind, tied):
    model, _ = tiny_model(kind, tie_word_embeddings=tied)
    tables = 1 if tied else 2
    linear = sum(isinstance(part, torch.nn.Linear) for part in model.model.backbone.modules())
    adapted = get_peft_model(model, lasar_lora_config(model, r=4))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert sum("lora_A" in name for name in names) == linear
    assert sum("trainable_tokens_delta" in name for name in names) == tables
    assert sum("policy_head.modules_to_save" in name for name in names) == 4
    assert len(names) == 2 * linear + tables + 4
    config = lasar_lora_config(tiny_model(kind)[0])
    assert config.trainable_token_indices["lm_head"] == trained_rows(model.config)


def test_layers_can_be_chosen_by_name():
    model, _ = tiny_model()
    adapted = get_peft_model(model, lasar_lora_config(model, target_modules=["q_proj", "v_proj"]))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 4
    with pytest.raises(ValueError, match=r"target_modules holds \['query'\]"):
        lasar_lora_config(tiny_model()[0], target_modules=["query", "v_proj"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("sid_loss", ["catalog", "vocab"])
def test_sft_moves_the_adapter_and_nothing_else(tmp_path, tied, stage, sid_loss):
    options = dict(depths=[0] * 6) if stage == 1 else dict(policy_weight=0.1)
    trainer = sft_trainer(tmp_path, tied, sid_loss=sid_loss, **options)
    model = trainer.model
    table = model.get_base_model().get_input_embeddings().weight.detach().clone()
    before = state(model)
    trainer.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved(before, model) == trained
    assert any("policy_head" in name for name in trained) == (stage == 2)
    change = (model.get_base_model().get_input_embeddings().weight - table).abs().amax(dim=1)
    assert set(change.nonzero()[:, 0].tolist()) <= set(trained_rows(model.config)) and change.any()


@pytest.mark.parametrize("wrap", [True, False])
def test_grpo_takes_the_model_without_the_adapter_as_reference(tmp_path, wrap):
    trainer = grpo_trainer(tmp_path, wrap, beta=0.1)
    model, before = trainer.model, state(trainer.model)
    trainer.train()
    assert trainer.ref_model is None and not (tmp_path / "reference_model").exists()
    logs = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert logs[0] == pytest.approx(0, abs=1e-6) and logs[-1] > 1e-6
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved(before, model) == trained and any("policy_head" in name for name in trained)
    assert not any(".ref." in name for name in trained)


def test_an_adapter_that_was_trained_before_is_its_own_reference(tmp_path):
    model, tokenizer, catalog, rows = grpo_setup()
    adapted = get_peft_model(model, lasar_lora_config(model, r=4, lora_dropout=0.0))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    args = LasarGRPOConfig(
        str(tmp_path), **{**COMMON, "per_device_train_batch_size": 8, "num_generations": 4, "beta": 0.1}
    )
    trainer = LasarGRPOTrainer(
        adapted, args, catalog, [first_code], train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_save_load_and_merge_recommend_the_same(tmp_path, tied):
    base = sft_setup(tie_word_embeddings=tied)[0]
    base.save_pretrained(tmp_path / "base")
    trainer = sft_trainer(tmp_path / "out", tied, policy_weight=0.1, learning_rate=5e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    catalog, prompts = tiny_catalog(), batch([row(base, 5, 0), row(base, 8, 0, seed=1)])

    def recommend(model):
        return model.recommend(**prompts, catalog=catalog, top_k=8, num_beams=20)

    expected = recommend(trainer.model)
    assert not torch.equal(expected.items, recommend(base).items)
    loaded = PeftModel.from_pretrained(LasarForGenerativeRec.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    merged = PeftModel.from_pretrained(LasarForGenerativeRec.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    save_trained(trainer)
    whole = LasarForGenerativeRec.from_pretrained(tmp_path / "out")
    assert torch.equal(SidCatalog.from_pretrained(tmp_path / "out").codes, catalog.codes)
    assert (whole.lm_head.weight is whole.get_input_embeddings().weight) == tied
    for model in (loaded, merged.merge_and_unload(), whole):
        got = recommend(model)
        assert torch.equal(got.items, expected.items) and torch.equal(got.latent_steps, expected.latent_steps)
        torch.testing.assert_close(got.scores, expected.scores, atol=1e-5, rtol=1e-5)

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    width, rows = base.config.hidden_size, len(trained_rows(base.config))
    whole_tables = [name for name, value in saved.items() if value.shape[0] == base.config.vocab_size]
    assert not whole_tables
    assert sum(value.shape == (rows, width) for value in saved.values()) == (1 if tied else 2)


def test_sft_of_an_adapter_resumes_bit_exactly(tmp_path):
    options = dict(max_steps=4, policy_weight=0.1, save_strategy="steps", save_steps=2)
    whole = sft_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = sft_trainer(tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = state(whole.model)
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_checkpointing_changes_no_gradient_of_the_adapter():
    model, _ = tiny_model()
    inputs = batch(mixed_rows(model), SIDES)
    real = inputs["attention_mask"].bool()
    adapted = get_peft_model(model, lasar_lora_config(model, r=4, lora_dropout=0.0)).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            adapted.enable_input_require_grads()  # as TRL does
        outputs = model(**inputs)
        assert outputs.latent_steps.tolist() == MIXED_DEPTHS
        results.append(gradients(adapted, functional(outputs.logits[real], outputs.latent_states)))
    assert results[0].keys() == results[1].keys() and len(results[0]) == 2 * 14 + 2
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, atol=1e-6, rtol=1e-6)


def test_an_adapter_that_would_lose_the_policy_head_is_refused(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="lasar_lora_config"):
        sft_trainer(tmp_path, policy_weight=0.1, peft_config=config)
    sft_trainer(tmp_path, depths=[0] * 6, peft_config=config)  # stage 1 does not train it


def test_zero3_is_refused():
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    with pytest.raises(ValueError, match="zero2.yaml"):
        refuse_zero3("path", args, LoraConfig())
    refuse_zero3("path", args, None)
