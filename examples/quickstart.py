"""
All stages of LASAR on a generated shop, without network and GPU: under two minutes on two CPU cores.

    pip install -e ".[test]" && python examples/quickstart.py

Toy shop -> Semantic IDs -> stage 1 -> stage 2 -> GRPO -> table of results and one recommendation. Model, report and
a plot of depth and reward go to `outputs/quickstart`; `examples/recommend.py` loads the model.
"""

import os
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network

import datasets
import matplotlib
import numpy as np
from transformers import AutoModelForCausalLM, GPTNeoXConfig, set_seed
from transformers.utils import logging as transformers_logging

from lasar_hf import (
    LasarForGenerativeRec,
    LasarGRPOConfig,
    LasarGRPOTrainer,
    LasarProcessor,
    LasarSFTConfig,
    LasarSFTTrainer,
    SidCatalog,
)
from lasar_hf.data import (
    alignment_examples,
    build_tokenizer,
    grpo_examples,
    history_examples,
    leave_one_out,
    reasoning_examples,
    samples,
    toy_shop,
)
from lasar_hf.evaluation import (
    comparison_table,
    evaluate_recommendations,
    item_knn_ranking,
    markov_ranking,
    popularity_ranking,
    recommend_samples,
    save_report,
)
from lasar_hf.files import atomic_file
from lasar_hf.reasoning import TemplateTeacher, encode_anchors, segment
from lasar_hf.semantic_ids import (
    build_semantic_ids,
    collaborative_embeddings,
    combine_views,
    item_text,
    text_embeddings,
)


matplotlib.use("Agg")

SEED, LEVELS, CODES, STEPS, OUTPUT = 0, 4, 16, 4, Path("outputs/quickstart")
COMMON = dict(
    use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none", logging_steps=5,
    lr_scheduler_type="cosine", seed=SEED, disable_tqdm=True,
)


def make_catalog(shop, split):
    """Item text and co-occurrence in the training part -> vectors -> residual k-means -> one Semantic ID per item."""
    texts = [item_text(item) for item in shop.items]
    views = [text_embeddings(texts, 32, SEED), collaborative_embeddings(split.train, len(texts), 16, SEED)]
    codes, quantizer = build_semantic_ids(combine_views(views), LEVELS, CODES, SEED)
    return SidCatalog(codes, shop.item_ids, titles=[item["title"] for item in shop.items]), quantizer


def make_model(shop, quantizer):
    """A small backbone from scratch. Its tokenizer is fitted to the item text, its SID tokens start as centroids."""
    tokenizer = build_tokenizer([item_text(item) for item in shop.items], vocab_size=400)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, hidden_dropout=0.1, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )
    backbone = AutoModelForCausalLM.from_config(config)
    model = LasarForGenerativeRec.from_backbone(backbone, tokenizer, LEVELS, CODES, STEPS)
    model.set_sid_embeddings(quantizer.codebooks)
    model.config.exclude_history = True  # hardly anybody buys a book twice
    return model, tokenizer


def plot_history(sft_log, rl_log, path: Path) -> None:
    """Depth during stage 2 and GRPO, reward during GRPO."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, log in (("stage 2 (labels)", sft_log), ("GRPO (sampled)", rl_log)):
        points = [(entry["step"], entry["mean_depth"]) for entry in log if "loss" in entry]
        left.plot(*zip(*points, strict=True), label=name)
    left.set(xlabel="step", ylabel="mean latent steps", title="Depth")
    left.legend()
    points = [(entry["step"], entry["rewards/exact_match/mean"]) for entry in rl_log if "loss" in entry]
    right.plot(*zip(*points, strict=True), color="tab:green")
    right.set(xlabel="step", ylabel="share of candidates that are the target", title="Reward")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def main() -> None:
    """Run every stage and report."""
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    set_seed(SEED)
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True)

    # 1. A shop, its split, and Semantic IDs.

    shop = toy_shop(num_users=600, num_items=192, seed=SEED)
    split = leave_one_out(shop)
    catalog, quantizer = make_catalog(shop, split)
    say(f"Toy shop: {len(split.user_ids)} users, {len(catalog)} items, Semantic IDs of {LEVELS} x {CODES} codes.")

    # 2. Stage 1: loss on every item of a user's history, and item titles to Semantic IDs.
    model, tokenizer = make_model(shop, quantizer)
    processor = LasarProcessor(tokenizer, catalog, instruction="")
    titles = alignment_examples(shop, split, processor, tasks=("title_to_sid",))
    examples = [history_examples(split, processor), titles]
    args = LasarSFTConfig(
        str(OUTPUT / "stage1"), num_train_epochs=30, learning_rate=4e-3, weight_decay=0.1, warmup_steps=0.05,
        per_device_train_batch_size=32, train_sampling_strategy="group_by_length", **COMMON,
    )
    examples = datasets.concatenate_datasets(examples)
    LasarSFTTrainer(model, args, train_dataset=examples, processing_class=processor).train()
    say("Stage 1: the model generates Semantic IDs.")

    test = samples(split, "test")
    table, targets = {}, np.array(test["target"])
    baselines = {"popularity": popularity_ranking, "Markov": markov_ranking, "item-kNN": item_knn_ranking}
    for name, ranking in baselines.items():
        predictions = ranking(split.train, test["history"], len(catalog), 20, exclude_history=True)
        table[name] = evaluate_recommendations(predictions, targets, len(catalog))

    def evaluate(name: str, latent_steps: int | None = None) -> None:
        result = recommend_samples(model, test, processor, latent_steps=latent_steps)
        table[name] = evaluate_recommendations(
            result.items, targets, len(catalog), result.latent_steps, result.seconds
        )

    evaluate("direct", latent_steps=0)

    # 3. Stage 2: latent states are aligned with the hidden states of the segments of a chain of thought.
    train = samples(split, "train")
    teacher = TemplateTeacher(shop, split)
    chains = [teacher.chain_of_thought(h, t) for h, t in zip(train["history"], train["target"], strict=True)]
    segments = segment(chains, max_segments=STEPS)
    anchors = encode_anchors(model, processor, segments)
    say(f"Teacher, segments and anchors: {anchors.depths.mean():.2f} steps on average. One chain of thought:")
    print(*(f"          {step + 1}. {text}" for step, text in enumerate(segments[7])), sep="\n")

    args = LasarSFTConfig(
        str(OUTPUT / "stage2"), num_train_epochs=10, learning_rate=2e-3, weight_decay=0.1, warmup_steps=0.05,
        per_device_train_batch_size=64, alignment_weight=0.05, policy_weight=0.1, **COMMON,
    )
    stage2 = LasarSFTTrainer(
        model, args, anchors=anchors, train_dataset=reasoning_examples(train, processor, anchors.depths),
        processing_class=processor,
    )
    stage2.train()
    evaluate("LASAR-SFT")
    say("Stage 2: the model reasons in hidden states.")

    # 4. GRPO: candidates are rewarded, the policy head learns how many steps pay off.
    args = LasarGRPOConfig(
        str(OUTPUT / "grpo"), max_steps=100, learning_rate=1e-4, per_device_train_batch_size=64, num_generations=8,
        **COMMON,
    )
    rl = LasarGRPOTrainer(
        model, args, train_dataset=grpo_examples(train, processor, anchors.terminal()), processing_class=processor
    )
    rl.train()
    evaluate("LASAR-RL")
    say("GRPO: quality and depth together.")

    # 5. A checkpoint with model, tokenizer, catalogue and prompt format; the report; one recommendation.
    model.save_pretrained(OUTPUT / "model")
    processor.save_pretrained(OUTPUT / "model")
    plot_history(stage2.state.log_history, rl.state.log_history, OUTPUT / "training.png")
    save_report(OUTPUT, table)
    shown = ("HR@10", "NDCG@10", "mean_depth", "ms_per_user")
    print("\n" + comparison_table({n: {k: v for k, v in row.items() if k in shown} for n, row in table.items()}))

    user = test[3]
    inputs = processor([[catalog.item_ids[item] for item in user["history"]]])
    output = model.recommend(**inputs, catalog=catalog, top_k=5)
    print(f"User {user['user_id']} bought:")
    print(*(f"  {catalog.titles[item]}" for item in user["history"]), sep="\n")
    print(f"After {int(output.latent_steps[0])} latent steps we recommend:")
    for entry in processor.decode_recommendations(output)[0]:
        mark = "  <- bought next" if entry["item_id"] == catalog.item_ids[user["target"]] else ""
        print(f"  {np.exp(entry['score']):6.1%}  {entry['title']}{mark}")
    say(f"Done. Model, report and plot are in {OUTPUT}.")


if __name__ == "__main__":
    main()
