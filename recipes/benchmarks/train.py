"""
Cost of latent steps and of repeated prompts in training.

    python recipes/benchmarks/train.py --json

With the same weights and batches throughout, it compares

* a stage-2 step with a stage-1 step of the same number of tokens, for several depths;
* forward and backward of GRPO with shared prompts and without;
* a whole GRPO step with that of stock `trl.GRPOTrainer` on the same prompts and completions;
* training on every prefix of every history, each history read once, with one sequence per prefix: an epoch of stage 2
  on the users of `--histories` and on users of 50 items, GRPO with four prompts per user. The token ratio beside a
  speed is the number of tokens that are read without sharing over those with it, without padding.

Times are medians over interleaved repeats.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from trl import GRPOConfig, GRPOTrainer

from lasar_hf import LasarForGenerativeRec, LasarGRPOConfig, LasarGRPOTrainer, SidCatalog
from lasar_hf.files import read_json
from lasar_hf.trainers import add_catalog_head, alignment_loss
from lasar_hf.trainers.prefix_sampler import PrefixBatchSampler


WORDS = 1000


def parse(argv: list[str]) -> argparse.Namespace:
    """Command-line options. The defaults take about two minutes on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, default=WORDS, help="Words, without Semantic-ID tokens.")
    parser.add_argument("--prompt_length", type=int, default=256)
    parser.add_argument("--examples", type=int, default=16, help="Examples of an SFT batch.")
    parser.add_argument("--prompts", type=int, default=2, help="Prompts of a GRPO batch.")
    parser.add_argument("--candidates", type=int, default=8, help="Candidates per prompt.")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1, 2, 4, 8], help="Latent steps.")
    parser.add_argument("--histories", help="JSON file of users and their items, such as Beauty.inter.json.")
    parser.add_argument("--users", type=int, default=64, help="Users drawn from --histories.")
    parser.add_argument("--history_length", type=int, default=50, help="Items of each synthetic user.")
    parser.add_argument("--steps", type=int, default=3, help="Latent steps of the prefix benchmark.")
    parser.add_argument("--max_tokens", type=int, default=2048, help="Tokens of a batch of the prefix benchmark.")
    parser.add_argument("--repeats", type=int, default=3, help="Timed repeats of each task.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
    return parser.parse_args(argv)


def build(args: argparse.Namespace):
    """A model with random weights, its tokenizer and a catalogue of random items."""
    torch.manual_seed(0)
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(args.vocab_size)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w1", eos_token="w2", padding_side="left")
    heads = max(args.hidden_size // 64, 1)
    config = Qwen3Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 2, 1),
        head_dim=64,
        max_position_embeddings=2048,
        pad_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    model = LasarForGenerativeRec.from_backbone(AutoModelForCausalLM.from_config(config), tokenizer)
    codes = np.unique(np.random.default_rng(0).integers(0, 256, (5000, 4)), axis=0)
    model = model.to(args.device, getattr(torch, args.dtype))
    return model, tokenizer, SidCatalog(codes, [str(i) for i in range(len(codes))])


def make_batch(args, model, catalog, depth: int, count: int, repeat: int = 1) -> dict[str, torch.Tensor]:
    """`count` prompts of the full length, each `repeat` times with different answers."""
    generator = torch.Generator().manual_seed(depth)
    config = model.config
    prompts = torch.randint(3, args.vocab_size, (count, args.prompt_length - 1), generator=generator)
    items = torch.randint(len(catalog), (count * repeat,), generator=generator)
    offsets = torch.tensor([config.sid_token_id(level, 0) for level in range(config.num_sid_levels)])
    region = [config.latent_start_token_id] + [config.latent_token_id] * depth + [config.latent_end_token_id]
    fixed = torch.cat([prompts, torch.tensor(region).expand(count, -1)], dim=1).repeat_interleave(repeat, dim=0)
    answers = catalog.codes[items] + offsets
    input_ids = torch.cat([fixed, answers], dim=1)
    labels = torch.cat([torch.full_like(fixed, -100), answers], dim=1)
    return {"input_ids": input_ids.to(args.device), "labels": labels.to(args.device)}


def median_times(args, tasks: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of each task; the tasks take turns, after one warm-up round."""
    times = {name: [] for name in tasks}
    for repeat in range(args.repeats + 1):
        for name, task in tasks.items():
            if args.device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            task()
            if args.device != "cpu":
                torch.cuda.synchronize()
            if repeat > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def sft_steps(args, model, catalog) -> dict[str, float]:
    """Forward and backward of both stages for each depth."""
    add_catalog_head(model, catalog)
    state = {}
    hook = model.model.register_forward_hook(lambda module, inputs, output: state.update(output=output))

    def stage1(depth: int) -> None:
        inputs = make_batch(args, model, catalog, 0, args.examples)
        # The same number of tokens: a plain token instead of each latent slot.
        extra = inputs["input_ids"][:, :depth]
        labels = torch.cat([torch.full_like(extra, -100), inputs["labels"]], dim=1)
        model.zero_grad()
        model(torch.cat([extra, inputs["input_ids"]], dim=1), labels=labels, fused_lm_head=True).loss.backward()

    def stage2(depth: int) -> None:
        inputs = make_batch(args, model, catalog, depth, args.examples)
        model.zero_grad()
        loss = model(**inputs, fused_lm_head=True).loss
        output = state["output"]
        if depth:
            latents = output.latent_states[:, 1:]
            mask = torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device)
            loss = loss + 0.1 * alignment_loss(latents, torch.zeros_like(latents), mask)
        loss = loss + 0.1 * output.depth_logits.float().log_softmax(-1)[:, max(depth, 1) - 1].neg().mean()
        loss.backward()

    tasks = {}
    for depth in args.depths:
        tasks[f"stage1_n{depth}"] = lambda depth=depth: stage1(depth)
        tasks[f"stage2_n{depth}"] = lambda depth=depth: stage2(depth)
    times = median_times(args, tasks)
    hook.remove()
    return times


def grpo_pass(args, model, catalog) -> dict[str, float]:
    """Forward and backward of a policy-gradient loss, with shared prompts and without; and how far they differ."""
    inputs = make_batch(args, model, catalog, 3, args.prompts, args.candidates)
    torch.manual_seed(1)
    advantages = torch.randn(len(inputs["labels"]), 1, device=args.device)
    results = {}

    def run(share: bool) -> None:
        model.model.share_prefixes = share
        model.zero_grad()
        loss = -(model(**inputs, fused_lm_head=True).log_probs * advantages).sum() / len(advantages)
        loss.backward()
        results[share] = loss.item(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}

    times = median_times(args, {"shared": lambda: run(True), "unshared": lambda: run(False)})
    model.model.share_prefixes = True
    (shared_loss, shared), (unshared_loss, unshared) = results[True], results[False]
    difference = sum((shared[n] - unshared[n]).pow(2).sum() for n in shared).sqrt()
    norm = sum(g.pow(2).sum() for g in unshared.values()).sqrt()
    return {
        "grpo_speedup_vs_unshared": times["unshared"] / times["shared"],
        "loss_difference": abs(shared_loss - unshared_loss) / max(abs(unshared_loss), 1e-9),
        "grad_difference": float(difference / norm),
    }


def grpo_step(args, model, tokenizer, catalog) -> float:
    """Time of a training step of stock TRL over that of [`LasarGRPOTrainer`], on equal prompts and completions."""
    inputs = make_batch(args, model, catalog, 3, args.prompts, args.candidates)
    levels = model.config.num_sid_levels
    ids = inputs["input_ids"].tolist()
    rollout = {"prompt_ids": [r[:-levels] for r in ids], "completion_ids": [r[-levels:] for r in ids]}
    rollout |= {"logprobs": None, "depth_log_prob": [0.0] * len(ids)}

    def reward(completion_ids, **kwargs):
        return [float(completion[0] % 7) for completion in completion_ids]

    size = args.prompts * args.candidates
    data = Dataset.from_list([{"prompt": f"w{i}<|latent_start|>", "target": 0} for i in range(args.prompts)])
    examples = [data[i // args.candidates] for i in range(size)]
    trainers = {}
    for name, config_class, trainer_class in (
        ("ours", LasarGRPOConfig, LasarGRPOTrainer),
        ("stock", GRPOConfig, GRPOTrainer),
    ):
        options = {
            "use_cpu": args.device == "cpu",
            "bf16": False,
            "report_to": "none",
            "beta": 0.0,
            "loss_type": "grpo",
            "per_device_train_batch_size": size,
            "num_generations": args.candidates,
            "gradient_checkpointing": False,
            "max_completion_length": levels,
            "save_strategy": "no",
        }
        extra = {"catalog": catalog} if name == "ours" else {"rollout_func": lambda prompts, trainer: rollout}
        folder = tempfile.mkdtemp()
        trainer = trainer_class(
            model=model,
            reward_funcs=[reward],
            args=config_class(folder, **options),
            train_dataset=data,
            processing_class=tokenizer,
            **extra,
        )
        trainer.rollout_func = lambda prompts, trainer: rollout
        trainer.current_gradient_accumulation_steps = 1
        forward = model.forward  # each trainer has replaced it by its own, to be set again for its steps
        trainers[name] = trainer, forward

    def step(name: str) -> None:
        trainer, forward = trainers[name]
        model.forward, model.model.share_prefixes = forward, name == "ours"
        model.train()
        model.zero_grad()
        trainer._step = 0  # every step is a generation step
        trainer.training_step(model, [dict(example) for example in examples], None)

    times = median_times(args, {name: lambda name=name: step(name) for name in trainers})
    model.model.share_prefixes = True
    return times["stock"] / times["ours"]


def user_examples(args, model, catalog, lengths: list[int], depth: int) -> list[list[int]]:
    """Token ids of every sample of users with so many items, with random items and at most 50 in the prompt."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    offsets = torch.tensor([config.sid_token_id(level, 0) for level in range(config.num_sid_levels)])
    region = [config.latent_start_token_id, *[config.latent_token_id] * depth, config.latent_end_token_id]
    examples = []
    for length in lengths:
        items = catalog.codes[torch.randint(len(catalog), (length,), generator=generator)] + offsets  # (length, M)
        for j in range(1, length):
            examples.append([*items[max(j - 50, 0) : j].flatten().tolist(), *region, *items[j].tolist()])
    return examples


def padded(model, examples: list[list[int]]) -> dict[str, torch.Tensor]:
    """Left-padded examples with the loss on the answer."""
    width, levels = max(map(len, examples)), model.config.num_sid_levels
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in examples])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in examples])
    labels = input_ids.clone()
    labels[:, :-levels] = -100
    device = model.lm_head.weight.device
    return {name: part.to(device) for name, part in
            {"input_ids": input_ids, "attention_mask": mask, "labels": labels}.items()}  # fmt: skip


def epoch(model, batches: list[list[list[int]]], share: bool) -> float:
    """Forward and backward over batches of examples. Gradients add up; returns the sum of the losses."""
    model.model.share_prefixes = share
    model.zero_grad()
    total = 0.0
    for examples in batches:
        loss = -model(**padded(model, examples), fused_lm_head=True).log_probs.sum()
        loss.backward()
        total += loss.item()
    model.model.share_prefixes = True
    return total


def prefix_epoch(args, model, catalog, lengths: list[int]) -> dict[str, float]:
    """An epoch of stage 2 in batches of users, against sequences of similar length; equal up to rounding."""
    examples = user_examples(args, model, catalog, lengths, args.steps)
    start = model.config.latent_start_token_id
    users = [[examples[i] for i in batch] for batch in PrefixBatchSampler(examples, start, args.max_tokens)]
    by_length = sorted(examples, key=len)
    rows, batch = [], []
    for ids in by_length:
        if batch and (len(batch) + 1) * len(ids) > args.max_tokens:
            rows.append(batch)
            batch = []
        batch.append(ids)
    rows.append(batch)
    results = {}

    def run(name: str, batches, share: bool) -> None:
        results[name] = epoch(model, batches, share), gradients_of(model)

    times = median_times(args, {"users": lambda: run("users", users, True), "rows": lambda: run("rows", rows, False)})
    (loss, gradients), (row_loss, row_gradients) = results["users"], results["rows"]
    difference = sum((gradients[name] - row_gradients[name]).pow(2).sum() for name in gradients).sqrt()
    norm = sum(gradient.pow(2).sum() for gradient in row_gradients.values()).sqrt()
    # The last token of an answer is not read.
    paths = 1 + args.steps + model.config.num_sid_levels
    trunks = sum(min(length - 1, 50) * model.config.num_sid_levels for length in lengths)
    trunks += sum(50 * model.config.num_sid_levels * max(length - 51, 0) for length in lengths)  # windows that moved
    return {
        "speedup": times["rows"] / times["users"],
        "token_ratio": sum(len(ids) - 1 for ids in examples) / (trunks + paths * len(examples)),
        "loss_difference": abs(loss - row_loss) / abs(row_loss),
        "grad_difference": float(difference / norm),
        "seconds": times["users"],
        "memory_ratio": saved_bytes(model, users[-1], True) / max(saved_bytes(model, batch, False) for batch in rows),
    }


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model, examples: list[list[int]], share: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.model.share_prefixes = share
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**padded(model, examples), fused_lm_head=True).log_probs.sum()
    model.model.share_prefixes = True
    del loss
    return sum(storages.values())


def grpo_prefix_step(args, model, tokenizer, catalog, users: list[list[list[int]]]) -> float:
    """Time of a whole GRPO step, draws included, for prompts that share no prefix over the four prompts of a user."""
    size = 2 * 4 * args.candidates
    start = model.config.latent_start_token_id
    prompts = [tokenizer.decode(ids[: ids.index(start) + 1]) for user in users[:2] for ids in user[-4:]]
    examples = {
        "together": [f"w3 {prompt}" for prompt in prompts],
        "apart": [f"w{3 + i} {p}" for i, p in enumerate(prompts)],
    }
    options = {
        "use_cpu": args.device == "cpu",
        "bf16": False,
        "report_to": "none",
        "beta": 0.0,
        "save_strategy": "no",
        "per_device_train_batch_size": size,
        "num_generations": args.candidates,
        "gradient_checkpointing": False,
    }
    data = Dataset.from_list([{"prompt": prompt, "target": 0} for prompt in examples["together"]])
    trainer = LasarGRPOTrainer(
        model, LasarGRPOConfig(tempfile.mkdtemp(), **options), catalog,
        [lambda completion_ids, **kwargs: [float(ids[0] % 7) for ids in completion_ids]], train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1

    def step(name: str) -> None:
        model.train()
        model.zero_grad()
        trainer._step = 0  # every step is a generation step
        rows = [{"prompt": prompt, "target": 0} for prompt in examples[name] for _ in range(args.candidates)]
        trainer.training_step(model, rows, None)

    times = median_times(args, {name: lambda name=name: step(name) for name in examples})
    return times["apart"] / times["together"]


def prefix_training(args, model, tokenizer, catalog) -> dict[str, float]:
    """What sharing prefixes saves in stage 2 and GRPO, and stage 2 against a pass over the histories of stage 1."""
    add_catalog_head(model, catalog)
    model.eval()
    levels = model.config.num_sid_levels
    # 1. Stage 2 on users of equal length, and on real ones.
    lengths = [args.history_length] * 4
    synthetic = prefix_epoch(args, model, catalog, lengths)
    result = {
        "stage2_prefix_speedup_50_items": synthetic["speedup"], "token_ratio_50_items": synthetic["token_ratio"],
        "prefix_loss_difference": synthetic["loss_difference"],
        "prefix_grad_difference": synthetic["grad_difference"],
        "prefix_peak_memory_ratio": synthetic["memory_ratio"],
    }  # fmt: skip
    if args.histories:
        everyone = sorted(len(items) - 2 for items in read_json(args.histories).values())  # two are held out
        chosen = np.random.default_rng(0).choice(len(everyone), args.users, replace=False)
        real = prefix_epoch(args, model, catalog, [everyone[i] for i in chosen if everyone[i] > 1])
        result["stage2_prefix_speedup_beauty"], result["token_ratio_beauty"] = real["speedup"], real["token_ratio"]

    # 2. One sequence per user with the loss on every item, as the history task of stage 1.
    examples = user_examples(args, model, catalog, lengths, 0)
    histories = [examples[i] for i in range(args.history_length - 2, len(examples), args.history_length - 1)]

    def stage1() -> None:
        inputs = padded(model, histories)
        labels = inputs["input_ids"].clone()
        labels[:, -levels - 2 : -levels] = -100
        model.zero_grad()
        (-model(**inputs | {"labels": labels}, fused_lm_head=True).log_probs.sum()).backward()

    stage2 = user_examples(args, model, catalog, lengths, args.steps)
    users = [stage2[i : i + args.history_length - 1] for i in range(0, len(stage2), args.history_length - 1)]
    times = median_times(args, {"stage1": stage1, "stage2": lambda: epoch(model, users, True)})
    result["stage2_over_history_stage1"] = times["stage2"] / times["stage1"]

    # 3. GRPO: the last four prompts of two users, each with several answers. Without shared prefixes, equal prompts
    #    are still read once: other first tokens make prompts of the same size that are no prefixes of one another.
    def candidates(distinct: bool) -> list[list[int]]:
        sequences = []
        for user in range(2):
            for j, ids in enumerate(users[user][-4:]):
                first = [3 + j] if distinct else ids[:1]
                for k in range(args.candidates):
                    answer = users[user][k][-levels:]
                    sequences.append([*first, *ids[1:-levels], *answer])
        return sequences

    together, apart = candidates(False), candidates(True)
    times = median_times(
        args, {"together": lambda: epoch(model, [together], True), "apart": lambda: epoch(model, [apart], True)}
    )
    result["grpo_prefix_speedup_4_prompts"] = times["apart"] / times["together"]
    result["grpo_prefix_step_speedup_4_prompts"] = grpo_prefix_step(args, model, tokenizer, catalog, users)
    prompts = [len(ids) - 1 - args.steps - 1 - levels for ids in users[0][-4:]]
    tails = 4 * (1 + args.steps + args.candidates * levels)
    result["token_ratio_4_prompts"] = (sum(prompts) + tails) / (max(prompts) + tails)
    return result


def main(argv: list[str]) -> None:
    """Parse, measure, print."""
    args = parse(argv)
    model, tokenizer, catalog = build(args)
    times = sft_steps(args, model, catalog)
    result = {f"stage2_over_stage1_n{d}": times[f"stage2_n{d}"] / times[f"stage1_n{d}"] for d in args.depths}
    result |= grpo_pass(args, model, catalog)
    result["grpo_speedup_vs_stock_trl"] = grpo_step(args, model, tokenizer, catalog)
    result |= prefix_training(args, model, tokenizer, catalog)
    result["parameters"] = sum(p.numel() for p in model.parameters())
    if args.json:
        print(json.dumps({**result, "arguments": vars(args)}))
        return
    print("| measure | value |\n|---|---:|")
    for name, value in result.items():
        print(f"| {name} | {value:.3g} |" if isinstance(value, float) else f"| {name} | {value:,} |")


if __name__ == "__main__":
    main(sys.argv[1:])
