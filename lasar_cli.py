"""
The `lasar` command: from a table of interactions to recommendations.

    lasar prepare ratings.csv --output mine
    lasar train mine
    lasar recommend mine --history "item1,item2"

This file is outside the package, since importing the package takes seconds and help should not.
"""

import csv
import functools
import logging
import os
import signal
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", help=__doc__.split("\n")[1])
console, errors = Console(), Console(stderr=True)

SOURCES = ("toy", "routines", "amazon2014", "amazon2018", "amazon2023")
Project = Annotated[str, typer.Argument(help="Folder of the project, as given to `lasar prepare --output`.")]
Model = Annotated[str, typer.Argument(help="Folder of a project or a checkpoint, or a model id on the Hub.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting, such as codebook_size=64; can be repeated.")
]


def show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"lasar_hf {metadata.version('lasar_hf')}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Warnings for users, one sentence each and once; those for programmers are of other kinds.
    warnings.showwarning = lambda message, kind, *_, **__: kind is UserWarning and show_warning(str(message))  # type: ignore[assignment]
    # tqdm shows the bars of steps that take longer than a second, and removes them in the end (empty for no).
    for name, value in {"TQDM_DELAY": "1", "TQDM_LEAVE": ""}.items():
        os.environ.setdefault(name, value)
    # Ended from outside, such as by a closed terminal, a command ends the processes that it started.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


@functools.cache
def show_warning(message: str) -> None:
    """A warning, said once, without the line of code that it comes from."""
    show_error(f"Warning: {message}", "yellow")


def show_error(text: str, style: str) -> None:
    """Lines of text on the standard error output. Names in it, such as those of columns, may be of others."""
    lines = text.splitlines()
    if not all(map(str.isprintable, lines)):
        from lasar_hf.terminal import printable

        lines = [printable(line) for line in lines]
    errors.print("\n".join(lines), style=style, markup=False, highlight=False)


def show_table(title: str, columns: list[str], rows: list[list]) -> None:
    """A table. Cells are shown as they are: rich would take `[bold]` in a title for a command."""
    from lasar_hf.terminal import printable

    console.print(title, highlight=False)
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        cells = ("–" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(table)


def results_table(results: dict[str, dict], split: str = "test") -> None:
    """The rows of a report."""
    columns = ["HR@10", "NDCG@10", "mean_depth", "ms_per_user"]
    rows = [[name, *(row.get(column) for column in columns)] for name, row in results.items()]
    show_table(f"{split.capitalize()} users, the whole catalogue ranked", ["model", *columns], rows)


def settings_table(path: str, settings: dict[str, dict]) -> None:
    """The settings of training that are changed most often."""
    names = ["learning_rate", "num_train_epochs", "max_steps", "max_tokens_per_batch", "eval_steps"]
    stages = {stage: part for stage, part in settings.items() if set(names) & set(part)}
    rows = [[name, *(str(part.get(name, "–")) for part in stages.values())] for name in names]
    show_table(f"Settings in {path}; change one with --set stage1.learning_rate=0.001", ["setting", *stages], rows)


def read_changes(changes: list[str] | None) -> dict:
    """`name=value` pairs as a dictionary, values as in YAML."""
    pairs = [change.partition("=") for change in changes or []]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ValueError(f"--set has {wrong[0]!r}; expected name=value.")
    from lasar_hf.commands.project import read_value

    return {name: read_value(value) for name, _, value in pairs}


def load(model: str, revision: str | None = None):
    """The recommender of a project, a folder or a model id."""
    from transformers.utils.logging import disable_progress_bar

    from lasar_hf import Recommender
    from lasar_hf.commands.project import checkpoint_of

    disable_progress_bar()  # of loading small weights
    return Recommender.from_pretrained(checkpoint_of(model, revision), revision=revision)


def split_history(history: str, recommender) -> list[str]:
    """The items of a row of CSV. Titles may contain commas; one that is a title as a whole is one item."""
    if recommender.item_index(history) is not None:
        return [history]
    return [part.strip() for part in next(csv.reader([history], skipinitialspace=True), []) if part.strip()]


@app.command()
def prepare(
    data: Annotated[str, typer.Argument(help=f"A table (CSV, JSON, Parquet …), a folder, or {', '.join(SOURCES)}.")],
    output: Annotated[str, typer.Option(help="Folder of the project.")] = "mine",
    items: Annotated[str | None, typer.Option(help="Table of the items, with their titles.")] = None,
    user_column: Annotated[str | None, typer.Option(help="Column of users; found by its name.")] = None,
    item_column: Annotated[str | None, typer.Option(help="Column of items; found by its name.")] = None,
    time_column: Annotated[str | None, typer.Option(help="Column of times; found by its name.")] = None,
    title_column: Annotated[str | None, typer.Option(help="Column of titles; found by its name.")] = None,
    k_core: Annotated[int | None, typer.Option(min=1, help="Fewest interactions of a user and an item.")] = None,
    changes: Set = None,
) -> None:
    """Read interactions and make Semantic IDs and training data of them."""
    from lasar_hf.commands.project import prepare_project, table_arguments

    columns = {"user_column": user_column, "item_column": item_column, "time_column": time_column}
    columns |= {"items": items, "title_column": title_column}
    source, arguments = data, {}
    if data not in SOURCES and not Path(data).is_dir():
        source, arguments = "table", table_arguments(data, **columns)
    elif given := [name for name, value in columns.items() if value is not None]:
        raise ValueError(f"--{given[0].replace('_', '-')} is for a table; change arguments of {data} with --set.")
    if k_core is not None:
        arguments["k_core"] = k_core
    settings = prepare_project(output, source, arguments, read_changes(changes))
    rows = [[name, value] for name, value in settings.items()]
    show_table("Chosen by the size of the data; change one with --set", ["setting", "value"], rows)
    console.print(f"Next: lasar train {output}")


@app.command()
def train(
    project: Project,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change train.yaml, such as stage1.num_train_epochs=3; can be repeated."),
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file whose sections replace those of train.yaml.")] = None,
    launch: Annotated[str | None, typer.Option(help='Such as "accelerate launch --num_processes 8".')] = None,
    report_to: Annotated[str | None, typer.Option(help="trackio, tensorboard, wandb or none.")] = None,
) -> None:
    """Train all stages, with the settings of train.yaml, which is made to fit the data. Resumes where it stopped."""
    from lasar_hf.commands.project import project_settings, train_project

    settings_table(f"{project}/train.yaml", project_settings(project, changes or [], config))
    results_table(train_project(project, launch, report_to))
    console.print(f'The model is in {project}/model. Next: lasar recommend {project} --history "ITEM,ITEM"')


@app.command()
def evaluate(
    project: Project,
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    users: Annotated[int, typer.Option(help="Number of users, drawn at random; 0 for all.")] = 0,
    beams: Annotated[int, typer.Option(help="Width of the beam search.")] = 50,
) -> None:
    """Rank the whole catalogue for held-out users: baselines and the checkpoints of all stages."""
    from lasar_hf.commands.evaluate import EvaluateArguments
    from lasar_hf.commands.evaluate import main as run
    from lasar_hf.commands.project import project_settings, stage_settings

    settings = stage_settings(project, project_settings(project))["evaluate"]
    settings |= {"split": split, "users": users, "num_beams": beams}
    settings["output_dir"] = str(Path(project, f"report_{split}"))
    run(EvaluateArguments(**settings), show=lambda rows, *_: results_table(rows, split))
    console.print(f"More numbers, and those of parts of the users: {settings['output_dir']}/report.md")


@app.command()
def recommend(
    model: Model,
    history: Annotated[str | None, typer.Option(help='Item ids or titles, oldest first: a,b,"c, d".')] = None,
    histories: Annotated[str | None, typer.Option(help="Table of users with user_id and history.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the results for --histories.")] = None,
    top_k: Annotated[int, typer.Option(help="Number of items per user.")] = 10,
    latent_steps: Annotated[int | None, typer.Option(help="Latent steps; the policy's by default.")] = None,
    unknown_items: Annotated[str, typer.Option(help="What an unknown item of --history is: error or skip.")] = "error",
    revision: Revision = None,
) -> None:
    """Recommend items: a table with titles for one --history, or files for a table of --histories."""
    if (history is None) == (histories is None) or (histories is None) != (output is None):
        raise ValueError("Give either --history, or --histories with --output.")
    if histories is not None:
        from lasar_hf.commands.project import checkpoint_of
        from lasar_hf.commands.recommend import RecommendArguments
        from lasar_hf.commands.recommend import main as run

        path = checkpoint_of(model, revision)
        run(RecommendArguments(path, histories, output, top_k=top_k, latent_steps=latent_steps, revision=revision))
        return
    recommender = load(model, revision)
    items = split_history(history, recommender)
    (result,) = recommender.recommend([items], top_k, latent_steps=latent_steps, unknown_items=unknown_items)
    if not result["items"]:
        raise ValueError("There is nothing to recommend: the history has no known items, or no others are left.")
    columns = {"title": "title", "item_id": "item", "score": "log-probability"}
    if not any(item["title"] for item in result["items"]):
        del columns["title"]
    rows = [[item[name] for name in columns] for item in result["items"]]
    show_table(f"After {result['latent_steps']} latent steps", list(columns.values()), rows)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on, 0 for a free one.")] = 8000,
    device: Annotated[str | None, typer.Option(help="Where to compute; the accelerator if there is one.")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Width of the beam search.")] = 50,
    max_batch: Annotated[int, typer.Option(help="Users of a batch.")] = 64,
    max_wait_ms: Annotated[float, typer.Option(help="Milliseconds that a user waits for others.")] = 5.0,
    max_queue: Annotated[int, typer.Option(help="Users that may wait; more are answered with status 429.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up, status 504.")] = 30.0,
    admin_token: Annotated[
        str | None, typer.Option(envvar="LASAR_ADMIN_TOKEN", help="Token that allows to change the catalogue.")
    ] = None,
    revision: Revision = None,
) -> None:
    """Serve recommendations over HTTP; /docs lists the requests."""
    from lasar_hf.commands.project import checkpoint_of
    from lasar_hf.serving import serve as run

    run(
        checkpoint_of(model, revision),
        host,
        port,
        device,
        admin_token,
        revision=revision,
        num_beams=num_beams,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        timeout=timeout,
    )


@app.command()
def push(
    model: Model,
    repo_id: Annotated[str, typer.Argument(help="Name on the Hub, such as user/model.")],
    private: Annotated[bool, typer.Option(help="Make a private repository.")] = False,
) -> None:
    """Upload a model with code, prompt format, catalogue, memory and card to the Hub."""
    console.print(load(model).push_to_hub(repo_id, private=private))


@app.command()
def plot(
    project: Project, output: Annotated[str | None, typer.Option(help="Image; training.png in the project.")] = None
) -> None:
    """Plot loss, ranking, reward and depth of a training."""
    from lasar_hf.commands.plots import plot_project

    path = output or str(Path(project, "training.png"))
    plot_project(project, path)
    console.print(f"Written to {path}.")


def run() -> None:
    """The command. A wrong setting, file or item ends it with one sentence."""
    try:
        app(prog_name="lasar")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        is_file = isinstance(error, OSError) and error.filename is not None and error.strerror is not None
        text = f"{error.filename}: {error.strerror}." if is_file else str(error)
        show_error(f"Error: {text}", "red")
        raise SystemExit(1) from None


if __name__ == "__main__":
    run()
