"""One figure of a training from the logs of its stages: losses, ranking, reward and depth."""

from pathlib import Path

from ..files import atomic_file, read_json


STAGES = ("stage1", "stage2", "grpo")
PANELS = {  # title of a panel: name in the logs, and the stages that have it
    "Loss": ("loss", ("stage1", "stage2")),
    "NDCG@10, validation": ("eval_NDCG@10", STAGES),
    "Reward": ("reward", ("grpo",)),
    "Mean latent steps": ("mean_depth", ("stage2", "grpo")),
}


def training_log(folder: Path) -> list[dict]:
    """The log of a stage, from its newest checkpoint; empty without a checkpoint."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    newest = max(states, key=lambda path: int(path.parent.name.rpartition("-")[2]), default=None)
    return [] if newest is None else read_json(newest)["log_history"]


def plot_project(folder: str, path: str) -> None:
    """
    Plot the logs of a project's stages to an image file. Needs matplotlib.

    Raises:
        `FileNotFoundError`: if no stage has a log.
    """
    from matplotlib.figure import Figure

    logs = {stage: training_log(Path(folder, stage)) for stage in STAGES}
    if not any(logs.values()):
        raise FileNotFoundError(f"{folder} has no logs of a training. Run: lasar train {folder}")
    figure = Figure(figsize=(14, 3.2), layout="constrained")
    for axes, (title, (name, stages)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for stage in stages:
            points = [(entry["step"], entry[name]) for entry in logs[stage] if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None, label=stage)
        axes.set(title=title, xlabel="update")
        axes.legend(frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
