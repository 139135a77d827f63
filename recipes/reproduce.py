"""
A whole study in one command: train every row, evaluate it, and write a report with tables and figures.

    python recipes/reproduce.py --config recipes/scientific/study.yaml --source path/to/scientific

Each row of the study is a run of `sft.py` or `grpo.py` with some settings changed, an evaluation with and without an
item memory and, if asked for, at every fixed depth. Unknown rows and settings, and text where a number belongs, are
refused before anything runs. A study that is killed goes on where it stopped: a job that ended with the same settings
is not run again, and trainings resume from their last checkpoint. With other settings a training starts again, and its
last run is kept in `checkpoint.old`. `report_only: true` writes the report of what has ended so far. Needs matplotlib
(`pip install "lasar_hf[study]"`), and cornac for SASRec (`"lasar_hf[baselines]"`).
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from argparse import ArgumentError
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from lasar_hf import LasarGRPOConfig, LasarSFTConfig
from lasar_hf.commands.grpo import GRPOScriptArguments
from lasar_hf.commands.parser import ScriptParser
from lasar_hf.commands.prepare import PrepareArguments
from lasar_hf.commands.sft import SFTScriptArguments
from lasar_hf.data import PreparedData
from lasar_hf.evaluation import BASELINES, has_sasrec
from lasar_hf.evaluation.study import StudyResults, write_study
from lasar_hf.files import atomic_file, check_writable, read_json, write_json
from lasar_hf.locks import locked, try_lock
from lasar_hf.trainers import LasarModelConfig


RECIPES = Path(__file__).resolve().parent
TRAINING = {  # what a row may run, and the classes of its arguments
    "sft": (SFTScriptArguments, LasarSFTConfig, LasarModelConfig),
    "grpo": (GRPOScriptArguments, LasarGRPOConfig, LasarModelConfig),
}
ALL_USERS = sys.maxsize
VERSIONS = ("lasar_hf", "torch", "transformers", "trl", "numpy")
logger = logging.getLogger(__name__)


@dataclass
class StudyArguments:
    """Arguments of a study."""

    data_dir: str = field(metadata={"help": "Folder of the prepared data."})
    output_dir: str = field(metadata={"help": "Folder of checkpoints, logs and results."})
    report_dir: str = field(metadata={"help": "Folder of the report, study.md and its figures."})
    rows: dict = field(metadata={"help": "Rows of the study by name, see RowArguments."})
    tables: list[dict] = field(metadata={"help": "Tables of the report: title, rows, rows to compare them with."})
    prepare: list[dict] = field(
        default_factory=list, metadata={"help": "Runs of recipes/prepare.py: `config`, and changed settings in `set`."}
    )
    source: str | None = field(default=None, metadata={"help": "`source` of recipes/prepare.py."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds of rows with `seeds: all`; others use the first."}
    )
    baselines: bool = field(default=True, metadata={"help": "Whether to tune and rank the baselines."})
    jobs: int = field(default=2, metadata={"help": "Number of jobs at once; each uses its share of the CPUs."})
    num_beams: int = field(default=50, metadata={"help": "Width of the beam search."})
    sweep_users: int = field(default=0, metadata={"help": "Users of the evaluations at fixed depths; 0 for all."})
    max_depth: int = field(default=8, metadata={"help": "Largest fixed depth."})
    report_only: bool = field(default=False, metadata={"help": "Write the report of the jobs that have ended."})

    def __post_init__(self):
        for name, least in (("jobs", 1), ("num_beams", 1), ("sweep_users", 0), ("max_depth", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; expected one or more different numbers, such as [0].")
        if not isinstance(self.rows, dict):
            raise ValueError(f"rows is {self.rows!r}; expected the name of each row and its settings.")


@dataclass
class RowArguments:
    """
    A row of a study: a training, or another way to evaluate the checkpoint of a row (`of`). In `set`, a value that
    starts with `@` and the name of a row is the folder of that row, such as `"@LASAR-SFT/anchors"`, and `null` leaves
    a setting of the YAML file out.
    """

    recipe: str | None = None  # sft or grpo
    config: str | None = None  # YAML of the recipe
    set: dict = field(default_factory=dict)  # changed settings
    of: str | None = None  # row whose checkpoint is evaluated, instead of a training
    depth: int | str | None = None  # latent steps, `text` for explicit chains of thought; the policy's by default
    memory: bool = False  # evaluate on test users with an item memory too
    test: bool = True  # evaluate on test users; false for rows among which a setting is chosen
    validation: bool = False  # evaluate on validation users too
    sweep: bool = False  # at the first seed: evaluate at every fixed depth too
    oracle: bool = False  # at the first seed: recipes/depth.py, the policy against the best depth of each user
    seeds: str = "first"  # or all


@dataclass
class Job:
    """A run of a recipe. `key` identifies its settings and those of the jobs before it."""

    name: str
    script: str
    settings: dict[str, Any]
    folder: Path
    after: list[str]
    key: str

    @property
    def marker(self) -> Path:
        return self.folder / f"{self.name.split('/')[-1]}.done.json"

    def has_ended(self) -> bool:
        return self.marker.exists() and read_json(self.marker)["key"] == self.key


def read_rows(study: StudyArguments) -> dict[str, RowArguments]:
    """The rows of a study, checked: their settings, and the rows that they refer to."""
    rows = {name: read_row(name, settings) for name, settings in study.rows.items()}
    for name, row in rows.items():
        for other in references(row):
            if other not in rows:
                raise ValueError(f"Row {name!r} refers to {other!r}; expected one of the rows {', '.join(rows)}.")
            if row.seeds == "all" and rows[other].seeds != "all":
                raise ValueError(f"Row {name!r} has seeds: all, so {other!r}, which it refers to, needs them too.")
    order(rows)
    for name, row in rows.items():
        evaluated = [other for other in references(row) if rows[other].recipe is None]
        if evaluated:
            raise ValueError(f"Row {name!r} refers to {evaluated[0]!r}, which has no checkpoint of its own.")
        if row.of is not None and row.memory and not rows[row.of].memory:
            raise ValueError(f"Row {name!r} has memory: true, so {row.of!r} needs it too.")
    return rows


def read_row(name: str, settings: dict[str, Any]) -> RowArguments:
    """A row of a study, with a check of what does not depend on other rows."""
    known = {part.name for part in fields(RowArguments)}
    if not isinstance(name, str) or not isinstance(settings, dict):
        raise ValueError(f"Row {name!r} is {settings!r}; expected settings, and text as its name.")
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"Row {name!r} has {unknown}; expected some of {', '.join(sorted(known))}.")
    row = RowArguments(**settings)
    if not isinstance(row.set, dict):
        raise ValueError(f"Row {name!r} has set: {row.set!r}; expected settings, or leave it out.")
    checks = [
        ((row.recipe is None) != (row.of is None) and row.recipe in (None, *TRAINING),
         f"has recipe {row.recipe} and of {row.of}; expected recipe: sft or grpo, or of: another row."),
        (row.recipe is None or Path(row.config or "").is_file(), f"has config {row.config!r}, which is no file."),
        (row.of is None or not (row.set or row.config), "has of and trains nothing; leave out set and config."),
        (row.depth in (None, "text") or str(row.depth).isdecimal(),
         f"has depth {row.depth!r}; expected a number of latent steps, or text."),
        (row.test or row.validation, "has test and validation: false; expected at least one evaluation."),
        (row.test or not row.memory, "has memory: true and test: false; memories are evaluated on test users only."),
        (row.seeds in ("first", "all"), f"has seeds {row.seeds!r}; expected first or all."),
        ("output_dir" not in row.set and not (row.seeds == "all" and "seed" in row.set),
         "sets output_dir, or seed with seeds: all; leave them to the study."),
        (not set(name) & set("/@=") and not name.endswith(" + memory") and name not in BASELINES,
         "has /, @ or = in its name, ends in ' + memory' or is a baseline; use another name."),
    ]  # fmt: skip
    for is_met, message in checks:
        if not is_met:
            raise ValueError(f"Row {name!r} {message}")
    if row.recipe is not None:
        check_settings(f"Row {name!r}", row.recipe, TRAINING[row.recipe], changed_settings(row.config, row.set))
    return row


def check_settings(owner: str, script: str, classes: tuple[type, ...], settings: dict[str, Any]) -> None:
    """Refuse settings that a recipe does not have, and text where a number or boolean belongs."""
    parser = ScriptParser(classes)
    unknown = parser.set_defaults_with_config(**settings)[::2]
    if unknown:
        names = ", ".join(name.removeprefix("--") for name in unknown)
        raise ValueError(
            f"{owner} has {names}, which {script}.py does not know. {script}.py --help-all lists its options."
        )
    for action in parser._actions:
        action.required = False  # the study itself sets some
    parser.exit_on_error = False
    try:
        parser.parse_args([])  # converts the settings to their types
    except ArgumentError as error:
        raise ValueError(f"{owner}: {error}.") from None


def changed_settings(config: str | None, changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of a YAML file, some of them changed or, with `None`, left out."""
    settings = yaml.safe_load(Path(config).read_text(encoding="utf-8")) if config else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{config} has no settings; expected lines such as `learning_rate: 1.0e-3`.")
    return {key: value for key, value in (settings | changes).items() if value is not None}


def check_names(path: str) -> None:
    """Refuse a YAML file with the same key twice, such as two rows of one name: YAML would keep the last."""
    nodes = [yaml.compose(Path(path).read_text(encoding="utf-8"))]
    for node in nodes:  # grows
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            if twice:
                raise ValueError(f"{path} has {twice} more than once; use other names.")
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def references(row: RowArguments) -> list[str]:
    """Names of the rows that a row needs."""
    values = [value[1:].partition("/")[0] for value in row.set.values() if str(value).startswith("@")]
    return values + ([row.of] if row.of else [])


def order(rows: dict[str, RowArguments]) -> list[str]:
    """Names of the rows, each after those that it needs."""
    done: list[str] = []
    while len(done) < len(rows):
        ready = [name for name in rows if name not in done and set(references(rows[name])) <= set(done)]
        if not ready:
            raise ValueError(f"The rows {sorted(set(rows) - set(done))} refer to one another in a circle.")
        done += ready
    return done


def check_prepare(study: StudyArguments) -> None:
    """Refuse preparations with unknown keys, files or settings, and a study in the folder of its data."""
    for part in study.prepare:
        is_known = set(part) <= {"config", "set"} and isinstance(part.get("set", {}), dict)
        if not is_known or not Path(str(part.get("config") or __file__)).is_file():
            raise ValueError(f"prepare has {part}; expected config, a YAML file, and set, changed settings.")
        settings = changed_settings(part.get("config"), part.get("set", {}))
        check_settings(f"prepare with {part}", "prepare", (PrepareArguments,), settings)
        if Path(str(settings.get("output_dir"))).resolve() == Path(study.output_dir).resolve():
            raise ValueError(f"output_dir is {study.output_dir}, the folder of prepared data; set another folder.")


def check_depths(study: StudyArguments, rows: dict[str, RowArguments]) -> None:
    """Refuse numbers of latent steps that the models of the rows do not take."""
    for name, row in rows.items():
        settings = changed_settings(row.config, row.set)
        weights = settings.get("depth_weights", [0])
        if not isinstance(weights, list):
            raise ValueError(f"Row {name!r} has depth_weights {weights!r}; expected a list, one for each depth.")
        numbers = [row.depth, settings.get("depth_source"), settings.get("fixed_depth")]
        numbers += [len(weights) - 1, study.max_depth if row.sweep else 0]
        wanted = max(int(number) for number in numbers if str(number).isdecimal())
        while row.of is not None or str(row.set.get("model_name_or_path", "")).startswith("@"):
            row = rows[row.of or row.set["model_name_or_path"][1:].partition("/")[0]]
        settings = changed_settings(row.config, row.set)
        if "model_name_or_path" in settings and "max_latent_steps" not in settings:
            continue  # a model from elsewhere, whose largest depth is not known here
        most = int(settings.get("max_latent_steps", SFTScriptArguments.max_latent_steps))
        if wanted > most:
            raise ValueError(f"Row {name!r} has {wanted} latent steps; its model takes at most {most}.")


def check_tables(study: StudyArguments, rows: dict[str, RowArguments]) -> None:
    """Refuse tables with unknown keys or rows, and those that would overwrite one another."""
    names = {*BASELINES, *rows, *(f"{name} + memory" for name, row in rows.items() if row.memory)}
    for table in study.tables:
        unknown = sorted(set(table) - {"title", "text", "rows", "against", "slices", "links", "figure"})
        if unknown or not {"title", "rows"} <= set(table):
            raise ValueError(
                f"A table has {sorted(table)}; expected title, rows and perhaps text, against, slices, links, figure."
            )
        if not all(isinstance(table.get(key, []), list) for key in ("rows", "against")):
            raise ValueError(f"Table {table['title']!r}: expected lists of rows in rows and against.")
        wrong = [name for name in [*table["rows"], *table.get("against", [])] if name not in names]
        if wrong:
            raise ValueError(f"Table {table['title']!r} has {wrong}, which are no rows of the study.")
        sources = [changed_settings(part.get("config"), part.get("set", {})).get("source") for part in study.prepare]
        if table.get("links") and "routines" not in sources:
            raise ValueError(f"Table {table['title']!r} has links: true; expected data of the source routines.")
    for key, used in (("title", []), ("figure", ["depths.png"])):
        used += [table[key] for table in study.tables if key in table]
        twice = sorted({value for value in used if used.count(value) > 1})
        if twice:
            raise ValueError(f"tables has the {key} {twice} more than once (depths.png is that of the fixed depths).")


def check_packages(study: StudyArguments) -> None:
    """Refuse a study whose figures or baselines need a package that is not installed."""
    if not find_spec("matplotlib"):
        raise ValueError('The figures need matplotlib: pip install "lasar_hf[study]".')
    named = {name for table in study.tables for name in [*table["rows"], *table.get("against", [])]}
    if study.baselines and "SASRec" in named and not study.report_only and not has_sasrec():
        raise ValueError(
            'The row SASRec needs cornac: pip install "lasar_hf[baselines]". Or leave SASRec out of the tables.'
        )


class Jobs(dict[str, Job]):
    """The jobs of a study by name, each after those that it needs."""

    def __init__(self, study: StudyArguments, rows: dict[str, RowArguments]):
        super().__init__()
        self.study, self.output = study, Path(study.output_dir)
        self.evaluation = {"data_dir": study.data_dir, "num_beams": study.num_beams}
        self.start = [f"prepare-{number}" for number in range(len(study.prepare))]
        for name, part in zip(self.start, study.prepare, strict=True):
            options = ({"source": study.source} if study.source else {}) | part.get("set", {})
            self.add(name, "prepare", options, self.output, [], part.get("config"))
        if study.baselines:
            folder = self.output / "baselines"
            self.add("baselines", "eval", self.evaluation | {"output_dir": str(folder)}, folder, self.start)
        for seed in study.seeds:  # the first seed is complete before the others begin
            for name in order(rows):
                if rows[name].seeds == "all" or seed == study.seeds[0]:
                    self.add_row(name, rows[name], seed)

    def add(
        self, name: str, script: str, options: dict[str, Any], folder: Path, after: list[str],
        config: str | None = None,
    ):  # fmt: skip
        """Add a run of a recipe."""
        settings = changed_settings(config, options)
        text = json.dumps([script, settings, [self[part].key for part in after]], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        self[name] = Job(name, script, settings, folder, after, key)

    def add_row(self, name: str, row: RowArguments, seed: int) -> None:
        """Add the training of a row, its memory and its evaluations."""
        prefix, folder = f"{seed}/{name}", self.output / str(seed) / name
        checkpoint = folder / "checkpoint"
        if row.of is not None:
            checkpoint = self.output / str(seed) / row.of / "checkpoint"
            ready = [f"{seed}/{row.of}/checkpoint"]
            ready += [job for job in [f"{seed}/{row.of}/memory"] if job in self]
        else:
            changed = {key: expand(value, self.output / str(seed)) for key, value in row.set.items()}
            options = {"data_dir": self.study.data_dir, "output_dir": str(checkpoint), "seed": seed} | changed
            ready = [f"{prefix}/checkpoint"]
            needed = [f"{seed}/{other}/checkpoint" for other in references(row)]
            self.add(ready[0], row.recipe, options, folder, self.start + needed, row.config)
        where = str(checkpoint) if row.depth is None else f"{checkpoint}@{row.depth}"
        if row.memory and row.of is None:
            self.add(f"{prefix}/memory", "memory", self.evaluation | {"models": [where]}, folder, ready)
            ready = [f"{prefix}/memory"]
        options = self.evaluation | {"models": [f"{name}={where}"], "baselines": False}
        for split in [split for split in ("test", "validation") if getattr(row, split)]:
            # The weight of a memory is fitted to the validation users, so that they say nothing about it.
            target = {"split": split, "memory": row.memory and split == "test", "output_dir": str(folder / split)}
            self.add(f"{prefix}/{split}", "eval", options | target, folder, ready)
        is_first = seed == self.study.seeds[0]
        if row.sweep and is_first:
            models = [f"{depth}={checkpoint}@{depth}" for depth in range(self.study.max_depth + 1)]
            options |= {"models": models, "users": self.study.sweep_users, "memory": False}
            options |= {"split": "validation", "output_dir": str(folder / "sweep")}
            self.add(f"{prefix}/sweep", "eval", options, folder, ready[:1])
        if row.oracle and is_first:
            options = self.evaluation | {"model": str(checkpoint), "output_dir": str(folder / "oracle")}
            options |= {"users": self.study.sweep_users or ALL_USERS}
            self.add(f"{prefix}/oracle", "depth", options, folder, ready[:1])


def expand(value: Any, folder: Path) -> Any:
    """`@row/file` as the path of that row's checkpoint."""
    if not str(value).startswith("@"):
        return value
    row, _, rest = value[1:].partition("/")
    return str(folder / row / "checkpoint" / rest)


def run_job(job: Job, study: StudyArguments) -> bool:
    """Run a command with its log beside its results. Returns whether it succeeded."""
    job.folder.mkdir(parents=True, exist_ok=True)
    config = job.folder / f"{job.name.split('/')[-1]}.yaml"
    # Several evaluations of a checkpoint may run at once, and those of fixed depths are not results of its policy.
    settings = job.settings | ({"cards": False} if job.script == "eval" else {})
    with atomic_file(config) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    command = [sys.executable, str(RECIPES / f"{job.script}.py"), "--config", str(config)]
    log, started_at = config.with_suffix(".log"), commit()
    threads = str(max(torch.get_num_threads() // study.jobs, 1))
    with log.open("a") as file:
        lock(file, job.name)
        job.marker.unlink(missing_ok=True)  # that of other settings, whose results are overwritten now
        began = time.time()
        if job.script in TRAINING:
            set_aside(job)
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": threads}
        ).returncode
    if code != 0:
        tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
        logger.error("%s failed with exit code %d. The end of %s:\n%s", job.name, code, log, tail)
        return False
    record = {"key": job.key, "seconds": time.time() - began, "commit": started_at, "settings": job.settings}
    write_json(job.marker, record)
    logger.info("%s: done in %.0f s", job.name, record["seconds"])
    return True


def set_aside(job: Job) -> None:
    """Keep a training of other settings in `checkpoint.old`, so that the job does not resume from it."""
    started, checkpoint = job.folder / "started.json", Path(job.settings["output_dir"])
    if checkpoint.exists() and (not started.exists() or read_json(started)["key"] != job.key):
        old = checkpoint.with_name(f"{checkpoint.name}.old")
        logger.info("%s: the settings changed, so it starts again. The last run is in %s.", job.name, old)
        shutil.rmtree(old, ignore_errors=True)
        checkpoint.rename(old)
    write_json(started, {"key": job.key})


def updates(jobs: dict[str, Job], row: str) -> int | None:
    """
    Number of updates of a row's training, at the first seed that has ended; `None` for rows that train nothing. The
    checkpoint that is kept may be an earlier one.
    """
    ended = [job for name, job in jobs.items() if name.endswith(f"/{row}/checkpoint") and job.has_ended()]
    states = sorted(Path(ended[0].settings["output_dir"]).glob("*/trainer_state.json")) if ended else []
    return read_json(states[0])["max_steps"] if states else None


def lock(file, name: str) -> None:
    """Lock the log of a job. The job inherits the lock and so keeps it if the study is killed: it has no double."""
    if not try_lock(file):
        logger.info("%s still runs, started by a study that was killed. Waiting for its end.", name)
        try_lock(file, wait=True)


def commit() -> str:
    """Commit of the repository that the recipes are in, or `unknown`."""
    command = ["git", "-C", str(RECIPES), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_jobs(jobs: dict[str, Job], study: StudyArguments) -> list[str]:
    """Run the jobs that have not ended, as soon as those before them have. Returns the names of those that did not."""
    ended: set[str] = set()
    for name, job in jobs.items():  # in order; what was made from results that are gone runs again
        if job.has_ended() and set(job.after) <= ended:
            ended.add(name)
    logger.info("%d of %d jobs have ended already.", len(ended), len(jobs))
    running, failed = {}, set()
    with ThreadPoolExecutor(study.jobs) as pool:
        while True:
            for name, job in jobs.items():
                is_ready = name not in ended | failed | set(running.values()) and set(job.after) <= ended
                if is_ready and len(running) < study.jobs:
                    running[pool.submit(run_job, job, study)] = name
            if not running:
                return [name for name in jobs if name not in ended]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                (ended if future.result() else failed).add(running.pop(future))


def write_report(study: StudyArguments, rows: dict[str, RowArguments], jobs: Jobs, missing: list[str]) -> None:
    """Write the report of the jobs that have ended."""
    if not Path(study.data_dir, "prepared.json").exists():
        raise ValueError(f"{study.data_dir} has no prepared data yet, so there is nothing to report.")
    seconds = {name: read_json(job.marker)["seconds"] for name, job in jobs.items() if job.has_ended()}
    commits = sorted({read_json(job.marker)["commit"] for job in jobs.values() if job.has_ended()})
    ended = {name: job.folder for name, job in jobs.items() if job.has_ended()}
    results = StudyResults(PreparedData.load(study.data_dir), Path(study.output_dir), ended)
    settings = {name: asdict(row) for name, row in rows.items()}
    versions = {"python": platform.python_version()} | {name: version(name) for name in VERSIONS}
    details = {
        "rows": settings,
        "seeds": study.seeds,
        "jobs": study.jobs,
        "seconds": seconds,
        "updates": {row: updates(jobs, row) for row in rows},
        "commits": commits,
        "versions": versions,
        "missing": missing,
    }
    write_study(Path(study.report_dir), results, study.tables, details)
    logger.info("The report is %s.", Path(study.report_dir, "study.md"))


def main(study: StudyArguments) -> None:
    """Run what is left of the study, and write its report."""
    rows = read_rows(study)
    check_prepare(study)
    check_depths(study, rows)
    check_tables(study, rows)
    check_packages(study)
    check_writable(study.report_dir)
    jobs = Jobs(study, rows)
    with nullcontext() if study.report_only else locked(study.output_dir):
        missing = [name for name, job in jobs.items() if not job.has_ended()]
        if not study.report_only:
            missing = run_jobs(jobs, study)
        write_report(study, rows, jobs, missing)
    if missing and not study.report_only:
        sys.exit(f"{len(missing)} jobs did not end: {', '.join(missing)}.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if "--config" in sys.argv[:-1]:
        check_names(sys.argv[sys.argv.index("--config") + 1])
    main(*ScriptParser((StudyArguments,), __doc__).parse_args_and_config())
