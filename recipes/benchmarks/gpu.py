"""
Serving and training speed of Qwen3-0.6B and 1.7B sizes on one GPU, with random weights.

    python recipes/benchmarks/gpu.py --json

Serving: latency of `recommend` at several batch sizes, eager and compiled (`compile_for_serving`), against the memory
roofline. The roofline is the time to read the weights once per pass of the backbone, at the bandwidth of a large copy
in the same run. Keys, values and arithmetic are not in it, so only small batches can come near.

Training: forward, backward and optimizer step on users of 50 items, in the trainers' mixed precision. A token counts
each time that the backbone reads it, padding included. Stage 1 reads histories, stage 2 all samples of a user at once,
and GRPO the last prompts of a user with several answers each (without the time to sample these).
"""

import argparse
import json
import resource
import statistics
import sys
from collections.abc import Callable
from itertools import chain

import torch
from decode import CODES, LEVELS, SIZES, make_model, make_prompt, random_codes, seconds_of
from train import padded, user_examples

from lasar_hf import SidCatalog
from lasar_hf.trainers import add_catalog_head


SIZES["qwen3-1.7b"] = SIZES["qwen3-0.6b"] | {"hidden_size": 2048, "intermediate_size": 6144}
SIZES["tiny"] = SIZES["small"] | {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 60,
}  # fmt: skip


def median_seconds(call: Callable, rounds: int, device: torch.device) -> float:
    """Median seconds of a call after three warm-up calls, in which graphs are compiled and recorded."""
    return statistics.median([seconds_of(call, device)[0] for _ in range(3 + rounds)][3:])


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, each byte read once and written once."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 5, device)


def peak_gib(device: torch.device) -> float:
    """Peak memory: of the device since the last call, on a CPU of the process since its start."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def backbone_calls(model, call: Callable) -> list[int]:
    """Tokens of each pass of the backbone in a call, padding included."""
    tokens = []

    def count(module, args, kwargs):
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens.append(ids.numel() if ids is not None else embeds.shape[:2].numel())

    hook = model.model.backbone.register_forward_pre_hook(count, with_kwargs=True)
    call()
    hook.remove()
    return tokens


def measure_serving(args, size: str, catalog: SidCatalog, bandwidth: float, device: torch.device) -> dict:
    """Latency of each batch size, eager and compiled, over the time to read the weights of all passes."""
    model = make_model(size, device, getattr(torch, args.dtype))
    prompt = make_prompt(model, args.prompt_length)
    # A pass reads every weight but the embeddings, of which it only reads some rows. Each level reads its head rows.
    backbone, embeddings = model.model.backbone, model.get_input_embeddings().weight
    pass_bytes = sum(weight.nbytes for weight in backbone.parameters()) - embeddings.nbytes
    head_bytes = LEVELS * CODES * embeddings[0].nbytes
    report = {}
    for batch_size in args.batch_sizes:
        prompts = prompt.expand(batch_size, -1)

        def recommend(prompts=prompts):
            return model.recommend(
                prompts,
                catalog=catalog,
                top_k=args.num_beams,
                num_beams=args.num_beams,
                latent_steps=args.latent_steps,
            )

        model.static_passes = None
        num_passes = len(backbone_calls(model, recommend))
        roofline = (num_passes * pass_bytes + head_bytes) / bandwidth
        eager, expected = median_seconds(recommend, args.rounds, device), recommend()
        model.compile_for_serving([args.prompt_length], [batch_size], args.num_beams, args.mode, backend=args.backend)
        compiled, output = median_seconds(recommend, args.rounds, device), recommend()
        report[f"batch_{batch_size}"] = {
            "passes": num_passes, "roofline_ms": 1000 * roofline, "eager_ms": 1000 * eager,
            "compiled_ms": 1000 * compiled, "compiled_over_roofline": compiled / roofline,
            "compiled_speedup": eager / compiled,
            "largest_score_difference": (output.scores - expected.scores).abs().max().item(),
        }  # fmt: skip
    return report | {"peak_gib": peak_gib(device)}


def measure_training(args, size: str, catalog: SidCatalog, device: torch.device) -> dict:
    """Tokens and samples per second of a training step of each stage."""
    model = make_model(size, device, torch.float32).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    add_catalog_head(model, catalog)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    # 1. The batches of each stage.
    lengths, levels = [args.history_length] * args.users, model.config.num_sid_levels
    direct = user_examples(args, model, catalog, lengths, 0)
    samples = user_examples(args, model, catalog, lengths, args.latent_steps)
    per_user = args.history_length - 1
    histories = direct[per_user - 1 :: per_user]  # the longest sample of each user
    ends = range(per_user, len(samples) + 1, per_user)
    last = chain.from_iterable(samples[end - args.prompts : end] for end in ends)
    candidates = [ids[:-levels] + samples[k][-levels:] for ids in last for k in range(args.candidates)]
    stage1 = padded(model, histories)
    stage1["labels"] = stage1["input_ids"].clone()
    stage1["labels"][:, -levels - 2 : -levels] = -100  # the loss is on every item, not on control tokens
    batches = {"stage1": stage1, "stage2": padded(model, samples), "grpo": padded(model, candidates)}
    # 2. Steps, in mixed precision. Advantages and the small losses of stage 2 would not change the time.
    report = {}
    for name, inputs in batches.items():

        def step(inputs=inputs):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = -model(**inputs, fused_lm_head=True).log_probs.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        peak_gib(device)
        seconds = median_seconds(step, args.rounds, device)
        tokens = sum(backbone_calls(model, lambda inputs=inputs: model(**inputs, fused_lm_head=True)))
        report[name] = {
            "step_ms": 1000 * seconds, "tokens_per_second": tokens / seconds,
            "samples_per_second": len(inputs["labels"]) / seconds, "peak_gib": peak_gib(device),
        }  # fmt: skip
    return report


def benchmark(args: argparse.Namespace) -> dict:
    """All measurements of all sizes."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    bandwidth = measure_bandwidth(device)
    catalog = SidCatalog(random_codes(args.items), list(map(str, range(args.items))))
    report = {"device": name, "torch": torch.__version__, "bandwidth_gb_per_s": bandwidth / 1e9, "sizes": {}}
    for size in args.size:
        serving = measure_serving(args, size, catalog, bandwidth, device)
        report["sizes"][size] = {"serving": serving, "training": measure_training(args, size, catalog, device)}
    return report | {"arguments": vars(args)}


def show(report: dict) -> None:
    """Print one row per measurement."""
    print(f"{report['device']}, {report['bandwidth_gb_per_s']:.0f} GB/s\n\n| measure | value |\n|---|---:|")
    for size, parts in report["sizes"].items():
        for part, rows in parts.items():
            for row, values in rows.items():
                values = values if isinstance(values, dict) else {"": values}
                for name, value in values.items():
                    print(f"| {size}, {part}, {row} {name} | {value:,.4g} |")


def main(argv: list[str]) -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--size", nargs="+", choices=sorted(SIZES), default=["qwen3-0.6b", "qwen3-1.7b"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="Data type of products.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64], help="Prompts of a request.")
    parser.add_argument("--prompt_length", type=int, default=128, help="Tokens of a prompt.")
    parser.add_argument("--num_beams", type=int, default=50, help="Width of the search.")
    parser.add_argument("--latent_steps", type=int, default=3, help="Latent steps, in serving and training.")
    parser.add_argument("--items", type=int, default=100_000, help="Items of the catalogue.")
    parser.add_argument("--backend", default="inductor", help="Backend of torch.compile.")
    parser.add_argument("--mode", help="Mode of torch.compile: reduce-overhead by default with inductor.")
    parser.add_argument("--users", type=int, default=4, help="Users of a training batch.")
    parser.add_argument("--history_length", type=int, default=50, help="Items of a user.")
    parser.add_argument("--prompts", type=int, default=4, help="Prompts per user in GRPO.")
    parser.add_argument("--candidates", type=int, default=8, help="Answers per prompt in GRPO.")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="Trade time for memory in training.")
    parser.add_argument("--rounds", type=int, default=10, help="Timed repeats, of which medians are reported.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    args = parser.parse_args(argv)
    if args.mode is None and args.backend == "inductor":
        args.mode = "reduce-overhead"
    report = benchmark(args)
    print(json.dumps(report, indent=1)) if args.json else show(report)


if __name__ == "__main__":
    main(sys.argv[1:])
