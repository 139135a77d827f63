"""
Latency of recommending on random weights, compared with `generate` and with a written chain of thought, and judged by
the operations and the bytes that it needs; and the size and speed of the catalogue's index.

    python recipes/benchmarks/decode.py --json
    python recipes/benchmarks/decode.py --size qwen3-0.6b --rounds 1 --json
    python recipes/benchmarks/decode.py --size qwen3-0.6b --int8 --json
    python recipes/benchmarks/decode.py --int8 --checkpoint outputs/grpo --data outputs/data --json

`generate` runs as the field runs it: the prompt is expanded to every beam before it is read, and the constraint is a
dictionary from a hash of the prefix to the tokens that can follow, looked up in a Python loop over the beams.

Every ratio compares equal matrix products. All calls run inside `onednn_linear` where that is available (float32 on an
x86 CPU), `speedup_vs_generate_same_products` included, which `speedup_vs_generate` repeats.
`speedup_vs_generate_without_onednn` compares both engines on PyTorch's own products.

`flop_ratio` is the number of floating-point operations of `generate` over those of `recommend`, if all beams are read
at every level. `recommend` skips prefixes that only one item continues: `flop_ratio_as_read` counts the tokens that
it read in this run.

`latent_step_over_weight_reading` compares a latent step of one prompt with the sum of a flat tensor of as many bytes
as the weights of the backbone's layers. The sum reads memory in order with all threads and one addition per number; a
step cannot be faster. `latent_step_over_products` compares it with its matrix-vector products alone.

`--int8` compares the data types on a CPU instead: float32, bfloat16 and int8 weights (`int8_linear`). With
`--checkpoint` and `--data` it counts how many users of the test split get another list of ten items.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import LogitsProcessor, Qwen3Config

from lasar_hf import LasarConfig, LasarForGenerativeRec, LasarProcessor, SidCatalog
from lasar_hf.data.prepared_data import PreparedData
from lasar_hf.evaluation.recommendations import recommend_samples
from lasar_hf.model.batching_lasar import ReasoningState
from lasar_hf.model.cache_lasar import LinkedCache
from lasar_hf.model.decoding_lasar import beam_search, child_log_probs, rank_items
from lasar_hf.model.trie_lasar import SidTrie
from lasar_hf.onednn import HAS_ONEDNN, int8_linear, onednn_linear


LEVELS, CODES = 4, 256
BATCH = 8
STEPS = 4  # latent steps that are timed together, since one is short
STEP_ROUNDS = 7
SIZES = {
    "small": dict(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=151_669,
    ),
    "qwen3-0.6b": dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_669,
    ),
}


class HashedPrefixProcessor(LogitsProcessor):
    """
    The constraint of the field's recommenders: `dict[hash of the codes so far] -> tokens`, one look-up per beam.

    Scores are normalised over the tokens that can follow, as in this engine, so that they can be compared.

    Args:
        catalog ([`SidCatalog`]):
            The items.
        config ([`LasarConfig`]):
            Configuration of the model.
    """

    def __init__(self, catalog: SidCatalog, config: LasarConfig):
        self.latent_end = config.latent_end_token_id
        offsets = torch.arange(LEVELS) * CODES + config.sid_token_offset
        allowed: dict[int, set[int]] = {}
        for ids in (catalog.codes + offsets).tolist():
            for level, token in enumerate(ids):
                allowed.setdefault(hash(tuple(ids[:level])), set()).add(token)
        self.allowed = {key: sorted(tokens) for key, tokens in allowed.items()}

    def __call__(self, input_ids, scores):
        """Scores `(B * W, V)` with `-inf` at every token that cannot follow."""
        mask = torch.full_like(scores, -torch.inf)
        for beam, ids in enumerate(input_ids.tolist()):
            prefix = ids[len(ids) - ids[::-1].index(self.latent_end) :]
            mask[beam, self.allowed[hash(tuple(prefix))]] = 0
        return (scores + mask).log_softmax(dim=-1)


def make_model(size: str, device: torch.device, dtype: torch.dtype) -> LasarForGenerativeRec:
    """A recommender of that size with random weights."""
    shape = dict(SIZES[size])
    num_words = shape.pop("vocab_size")
    backbone = Qwen3Config(
        **shape,
        vocab_size=num_words + 3 + LEVELS * CODES,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = LasarConfig(
        backbone_config=backbone,
        num_sid_levels=LEVELS,
        codebook_size=CODES,
        sid_token_offset=num_words + 3,
        latent_start_token_id=num_words,
        latent_token_id=num_words + 1,
        latent_end_token_id=num_words + 2,
    )
    return LasarForGenerativeRec(config).to(device, dtype).eval()


def random_codes(num_items: int, seed: int = 0) -> torch.Tensor:
    """Distinct Semantic IDs `(I, M)`, int32."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, CODES**LEVELS, (num_items + num_items // 50 + 100,), generator=generator).unique()
    keys = keys[torch.randperm(len(keys), generator=generator)[:num_items]]
    return torch.stack([keys // CODES**level % CODES for level in range(LEVELS)], dim=1).int()


def seconds_of(call: Callable, device: torch.device) -> tuple[float, object]:
    """Wall-clock seconds of a call, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def interleaved(calls: dict[str, tuple[Callable, int]], rounds: int, device: torch.device):
    """
    Median seconds and last result of each call `name: (call, times per round)`.

    The calls take turns in every round, so that a drift of the machine affects all of them. The first of several calls
    is a warm-up and not counted.
    """
    seconds, results = {name: [] for name in calls}, {}
    for _ in tqdm(range(rounds), desc="Timing", disable=None):
        for name, (call, times) in calls.items():
            for _ in range(times):
                elapsed, results[name] = seconds_of(call, device)
                seconds[name].append(elapsed)
    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}, results


def make_prompt(model, length: int) -> torch.Tensor:
    """A random prompt `(1, L)` that ends in `<|latent_start|>`."""
    words = torch.randint(1, model.config.latent_start_token_id, (1, length - 1))
    start = torch.tensor([[model.config.latent_start_token_id]])
    return torch.cat([words, start], dim=1).to(model.device)


def engine_call(model, catalog: SidCatalog, prompt: torch.Tensor, num_beams: int, steps) -> Callable:
    """This engine with `steps` latent steps: one number, one per prompt, or `None` for the policy head's."""
    return lambda: model.recommend(prompt, catalog=catalog, top_k=num_beams, num_beams=num_beams, latent_steps=steps)


def generate_call(model, processor, prompt: torch.Tensor, num_beams: int, steps: int, share: bool) -> Callable:
    """`generate` with `steps` latent steps. `share` reads the equal prompts of the beams once, unlike other models."""
    config = model.config
    slots = [config.latent_token_id] * steps + [config.latent_end_token_id]
    ids = torch.cat([prompt, prompt.new_tensor([slots])], dim=1)

    def generate():
        model.model.share_prefixes = share
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=[processor],
            max_new_tokens=LEVELS,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        model.model.share_prefixes = True
        return output

    return generate


def recommend_with_text(model, prompt: torch.Tensor, catalog: SidCatalog, num_beams: int, max_new_tokens: int):
    """
    Recommend after a written chain of thought: prompt, text, `<|latent_start|><|latent_end|>`, Semantic ID.

    The text is written greedily, until the model writes `<|latent_start|>` or ends its text. Beam search continues on
    the cache of `generate`.

    Args:
        model ([`LasarForGenerativeRec`]):
            The model.
        prompt (`torch.Tensor` of shape `(1, L)`):
            Prompt that ends in `<|latent_start|>`; the text comes before that token.
        catalog ([`SidCatalog`]):
            The items.
        num_beams (`int`):
            Width of the search, and number of items to return.
        max_new_tokens (`int`):
            Maximum number of text tokens.

    Returns:
        `tuple` of `torch.Tensor`: text `(1, T)`, items `(1, W)` and scores `(1, W)`.
    """
    config = model.config
    eos = model.generation_config.eos_token_id
    stops = [config.latent_start_token_id, *([] if eos is None else [eos])]
    with model.evaluation_mode():
        # 1. Write the text. All but its last token are in the cache.
        written = model.generate(
            input_ids=prompt[:, :-1],
            attention_mask=torch.ones_like(prompt[:, :-1]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
            return_dict_in_generate=True,
            suppress_tokens=[config.latent_token_id, config.latent_end_token_id],
        )
        text_ids = written.sequences[:, prompt.shape[1] - 1 :]
        if text_ids[0, -1] in stops:
            text_ids = text_ids[:, :-1]
        # 2. Continue on that cache: a reasoning state without latent steps.
        cache = LinkedCache(config.backbone_config.num_hidden_layers)
        for index, layer in enumerate(written.past_key_values.layers):
            cache.update(layer.keys, layer.values, index)
        length = cache.get_seq_length()
        state = ReasoningState(
            hidden_states=None,
            depth_logits=None,
            depths=torch.zeros_like(prompt[:, 0]),
            cache=cache,
            visible=torch.ones(1, length, dtype=torch.bool, device=prompt.device),
            position=torch.full_like(prompt[:, 0], length),
            slot=None,
            slot_states=[],
        )
        # 3. Read what the cache does not have, and <|latent_start|>.
        rest = torch.cat([prompt[:, :-1], text_ids, prompt[:, -1:]], dim=1)[:, length:]
        causal = torch.ones(1, rest.shape[1], rest.shape[1], dtype=torch.bool, device=prompt.device).tril()
        model.model.read_tokens(state, rest, causal)
        state.visible = torch.ones(1, length + rest.shape[1], dtype=torch.bool, device=prompt.device)
        state.position = state.visible.sum(dim=1)
        # 4. Search.
        trie = catalog.trie(prompt.device)
        leaves, scores = beam_search(model, state, trie, num_beams)
        return text_ids, *rank_items(leaves, scores, trie, num_beams)


def with_onednn(model, call: Callable, enabled: bool) -> Callable:
    """The call with the linear layers of the model on oneDNN, if enabled."""

    def run():
        with onednn_linear(model) if enabled else nullcontext():
            return call()

    return run


def backbone_operations(config: LasarConfig, reads: list[int]) -> int:
    """
    Floating-point operations of the backbone's layers for one sequence. `reads` are the numbers of tokens of its
    calls. A token attends to all tokens of its own call and of earlier ones, since masked pairs are computed too.
    """
    shape, operations, num_keys = config.backbone_config, 0, 0
    query_size = shape.num_attention_heads * shape.head_dim
    key_size = shape.num_key_value_heads * shape.head_dim
    weights = shape.hidden_size * (2 * query_size + 2 * key_size + 3 * shape.intermediate_size)  # per layer
    for num_tokens in reads:
        num_keys += num_tokens
        operations += num_tokens * (2 * weights + 4 * query_size * num_keys)
    return shape.num_hidden_layers * operations


def generate_operations(config: LasarConfig, prompt_length: int, width: int, steps: int) -> int:
    """
    Floating-point operations of `generate` as peers run it: every beam reads the prompt and its own codes, and scores
    the whole vocabulary at each level.
    """
    reads = [*reasoning_reads(prompt_length, steps), *[1] * (LEVELS - 1)]
    head = 2 * config.hidden_size * config.vocab_size
    return width * (backbone_operations(config, reads) + LEVELS * head)


def recommend_operations(config: LasarConfig, reads: list[int]) -> int:
    """Floating-point operations of `recommend`, whose last calls read the prefixes of each level after the first."""
    head = 2 * config.hidden_size * config.codebook_size
    return backbone_operations(config, reads) + head * (1 + sum(reads[1 - LEVELS :]))


def reasoning_reads(prompt_length: int, steps: int) -> list[int]:
    """Tokens per call for the prompt, the latent steps and `<|latent_end|>`, which is read with the last step."""
    return [prompt_length, *[1] * (steps - 1), 1 + min(steps, 1)]


def tokens_read(model, call: Callable) -> list[int]:
    """Tokens of each call of the backbone."""
    reads = []

    def count(module, args, kwargs):
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        reads.append(tokens.shape[1])

    handle = model.model.backbone.register_forward_pre_hook(count, with_kwargs=True)
    call()
    handle.remove()
    return reads


def measure_operations(model, catalog: SidCatalog, prompt: torch.Tensor, width: int, policy: int) -> dict:
    """Floating-point operations of `generate` over those of `recommend`."""
    config, length = model.config, prompt.shape[1]
    # Prefixes are distinct, so the first levels may have fewer than `width`.
    beams = [min(width, CODES**level) for level in range(1, LEVELS)]
    ratios = {}
    for name, steps in {"flop_ratio": 0, "flop_ratio_at_policy_depth": policy}.items():
        ours = recommend_operations(config, [*reasoning_reads(length, steps), *beams])
        ratios[name] = generate_operations(config, length, width, steps) / ours
    reads = tokens_read(model, engine_call(model, catalog, prompt, width, 0))
    # A level whose prefixes all have one item is not read.
    reads += [0] * (1 + LEVELS - len(reads))
    ratios["flop_ratio_as_read"] = generate_operations(config, length, width, 0) / recommend_operations(config, reads)
    return ratios


def latent_steps_call(model, prompt: torch.Tensor) -> Callable:
    """The work of `STEPS` latent steps: each is a call of the backbone for one position after the prompt."""
    with model.evaluation_mode():
        state = model.encode_prompts(prompt, latent_steps=0)
    token = torch.full_like(prompt[:, :1], model.config.latent_token_id)
    itself = torch.ones(1, 1, 1, dtype=torch.bool, device=prompt.device)

    @torch.no_grad()
    def steps():
        for _ in range(STEPS):
            model.model.read_tokens(replace(state, num_read=[]), token, itself)

    return steps


def linear_layers(model) -> list[nn.Linear]:
    """The layers whose weights a latent step reads."""
    return [part for part in model.model.backbone.modules() if isinstance(part, nn.Linear)]


def products_call(model) -> Callable:
    """The matrix-vector products of `STEPS` latent steps, without anything between them."""
    layers = linear_layers(model)
    inputs = [torch.ones(1, layer.in_features, dtype=model.dtype, device=model.device) for layer in layers]

    @torch.no_grad()
    def multiply():
        for layer, states in STEPS * list(zip(layers, inputs, strict=True)):
            layer(states)

    return multiply


def measure_weight_reading(model, prompt: torch.Tensor, use_onednn: bool, device) -> dict:
    """A latent step of one prompt, its products, and the reading of as many bytes, interleaved."""
    num_bytes = sum(layer.weight.nbytes for layer in linear_layers(model))
    flat = torch.ones(num_bytes // 4, device=device)  # written to, so that every page exists
    calls = {
        "latent step": with_onednn(model, latent_steps_call(model, prompt), use_onednn),
        "products": with_onednn(model, products_call(model), use_onednn),
        "weight reading": lambda: [flat.sum() for _ in range(STEPS)],
    }
    seconds, _ = interleaved({name: (call, 1) for name, call in calls.items()}, STEP_ROUNDS, device)
    seconds = {name: value / STEPS for name, value in seconds.items()}
    return {
        "latent_step_over_weight_reading": seconds["latent step"] / seconds["weight reading"],
        "latent_step_over_products": seconds["latent step"] / seconds["products"],
        "latent_step_ms": 1000 * seconds["latent step"],
        "weight_reading_gb_per_second": num_bytes / seconds["weight reading"] / 1e9,
    }


def measure_latency(model, catalog: SidCatalog, args, device) -> dict:
    """This engine, `generate` and a written chain of thought on one prompt, and whether they agree."""
    prompt, width, config = make_prompt(model, args.prompt_length), args.num_beams, model.config
    use_onednn = HAS_ONEDNN and device.type == "cpu" and args.dtype == "float32"
    policy = int(engine_call(model, catalog, prompt, width, None)().latent_steps)
    processor = HashedPrefixProcessor(catalog, config)
    users, depths = prompt.expand(BATCH, -1), torch.tensor([2, 3] * (BATCH // 2), device=device)

    # 1. Calls, each with the number of times per round.
    steps = {"direct": 0, "latent 2": 2, "latent 3": 3, "policy": None}
    calls = {name: (engine_call(model, catalog, prompt, width, n), 4) for name, n in steps.items()}
    calls["generate, direct"] = generate_call(model, processor, prompt, width, 0, share=False), 1
    calls["generate, policy"] = generate_call(model, processor, prompt, width, policy, share=False), 1
    calls["generate, prompt shared"] = generate_call(model, processor, prompt, width, 0, share=True), 1
    calls["direct, batch"] = engine_call(model, catalog, users, width, 0), 3
    calls["latent 2.5, batch"] = engine_call(model, catalog, users, width, depths), 3
    calls["text"] = (lambda: recommend_with_text(model, prompt, catalog, width, args.text_length)), 1
    timed = {name: (with_onednn(model, call, use_onednn), times) for name, (call, times) in calls.items()}
    if use_onednn:
        timed |= {f"{name}, without onednn": calls[name] for name in ("direct", "generate, direct")}
    seconds, results = interleaved(timed, args.rounds, device)

    # 2. Both engines must find the same items.
    if results["text"][0].shape[1] < args.text_length:
        raise SystemExit("The random model ended its text early. Choose another --seed.")
    index_of = {tuple(codes): index for index, codes in enumerate(catalog.codes.tolist())}
    same, difference = True, 0.0
    for name in ("direct", "policy"):
        theirs = results[f"generate, {name}"]
        codes = (theirs.sequences[:, -LEVELS:] - config.sid_token_offset) % CODES
        same &= [index_of[tuple(sid)] for sid in codes.tolist()] == results[name].items[0].tolist()
        difference = max(difference, (theirs.sequences_scores - results[name].scores[0]).abs().max().item())

    # 3. Ratios.
    latent = (seconds["latent 2"] + seconds["latent 3"]) / 2
    speedup = seconds["generate, direct"] / seconds["direct"]
    operations = measure_operations(model, catalog, prompt, width, policy)
    report = {
        "products": "onednn" if use_onednn else "pytorch",
        "policy_steps": policy,
        "speedup_vs_generate_same_products": speedup,
        **operations,
        "share_of_flop_ratio": speedup / operations["flop_ratio"],
        "share_of_flop_ratio_as_read": speedup / operations["flop_ratio_as_read"],
        **measure_weight_reading(model, prompt, use_onednn, device),
        "speedup_vs_generate": speedup,
        "speedup_vs_generate_at_policy_depth": seconds["generate, policy"] / seconds["policy"],
        "same_items": same,
        "max_score_difference": difference,
        "latency_ratio_latent_n2.5_over_direct": latent / seconds["direct"],
        f"latency_ratio_latent_n2.5_over_direct_at_batch_{BATCH}": seconds["latent 2.5, batch"]
        / seconds["direct, batch"],
        "explicit_cot_over_latent": seconds["text"] / latent,
        "seconds": seconds,
    }
    if use_onednn:
        theirs, ours = (seconds[f"{name}, without onednn"] for name in ("generate, direct", "direct"))
        report["speedup_vs_generate_without_onednn"] = theirs / ours
    return report


def cpu_variants(model) -> dict[str, LasarForGenerativeRec]:
    """The model with float32, bfloat16 and int8 weights."""
    variants = {"float32": model, "bfloat16": copy.deepcopy(model).to(torch.bfloat16), "int8": copy.deepcopy(model)}
    int8_linear(variants["int8"])
    return variants


def measure_data_types(args) -> dict:
    """Speed of bfloat16 and int8 weights over float32 on a CPU, one prompt, on random weights."""
    device = torch.device("cpu")
    model = make_model(args.size, device, torch.float32)
    catalog = SidCatalog(random_codes(args.items), list(map(str, range(args.items))))
    prompt, calls = make_prompt(model, args.prompt_length), {}
    for name, variant in cpu_variants(model).items():
        parts = {f"{STEPS} steps": latent_steps_call(variant, prompt)}
        parts |= {f"latent {n}": engine_call(variant, catalog, prompt, args.num_beams, n) for n in (0, 6)}
        calls |= {f"{name}, {part}": (with_onednn(variant, call, HAS_ONEDNN), 2) for part, call in parts.items()}
    seconds, _ = interleaved(calls, args.rounds, device)
    speedups = {
        f"{name}_speedup_{key}": seconds[f"float32, {part}"] / seconds[f"{name}, {part}"]
        for name in ("bfloat16", "int8")
        for key, part in {"direct": "latent 0", "6_latent_steps": "latent 6", "latent_step": f"{STEPS} steps"}.items()
    }
    return {
        "size": args.size,
        "threads": torch.get_num_threads(),
        "prompt_length": args.prompt_length,
        "num_beams": args.num_beams,
        **speedups,
        "seconds": seconds,
    }


def measure_changed_lists(checkpoint: str, data: str, num_users: int, num_beams: int) -> dict:
    """How many users get another list of ten items from bfloat16 and int8 weights than from float32."""
    processor = LasarProcessor.from_pretrained(checkpoint)
    samples = PreparedData.load(data).draw("test", num_users)
    lists, report = {}, {"users": len(samples)}
    for name, variant in cpu_variants(LasarForGenerativeRec.from_pretrained(checkpoint).eval()).items():
        with onednn_linear(variant):
            output = recommend_samples(variant, samples, processor, top_k=10, num_beams=num_beams)
        lists[name] = torch.from_numpy(output.items)
        hits = (lists[name] == torch.tensor(samples["target"])[:, None]).any(dim=1)
        report[f"{name}_hit_rate_at_10"] = hits.double().mean().item()
        # As sets, then with the order.
        same_items = (lists[name].sort(dim=1).values == lists["float32"].sort(dim=1).values).all(dim=1)
        report[f"{name}_lists_with_other_items"] = int((~same_items).sum())
        report[f"{name}_lists_with_another_order"] = int((lists[name] != lists["float32"]).any(dim=1).sum())
    return report


def measure_catalog(num_items: int, users: int, width: int, device) -> dict:
    """Build time, bytes per item, and the slowest constraint step for all beams of all users."""
    codes = random_codes(num_items)
    ids = list(map(str, range(num_items)))
    build, catalog = seconds_of(lambda: SidCatalog(codes, ids), device)
    index, trie = seconds_of(lambda: SidTrie(codes.to(device)), device)
    steps = []
    hidden = torch.zeros(users, width, 1, device=device)
    head = torch.zeros(CODES, 1, device=device)  # one column, so that the product costs nothing
    for level in range(1, LEVELS):
        nodes = torch.randint(0, trie.num_nodes[level], (users, width), device=device)
        times = [
            seconds_of(lambda n=nodes, lv=level: child_log_probs(hidden, head, trie, lv, n), device)[0]
            for _ in range(5)
        ]
        steps.append(statistics.median(times))
    return {
        "items": num_items,
        "catalog_seconds": build,
        "index_seconds": index,
        "bytes_per_item": trie.num_bytes / num_items,
        "constraint_step_ms": 1000 * max(steps),
    }


def measure_pass(model, users: int, width: int, device) -> float:
    """Seconds of one decode pass for all beams of all users, on short prompts (long ones only cost more)."""
    tokens = torch.full((users, width), model.config.sid_token_offset, device=device)
    alone = torch.eye(width, dtype=torch.bool, device=device).expand(users, -1, -1)
    with model.evaluation_mode():
        state = model.encode_prompts(make_prompt(model, 8).expand(users, -1), latent_steps=0)
        return seconds_of(lambda: model.model.read_tokens(state, tokens, alone), device)[0]


def benchmark(args) -> dict:
    """All measurements on one set of weights."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    model = make_model(args.size, device, getattr(torch, args.dtype))
    catalog = SidCatalog(random_codes(args.items), list(map(str, range(args.items))))
    report = {
        "size": args.size,
        "dtype": args.dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "prompt_length": args.prompt_length,
        "num_beams": args.num_beams,
        "items": args.items,
        **measure_latency(model, catalog, args, device),
    }
    sizes = [10**4, 10**5, 10**6] + [10**7] * args.ten_million
    report["catalog"] = [measure_catalog(size, args.users, args.num_beams, device) for size in sizes]
    report["decode_pass_ms"] = 1000 * measure_pass(model, args.users, args.num_beams, device)
    for row in report["catalog"]:
        row["constraint_step_over_decode_pass"] = row["constraint_step_ms"] / report["decode_pass_ms"]
    return report


def show(report: dict) -> None:
    """The report as a headline and two tables."""
    if "flop_ratio" in report:
        print(
            f"On equal products, recommend is {report['speedup_vs_generate_same_products']:.1f} times as fast as "
            f"generate, {report['share_of_flop_ratio']:.0%} of the ratio of their operations "
            f"({report['flop_ratio']:.1f}). A latent step takes {report['latent_step_over_weight_reading']:.2f} times "
            "the time to read the weights.\n"
        )
    for name, value in report.items():
        if name not in ("catalog", "seconds"):
            print(f"{name:40} {value:.4g}" if isinstance(value, float) else f"{name:40} {value}")
    for name, value in report.get("seconds", {}).items():
        print(f"{'ms, ' + name:40} {1000 * value:.1f}")
    if "catalog" not in report:
        return
    print("\n| " + " | ".join(report["catalog"][0]) + " |")
    print("|" + "---|" * len(report["catalog"][0]))
    for row in report["catalog"]:
        print(
            "| "
            + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
            + " |"
        )


def main(argv: list[str]) -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="Layer sizes of the model.")
    parser.add_argument("--prompt_length", type=int, default=128, help="Tokens of the prompt.")
    parser.add_argument("--num_beams", type=int, default=50, help="Width of the search.")
    parser.add_argument("--text_length", type=int, default=128, help="Tokens of the written chain of thought.")
    parser.add_argument("--items", type=int, default=100_000, help="Items to choose from in the comparison.")
    parser.add_argument("--users", type=int, default=64, help="Users of one constraint step.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds of the timing, of which medians are reported.")
    parser.add_argument("--ten_million", action="store_true", help="Also index 10^7 items (about 3 GiB).")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="Data type.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and the prompt.")
    parser.add_argument("--int8", action="store_true", help="Compare float32, bfloat16 and int8 weights on a CPU.")
    parser.add_argument("--checkpoint", help="With --int8: a trained model, to count the lists that change.")
    parser.add_argument("--data", help="With --checkpoint: the prepared data of its test users.")
    parser.add_argument("--test_users", type=int, default=1000, help="With --checkpoint: number of test users.")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) != bool(args.data) or (args.checkpoint and not args.int8):
        parser.error("--checkpoint and --data are used together, with --int8.")
    if args.checkpoint:
        report = measure_changed_lists(args.checkpoint, args.data, args.test_users, args.num_beams)
    elif args.int8:
        torch.manual_seed(args.seed)
        report = measure_data_types(args)
    else:
        report = benchmark(args)
    print(json.dumps(report, indent=1)) if args.json else show(report)


if __name__ == "__main__":
    main(sys.argv[1:])
