"""
How many latent steps does each user need, and does the policy know?

    python recipes/depth.py --config recipes/scientific/depth.yaml

Fits the depth policy of a checkpoint on validation users with a frozen backbone, each half of them for the other half,
and compares it with every fixed depth, with its own depths shuffled among the users, and with the best depth of each
user (the oracle). The oracle picks the best of several lists, so it also wins by chance: its null has as many lists at
one depth, whose inputs have noise that changes the target's probability as much as depth does. Writes `report.md`,
`report.json` and `depth.png`; with `save_to`, a checkpoint whose policy is fitted on all validation users.
"""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from lasar_hf import LasarForGenerativeRec, LasarProcessor
from lasar_hf.arguments import check_choices
from lasar_hf.commands.parser import ScriptParser
from lasar_hf.data import PreparedData
from lasar_hf.evaluation import ndcg_per_user, paired_bootstrap, ranks, recommend_samples
from lasar_hf.files import atomic_file, write_json
from lasar_hf.locks import locked
from lasar_hf.onednn import onednn_linear
from lasar_hf.trainers import DepthScores, fit_depth_policy, score_depths


NOISES = (0.02, 0.05, 0.1, 0.2, 0.4)  # relative to the embeddings' root mean square
SHUFFLES = 20


@dataclass
class DepthArguments:
    """Arguments of the comparison of depths."""

    data_dir: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    model: str = field(metadata={"help": "Checkpoint of stage 2 or of GRPO."})
    output_dir: str = field(metadata={"help": "Folder of the report."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a model on the Hub; a folder has none."}
    )
    users: int = field(default=4000, metadata={"help": "Largest number of validation users."})
    reward: str = field(
        default="logp", metadata={"help": "Reward of a depth: log p(target) or NDCG@10.", "choices": ["logp", "ndcg"]}
    )
    step_cost: str = field(
        default="auto", metadata={"help": "Cost of a step; auto: the deepest chain costs half of the oracle's gain."}
    )
    num_beams: int = field(default=50, metadata={"help": "Width of the beam search."})
    batch_size: int = field(default=64, metadata={"help": "Users per batch."})
    save_to: str | None = field(default=None, metadata={"help": "Folder for a checkpoint with the fitted policy."})

    def __post_init__(self):
        check_choices(self)
        if self.step_cost != "auto":
            float(self.step_cost)


def ndcg_at(model, samples, processor, depth: int, args: DepthArguments) -> np.ndarray:
    """NDCG@10 of each user at one depth, `(U,)`."""
    output = recommend_samples(model, samples, processor, 10, args.num_beams, depth, args.batch_size)
    return ndcg_per_user(ranks(output.items, samples["target"]), 10)


def add_noise(model, scale: float, seed: int):
    """Add noise to the backbone's input embeddings until the returned handle is removed."""
    generator = torch.Generator(model.device).manual_seed(seed)
    weight = model.get_input_embeddings().weight
    deviation = scale * float(weight.detach().float().square().mean().sqrt())

    def noisy(module, args, output):
        noise = torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        return output + deviation * noise

    return model.get_input_embeddings().register_forward_hook(noisy)


def noise_null(model, samples, processor, scores: np.ndarray, depth: int, args: DepthArguments) -> tuple[float, ...]:
    """The noise that matches depth, and the oracle over as many noisy lists at one depth: log p, NDCG@10."""
    part, num_lists = samples.select(range(min(400, len(samples)))), scores.shape[1]
    spread = scores.std(axis=1, ddof=1).mean()
    found = []
    for noise in NOISES:
        runs = [noisy_scores(model, part, processor, noise, seed, depth) for seed in range(3)]
        found.append(np.std(runs, axis=0, ddof=1).mean())
    noise = NOISES[int(np.abs(np.log(np.array(found) / spread)).argmin())]
    log_probs, ndcg = [], []
    for seed in range(num_lists):
        log_probs.append(noisy_scores(model, samples, processor, noise, seed, depth))
        handle = add_noise(model, noise, seed)
        ndcg.append(ndcg_at(model, samples, processor, depth, args))
        handle.remove()
    return noise, float(np.max(log_probs, axis=0).mean()), float(np.max(ndcg, axis=0).mean())


def noisy_scores(model, samples, processor, noise: float, seed: int, depth: int) -> np.ndarray:
    """`log p(target)` of each user at one depth with noise, `(U,)`."""
    handle = add_noise(model, noise, seed)
    scores = depth_scores(model, samples, processor, [depth]).log_probs[:, 0].cpu().numpy()
    handle.remove()
    return scores


def depth_scores(model, samples, processor, depths) -> DepthScores:
    """`log p(target)` of the samples at some depths, and `h_0`."""
    prompts = [processor.prompt_ids(history) for history in samples["history"]]
    return score_depths(model, processor.catalog, prompts, samples["target"], depths)


def cross_fitted(head, states, rewards: np.ndarray, cost: float, first: int, users: np.ndarray) -> np.ndarray:
    """Depth of each sample from a policy that was fitted on the other half of the `users` `(U,)`, `(U,)`."""
    half, depths = users % 2, np.empty(len(rewards), dtype=np.int64)
    for part in (0, 1):
        fitted = fit_depth_policy(head, states[half != part], rewards[half != part], cost, first)
        with torch.no_grad():
            depths[half == part] = fitted(states[half == part]).argmax(dim=-1).numpy() + first
    return depths


def compare(
    log_probs: np.ndarray, ndcg: np.ndarray, policies: dict[str, np.ndarray], users: np.ndarray, seed: int = 0
) -> dict:
    """Mean log p and NDCG@10 of each way to choose depths, and tests of the fitted policy over `users` `(U,)`."""
    samples, rows = np.arange(len(ndcg)), {}
    for depth in range(ndcg.shape[1]):
        rows[f"depth {depth}"] = {"log p": log_probs[:, depth].mean(), "NDCG@10": ndcg[:, depth].mean()}
    best = int(ndcg.mean(axis=0).argmax())
    rng = np.random.default_rng(seed)
    for name, depths in policies.items():
        rows[name] = {"log p": log_probs[samples, depths].mean(), "NDCG@10": ndcg[samples, depths].mean()}
        shuffles = [rng.permutation(depths) for _ in range(SHUFFLES)]
        shuffled = np.mean([ndcg[samples, part] for part in shuffles], axis=0)  # (U,)
        log_p = np.mean([log_probs[samples, part] for part in shuffles])
        rows[f"{name}, shuffled"] = {"log p": log_p, "NDCG@10": shuffled.mean()}
        values = ndcg[samples, depths]
        rows[name]["against best fixed"] = asdict(paired_bootstrap(values, ndcg[:, best], users))
        rows[name]["against shuffled"] = asdict(paired_bootstrap(values, shuffled, users))
        rows[name]["depths"] = np.bincount(depths, minlength=ndcg.shape[1]).tolist()
    rows["oracle"] = {"log p": log_probs.max(axis=1).mean(), "NDCG@10": ndcg.max(axis=1).mean()}
    return rows | {"best fixed depth": best}


def write_report(folder: Path, rows: dict, null: dict, details: dict) -> None:
    """Write `report.md`, `report.json` and `depth.png`."""
    best = rows.pop("best fixed depth")
    lines = ["| depth | log p(target) | NDCG@10 | NDCG@10 − best fixed | NDCG@10 − shuffled |", "|---|" + "---:|" * 4]
    for name, row in {**rows, "oracle of noisy lists": null}.items():
        tests = [row.get(key) for key in ("against best fixed", "against shuffled")]
        cells = ["" if t is None else f"{t['difference']:+.4f} ({t['low']:+.4f} to {t['high']:+.4f})" for t in tests]
        lines.append(f"| {name} | {row['log p']:.4f} | {row['NDCG@10']:.4f} | {' | '.join(cells)} |")
    histograms = {name: row["depths"] for name, row in rows.items() if "depths" in row}
    depths = range(len(next(iter(histograms.values()))))
    table = [f"| users by depth | {' | '.join(map(str, depths))} |", "|---|" + "---:|" * len(depths)]
    table += [f"| {name} | {' | '.join(map(str, counts))} |" for name, counts in histograms.items()]
    text = [
        "# Depth",
        f"{details['users']:,} validation users, best fixed depth {best}, step cost {details['cost']:.4f}. The fitted "
        f"policy of each half of the users knows the other half only. Noise of the null: {null['noise']}.",
        "\n".join(lines), "\n".join(table), "![NDCG@10 by depth, and the depths of the policies](depth.png)",
    ]  # fmt: skip
    with atomic_file(folder / "report.md") as temporary:
        temporary.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    write_json(folder / "report.json", {"rows": rows, "null": null, "best": best, "details": details})
    plot(folder / "depth.png", rows, null, histograms)


def plot(path: Path, rows: dict, null: dict, histograms: dict[str, list[int]]) -> None:
    """NDCG@10 by fixed depth beside the policies and oracles, and the histograms of the policies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    fixed = [row["NDCG@10"] for name, row in rows.items() if name.startswith("depth ")]
    left.plot(fixed, marker="o", color="black", label="fixed depth")
    for number, name in enumerate(histograms):
        left.axhline(rows[name]["NDCG@10"], color=f"C{number}", label=name)
    left.axhline(rows["oracle"]["NDCG@10"], color="gray", linestyle="--", label="oracle")
    left.axhline(null["NDCG@10"], color="gray", linestyle=":", label="oracle of noisy lists")
    left.set(xlabel="latent steps", ylabel="NDCG@10, validation")
    left.legend(frameon=False, fontsize="small")
    width = 0.8 / len(histograms)
    for number, (name, counts) in enumerate(histograms.items()):
        right.bar(np.arange(len(counts)) + number * width, np.array(counts) / sum(counts), width, label=name)
    right.set(xlabel="latent steps", ylabel="part of the users")
    right.legend(frameon=False, fontsize="small")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(args: DepthArguments) -> None:
    """Score every depth, fit and compare the policy, and write the report."""
    with ExitStack() as stack:
        for folder in {args.output_dir, args.save_to or args.output_dir}:
            stack.enter_context(locked(folder))
        compare_depths(args)


def compare_depths(args: DepthArguments) -> None:
    """Compare depths in folders to which no other command writes."""
    data, processor = (
        PreparedData.load(args.data_dir),
        LasarProcessor.from_pretrained(args.model, revision=args.revision),
    )
    data.check_catalog(processor.catalog, args.model)
    model = LasarForGenerativeRec.from_pretrained(args.model, revision=args.revision).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    samples = data.draw("validation", args.users)
    first, num_depths = model.config.min_latent_steps, model.config.max_latent_steps + 1

    # 1. Probability of the target and NDCG@10 at every depth.
    with onednn_linear(model):
        scores = depth_scores(model, samples, processor, range(num_depths))
        states, log_probs = scores.start_states.float().cpu(), scores.log_probs.cpu().numpy()
        ndcg = np.stack([ndcg_at(model, samples, processor, depth, args) for depth in range(num_depths)], axis=1)

    # 2. The policy before and after.
    rewards = (log_probs if args.reward == "logp" else ndcg)[:, first:]  # (U, C)
    auto = 0.5 * float((rewards.max(axis=1) - rewards[:, 0]).mean()) / max(rewards.shape[1] - 1, 1)
    cost, head = auto if args.step_cost == "auto" else float(args.step_cost), model.model.policy_head.cpu()
    with torch.no_grad():
        before = head(states.to(head.dense.weight.dtype)).argmax(dim=-1).numpy() + first
    # With a split by time a user has several samples.
    numbers = {user: number for number, user in enumerate(dict.fromkeys(samples["user_id"]))}
    users = np.array([numbers[user] for user in samples["user_id"]])  # (U,)
    after = cross_fitted(head, states, rewards, cost, first, users)
    rows = compare(log_probs, ndcg, {"policy": before, "fitted policy": after}, users)

    # 3. The null of the oracle, and the report.
    head.to(model.device)
    with onednn_linear(model):
        noise, log_p, value = noise_null(model, samples, processor, log_probs, rows["best fixed depth"], args)
    details = {"arguments": asdict(args), "users": len(samples), "cost": cost}
    null = {"noise": noise, "log p": log_p, "NDCG@10": value}
    print(json.dumps({name: round(row["NDCG@10"], 4) for name, row in rows.items() if name != "best fixed depth"}))
    write_report(Path(args.output_dir), rows, null, details)
    if args.save_to is not None:
        fitted = fit_depth_policy(head.cpu(), states, rewards, cost, first)
        model.model.policy_head.load_state_dict(fitted.state_dict())
        model.save_pretrained(args.save_to)
        processor.save_pretrained(args.save_to)


if __name__ == "__main__":
    main(*ScriptParser((DepthArguments,), __doc__).parse_args_and_config())
