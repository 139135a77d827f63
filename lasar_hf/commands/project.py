"""
A project: one folder in which the `lasar` command prepares data, trains all stages and evaluates.

    data/  train.yaml  stage1/  stage2/  grpo/  report/  model/  settings/

`train.yaml` has one section for each stage, whose keys are those of the stage's own script. A stage whose settings and
predecessors did not change is not run again, and a stage that was killed resumes. What a stage made with other
settings is moved to `old/`.
"""

import hashlib
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..arguments import near_name
from ..card import renamed
from ..data import PreparedData, read_source
from ..data.tables import column_names
from ..files import atomic_file, folder_hashes, read_json, write_json
from ..model.recommender_lasar import Recommender
from ..trainers import LasarGRPOConfig, LasarModelConfig, LasarSFTConfig
from .automatic import CORE, LARGE, core_size, find_column, prepare_settings, train_settings
from .evaluate import EvaluateArguments
from .grpo import GRPOScriptArguments
from .memory import MemoryArguments
from .plots import training_log
from .prepare import PrepareArguments, prepare
from .sft import SFTScriptArguments


logger = logging.getLogger(__name__)

SETTINGS = "train.yaml"
TRAINED = ("stage1", "stage2", "grpo")
# The stages in order: module of lasar_hf.commands, and the classes of its arguments.
STAGES = {
    "stage1": ("sft", (SFTScriptArguments, LasarSFTConfig, LasarModelConfig)),
    "stage2": ("sft", (SFTScriptArguments, LasarSFTConfig, LasarModelConfig)),
    "grpo": ("grpo", (GRPOScriptArguments, LasarGRPOConfig, LasarModelConfig)),
    "memory": ("memory", (MemoryArguments,)),
    "evaluate": ("evaluate", (EvaluateArguments,)),
}


def table_arguments(
    path: str, items: str | None = None, user_column: str | None = None, item_column: str | None = None,
    time_column: str | None = None, title_column: str | None = None,
) -> dict[str, Any]:
    """
    Arguments of [`~lasar_hf.data.read_table`] for a file, with columns found by their names. Titles come from `items`,
    or from the file itself if it has a column of titles.
    """
    names = column_names(path)
    arguments = {
        "interactions": path, "user_column": user_column or find_column("user", names, path),
        "item_column": item_column or find_column("item", names, path), "time_column": time_column,
    }  # fmt: skip
    if time_column is None:
        try:
            arguments["time_column"] = find_column("time", names, path)
        except ValueError:
            logger.warning("%s has no column of times: the rows of a user are taken in their order.", path)
    item_names = names if items is None else column_names(items)
    if title_column is None and items is not None:
        return arguments | {"items": items}  # all usual columns of text
    if title_column is None:
        try:
            title_column = find_column("title", names, path)
        except ValueError:
            return arguments
    if title_column not in item_names:
        raise ValueError(f"{items or path} has no column {title_column!r}; its columns are {', '.join(item_names)}.")
    return arguments | {"items": items or path, "text_columns": {"title": title_column}}


def prepare_project(
    folder: str, source: str, source_args: dict[str, Any] | None = None, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    Prepare data with settings that fit its size. Returns them.

    Args:
        folder (`str`):
            Folder of the project.
        source, source_args:
            As for [`~lasar_hf.data.read_source`]. `k_core` of a table is chosen by its size if it is not given.
        changes (`Mapping`, *optional*):
            Arguments of [`PrepareArguments`] that replace the chosen ones.
    """
    source_args = dict(source_args or {})
    if source == "table" and "k_core" not in source_args:
        source_args["k_core"] = 1
        size = read_source(source, source_args).num_interactions
        source_args["k_core"] = core_size(size)
    data = read_source(source, source_args)
    settings = prepare_settings(len(data.items)) | dict(changes or {})
    if source == "table" and source_args["k_core"] == 1 and data.num_interactions < LARGE:
        logger.info("All users and items are kept; from %d interactions on, those with at least %d.", LARGE, CORE)
    output_dir = str(Path(folder, "data"))
    check_keys("prepare", settings, (PrepareArguments,))
    prepare(PrepareArguments(output_dir=output_dir, source=source, source_args=source_args, **settings))
    return {"k_core": source_args["k_core"], **settings} if source == "table" else settings


def check_keys(section: str, settings: Mapping[str, Any], classes: Sequence[type]) -> None:
    """Refuse, with a `ValueError`, settings that are not fields of the dataclasses; says near ones."""
    known = [part.name for arguments in classes for part in fields(arguments)]
    for name in settings:
        if name not in known:
            raise ValueError(f"{section} has no setting {name!r}{near_name(name, known)}.")


def project_settings(folder: str, changes: Sequence[str] = (), config: str | None = None) -> dict[str, dict[str, Any]]:
    """
    The sections of `train.yaml`, which is written first if it is missing: settings that fit the prepared data.

    Args:
        folder (`str`):
            Folder of the project.
        changes (`list[str]`, *optional*):
            Settings to change in the file, such as `"stage1.num_train_epochs=3"`.
        config (`str`, *optional*):
            Another YAML file to take the sections from. They replace those of the file.

    Raises:
        `ValueError`: if a section or a setting does not exist.
    """
    path = Path(folder, SETTINGS)
    source = Path(config) if config is not None else path
    if config is not None or path.exists():
        settings = read_sections(source)
    else:
        data = PreparedData.load(Path(folder, "data"))
        numbers = sum(map(len, data.split.train))
        settings = train_settings(len(data.split.user_ids), len(data.items), numbers, data.catalog.num_levels)
    for change in changes:
        name, _, value = change.partition("=")
        section, _, key = name.partition(".")
        if not key or not value:
            raise ValueError(f"--set has {change!r}; expected section.name=value, such as stage1.num_train_epochs=3.")
        settings.setdefault(section, {})[key] = yaml.safe_load(value)
    if unknown := set(settings) - set(STAGES):
        raise ValueError(f"{source} has the sections {sorted(unknown)}; expected some of {', '.join(STAGES)}.")
    for section, part in settings.items():
        check_keys(f"{source}: {section}", part, STAGES[section][1])
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return settings


def read_sections(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a YAML file; an empty one has no settings."""
    sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(sections, dict) or not all(isinstance(part, dict | None) for part in sections.values()):
        raise ValueError(f"{path} is not made of sections; expected some of {', '.join(STAGES)}, each with settings.")
    return {section: part or {} for section, part in sections.items()}


def stage_settings(folder: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """All settings of each stage: those of `train.yaml`, and the folders that the stages hand on."""
    path = {name: str(Path(folder, name)) for name in ("data", "stage1", "stage2", "grpo", "report")}
    anchors = str(Path(path["stage2"], "anchors"))
    handed = {
        "stage1": {"output_dir": path["stage1"]},
        "stage2": {"model_name_or_path": path["stage1"], "output_dir": path["stage2"]},
        "grpo": {
            "model_name_or_path": path["stage2"], "stage1_model": path["stage1"], "anchors_dir": anchors,
            "output_dir": path["grpo"],
        },
        "memory": {"models": [f"{path['stage1']}@0", path["stage2"], path["grpo"]]},
        "evaluate": {
            "models": [f"direct={path['stage1']}@0", f"LASAR-SFT={path['stage2']}", f"LASAR-RL={path['grpo']}"],
            "output_dir": path["report"],
        },
    }  # fmt: skip
    return {name: {"data_dir": path["data"], **handed[name], **settings.get(name, {})} for name in STAGES}


def train_project(folder: str, launch: str | None = None, report_to: str | None = None) -> dict[str, dict[str, Any]]:
    """
    Train all stages that are not up to date, give each checkpoint an item memory, evaluate, and save the last one with
    all its parts to `model/`.

    Args:
        folder (`str`):
            Folder of the project, whose settings are [`project_settings`].
        launch (`str`, *optional*):
            Launcher of the stages, such as `"accelerate launch --num_processes 8"`. By default one process.
        report_to (`str`, *optional*):
            Where to log, such as `"trackio"`, `"tensorboard"` or `"wandb"`.

    Returns:
        `dict`: rows of the report by their names.
    """
    root = Path(folder)
    stages = stage_settings(folder, project_settings(folder))
    before: Any = folder_hashes(root / "data", "steps/*.json")
    for number, (name, settings) in enumerate(stages.items(), start=1):
        config, mark = root / "settings" / f"{name}.yaml", root / "settings" / f"{name}.json"
        before = hashlib.sha256(json.dumps([before, settings], sort_keys=True).encode()).hexdigest()
        if report_to is not None and name in TRAINED:  # changes no result
            settings["report_to"] = report_to
        earlier = read_json(mark) if mark.exists() else {"settings": before}
        if earlier == {"settings": before, "done": True}:
            logger.info("[%d/%d] %s: done before.", number, len(stages), name)
            continue
        logger.info("[%d/%d] %s", number, len(stages), name)
        if earlier["settings"] != before and name in TRAINED:
            put_aside(root, name)
        config.parent.mkdir(parents=True, exist_ok=True)
        write_json(mark, {"settings": before, "done": False})
        with atomic_file(config) as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        run_stage(name, config, launch)
        write_json(mark, {"settings": before, "done": True})
        if values := [entry["eval_NDCG@10"] for entry in training_log(root / name) if "eval_NDCG@10" in entry]:
            logger.info("      best NDCG@10 on validation users: %.4f", max(values))
    save_recommender(root / "grpo", root / "model")
    return read_json(root / "report" / "report.json")["results"]


def put_aside(root: Path, name: str) -> None:
    """Move what a stage made with other settings to `old/`, since it cannot go on from there."""
    if (root / name).is_dir():
        old = root / "old" / name
        logger.info("      Settings changed. What was trained before is now in %s.", old)
        shutil.rmtree(old, ignore_errors=True)
        old.parent.mkdir(exist_ok=True)
        (root / name).rename(old)


def save_recommender(checkpoint: Path, folder: Path) -> None:
    """Save a checkpoint with all its parts to another folder, whose name is that on its card."""
    recommender = Recommender.from_pretrained(checkpoint, device="cpu")
    if recommender.card is not None:
        recommender.card = renamed(recommender.card, "/".join(folder.parts[-2:]))
    recommender.save_pretrained(folder)


def run_stage(name: str, config: Path, launch: str | None) -> None:
    """Run a stage in a process of its own, with the given launcher. Its output goes to `settings/<stage>.log`."""
    # Memory is fitted by one process.
    start = [sys.executable, "-m"] if launch is None or name == "memory" else [*shlex.split(launch), "-m"]
    command = [*start, f"lasar_hf.commands.{STAGES[name][0]}", "--config", str(config)]
    log = config.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        follow(process, log, name)
    finally:
        process.terminate()  # after Ctrl-C; nothing happens if it has ended
        code = process.wait()
    if code != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{name} ended with exit code {code}: {''.join(last)} The whole output is in {log}.")


def follow(process: subprocess.Popen, log: Path, name: str) -> None:
    """Show the progress of a process until it ends: the last bar of tqdm in its output."""
    columns = TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task(name, total=None)
        while process.poll() is None:
            time.sleep(0.5)
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - 2000))
                counts = re.findall(rb"(\d+)/(\d+) \[", file.read())
            if counts:
                progress.update(task, completed=int(counts[-1][0]), total=int(counts[-1][1]))


def checkpoint_of(path: str) -> str:
    """The checkpoint of a project, or `path` itself if it is a checkpoint or a model id."""
    model = Path(path, "model")
    if Path(path, "data").is_dir() and not model.is_dir():
        raise FileNotFoundError(f"{path} has no model yet. Run: lasar train {path}")
    return str(model) if model.is_dir() else path
