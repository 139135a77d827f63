"""Recommending and training in bfloat16, and attention back ends."""

import pytest
import torch

from tests.tiny import batch, row, tiny_catalog, tiny_model
from tests.training import sft_trainer


@pytest.mark.parametrize("latent_steps", [0, 3, None])
def test_recommend_in_bfloat16(latent_steps):
    model, _ = tiny_model(hidden_size=32)
    catalog = tiny_catalog()
    prompts = batch([row(model, 5, 0), row(model, 9, 0, seed=1)])
    options = dict(catalog=catalog, top_k=20, num_beams=20)
    expected = model.recommend(**prompts, **options, latent_steps=latent_steps)
    depths = expected.latent_steps if latent_steps is None else latent_steps
    got = model.to(torch.bfloat16).recommend(**prompts, **options, latent_steps=depths)
    assert got.scores.dtype == torch.float32 and got.scores.isfinite().all()
    by_item = [recommended.scores.gather(1, recommended.items.argsort(dim=1)) for recommended in (got, expected)]
    assert got.items.sort(dim=1).values.tolist() == [list(range(20))] * 2
    torch.testing.assert_close(*by_item, atol=0.15, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_under_autocast_follows_float32(tmp_path, checkpointing):
    losses = []
    for bf16 in (False, True):
        trainer = sft_trainer(
            tmp_path,
            bf16=bf16,
            gradient_checkpointing=checkpointing,
            policy_weight=0.1,
            max_steps=4,
            learning_rate=1e-3,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert "latent_norm_ratio" in trainer.state.log_history[0]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_mask_is_refused(name):
    model, _ = tiny_model()
    model.model.backbone.config._attn_implementation = name
    with pytest.raises(ValueError, match=f"attn_implementation is '{name}'"):
        model(**batch([row(model, 5, 2, [15])]))
    with pytest.raises(ValueError, match="attn_implementation"):
        model.recommend(**batch([row(model, 5, 0)]), catalog=tiny_catalog())
