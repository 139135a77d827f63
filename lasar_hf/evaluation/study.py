"""Report of a study: tables over seeds, tests over users, fixed depths, and figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.prepared_data import PreparedData
from ..data.routines import links
from ..files import atomic_file, read_json, write_json
from .metrics import hits_per_user, ndcg_per_user, ranks, repeat_share
from .report import exclusion_note, slice_report, slice_table
from .significance import BootstrapResult, paired_bootstrap
from .slices import slices
from .tuning import BASELINES, tuning_notes


METRICS = {"HR@10": hits_per_user, "NDCG@10": ndcg_per_user}


class StudyResults:
    """
    Lists of every row and seed of a study, as `recipes/eval.py` wrote them.

    Args:
        data ([`~lasar_hf.data.PreparedData`]):
            The prepared data.
        folder (`Path`):
            Folder of the study.
        ended (`dict[str, Path]`):
            Folders of the jobs that have ended, by `seed/row/split`.
    """

    def __init__(self, data: PreparedData, folder: Path, ended: dict[str, Path]):
        self.data, self.folder, self.ended = data, folder, ended
        self.targets = {split: np.asarray(data.samples[split]["target"]) for split in ("test", "validation")}
        self.lists: dict[tuple[str, str, str], dict] = {}  # by row, split and seed
        for name in ended:
            seed, _, rest = name.partition("/")
            row, _, split = rest.rpartition("/")
            if split in ("test", "validation"):
                self._read(folder / seed / row / split, split, seed)
        if "baselines" in ended:
            self._read(folder / "baselines", "test", "0")

    def _read(self, folder: Path, split: str, seed: str) -> None:
        numbers = read_json(folder / "report.json")["results"]
        with np.load(folder / "lists.npz") as arrays:
            for name in numbers:
                depths = arrays[f"depths/{name}"] if f"depths/{name}" in arrays else None
                lists = {"items": arrays[f"items/{name}"].astype(np.int64), "depths": depths, "row": numbers[name]}
                self.lists[name, split, seed] = lists

    def seeds(self, row: str, split: str) -> list[dict]:
        """Results of a row at each seed."""
        return [part for (name, where, _), part in self.lists.items() if (name, where) == (row, split)]

    def per_user(self, row: str, split: str, metric: str, seeds: set[str] | None = None) -> np.ndarray:
        """A metric of each user, `(U,)`, as a mean over the seeds, or over some of them."""
        parts = [
            part for (name, where, seed), part in self.lists.items()
            if (name, where) == (row, split) and (seeds is None or seed in seeds)
        ]  # fmt: skip
        values = [METRICS[metric](ranks(part["items"], self.targets[split]), 10) for part in parts]
        return np.mean(values, axis=0)

    def compare(self, row: str, other: str, split: str, metric: str) -> BootstrapResult | None:
        """
        Test of two rows, each as a mean over the seeds that both have: they start from the same stage-1 checkpoints.
        Baselines have no seed. `None` if no seed is common.
        """
        seeds = [{seed for name, where, seed in self.lists if (name, where) == (part, split)} for part in (row, other)]
        common = None if {row, other} & {*BASELINES} else seeds[0] & seeds[1]
        if common == set():
            return None
        first, second = (self.per_user(part, split, metric, common) for part in (row, other))
        return paired_bootstrap(first, second, self.data.samples[split]["user_id"])

    def exact(self, row: str, split: str) -> np.ndarray:
        """Whether the first item of the list is the target, `(U,)`, as a mean over the seeds."""
        return np.mean([part["items"][:, 0] == self.targets[split] for part in self.seeds(row, split)], axis=0)

    def first(self, row: str, job: str) -> str | None:
        """The first seed at which a job of a row has ended."""
        found = [name for name in self.ended if name.endswith(f"/{row}/{job}")]
        return found[0].partition("/")[0] if found else None

    def sweep(self, row: str) -> dict[str, dict] | None:
        """Numbers of a row at every fixed depth, at the first seed."""
        seed = self.first(row, "sweep")
        return None if seed is None else read_json(self.folder / seed / row / "sweep" / "report.json")["results"]

    def sweep_lists(self, row: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Indices of the sweep's validation users, `(U,)`, and their lists by the fixed depth and of the `policy`."""
        seed = self.first(row, "sweep")
        with np.load(self.folder / seed / row / "sweep" / "lists.npz") as arrays:
            lists = {name.removeprefix("items/"): arrays[name] for name in arrays if name.startswith("items/")}
            users = arrays["users"]
        if (row, "validation", seed) in self.lists:
            lists["policy"] = self.lists[row, "validation", seed]["items"][users]
        return users, lists

    def sweep_per_user(self, row: str) -> dict[str, np.ndarray]:
        """NDCG@10 of the sweep's users, `(U,)`, by the fixed depth and, if it has ended, of the `policy`."""
        users, lists = self.sweep_lists(row)
        targets = self.targets["validation"][users]
        return {name: ndcg_per_user(ranks(items, targets), 10) for name, items in lists.items()}


def row_numbers(results: StudyResults, row: str, split: str) -> dict[str, Any]:
    """Metrics of a row at each seed, their means, and standard deviations if there are several seeds."""
    parts = results.seeds(row, split)
    numbers: dict[str, Any] = {"seeds": len(parts)}
    for metric in METRICS:
        values = [part["row"][metric] for part in parts]
        numbers[metric] = float(np.mean(values))
        numbers[f"{metric} by seed"] = values
        numbers[f"{metric} sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    for name in ("mean_depth", "ms_per_user", "text_tokens"):
        values = [part["row"][name] for part in parts if name in part["row"]]
        numbers[name] = float(np.mean(values)) if values else None
    return numbers


def study_table(results: StudyResults, rows: Sequence[str], against: Sequence[str], split: str = "test") -> tuple:
    """
    Markdown table of rows, and its numbers by row: metrics, depth and time, then the difference to each row of
    `against` in NDCG@10 with its 95 % interval over users and p-value, over the seeds that both have.
    """
    references = [name for name in against if results.seeds(name, split)]
    columns = ["seeds", *METRICS, "depth", "ms per user", *(f"NDCG@10 − {name}" for name in references)]
    lines = [f"| row | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    table = {}
    for row in rows:
        if not results.seeds(row, split):
            lines.append(f"| {row} |" + " – |" * len(columns))
            continue
        table[row] = numbers = row_numbers(results, row, split)
        cells = [str(numbers["seeds"])]
        for metric in METRICS:
            deviation = numbers[f"{metric} sd"]
            cells.append(f"{numbers[metric]:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else ""))
        for name in ("mean_depth", "ms_per_user"):
            cells.append("–" if numbers[name] is None else f"{numbers[name]:.2f}")
        for name in references:
            cells.append("")
            test = results.compare(row, name, split, "NDCG@10") if name != row else None
            if test is not None:
                numbers[f"against {name}"] = vars(test)
                cells[-1] = difference(test)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n", table


def difference(test: BootstrapResult) -> str:
    """`+0.0048 (+0.0016 to +0.0081), p = 0.004`."""
    p_value = "p < 0.001" if test.p_value < 0.001 else f"p = {test.p_value:.3f}"
    return f"{test.difference:+.4f} ({test.low:+.4f} to {test.high:+.4f}), {p_value}"


def links_table(results: StudyResults, rows: Sequence[str]) -> str:
    """Exact match of the routines by number of links, and how often the depth is that number."""
    needed = np.array([links(history) for history in results.data.samples["test"]["history"]])
    numbers = sorted(set(needed.tolist()))
    lines = [f"| row | {' | '.join(map(str, numbers))} | depth = links |", "|---|" + "---:|" * (len(numbers) + 1)]
    for row in rows:
        if not results.seeds(row, "test"):
            continue
        exact, depths = results.exact(row, "test"), [part["depths"] for part in results.seeds(row, "test")]
        cells = [f"{exact[needed == number].mean():.3f}" for number in numbers]
        agreement = [float((part == needed).mean()) for part in depths if part is not None]
        lines.append(f"| {row} | {' | '.join(cells)} | {np.mean(agreement):.3f} |" if agreement else
                     f"| {row} | {' | '.join(cells)} | – |")  # fmt: skip
    return "\n".join(lines) + "\n"


def links_of_depths_table(results: StudyResults, row: str) -> str:
    """Exact match of the routines by number of links, at every fixed depth."""
    users, lists = results.sweep_lists(row)
    samples = results.data.samples["validation"].select(users)
    needed, targets = np.array([links(history) for history in samples["history"]]), np.array(samples["target"])
    numbers = sorted(set(needed.tolist()))
    lines = [f"| {row} | {' | '.join(map(str, numbers))} |", "|---|" + "---:|" * len(numbers)]
    for depth, items in lists.items():
        exact = items[:, 0] == targets
        cells = [f"{exact[needed == number].mean():.3f}" for number in numbers]
        lines.append(f"| {depth if depth == 'policy' else f'depth {depth}'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def slices_table(results: StudyResults, rows: Sequence[str]) -> str:
    """HR@10 / NDCG@10 of parts of the test users, at the first seed."""
    lists = {row: results.seeds(row, "test")[0]["items"] for row in rows if results.seeds(row, "test")}
    samples = results.data.samples["test"]
    return slice_table(slice_report(lists, samples["target"], slices(samples, results.data.split.train)))


def depth_section(results: StudyResults, rows: Sequence[str], folder: Path, has_links: bool) -> str:
    """Fixed depths against the policy: tables, also by number of links, and a figure with the policy's depths."""
    sweeps = {row: results.sweep(row) for row in rows if results.sweep(row)}
    if not sweeps:
        return ""
    lines = []
    for row, sweep in sweeps.items():
        cells = [f"{numbers['HR@10']:.4f} / {numbers['NDCG@10']:.4f}" for numbers in sweep.values()]
        lines += [f"| {row} | {' | '.join(cells)} |"]
    depths = list(next(iter(sweeps.values())))
    count = next(iter(sweeps.values()))[depths[0]]["n"]
    head = [f"| fixed depth | {' | '.join(depths)} |", "|---|" + "---:|" * len(depths)]
    total = len(results.targets["validation"])
    users = f"All {total:,} validation users" if count == total else f"{count:,} validation users, drawn at random"
    parts = ["## Fixed depths", f"{users}, HR@10 / NDCG@10, first seed.", "\n".join([*head, *lines])]
    histogram = [
        (row, np.bincount(results.seeds(row, "test")[0]["depths"], minlength=len(depths)))
        for row in sweeps if results.seeds(row, "test")
    ]  # fmt: skip
    if histogram:
        # A policy may choose more steps than the largest fixed depth.
        width = max(len(counts) for _, counts in histogram)
        histogram = [(row, np.pad(counts, (0, width - len(counts)))) for row, counts in histogram]
        head = [f"| depth | {' | '.join(map(str, range(width)))} |", "|---|" + "---:|" * width]
        rows_of = [f"| {row} | {' | '.join(map(str, counts))} |" for row, counts in histogram]
        parts += ["Test users by the depth that the policy chose, first seed:", "\n".join([*head, *rows_of])]
    parts += [table for table in (chosen_depths(results, row) for row in sweeps) if table]
    if has_links:
        parts.append("The same validation users, exact match by number of links:")
        parts += [links_of_depths_table(results, row).strip() for row in sweeps]
    per_user = {row: results.sweep_per_user(row) for row in sweeps}
    policies = {row: values["policy"].mean() for row, values in per_user.items() if "policy" in values}
    _plot_depths(sweeps, policies, histogram, folder / "depths.png")
    parts.append("![NDCG@10 at every fixed depth, and the depths of the policy, first seed](depths.png)")
    return "\n\n".join(parts) + "\n"


def chosen_depths(results: StudyResults, row: str) -> str:
    """NDCG@10 of the validation users by the depth that the policy chose for them, beside the best fixed depth."""
    values, (users, _) = results.sweep_per_user(row), results.sweep_lists(row)
    if "policy" not in values:
        return ""
    policy = values.pop("policy")
    best = max(values, key=lambda depth: values[depth].mean())
    chosen = results.lists[row, "validation", results.first(row, "sweep")]["depths"][users]
    groups = {str(depth): chosen == depth for depth in np.unique(chosen)} | {"all": chosen >= 0}
    user_ids = results.data.samples["validation"].select(users)["user_id"]
    test = paired_bootstrap(policy, values[best], user_ids)
    lines = [f"| depth that {row} chose | {' | '.join(groups)} |", "|---|" + "---:|" * len(groups)]
    lines += [f"| users | {' | '.join(str(group.sum()) for group in groups.values())} |"]
    for name, part in (("policy", policy), (f"fixed depth {best}", values[best])):
        lines += [f"| NDCG@10, {name} | {' | '.join(f'{part[group].mean():.4f}' for group in groups.values())} |"]
    text = (
        f"The same validation users by the depth that the policy of {row} chose. Policy − fixed depth {best}, "
        f"the best one for these same users: {difference(test)}."
    )
    return f"{text}\n\n" + "\n".join(lines)


def oracle_section(results: StudyResults, rows: Sequence[str]) -> str:
    """What `recipes/depth.py` found: the policy against shuffled depths, and the best depth of each user."""
    names = ["policy", "policy, shuffled", "fitted policy", "fitted policy, shuffled", "oracle"]
    columns = ["users", "best fixed", *names, "oracle of noisy lists"]
    columns += ["fitted policy − best fixed", "fitted policy − shuffled"]
    lines = [f"| row | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        seed = results.first(row, "oracle")
        if seed is None:
            continue
        report = read_json(results.folder / seed / row / "oracle" / "report.json")
        parts = [report["rows"][name] for name in (f"depth {report['best']}", *names)] + [report["null"]]
        fitted = report["rows"]["fitted policy"]
        tests = [difference(BootstrapResult(**fitted[f"against {name}"])) for name in ("best fixed", "shuffled")]
        cells = [*(f"{part['NDCG@10']:.4f}" for part in parts), *tests]
        lines.append(f"| {row} | {report['details']['users']:,} | {' | '.join(cells)} |")
    text = (
        "NDCG@10 of validation users, first seed. The policy of each half of the users is fitted on the other "
        "half. The oracle takes the best depth of each user. Compare it with the best of as many noisy lists at one "
        "depth."
    )
    return "\n\n".join(["## Which depth?", text, "\n".join(lines)]) if len(lines) > 2 else ""


def _plot_depths(sweeps: dict, policies: dict, histogram: list, path: Path) -> None:
    """NDCG@10 at every fixed depth, dashed for the policy, and how many users have which depth of the policy."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
    for row, sweep in sweeps.items():
        numbers = [part["NDCG@10"] for part in sweep.values()]
        (line,) = left.plot([int(depth) for depth in sweep], numbers, marker="o", label=row)
        if row in policies:
            left.axhline(policies[row], color=line.get_color(), linestyle="--", label=f"{row}, policy")
    left.set(xlabel="fixed number of latent steps", ylabel="NDCG@10, validation")
    width = 0.8 / max(len(histogram), 1)
    for number, (row, counts) in enumerate(histogram):
        right.bar(np.arange(len(counts)) + number * width, counts / counts.sum(), width, label=row)
    right.set(xlabel="latent steps that the policy chose", ylabel="part of the test users")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def plot_rows(results: StudyResults, names: Sequence[str], path: Path, metric: str = "NDCG@10") -> None:
    """A bar for each row, the mean over seeds, with its 95 % interval over test users."""
    pyplot = _pyplot()
    users, zeros = results.data.samples["test"]["user_id"], np.zeros(len(results.targets["test"]))
    tests = [paired_bootstrap(results.per_user(name, "test", metric), zeros, users) for name in names]
    figure, axes = pyplot.subplots(figsize=(7, 0.35 * len(names) + 0.8), layout="constrained")
    values = [test.difference for test in tests]
    errors = [[test.difference - test.low for test in tests], [test.high - test.difference for test in tests]]
    colours = ["tab:orange" if name.endswith("+ memory") else "tab:blue" for name in names]
    colours = ["tab:gray" if name in BASELINES else colour for name, colour in zip(names, colours, strict=True)]
    axes.barh(names, values, xerr=errors, color=colours)
    axes.invert_yaxis()
    axes.set(xlabel=f"{metric}, test")
    _save(figure, path)


def plot_links(results: StudyResults, rows: Sequence[str], path: Path) -> None:
    """Exact match by number of links, a line for each row."""
    pyplot = _pyplot()
    needed = np.array([links(history) for history in results.data.samples["test"]["history"]])
    numbers = sorted(set(needed.tolist()))
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    rows = [row for row in rows if results.seeds(row, "test")]
    for place, row in enumerate(rows):
        exact = results.exact(row, "test")
        width = 1 + 0.6 * (len(rows) - place)  # later lines are thinner, so that equal ones are both seen
        axes.plot(numbers, [exact[needed == n].mean() for n in numbers], marker="o", linewidth=width, label=row)
    axes.set(xlabel="links from the last item to the next", ylabel="exact match", ylim=(-0.05, 1.05))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
    _pyplot().close(figure)


def write_study(
    folder: Path, results: StudyResults, tables: Sequence[dict[str, Any]], details: dict[str, Any]
) -> None:
    """
    Write `study.md`, `study.json` and the figures of a study.

    Args:
        folder (`Path`), results ([`StudyResults`]):
            Folder of the report, and the lists of the study.
        tables (`list[dict]`):
            `title` and `rows` of each table, and if needed `text` above it, `against` (rows to compare with), `slices`
            (parts of the users), `links` (the routines' number of links) and `figure` (name of its file).
        details (`dict`):
            `rows` with their settings, `seeds`, number of `jobs` at once, `seconds` of each job, `updates` of each
            row, `commits`, `versions` and jobs that are `missing`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note, users = exclusion_note(results.data.exclude_history), len(results.targets["test"])
    intro = (
        f"The whole catalogue is ranked for {users:,} test users, if not said otherwise. {note} Differences have a 95 "
        "% interval and a p-value from a bootstrap over users; these do not contain the noise between trainings. Two "
        "rows are compared on the seeds that both have. Nothing was chosen on test users."
    )
    parts = ["# Study", intro]
    if details["missing"]:
        parts.append(f"**Not complete**: {', '.join(details['missing'])}.")
    content: dict[str, Any] = {"details": details, "tables": {}}
    for table in tables:
        texts, numbers = _table_section(results, table, folder)
        parts += texts
        content["tables"] |= numbers
    has_links = any(table.get("links") for table in tables)
    parts.append(depth_section(results, list(details["rows"]), folder, has_links).strip())
    parts.append(oracle_section(results, list(details["rows"])))
    parts.append(_how(results, details))
    write_json(folder / "study.json", content)
    with atomic_file(folder / "study.md") as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _table_section(results: StudyResults, table: dict[str, Any], folder: Path) -> tuple[list[str], dict[str, dict]]:
    """The parts of `study.md` for one table, and its numbers by title."""
    title, rows, against = table["title"], table["rows"], table.get("against", [])
    text, numbers = study_table(results, rows, against)
    validation = [row for row in rows if results.seeds(row, "validation")]
    parts, content = [f"## {title}", table.get("text", "").strip()], {title: numbers}
    if numbers or not validation:
        parts.append(text.strip())
    if validation:
        text, content[f"{title}, validation"] = study_table(results, validation, against, "validation")
        parts += ["Validation users:", text.strip()]
    if table.get("links"):
        parts += ["Exact match by number of links:", links_table(results, rows).strip()]
    if table.get("slices"):
        text = slices_table(results, rows).strip()
        parts += ["HR@10 / NDCG@10 of parts of the users, first seed:", text]
    if table.get("figure") and numbers:
        if table.get("links"):
            plot_links(results, rows, folder / table["figure"])
        else:
            plot_rows(results, list(numbers), folder / table["figure"])
        parts.append(f"![{title}]({table['figure']})")
    return parts, content


def _how(results: StudyResults, details: dict[str, Any]) -> str:
    """How each row was made: settings, seeds, times, commit, and the settings of the baselines."""
    lines = ["| row | made from | changed settings | depth | updates run | minutes of the last run |"]
    lines.append("|---|---|---|---|---:|---:|")
    for name, row in details["rows"].items():
        seconds = [time for job, time in details["seconds"].items() if job.endswith(f"/{name}/checkpoint")]
        changed = ", ".join(f"`{key}: {value}`" for key, value in row["set"].items())
        depth = "policy" if row["depth"] is None else row["depth"]
        minutes = f"{np.mean(seconds) / 60:.1f}" if seconds else "–"
        made = f"`{row['config']}`" if row["config"] else f"row {row['of']}"
        lines.append(f"| {name} | {made} | {changed} | {depth} | {details['updates'][name] or '–'} | {minutes} |")
    total = sum(details["seconds"].values()) / 60
    notes = [f"Seeds {details['seeds']}, commits {', '.join(details['commits'])}, {total:.0f} minutes of jobs in all, "
             "counted from the last start of each."]  # fmt: skip
    notes.append("Versions: " + ", ".join(f"{name} {number}" for name, number in details["versions"].items()) + ".")
    if details["jobs"] > 1:
        notes.append(f"Times per user were measured while up to {details['jobs']} jobs ran.")
    if "baselines" in results.ended:
        notes += tuning_notes(read_json(results.folder / "baselines" / "report.json")["details"]["baselines"])
    repeats = [repeat_share(part["items"], results.data.samples["test"]["history"])
               for (_, split, _), part in results.lists.items() if split == "test"]  # fmt: skip
    if repeats:
        notes.append(f"Largest part of list entries that repeat the history: {max(repeats):.4f}.")
    return "\n\n".join(["## How the rows were made", "\n".join(lines), "\n".join(f"* {note}" for note in notes)])
