"""The benchmark of decoding, on a tiny model: the keys of its report, and that it compares equal work."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.references import score_every_item
from tests.tiny import row, tiny_catalog, tiny_model


needs_int8 = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="CPU without AVX512-VNNI")


@pytest.fixture
def benchmark():
    path = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks" / "decode.py"
    spec = importlib.util.spec_from_file_location("decode_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SIZES["small"].update(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=60,
    )
    return module


def test_one_run_measures_everything(benchmark, capsys):
    benchmark.main(
        "--json --prompt_length 9 --num_beams 6 --text_length 4 --items 5000 --users 2 --rounds 1 --device cpu".split()
    )
    report = json.loads(capsys.readouterr().out)
    assert report["same_items"] is True
    assert report["max_score_difference"] <= 2e-5
    assert 1 <= report["policy_steps"] <= 8
    seconds = report["seconds"]
    latent = (seconds["latent 2"] + seconds["latent 3"]) / 2
    speedup = report["speedup_vs_generate_same_products"]
    assert speedup == report["speedup_vs_generate"]
    assert report["share_of_flop_ratio"] == speedup / report["flop_ratio"]
    assert report["flop_ratio_as_read"] >= report["flop_ratio"] > 1
    assert report["latent_step_over_weight_reading"] > 0
    assert report["latent_step_over_products"] > 0
    assert report["speedup_vs_generate"] == seconds["generate, direct"] / seconds["direct"]
    assert report["products"] in ("onednn", "pytorch")
    if report["products"] == "onednn":
        plain = seconds["generate, direct, without onednn"] / seconds["direct, without onednn"]
        assert report["speedup_vs_generate_without_onednn"] == plain
    assert report["latency_ratio_latent_n2.5_over_direct"] == latent / seconds["direct"]
    assert report["explicit_cot_over_latent"] == seconds["text"] / latent
    assert [index["items"] for index in report["catalog"]] == [10**4, 10**5, 10**6]
    for index in report["catalog"]:
        assert index["bytes_per_item"] <= 32
        assert index["constraint_step_ms"] > 0
        assert index["catalog_seconds"] > 0


def count_operations(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("steps", [0, 3])
def test_counted_operations_are_those_of_pytorch(benchmark, steps):
    model = benchmark.make_model("small", torch.device("cpu"), torch.float32)
    model.set_attn_implementation("eager")  # PyTorch does not count its fused attention on a CPU
    config, prompt, width = model.config, benchmark.make_prompt(model, 24), 6
    # Every prefix has several items, so the beams of all levels are read.
    codes = torch.cartesian_prod(*[torch.arange(6)] * 4)
    catalog = benchmark.SidCatalog(codes, list(map(str, range(len(codes)))))
    processor = benchmark.HashedPrefixProcessor(catalog, config)

    theirs = count_operations(benchmark.generate_call(model, processor, prompt, width, steps, share=False))
    ours = count_operations(benchmark.engine_call(model, catalog, prompt, width, steps))
    ratios = benchmark.measure_operations(model, catalog, prompt, width, policy=steps)
    assert ratios["flop_ratio_at_policy_depth"] == pytest.approx(theirs / ours, rel=0.03)
    assert benchmark.generate_operations(config, 24, width, steps) == pytest.approx(theirs, rel=0.03)
    if steps == 0:
        assert ratios["flop_ratio_as_read"] == ratios["flop_ratio"] == ratios["flop_ratio_at_policy_depth"]


def test_prefixes_of_one_item_are_not_counted_as_read(benchmark):
    model = benchmark.make_model("small", torch.device("cpu"), torch.float32)
    catalog = benchmark.SidCatalog(benchmark.random_codes(300), list(map(str, range(300))))
    ratios = benchmark.measure_operations(model, catalog, benchmark.make_prompt(model, 24), 6, policy=0)
    assert ratios["flop_ratio_as_read"] > 1.05 * ratios["flop_ratio"]


def test_flop_ratio_at_the_published_size(benchmark):
    benchmark.SIZES["qwen3-0.6b"].update(num_hidden_layers=1, vocab_size=151_669 // 28)  # the same shares
    model = benchmark.make_model("qwen3-0.6b", torch.device("meta"), torch.float32)
    reads = [*benchmark.reasoning_reads(128, 0), 50, 50, 50]
    ours = benchmark.recommend_operations(model.config, reads)
    assert benchmark.generate_operations(model.config, 128, 50, 0) / ours == pytest.approx(23.6, rel=0.02)


@needs_int8
def test_data_types_are_compared(benchmark, capsys):
    benchmark.main("--int8 --json --prompt_length 9 --num_beams 6 --items 500 --rounds 1".split())
    report = json.loads(capsys.readouterr().out)
    for part in ("direct", "6_latent_steps", "latent_step"):
        assert report[f"int8_speedup_{part}"] > 0
        assert report[f"bfloat16_speedup_{part}"] > 0


def test_a_checkpoint_without_its_data_is_refused(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main("--int8 --checkpoint outputs/grpo".split())
    assert "--data" in capsys.readouterr().err


def test_the_peers_processor_is_the_constraint(benchmark):
    """Exactly the codes that continue the prefix get a probability."""
    model = benchmark.make_model("small", torch.device("cpu"), torch.float32)
    codes, config = benchmark.random_codes(50), model.config
    processor = benchmark.HashedPrefixProcessor(benchmark.SidCatalog(codes, list(map(str, range(50)))), config)
    ids = [config.latent_end_token_id, config.sid_token_id(0, int(codes[7, 0]))]
    scores = processor(torch.tensor([ids]), torch.zeros(1, config.vocab_size))
    follow = {config.sid_token_id(1, c[1]) for c in codes.tolist() if c[0] == codes[7, 0]}
    assert set(scores[0].isfinite().nonzero()[:, 0].tolist()) == follow
    assert scores.exp().sum().item() == pytest.approx(1)


# Random models whose text is cut at five tokens, ends by itself after three and one, or is empty.
@pytest.mark.parametrize(("seed", "length"), [(1, 5), (15, 3), (0, 1), (12, 0)])
def test_a_written_chain_of_thought_is_part_of_the_prompt(benchmark, seed, length):
    model, _ = tiny_model(seed=seed)
    prompt, catalog = row(model, 6, 0), tiny_catalog()
    text, items, scores = benchmark.recommend_with_text(model, torch.tensor([prompt]), catalog, 20, 5)
    assert text[0].tolist() == greedy_text(model, prompt[:-1], 5)
    assert text.shape[1] == length
    expected = score_every_item(model, prompt[:-1] + text[0].tolist() + prompt[-1:], 0, catalog)
    order = expected.argsort(descending=True)
    assert items[0].tolist() == order.tolist()
    torch.testing.assert_close(scores[0].double(), expected[order], atol=2e-5, rtol=2e-5)


def greedy_text(model, prompt: list[int], max_new_tokens: int) -> list[int]:
    """One whole forward pass per token, until `<|latent_start|>` or the end of the text."""
    config, text = model.config, []
    while len(text) < max_new_tokens:
        logits = model(torch.tensor([prompt + text])).logits[0, -1].clone()
        logits[[config.latent_token_id, config.latent_end_token_id]] = -torch.inf
        token = int(logits.argmax())
        if token in (config.latent_start_token_id, config.backbone_config.eos_token_id):
            break
        text.append(token)
    return text
