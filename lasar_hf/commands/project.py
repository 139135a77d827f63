"""
A project: one folder in which the `lasar` command prepares data, trains all stages and evaluates.

    data/  train.yaml  stage1/  stage2/  grpo/  report/  model/  settings/

`train.yaml` has one section for each stage, whose keys are those of the stage's own script. A stage whose settings and
predecessors did not change is not run again, and one that was killed resumes. Otherwise it is trained
again from the start, and its last run is kept in `stage1.old/` and so on.
"""

import hashlib
import inspect
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import IO, Any, get_args, get_type_hints

import yaml
from huggingface_hub import CacheNotFound, scan_cache_dir
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import cached_file

from ..arguments import near_name
from ..data import PreparedData, read_source
from ..data.readers import SOURCES, TEXT_COLUMNS, read_lcrec
from ..data.tables import column_names
from ..files import atomic_file, folder_hashes, read_json, write_json
from ..locks import locked
from ..model.recommender_lasar import Recommender, renamed_card
from ..trainers import LasarGRPOConfig, LasarModelConfig, LasarSFTConfig
from .automatic import LARGE, core_size, find_column, prepare_settings, train_settings
from .evaluate import EvaluateArguments
from .grpo import NOT_BETTER, GRPOScriptArguments
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
    path: str,
    items: str | None = None,
    user_column: str | None = None,
    item_column: str | None = None,
    time_column: str | None = None,
    title_column: str | None = None,
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
        except ValueError as error:
            logger.warning("%s Otherwise the rows of a user are taken in the order of the file.", error)
    table, names = (path, names) if items is None else (items, column_names(items))
    if title_column is None:
        try:
            title_column = find_column("title", names, table)
        except ValueError as error:
            if items is None:
                return arguments
            logger.warning("%s Otherwise items are shown by their ids.", error)
            return arguments | {"items": items}
        if items is not None and title_column in TEXT_COLUMNS["title"]:
            return arguments | {"items": items}  # all usual columns of text
    if title_column not in names:
        raise ValueError(f"{table} has no column {title_column!r}; its columns are {', '.join(names)}.")
    return arguments | {"items": table, "text_columns": {"title": title_column}}


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
            Arguments of [`PrepareArguments`] that replace the chosen ones, and those of the source, such as
            `keep_repeats` of [`~lasar_hf.data.read_table`].

    Raises:
        `ValueError`: if a change is no setting of the preparation, or has a wrong value.
    """
    changes = dict(changes or {})
    fixed: dict[str, Any] = {"output_dir": str(Path(folder, "data")), "source": source}
    own = [part.name for part in fields(PrepareArguments)]
    of_source = [name for name in inspect.signature(SOURCES.get(source, read_lcrec)).parameters if name not in own]
    source_args = {**(source_args or {}), **{name: changes.pop(name) for name in of_source if name in changes}}
    if unknown := [name for name in changes if name not in own]:
        raise ValueError(f"prepare has no setting {unknown[0]!r}{near_name(unknown[0], [*own, *of_source])}.")
    check_keys("prepare", changes, (PrepareArguments,))
    if taken := [name for name in changes if name in (*fixed, "source_args")]:
        raise ValueError(f"--set has {taken[0]!r}, which is given by the data and --output.")
    PrepareArguments(**fixed, **changes)  # refuses wrong values before the long reading
    with locked(folder):
        if source == "table" and "k_core" not in source_args:
            source_args["k_core"] = 1
            source_args["k_core"] = core_size(read_source(source, source_args).num_interactions)
            if source_args["k_core"] == 1:
                logger.info("All users and items are kept, since there are fewer than %s interactions.", f"{LARGE:,}")
        settings = prepare_settings(len(read_source(source, source_args).items)) | changes
        ran = prepare(PrepareArguments(**fixed, source_args=source_args, **settings))
    if ran and Path(folder, SETTINGS).exists():
        logger.warning("%s is kept. Delete it to train with settings that fit this data.", Path(folder, SETTINGS))
    return {"k_core": source_args["k_core"], **settings} if source == "table" else settings


def check_keys(section: str, settings: Mapping[str, Any], classes: Sequence[type]) -> None:
    """
    Refuse, with a `ValueError`, settings that are not fields of the dataclasses, and says near ones; and values that
    are not numbers or switches where the fields are.
    """
    known = [part.name for arguments in classes for part in fields(arguments)]
    hints = {name: hint for arguments in classes for name, hint in get_type_hints(arguments).items()}
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{section} has no setting {name!r}{near_name(name, known)}.")
        check_value(f"{section}: {name}", value, hints[name])


def check_value(where: str, value: Any, hint: Any) -> None:
    """Refuse, with a `ValueError`, a value that is not of the type of a field that is a number or a switch."""
    kinds = set(get_args(hint) or [hint])
    if value is None and NoneType in kinds:
        return
    for kind, wanted in ((bool, "true or false"), (int, "a whole number"), (float, "a number")):
        if kinds - {NoneType} == {kind} and not is_value(value, kind):
            raise ValueError(f"{where} is {value!r}; expected {wanted}.")


def is_value(value: Any, kind: type) -> bool:
    """Whether a value of YAML is a switch or a number, which may be text, such as 1e-3."""
    if kind is bool or isinstance(value, bool):
        return isinstance(value, kind) and kind is bool
    try:
        kind(str(value))
    except ValueError:
        return False
    return True


def read_value(text: str) -> Any:
    """A value as in YAML, of which 1e-3 is a number."""
    return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else yaml.safe_load(text)


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
    if not Path(folder, "data").is_dir():
        raise FileNotFoundError(f"{folder} has no prepared data. Run: lasar prepare DATA --output {folder}")
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
        settings.setdefault(section, {})[key] = read_value(value)
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
    handed: dict[str, dict[str, Any]] = {
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
    settings = project_settings(folder)
    with locked(folder) as lock:
        run_stages(Path(folder), settings, lock, launch, report_to)
    return read_json(Path(folder, "report", "report.json"))["results"]


def run_stages(
    root: Path, sections: Mapping[str, dict[str, Any]], lock: IO, launch: str | None, report_to: str | None
) -> None:
    """Run the stages that are not up to date, and save the last checkpoint."""
    before: Any = folder_hashes(root / "data", "steps/*.json")
    stages = stage_settings(str(root), sections)
    inside = stage_settings("", sections)  # with paths inside the project, which may be moved
    for number, (name, settings) in enumerate(stages.items(), start=1):
        config, mark = root / "settings" / f"{name}.yaml", root / "settings" / f"{name}.json"
        before = hashlib.sha256(json.dumps([before, inside[name]], sort_keys=True).encode()).hexdigest()
        if report_to is not None and name in TRAINED:  # changes no result
            settings["report_to"] = report_to
        last = read_json(mark) if mark.exists() else {"settings": before, "done": False}
        if last == {"settings": before, "done": True}:
            logger.info("[%d/%d] %s: done before.", number, len(stages), name)
            continue
        logger.info("[%d/%d] %s", number, len(stages), name)
        if last["settings"] != before and (root / name).exists():
            logger.info("      Settings or data changed: it starts again. The last run is in %s.old.", root / name)
            shutil.rmtree(root / f"{name}.old", ignore_errors=True)
            (root / name).rename(root / f"{name}.old")
        config.parent.mkdir(parents=True, exist_ok=True)
        write_json(mark, {"settings": before, "done": False})
        with atomic_file(config) as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        run_stage(name, config, launch, lock)
        write_json(mark, {"settings": before, "done": True})
        if values := [entry["eval_NDCG@10"] for entry in training_log(root / name) if "eval_NDCG@10" in entry]:
            logger.info("      best NDCG@10 on validation users: %.4f", max(values))
    recommender = Recommender.from_pretrained(root / "grpo", device="cpu")
    if NOT_BETTER in (recommender.card or ""):
        logger.warning("grpo: %s", NOT_BETTER)
    recommender.card = None if recommender.card is None else renamed_card(recommender.card, "model")
    recommender.save_pretrained(root / "model")


def run_stage(name: str, config: Path, launch: str | None, lock: IO) -> None:
    """Run a stage in a process of its own, with the given launcher. Its output goes to `settings/<stage>.log`."""
    # Memory is fitted by one process.
    start = [sys.executable] if launch is None or name == "memory" else shlex.split(launch)
    if shutil.which(start[0]) is None:
        raise ValueError(f"--launch has {start[0]!r}, which is not a program that can be found.")
    command = [*start, "-m", f"lasar_hf.commands.{STAGES[name][0]}", "--config", str(config)]
    log = config.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[lock.fileno()]
        )
    try:
        follow(process, log, name)
    finally:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(process.pid, signal.SIGTERM)  # with the processes of its launcher
        code = process.wait()
    if code != 0:
        raise RuntimeError(f"{name} ended with exit code {code}: {last_error(log)} The whole output is in {log}.")


def last_error(log: Path) -> str:
    """The last exception in a log that is not the launcher's own, or the last line."""
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [re.sub(r"^\[rank\d+\]: ", "", line) for line in lines]
    errors = [line for line in errors if re.match(r"[\w.]*(Error|Exception): ", line)]
    errors = [line for line in errors if not re.match(r"[\w.]*(CalledProcess|ChildFailed)Error", line)]
    return "".join((errors or lines)[-1:])


def follow(process: subprocess.Popen, log: Path, name: str) -> None:
    """Show the progress of a process until it ends: the last bar of tqdm in its output that is not inside another."""
    columns = TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task(name, total=None)
        has_ended = False
        while not has_ended:
            time.sleep(0.5)
            has_ended = process.poll() is not None
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - 4000))
                # tqdm moves the cursor up after a bar inside another one.
                counts = re.findall(rb"(\d+)/(\d+) \[[^\]\r\n]*\](?!\x1b)", file.read())
            if counts:
                progress.update(task, completed=int(counts[-1][0]), total=int(counts[-1][1]))
        if process.returncode == 0 and progress.tasks[task].total is None:
            progress.update(task, completed=1, total=1)  # too short for a bar


def checkpoint_of(path: str, revision: str | None = None) -> str:
    """
    The checkpoint of a project, or `path` itself if it is a checkpoint or a model id, of which `revision` is a branch,
    tag or commit.

    Raises:
        `FileNotFoundError`: if a folder is neither.
        `OSError`: if there is no such folder, and no such model on the Hub or in its cache.
    """
    model = Path(path, "model")
    if model.is_dir():
        return str(model)
    if Path(path, "data").is_dir():
        raise FileNotFoundError(f"{path} has no model yet. Run: lasar train {path}")
    if Path(path).exists() and not Path(path, "config.json").exists():
        raise FileNotFoundError(f"{path} is neither a project nor a checkpoint: it has no data/ and no config.json.")
    if not Path(path).exists():
        try:
            cached_file(path, "config.json", revision=revision)
        except OSError as error:
            raise OSError(
                f"{path} is not a folder, and no model of this name can be loaded from the Hub. "
                f"{str(error).splitlines()[0]} In the cache: {', '.join(cached_models()) or 'no models'}."
            ) from None
    return path


def cached_models() -> list[str]:
    """Ids of the models in the cache of the Hub."""
    with suppress(CacheNotFound):
        return sorted(repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model")
    return []
