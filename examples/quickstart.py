"""
All stages of LASAR on a generated shop, without network and GPU: under two minutes on two CPU cores.

    pip install -e ".[test]" && python examples/quickstart.py

Toy shop -> Semantic IDs -> stage 1 -> stage 2 -> GRPO -> a table, a figure and recommendations. The model with its
card goes to `outputs/quickstart/model`, the figure and the report beside it.
"""

import os
import time
import warnings
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network

import datasets
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from lasar_hf import (
    LasarForGenerativeRec,
    LasarGRPOConfig,
    LasarGRPOTrainer,
    LasarProcessor,
    LasarSFTConfig,
    LasarSFTTrainer,
    Recommender,
    SidCatalog,
)
from lasar_hf.card import CardFacts, add_results
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
from lasar_hf.evaluation import evaluate_recommendations, item_knn_ranking, recommend_samples, save_report
from lasar_hf.reasoning import TemplateTeacher, encode_anchors, segment
from lasar_hf.semantic_ids import (
    build_semantic_ids,
    collaborative_embeddings,
    combine_views,
    item_text,
    text_embeddings,
)


SEED, LEVELS, CODES, STEPS, OUTPUT = 0, 4, 16, 4, Path("outputs/quickstart")
COMMON = dict(
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
    logging_steps=5,
    lr_scheduler_type="cosine",
    seed=SEED,
    disable_tqdm=True,
    dataloader_pin_memory=False,
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
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        hidden_dropout=0.1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    backbone = AutoModelForCausalLM.from_config(config)
    model = LasarForGenerativeRec.from_backbone(backbone, tokenizer, LEVELS, CODES, STEPS)
    model.set_sid_embeddings(quantizer.codebooks)
    model.config.exclude_history = True  # hardly anybody buys a book twice
    return model, tokenizer


def train(trainer, title: str, start: str | None = None):
    """Train without printing logs, and write a model card that continues the card of the stage before."""
    trainer.remove_callback(PrinterCallback)
    trainer.card_facts = CardFacts(start and str(OUTPUT / start), title=title)
    trainer.train()
    trainer.create_model_card(model_name=str(OUTPUT / "model"), dataset_name="Toy shop")


def plot(table: dict[str, dict], path: Path) -> None:
    """How good the lists are, and how many latent steps they took, before and after reinforcement learning."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    quality, depth = figure.subplots(1, 2, width_ratios=[3, 2])
    colours = ["tab:gray", "tab:blue", "tab:orange", "tab:green"]
    bars = quality.bar(list(table), [row["NDCG@10"] for row in table.values()], color=colours)
    quality.bar_label(bars, fmt="%.3f")
    quality.set(title="Ranking quality (higher is better)", ylabel="NDCG@10, test users", ylim=(0, 1))
    names = ["LASAR-SFT", "LASAR-RL"]
    bars = depth.bar(names, [table[name]["mean_depth"] for name in names], color=colours[2:], width=0.5)
    depth.bar_label(bars, fmt="%.2f")
    depth.set(title="Latent steps per user (fewer is faster)", ylabel="mean", ylim=(0, STEPS))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run every stage and report."""
    warnings.simplefilter("ignore", FutureWarning)  # transformers' own, about names of arguments in the next version
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)  # matrices of this size do not gain from more
    set_seed(SEED)
    start, console = time.perf_counter(), Console(highlight=False)

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - start:4.0f} s] {text}", markup=False, soft_wrap=True)

    # 1. A shop, its split, and Semantic IDs.
    shop = toy_shop(num_users=600, num_items=192, seed=SEED)
    split = leave_one_out(shop)
    catalog, quantizer = make_catalog(shop, split)
    say(f"A toy shop: {len(split.user_ids)} users, {len(catalog)} books, Semantic IDs of {LEVELS} x {CODES} codes.")

    # 2. Stage 1: loss on every item of a user's history, and item titles to Semantic IDs.
    model, tokenizer = make_model(shop, quantizer)
    processor = LasarProcessor(tokenizer, catalog, instruction="")
    titles = alignment_examples(shop, split, processor, tasks=("title_to_sid",))
    examples = datasets.concatenate_datasets([history_examples(split, processor), titles])
    args = LasarSFTConfig(
        str(OUTPUT / "stage1"),
        num_train_epochs=30,
        learning_rate=4e-3,
        weight_decay=0.1,
        warmup_steps=0.05,
        per_device_train_batch_size=32,
        train_sampling_strategy="group_by_length",
        **COMMON,
    )
    train(LasarSFTTrainer(model, args, train_dataset=examples, processing_class=processor), "Stage 1")

    test = samples(split, "test")
    table, targets = {}, np.array(test["target"])
    neighbours = item_knn_ranking(split.train, test["history"], len(catalog), 20, exclude_history=True)
    table["item-kNN"] = evaluate_recommendations(neighbours, targets, len(catalog))

    def evaluate(name: str, latent_steps: int | None = None) -> str:
        result = recommend_samples(model, test, processor, latent_steps=latent_steps)
        table[name] = row = evaluate_recommendations(
            result.items, targets, len(catalog), result.latent_steps, result.seconds
        )
        return f"NDCG@10 {row['NDCG@10']:.3f} with {row['mean_depth']:.2f} latent steps per user"

    say(f"Stage 1, the model learns Semantic IDs: {evaluate('direct', latent_steps=0)}.")

    # 3. Stage 2: latent states are aligned with the hidden states of the segments of a chain of thought. The list is
    # trained after each number of steps, so that the policy head has something to choose from.
    train_samples = samples(split, "train")
    teacher = TemplateTeacher(shop, split)
    pairs = zip(train_samples["history"], train_samples["target"], strict=True)
    segments = segment([teacher.chain_of_thought(*pair) for pair in pairs], max_segments=STEPS)
    anchors = encode_anchors(model, processor, segments)
    say(f"A teacher wrote {len(segments):,} chains of thought, of {np.mean([*map(len, segments)]):.1f} segments each.")
    depths = np.random.default_rng(SEED).integers(1, STEPS + 1, len(segments))
    args = LasarSFTConfig(
        str(OUTPUT / "stage2"),
        num_train_epochs=6,
        learning_rate=2e-3,
        weight_decay=0.1,
        warmup_steps=0.05,
        per_device_train_batch_size=64,
        alignment_weight=0.05,
        policy_weight=0.1,
        depth_weights=[1, 1, 1, 1, 1],
        anchors_at_any_depth=True,
        **COMMON,
    )
    examples = reasoning_examples(train_samples, processor, depths)
    stage2 = LasarSFTTrainer(model, args, anchors=anchors, train_dataset=examples, processing_class=processor)
    train(stage2, "Stage 2", start="stage1")
    say(f"Stage 2, the model reasons in hidden states: {evaluate('LASAR-SFT')}.")

    # 4. GRPO: candidates are rewarded, and the policy head learns how many steps pay off.
    args = LasarGRPOConfig(
        str(OUTPUT / "grpo"),
        max_steps=100,
        learning_rate=1e-4,
        per_device_train_batch_size=64,
        num_generations=8,
        depth_gradient="exact",
        step_cost="auto",
        policy_learning_rate=3e-3,
        **COMMON,
    )
    examples = grpo_examples(train_samples, processor, anchors.terminal())
    rl = LasarGRPOTrainer(model, args, train_dataset=examples, processing_class=processor)
    train(rl, "Reinforcement learning", start="stage2")
    say(f"GRPO, the model learns which steps pay off: {evaluate('LASAR-RL')}.")

    # 5. A checkpoint with everything that others need, the report and the figure.
    folder = OUTPUT / "model"
    recommender = Recommender(model.eval(), processor, card=(OUTPUT / "grpo" / "README.md").read_text())
    recommender.save_pretrained(folder)
    results = {"results": table, "details": {"exclude_history": True}}
    add_results(folder, results, "Toy shop", rows={"LASAR-RL": "this model"})
    save_report(OUTPUT, table)
    plot(table, OUTPUT / "quickstart.png")
    view = Table("", "HR@10", "NDCG@10", "latent steps", title="Test users, all books ranked", title_justify="left")
    for name, row in table.items():
        view.add_row(name, *(f"{row[key]:.3f}" if key in row else "–" for key in ("HR@10", "NDCG@10", "mean_depth")))
    console.print(view)

    user = test[3]
    history = [catalog.item_ids[item] for item in user["history"]]
    (result,) = recommender.recommend([history], top_k=5)
    bought = (catalog.titles[item] for item in user["history"][::-1])
    console.print("A user bought, the last one first:", *bought, sep="\n  ")
    console.print(f"After {result['latent_steps']} latent steps the model recommends:")
    for item in result["items"]:
        mark = "  <- bought next" if item["item_id"] == catalog.item_ids[user["target"]] else ""
        console.print(f"  {np.exp(item['score']):6.1%}  {item['title']}{mark}")
    say(f"Done. The model and its card are in {folder}, a figure is {OUTPUT / 'quickstart.png'}.")
    console.print(f'Next: lasar recommend {folder} --history "item-0,item-1,item-2"')


if __name__ == "__main__":
    main()
