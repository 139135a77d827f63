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
    LasarProcessor,
    LasarSFTConfig,
    LasarSFTTrainer,
)
from lasar_hf.trainers import LasarModelConfig, lasar_lora_config, load_model, lora_from_arguments
from lasar_hf.trainers.sharding import refuse_zero3
from tests.references import DEPTHS as MIXED_DEPTHS
from tests.references import SIDES, functional, gradients, mixed_rows
from tests.tiny import batch, row, tiny_catalog, tiny_model
from tests.training import COMMON, DEPTHS, first_code, grpo_setup, moved, parameters, sft_setup


BACKBONES = ["qwen3", "gpt_neox"]
# B of a LoRA starts at zero, so A has no gradient in the first step.
OPTIONS = {**COMMON, "max_steps": 3, "per_device_train_batch_size": 3}


def sft_trainer(folder, tied=False, depths=DEPTHS, peft_config=None, **kwargs):
    model, tokenizer, catalog, rows, anchors = sft_setup(depths, tie_word_embeddings=tied)
    args = LasarSFTConfig(str(folder), **{**OPTIONS, **kwargs})
    return LasarSFTTrainer(
        model,
        args,
        anchors=anchors,
        train_dataset=rows,
        processing_class=LasarProcessor(tokenizer, catalog),
        peft_config=peft_config or lasar_lora_config(model, r=4),
    )


def grpo_trainer(folder, wrap, config=None, **kwargs):
    model, tokenizer, catalog, rows = grpo_setup()
    args = LasarGRPOConfig(
        str(folder), **{**COMMON, "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4, **kwargs}
    )
    config = config or lasar_lora_config(model, r=4, lora_dropout=0.0)
    model, peft_config = (get_peft_model(model, config), None) if wrap else (model, config)
    return LasarGRPOTrainer(
        model, args, catalog, [first_code], train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )


def trained_rows(config):
    first = config.sid_token_offset
    return [*range(min(config.latent_start_token_id, first), first + config.num_sid_tokens)]


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_adapters_token_rows_and_policy_head(kind, tied):
    model, _ = tiny_model(kind, tie_word_embeddings=tied)
    tables = 1 if tied else 2
    linear = sum(isinstance(part, torch.nn.Linear) for part in model.model.backbone.modules())
    adapted = get_peft_model(model, lasar_lora_config(model, r=4))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert sum("lora_A" in name for name in names) == linear
    assert sum("trainable_tokens_delta" in name for name in names) == tables
    assert sum("policy_head.modules_to_save" in name for name in names) == 4
    assert len(names) == 2 * linear + tables + 4


@pytest.mark.parametrize("kind", BACKBONES)
def test_lora_trains_the_rows_of_new_tokens_only(kind):
    model, _ = tiny_model(kind)
    assert lasar_lora_config(model).trainable_token_indices["lm_head"] == trained_rows(model.config)


def test_layers_can_be_chosen_by_name():
    model, _ = tiny_model()
    adapted = get_peft_model(model, lasar_lora_config(model, target_modules=["q_proj", "v_proj"]))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 4


def test_unknown_layers_are_refused():
    with pytest.raises(ValueError, match=r"target_modules .*'query'"):
        lasar_lora_config(tiny_model()[0], target_modules=["query", "v_proj"])


@pytest.mark.parametrize("names", [["q_proj"], ["q_proj", "v_proj"], "all-linear", None])
def test_lora_reads_a_recipes_arguments(names):
    arguments = LasarModelConfig(use_peft=True, lora_r=2, lora_target_modules=names)
    config = lora_from_arguments(tiny_model()[0], arguments)
    layers = names if isinstance(names, list) else ["down_proj", "q_proj"]
    assert config.r == 2
    assert all(layer in config.target_modules for layer in layers)


def test_without_use_peft_there_is_no_lora():
    assert lora_from_arguments(tiny_model()[0], LasarModelConfig()) is None


@pytest.mark.parametrize(
    "field",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {"bnb_4bit_quant_type": "fp4"},
        {"use_bnb_nested_quant": True},
        {"bnb_4bit_quant_storage": "uint8"},
        {"lora_modules_to_save": ["lm_head"]},
        {"lora_target_parameters": ["weight"]},
        {"lora_task_type": "SEQ_CLS"},
        {"dtype": "float64"},
        {"attn_implementation": "flash_attention_2"},
    ],
)
def test_unsupported_model_arguments_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        LasarModelConfig(**field)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("sid_loss", ["catalog", "vocab"])
def test_sft_moves_the_adapter_and_nothing_else(tmp_path, tied, stage, sid_loss):
    options = dict(depths=[0] * 6) if stage == 1 else dict(policy_weight=0.1)
    trainer = sft_trainer(tmp_path, tied, sid_loss=sid_loss, **options)
    model = trainer.model
    table = model.get_base_model().get_input_embeddings().weight.detach().clone()
    before = parameters(model)
    trainer.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved(before, model) == trained
    assert any("policy_head" in name for name in trained) == (stage == 2)
    change = (model.get_base_model().get_input_embeddings().weight - table).abs().amax(dim=1)
    assert change.any()
    assert set(change.nonzero()[:, 0].tolist()) <= set(trained_rows(model.config))


@pytest.mark.parametrize("wrap", [True, False])
def test_grpo_reference_is_the_model_without_adapter(tmp_path, wrap):
    trainer = grpo_trainer(tmp_path, wrap, beta=0.1)
    model, before = trainer.model, parameters(trainer.model)
    trainer.train()
    assert trainer.ref_model is None
    assert not (tmp_path / "reference_model").exists()
    logs = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert logs[0] == pytest.approx(0, abs=1e-6)
    assert logs[-1] > 1e-6
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved(before, model) == trained
    assert any("policy_head" in name for name in trained)
    assert not any(".ref." in name for name in trained)


def test_grpo_reference_copies_a_given_adapter(tmp_path):
    model, tokenizer, catalog, rows = grpo_setup()
    adapted = get_peft_model(model, lasar_lora_config(model, r=4, lora_dropout=0.0))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    args = LasarGRPOConfig(
        str(tmp_path), **{**COMMON, "per_device_train_batch_size": 8, "num_generations": 4, "beta": 0.1}
    )
    trainer = LasarGRPOTrainer(adapted, args, catalog, [first_code], train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_save_load_and_merge_recommend_the_same(tmp_path, tied):
    base = sft_setup(tie_word_embeddings=tied)[0]
    base.save_pretrained(tmp_path / "base")
    trainer = sft_trainer(tmp_path / "out", tied, policy_weight=0.1, learning_rate=5e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "first"))
    catalog, prompts = tiny_catalog(), batch([row(base, 5, 0), row(base, 8, 0, seed=1)])

    def recommend(model):
        return model.recommend(**prompts, catalog=catalog, top_k=8, num_beams=20)

    expected = recommend(trainer.model)
    assert not torch.equal(expected.items, recommend(base).items)
    loaded, merged = (
        PeftModel.from_pretrained(LasarForGenerativeRec.from_pretrained(tmp_path / "base"), tmp_path / "first/adapter")
        for _ in range(2)
    )
    trainer.save_model()
    whole = LasarForGenerativeRec.from_pretrained(tmp_path / "out")
    assert (whole.lm_head.weight is whole.get_input_embeddings().weight) == tied
    for model in (loaded, merged.merge_and_unload(), whole):
        got = recommend(model)
        assert torch.equal(got.items, expected.items)
        assert torch.equal(got.latent_steps, expected.latent_steps)
        torch.testing.assert_close(got.scores, expected.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_saves_its_token_rows_only(tmp_path, tied):
    trainer = sft_trainer(tmp_path, tied)
    trainer.save_model()
    base = trainer.model.get_base_model()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    width, rows = base.config.hidden_size, len(trained_rows(base.config))
    whole_tables = [name for name, value in saved.items() if value.shape[0] == base.config.vocab_size]
    assert not whole_tables
    assert sum(value.shape == (rows, width) for value in saved.values()) == (1 if tied else 2)


@pytest.mark.parametrize("name", [".", "adapter"])
def test_merged_model_and_adapter_come_with_the_processor(tmp_path, name):
    trainer = sft_trainer(tmp_path)
    trainer.save_model()
    processor = LasarProcessor.from_pretrained(tmp_path / name)
    assert processor.to_dict() == trainer.processor.to_dict()
    assert torch.equal(processor.catalog.codes, trainer.catalog.codes)


def test_sft_of_an_adapter_resumes_bit_exactly(tmp_path):
    options = dict(max_steps=4, policy_weight=0.1, save_strategy="steps", save_steps=2)
    whole = sft_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = sft_trainer(tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = parameters(whole.model)
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


def trained_tables(model, **kwargs):
    """An adapter that trains the token rows of the backbone and head only."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices=lasar_lora_config(model).trainable_token_indices,
        **kwargs,
    )


def test_an_adapter_without_policy_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="modules_to_save"):
        sft_trainer(tmp_path, policy_weight=0.1, peft_config=trained_tables(tiny_model()[0]))


def test_stage_1_accepts_an_adapter_without_policy_head(tmp_path):
    trainer = sft_trainer(tmp_path, depths=[0] * 6, peft_config=trained_tables(tiny_model()[0]))
    assert trainer.args.policy_weight == 0


def test_stage_1_accepts_an_adapter_with_whole_tables(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trainer = sft_trainer(tmp_path, depths=[0] * 6, peft_config=config)
    before = parameters(trainer.model)
    trainer.train()
    assert any("embed_tokens" in name for name in moved(before, trainer.model))


FROZEN = {
    "plain": LoraConfig(target_modules=["q_proj"], modules_to_save=["policy_head"]),
    "no head": LoraConfig(
        target_modules=["q_proj"],
        modules_to_save=["policy_head"],
        trainable_token_indices={"embed_tokens": list(range(12, 27))},
    ),
    "some rows": LoraConfig(
        target_modules=["q_proj"],
        modules_to_save=["policy_head"],
        trainable_token_indices={name: list(range(12, 20)) for name in ("embed_tokens", "lm_head")},
    ),
}


@pytest.mark.parametrize("config", FROZEN.values(), ids=FROZEN)
def test_sft_refuses_frozen_rows_of_new_tokens(tmp_path, config):
    with pytest.raises(ValueError, match="lasar_lora_config"):
        sft_trainer(tmp_path, peft_config=config)


@pytest.mark.parametrize("wrap", [True, False])
def test_grpo_refuses_frozen_rows_of_new_tokens(tmp_path, wrap):
    with pytest.raises(ValueError, match="lasar_lora_config"):
        grpo_trainer(tmp_path, wrap, config=FROZEN["plain"])


def test_an_adapter_loaded_for_inference_is_refused(tmp_path):
    model, tokenizer, catalog, rows, _ = sft_setup()
    get_peft_model(model, lasar_lora_config(model, r=4)).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(sft_setup()[0], tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable"):
        LasarSFTTrainer(
            loaded, LasarSFTConfig(str(tmp_path), **OPTIONS), catalog, train_dataset=rows, processing_class=tokenizer
        )


def test_zero3_is_refused():
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    with pytest.raises(ValueError, match="zero2.yaml"):
        refuse_zero3("path", args, LoraConfig())
    refuse_zero3("path", args, None)  # full training is supported


# ---------------------------------------------------------------------------------------------------------------------
# An adapter as the start


@pytest.fixture
def saved_adapter(tmp_path):
    """Folder of an adapter with random weights, and the scores of its model."""
    sft_setup()[0].save_pretrained(tmp_path / "base")
    model = LasarForGenerativeRec.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, lasar_lora_config(model, r=4, lora_dropout=0.0))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", scores(adapted)


def scores(model):
    return model.eval().recommend(**batch([row(model, 5, 0)]), catalog=tiny_catalog()).scores


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_training_goes_on_from_the_folder_of_an_adapter(tmp_path, saved_adapter, kind):
    folder, expected = saved_adapter
    options = {**OPTIONS, "per_device_train_batch_size": 4}
    if kind == "sft":
        _, tokenizer, catalog, rows, anchors = sft_setup()
        args = LasarSFTConfig(str(tmp_path / "out"), **options)
        trainer = LasarSFTTrainer(str(folder), args, catalog, train_dataset=rows, processing_class=tokenizer)
    else:
        _, tokenizer, catalog, rows = grpo_setup()
        args = LasarGRPOConfig(str(tmp_path / "out"), **options, num_generations=4)
        trainer = LasarGRPOTrainer(
            str(folder), args, catalog, [first_code], train_dataset=rows, processing_class=tokenizer
        )
    torch.testing.assert_close(scores(trainer.model), expected)
    before = parameters(trainer.model)
    trainer.train()
    changed = moved(before, trainer.model)
    assert any("lora_B" in name for name in changed)
    assert any("trainable_tokens_delta" in name for name in changed)


def test_an_adapter_without_its_base_model_names_the_merged_folder(tmp_path):
    """The base of an adapter from a first stage was never saved."""
    sft_trainer(tmp_path, depths=[0] * 6).save_model()
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_model(str(tmp_path / "adapter"))


def test_a_flipped_bit_of_an_adapter_is_found(tmp_path):
    sft_trainer(tmp_path, depths=[0] * 6).save_model()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not the file that was saved"):
        load_model(str(tmp_path / "adapter"))


def test_lora_arguments_do_not_change_an_adapter(saved_adapter):
    model = load_model(str(saved_adapter[0]))
    with pytest.raises(ValueError, match="use_peft"):
        lora_from_arguments(model, LasarModelConfig(use_peft=True))
