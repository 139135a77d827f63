"""Backbones: families with full attention equal the plain loop in float64; the others are refused by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from lasar_hf import (
    LasarConfig,
    LasarForGenerativeRec,
    LasarGRPOConfig,
    LasarGRPOTrainer,
    LasarSFTConfig,
    LasarSFTTrainer,
)
from lasar_hf.model.decoding_lasar import SidLogitsProcessor
from tests.references import plain_loop
from tests.tiny import WORDS, batch, row, sid_ids, tiny_backbone, tiny_catalog, tiny_model, tiny_tokenizer
from tests.training import COMMON, grpo_setup, sft_setup


SHAPE = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
KV = {"num_key_value_heads": 2}
EXPERTS = KV | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = KV | {"num_local_experts": 4}
ROUTED_EXPERTS = KV | {
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT_ATTENTION = ROUTED_EXPERTS | {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}

ACCEPTED = {
    "apertus": KV, "arcee": KV, "bitnet": KV, "deepseek_v2": LATENT_ATTENTION, "deepseek_v3": LATENT_ATTENTION,
    "diffllama": KV, "dots1": ROUTED_EXPERTS, "ernie4_5": KV,
    "ernie4_5_moe": KV | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    "flex_olmo": KV | {"num_experts": 4, "num_experts_per_tok": 2}, "gemma": KV | {"head_dim": 8},
    "glm": KV | {"head_dim": 8}, "glm4": KV | {"head_dim": 8}, "glm4_moe": ROUTED_EXPERTS | {"head_dim": 8},
    "glm4_moe_lite": LATENT_ATTENTION, "gpt2": GPT2, "gpt_bigcode": GPT2, "gpt_neox": {}, "granite": KV,
    "granitemoe": LOCAL_EXPERTS, "granitemoeshared": LOCAL_EXPERTS, "helium": KV | {"head_dim": 8},
    "hunyuan_v1_dense": KV | {"head_dim": 8}, "hyperclovax": KV, "internlm3": KV | {"head_dim": 8}, "jais2": KV,
    "jetmoe": KV, "llama": KV, "ministral3": KV | {"head_dim": 8}, "mistral": KV | {"sliding_window": None},
    "mixtral": LOCAL_EXPERTS, "nemotron": KV, "olmo": KV, "olmo2": KV,
    "olmoe": KV | {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16}, "persimmon": KV, "phi3": KV, "phimoe": LOCAL_EXPERTS,
    "qwen2": KV, "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16}, "qwen3": KV | {"head_dim": 8},
    "qwen3_moe": EXPERTS | {"head_dim": 8}, "seed_oss": KV, "smollm3": KV, "starcoder2": KV, "youtu": KV,
}  # fmt: skip

REFUSED = {
    "bloom": {"n_layer": 2, "n_head": 2}, "codegen": GPT2 | {"n_head": 4, "rotary_dim": 4}, "cohere": KV,
    "doge": KV, "exaone4": KV, "falcon": {}, "gpt_oss": KV, "granite": KV | {"logits_scaling": 4.0},
    "gptj": GPT2 | {"rotary_dim": 8}, "minimax": KV, "mistral": KV,
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2}, "nanochat": KV, "olmo3": KV,
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 8}, "phi": KV,
}  # fmt: skip


def tiny_language_model(family: str, settings: dict):
    """A randomly initialised causal language model of a family, in float64 with weights large enough to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SHAPE | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


@pytest.fixture(params=sorted(ACCEPTED))
def model(request):
    backbone = tiny_language_model(request.param, ACCEPTED[request.param])
    model = LasarForGenerativeRec.from_backbone(
        backbone, tiny_tokenizer(), num_sid_levels=3, codebook_size=4, max_latent_steps=4
    )
    model.model.backbone.set_experts_implementation("eager")  # grouped products of experts do not know float64
    return model.eval().double()


def mixed_sequences(model) -> list[list[int]]:
    """Sequences of several depths and lengths; two share their prompt."""
    codes = tiny_catalog().codes
    shapes = [(6, 2, 0), (4, 0, 1), (9, 4, 2), (6, 2, 0)]  # prompt length, latent steps, seed of the prompt
    return [
        row(model, length, steps, sid_ids(model, codes[item]), seed)
        for item, (length, steps, seed) in enumerate(shapes)
    ]


def test_logits_equal_the_plain_loop(model):
    sequences = mixed_sequences(model)
    with torch.no_grad():
        logits = model(**batch(sequences)).logits
        for sequence, row_logits in zip(sequences, logits, strict=True):
            expected, _ = plain_loop(model, sequence)
            torch.testing.assert_close(row_logits[-len(sequence) :], expected, atol=1e-8, rtol=0)


def test_gradients_equal_the_plain_loop(model):
    sequences = mixed_sequences(model)
    inputs = batch(sequences)
    model(**inputs).logits[inputs["attention_mask"].bool()].square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.cat([plain_loop(model, sequence)[0] for sequence in sequences]).square().mean().backward()
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6 * float(largest), rtol=1e-6)


def test_beams_equal_generate(model):
    catalog, prompt_length, steps = tiny_catalog(), 6, 2
    ids = torch.tensor([row(model, prompt_length, steps, [], seed=0)])
    found = model.recommend(ids[:, :prompt_length], catalog=catalog, top_k=5, num_beams=20, latent_steps=steps)
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        logits_processor=[SidLogitsProcessor(catalog, model.config)],
        num_beams=20,
        num_return_sequences=5,
        max_new_tokens=3,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
    )
    expected = torch.tensor([sid_ids(model, catalog.codes[item]) for item in found.items[0]])
    assert torch.equal(generated.sequences[:, -3:], expected)
    torch.testing.assert_close(generated.sequences_scores, found.scores[0], atol=1e-5, rtol=0)


def test_probabilities_of_all_items_sum_to_one(model):
    prompt = torch.tensor([row(model, 6, 0, seed=0)])
    scores = model.recommend(prompt, catalog=tiny_catalog(), top_k=20, num_beams=64, latent_steps=2).scores
    torch.testing.assert_close(scores.exp().sum(), torch.tensor(1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_other_backbones_are_refused(family):
    backbone = tiny_language_model(family, REFUSED[family])
    name = type(backbone).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    with pytest.raises(ValueError, match=name):
        LasarForGenerativeRec.from_backbone(backbone, tiny_tokenizer(), num_sid_levels=3, codebook_size=4)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
WITH_EXPERTS = ["granitemoe", "jetmoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_router_losses_are_refused(family):
    backbone = tiny_language_model(family, ACCEPTED[family] | {"output_router_logits": True})
    with pytest.raises(ValueError, match="output_router_logits"):
        LasarForGenerativeRec.from_backbone(backbone, tiny_tokenizer())


@pytest.mark.parametrize(
    ("family", "settings", "name"),
    [
        ("qwen3_moe", {"output_router_logits": True}, "output_router_logits"),
        ("opt", {"word_embed_proj_dim": 8}, "OPTModel"),
        ("gemma3", {}, "Gemma3Model"),
        ("mistral", {"sliding_window": 8}, "MistralModel"),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}, "Phi3Model .*longrope"),
    ],
)
def test_a_config_made_by_hand_is_checked(family, settings, name):
    shape = {} if family == "gemma3" else SHAPE | ACCEPTED[family]
    with torch.device("meta"), pytest.raises(ValueError, match=name):
        LasarForGenerativeRec(LasarConfig(backbone_config=CONFIG_MAPPING[family](**shape | settings)))


def capped(model, inputs, output):
    output.logits = 30 * torch.tanh(output.logits / 30)


def masked(model, inputs, output):
    output.logits[..., -1] = torch.finfo(output.logits.dtype).min


@pytest.mark.parametrize("change", [capped, masked])
def test_a_cap_is_found_at_small_logits(change):
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.lm_head.weight.mul_(1e-4)
    backbone.register_forward_hook(change)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        LasarForGenerativeRec.from_backbone(backbone, tiny_tokenizer())


def test_logits_without_the_head_are_refused():
    backbone = tiny_backbone()
    backbone.lm_head.forward = None  # not called

    def forward(**inputs):
        hidden_states = backbone.model(**inputs).last_hidden_state
        return CausalLMOutput(logits=hidden_states @ backbone.lm_head.weight.T / 4)

    backbone.forward = forward
    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        LasarForGenerativeRec.from_backbone(backbone, tiny_tokenizer())


def test_a_scaled_input_of_the_head_is_refused():
    backbone = tiny_backbone()
    backbone.lm_head.register_forward_pre_hook(lambda module, inputs: inputs[0] / 4)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        LasarForGenerativeRec.from_backbone(backbone, tiny_tokenizer())


def test_checking_a_backbone_leaves_it_as_it_was():
    backbone = tiny_backbone().train()
    backbone.resize_token_embeddings(64)  # enough, so that the head stays the same module
    model = LasarForGenerativeRec.from_backbone(backbone, tiny_tokenizer(), num_sid_levels=3, codebook_size=4)
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_backbone_keeps_its_implementations(experts, attention):
    backbone = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["qwen3_moe"](**SHAPE | ACCEPTED["qwen3_moe"]),
        attn_implementation=attention,
        experts_implementation=experts,
    )
    model = LasarForGenerativeRec.from_backbone(backbone, tiny_tokenizer(), num_sid_levels=3, codebook_size=4)
    assert model.model.backbone.config._experts_implementation == experts
    assert model.model.backbone.config._attn_implementation == attention
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: tiny_backbone().base_model,
        lambda: tiny_model()[0],
        lambda: get_peft_model(tiny_backbone(), LoraConfig(target_modules=["q_proj"])),
    ],
    ids=["no head", "a recommender", "an adapter"],
)
def test_only_language_models_are_backbones(backbone):
    with pytest.raises(ValueError, match="backbone"):
        LasarForGenerativeRec.from_backbone(backbone(), tiny_tokenizer())


def sft_trainer(folder, model):
    _, tokenizer, catalog, examples, anchors = sft_setup()
    args = LasarSFTConfig(str(folder), **COMMON)
    return LasarSFTTrainer(model, args, catalog, anchors, train_dataset=examples, processing_class=tokenizer)


def grpo_trainer(folder, model):
    _, tokenizer, catalog, examples = grpo_setup()
    args = LasarGRPOConfig(str(folder), **COMMON, num_generations=4)
    return LasarGRPOTrainer(model, args, catalog, train_dataset=examples, processing_class=tokenizer)


@pytest.mark.parametrize("make_trainer", [sft_trainer, grpo_trainer])
def test_experts_train_without_a_router_loss(make_trainer, tmp_path):
    """TRL would add the router's loss, which the latent loop does not return."""
    model = LasarForGenerativeRec.from_backbone(
        tiny_language_model("qwen3_moe", ACCEPTED["qwen3_moe"]),
        tiny_tokenizer(),
        num_sid_levels=3,
        codebook_size=4,
        max_latent_steps=4,
    )
    assert model.config.backbone_config.router_aux_loss_coef > 0
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert not trainer.model.config.backbone_config.output_router_logits


@pytest.mark.parametrize("config", [LasarSFTConfig, LasarGRPOConfig])
def test_a_router_loss_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        config(str(tmp_path), use_cpu=True, bf16=False, router_aux_loss_coef=0.01)
