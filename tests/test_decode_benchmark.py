"""The benchmark of decoding, on a tiny model: the keys of its report, and that it compares equal work."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture
def benchmark():
    path = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks" / "decode.py"
    spec = importlib.util.spec_from_file_location("decode_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SIZES["small"].update(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=60,
    )
    return module


def test_one_run_measures_everything_and_finds_the_same_items(benchmark, capsys):
    benchmark.main(
        "--json --prompt_length 9 --num_beams 6 --text_length 4 --items 5000 --users 2 --rounds 1 --device cpu".split()
    )
    report = json.loads(capsys.readouterr().out)
    assert report["same_items"] is True and report["max_score_difference"] <= 2e-5
    assert 1 <= report["policy_steps"] <= 8
    seconds = report["seconds"]
    latent = (seconds["latent 2"] + seconds["latent 3"]) / 2
    assert report["speedup_vs_generate"] == seconds["generate, direct"] / seconds["direct"]
    assert report["latency_ratio_latent_n2.5_over_direct"] == latent / seconds["direct"]
    assert report["explicit_cot_over_latent"] == seconds["text"] / latent
    assert [row["items"] for row in report["catalog"]] == [10**4, 10**5, 10**6]
    for row in report["catalog"]:
        assert row["bytes_an_item"] <= 32 and row["constraint_step_ms"] > 0 and row["catalog_seconds"] > 0


def test_the_peers_processor_is_the_constraint(benchmark):
    """A prefix is looked up as it stands; the processor of another catalogue would find other items."""
    model = benchmark.make_model("small", benchmark.torch.device("cpu"), benchmark.torch.float32)
    codes, config = benchmark.random_codes(50), model.config
    processor = benchmark.HashedPrefixProcessor(benchmark.SidCatalog(codes, list(map(str, range(50)))), config)
    ids = [config.latent_end_token_id, config.sid_token_id(0, int(codes[7, 0]))]
    scores = processor(benchmark.torch.tensor([ids]), benchmark.torch.zeros(1, config.vocab_size))
    follow = {config.sid_token_id(1, c[1]) for c in codes.tolist() if c[0] == codes[7, 0]}
    assert set(scores[0].isfinite().nonzero()[:, 0].tolist()) == follow
    assert scores.exp().sum().item() == pytest.approx(1)
