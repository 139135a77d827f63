"""Targets at every depth, a policy fitted on them, and recipes/depth.py."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from lasar_hf import LasarForGenerativeRec, LasarProcessor
from lasar_hf.data import PreparedData
from lasar_hf.evaluation import paired_bootstrap
from lasar_hf.model.base_lasar import DepthPolicyHead, sampled_depth
from lasar_hf.trainers import fit_depth_policy, score_depths
from tests.recipes import load_recipe, save_checkpoint, save_prepared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    save_checkpoint(folder / "model", instruction="")
    save_prepared(folder / "data")
    return folder


def test_the_policy_head_is_its_equation():
    head, states = DepthPolicyHead(8, 3), torch.randn(5, 8)
    inner = torch.tanh(states @ head.dense.weight.T + head.dense.bias)
    torch.testing.assert_close(head(states), inner @ head.out_proj.weight.T + head.out_proj.bias)


@pytest.mark.parametrize("first", [0, 1])
def test_depths_are_drawn_from_the_policy(first):
    torch.manual_seed(0)
    policy = torch.tensor([0.5, 0.2, 0.3])
    depths = sampled_depth(policy.log().expand(4000, -1), first)
    torch.testing.assert_close(torch.bincount(depths - first) / 4000, policy, atol=0.03, rtol=0)


def test_scores_are_those_of_recommending(folder):
    path = folder / "model"
    model, processor = LasarForGenerativeRec.from_pretrained(path), LasarProcessor.from_pretrained(path)
    samples = PreparedData.load(folder / "data").samples["test"]
    prompts = [processor.prompt_ids(history) for history in samples["history"]]
    scores = score_depths(model, processor.catalog, prompts, samples["target"], range(5), batch_size=5)
    ids = processor.catalog.item_ids
    for depth in range(5):
        prompts = processor([[ids[item] for item in history] for history in samples["history"]])
        output = model.recommend(**prompts, catalog=processor.catalog, top_k=20, num_beams=64, latent_steps=depth)
        is_target = output.items == torch.tensor(samples["target"])[:, None]
        expected = output.scores[is_target]
        torch.testing.assert_close(scores.log_probs[:, depth], expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        output = model.model(**prompts)
    torch.testing.assert_close(scores.start_states, output.latent_states[:, 0], atol=1e-4, rtol=1e-4)


def test_the_policy_learns_which_depth_is_best():
    torch.manual_seed(0)
    states, head = torch.randn(400, 8), DepthPolicyHead(8, 3)
    best = (states[:, 0] > 0).long() + (states[:, 0] > 0.8).long()  # 0, 1 or 2
    rewards = torch.nn.functional.one_hot(best, 3).numpy().astype(float)
    fitted = fit_depth_policy(head, states, rewards, step_cost=0.0, max_steps=400, learning_rate=0.02)
    test = torch.randn(400, 8)
    expected = (test[:, 0] > 0).long() + (test[:, 0] > 0.8).long()
    assert (fitted(test).argmax(dim=-1) == expected).float().mean() > 0.85
    cheap = fit_depth_policy(head, states, rewards, step_cost=5.0, max_steps=400, learning_rate=0.02)
    assert (cheap(test).argmax(dim=-1) == 0).float().mean() > 0.97


def test_a_fit_that_helps_nobody_keeps_the_head():
    torch.manual_seed(0)
    states, head = torch.randn(100, 8), DepthPolicyHead(8, 3)
    fitted = fit_depth_policy(head, states, np.zeros((100, 3)), step_cost=0.0)
    for name, weight in head.state_dict().items():
        assert torch.equal(fitted.state_dict()[name], weight)


@pytest.mark.parametrize("reward", ["logp", "ndcg"])
def test_the_recipe_reports_and_saves(folder, tmp_path, reward):
    recipe = load_recipe("depth")
    args = recipe.DepthArguments(
        str(folder / "data"), str(folder / "model"), str(tmp_path), reward=reward, num_beams=8,
        save_to=str(tmp_path / "fitted"),
    )  # fmt: skip
    recipe.main(args)
    report = json.loads((tmp_path / "report.json").read_text())
    fixed = [report["rows"][f"depth {depth}"]["NDCG@10"] for depth in range(5)]
    assert report["best"] == int(np.argmax(fixed))
    assert report["rows"]["oracle"]["NDCG@10"] >= max(fixed)
    assert sum(report["rows"]["fitted policy"]["depths"]) == 23
    assert "| oracle of noisy lists |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "depth.png").stat().st_size > 1000
    model = LasarForGenerativeRec.from_pretrained(tmp_path / "fitted")
    assert model.config.max_latent_steps == 4


def test_a_bfloat16_checkpoint_has_a_report(folder, tmp_path):
    recipe = load_recipe("depth")
    model = LasarForGenerativeRec.from_pretrained(folder / "model").bfloat16()
    model.save_pretrained(tmp_path / "model")
    LasarProcessor.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    fitted = str(tmp_path / "fitted")
    recipe.main(recipe.DepthArguments(
        str(folder / "data"), str(tmp_path / "model"), str(tmp_path), num_beams=8, save_to=fitted
    ))  # fmt: skip
    counts = json.loads((tmp_path / "report.json").read_text())["rows"]["policy"]["depths"]
    histories = PreparedData.load(folder / "data").samples["validation"]["history"]
    processor = LasarProcessor.from_pretrained(fitted)
    prompts = processor([[processor.catalog.item_ids[item] for item in row] for row in histories])
    chosen = model.recommend(**prompts, catalog=processor.catalog, top_k=1, num_beams=1).latent_steps
    assert counts == np.bincount(chosen, minlength=5).tolist()
    assert LasarForGenerativeRec.from_pretrained(fitted).dtype == torch.bfloat16


def test_a_policy_chooses_for_users_that_it_does_not_know(monkeypatch):
    """With a split by time a user has several samples."""
    recipe, pairs = load_recipe("depth"), []

    def fit(head, states, rewards, cost, first):
        pairs.append([set(states[:, 0].tolist())])
        return lambda chosen: pairs[-1].append(set(chosen[:, 0].tolist())) or torch.zeros(len(chosen), 2)

    monkeypatch.setattr(recipe, "fit_depth_policy", fit)
    users = np.array([0, 1, 0, 2, 3, 2, 2, 3])
    recipe.cross_fitted(None, torch.tensor(users)[:, None], np.zeros((8, 2)), 0.0, 1, users)
    assert len(pairs) == 2
    for known, chosen in pairs:
        assert known and chosen and not known & chosen


def test_intervals_are_those_of_users():
    compare, ndcg = load_recipe("depth").compare, np.random.default_rng(0).random((40, 2))
    policy, users = {"policy": np.arange(40) % 2}, np.arange(40) // 4
    found = compare(ndcg, ndcg, policy, users)["policy"]["against best fixed"]
    best = ndcg.mean(axis=0).argmax()
    assert found == asdict(paired_bootstrap(ndcg[np.arange(40), policy["policy"]], ndcg[:, best], users))


def test_wrong_arguments_are_refused(folder):
    with pytest.raises(ValueError, match="reward is 'luck'"):
        load_recipe("depth").DepthArguments("x", "x", "x", reward="luck")
    with pytest.raises(ValueError, match="cheap"):
        load_recipe("depth").DepthArguments("x", "x", "x", step_cost="cheap")
