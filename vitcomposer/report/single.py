"""Writes the report of one run: answers, curves, mistakes, how to do it again and what to do next, on one page."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from vitcomposer.escape import for_terminal
from vitcomposer.report import curves
from vitcomposer.report.answers import answers
from vitcomposer.report.mistakes import mistakes
from vitcomposer.report.page import cards, charts, code, details, page, section, shown, table, text
from vitcomposer.report.statistics import class_mean, class_scores, standard_error
from vitcomposer.report.story import EMA, Story, changed_from_yaml, command_words, read_story
from vitcomposer.report.words import duration, flops, percent, setting
from vitcomposer.runs import layout
from vitcomposer.whole_files import write_whole

_CLASSIFIERS = ("supervised", "distill")
_MEASUREMENTS = ("probe", "knn")  # recipes that train no network of their own


def write_report(run_folder: str | Path) -> Path:
    """Write ``report.html`` into the folder of a run, also of one that goes on, and return its path.

    Raises:
        ValueError: The folder has no ``metrics.jsonl``.
    """
    story = read_story(run_folder)
    for problem in story.problems:
        print(for_terminal(problem), file=sys.stderr)
    return write_page(story)


def write_page(story: Story, out: Path | None = None) -> Path:
    """Write the report of a run that was read, into its folder unless told where, and return the path."""
    path = out or story.folder / layout.REPORT
    write_whole(path, report_of(story))
    return path


def has_report(run_folder: str | Path) -> bool:
    """Whether the report of a finished run is there, later than its last number, or cannot be made."""
    metrics, report = Path(run_folder, layout.METRICS), Path(run_folder, layout.REPORT)
    return not metrics.is_file() or (report.is_file() and report.stat().st_mtime_ns >= metrics.stat().st_mtime_ns)


def report_at_end(run_folder: str | Path) -> None:
    """:func:`write_report` for a run that has ended: what keeps it from being written is said, and ends nothing."""
    try:
        write_report(run_folder)
    except Exception as error:  # of whatever a run left: the weights are what it was for
        reason = for_terminal(f"{type(error).__name__}: {error}")
        print(f"note: {Path(run_folder, layout.REPORT)} could not be written: {reason}", file=sys.stderr)


def report_of(story: Story) -> str:
    """The page."""
    state = "" if story.finished else " It has not ended yet, or was cut off."
    recipe, model = (str(story.settings.get(key) or "?") for key in ("recipe", "model.name"))
    parts = [
        *(text(problem, "soft") for problem in story.problems),
        cards(answers(story)),
        section("Over the run", charts(curves.main_charts(story))),
        mistakes(story),
        section("How good is it?", table(_scores(story))),
        section("How do I do it again?", *_again(story)),
        section("What next?", *_next(story)),
        section(
            "Everything else",
            details("Numbers", table(_numbers(story))),
            details("Attention", charts(curves.attention_charts(story))),
            details("More measurements", charts(curves.more_charts(story))),
            details("Configuration", *_file(story.folder / layout.CONFIG)),
            details("Environment", *([code(json.dumps(story.environment, indent=2))] if story.environment else [])),
        ),
    ]
    return page(story.name, f"{model}, recipe {recipe}.{state}", parts)


def _scores(story: Story) -> list[tuple[str, str]]:
    """Every accuracy of the last evaluation."""
    images, rows = story.evaluated_images, []
    for kind, weights in (("eval", "trained weights"), (EMA, "average, EMA")):
        said = story.predictions.get(kind)
        if said is not None:
            rows.append((f"Mean of classes, {weights}", percent(*class_mean(class_scores(said)))))
        for key, name in (("top1", "Top-1"), ("top5", "Top-5")):
            value = story.last(f"metrics/{kind}/{key}")
            if value is not None:
                rows.append((f"{name}, {weights}", percent(value, standard_error(value, images) if images else None)))
        loss = story.last(f"metrics/{kind}/loss")
        if loss is not None:
            rows.append((f"Loss, {weights}", f"{loss:.4f}"))
    for key, (k,) in curves.numbered(story, r"knn/top1_k(\d+)").items():
        value = story.last(key) or 0.0
        rows.append((f"k-NN top-1, k = {k}", percent(value, standard_error(value, images) if images else None)))
    if rows and images:
        rows.append(("Images", f"{images:,}; \u00b1 is one standard error, the root of p (1 - p) / n"))
    return rows


def _again(story: Story) -> list[str]:
    command, (page_name, overrides) = story.environment.get("command"), command_words(story)
    commit = story.environment.get("git_commit")
    lines = [f"git checkout {commit}"] if isinstance(commit, str) else []
    lines += [command] if isinstance(command, str) else []
    if (story.folder / layout.CONFIG).is_file():
        kept, name = (shlex.quote(str(each)) for each in (story.folder / layout.CONFIG, f"{story.name}_again"))
        lines += ["# or, from the settings that the run kept:", f"vitcomposer train {kept} run.name={name}"]
    parts = [code("\n".join(lines))] if lines else []
    if story.environment.get("git_dirty"):
        parts.append(text("Files of the code were changed after that commit.", "soft"))
    changed = changed_from_yaml(story)
    if changed:
        rows = [(key, *("-" if value is None else setting(value) for value in both)) for key, *both in changed]
        parts.append(f"<h3>What differs from {shown(str(page_name))}</h3>{table(rows, ('', 'yaml now', 'this run'))}")
    elif changed is not None:
        parts.append(text(f"Nothing differs from {page_name} as it is now."))
    elif overrides:
        parts.append(text(f"Given on the command line: {' '.join(overrides)}"))
    parts.append(table(_facts(story)))
    return parts


def _facts(story: Story) -> list[tuple[str, str]]:
    """Seed, versions and images."""
    environment, rows = story.environment, []
    if "seed" in story.settings:
        rows.append(("Seed", setting(story.settings["seed"])))
    packages = environment.get("packages")
    versions = [f"Python {environment['python']}"] if isinstance(environment.get("python"), str) else []
    if isinstance(packages, dict):
        versions += [f"{name} {version}" for name, version in packages.items() if isinstance(version, str)]
    rows += [("Versions", ", ".join(versions))] if versions else []
    for split in ("train", "val"):
        found = story.images.get(split)
        if isinstance(found, dict) and isinstance(found.get("samples"), int):
            index = found.get("index")
            mark = f", index.json of sha256 {index[:12]}" if isinstance(index, str) else ""
            place = story.settings.get("data.local") or found.get("source")
            rows.append((f"Images of {split}", f"{found['samples']:,} of {place}{mark}"))
    return rows


def _next(story: Story) -> list[str]:
    run, recipe = shlex.quote(str(story.folder)), story.settings.get("recipe")
    if not story.finished:
        return [text("The same command goes on from the last checkpoint.")]
    lines = []
    if recipe in _CLASSIFIERS:
        lines += [f"vitcomposer predict {run} FILE_OR_FOLDER", f"vitcomposer export {run} --out exported"]
    elif recipe not in _MEASUREMENTS:
        weights = shlex.quote(str(story.folder / layout.LATEST_CHECKPOINT))
        lines += [f"vitcomposer train probe_linear init.weights={weights}"]
    lines.append(f"vitcomposer report {run} OTHER_RUN        # side by side")
    return [code("\n".join(lines))]


def _numbers(story: Story) -> list[tuple[str, str]]:
    """All of summary.json."""
    forms: dict[str, Any] = {
        "seconds": duration,
        "train_flops": flops,
        "data_wait_fraction": lambda value: f"{value:.1%}",
        "mfu": lambda value: f"{value:.1%}",
        "peak_memory_bytes": lambda value: f"{value / 2**30:.2f} GiB",
        "images_per_sec": lambda value: f"{value:,.0f}",
    }
    rows = []
    for key, value in story.summary.items():
        number = story.number(key)
        known = number is not None and key in forms
        rows.append((key, forms[key](number) if known else "-" if value is None else setting(value)))
    return rows


def _file(path: Path) -> list[str]:
    return [code(path.read_text(errors="replace"))] if path.is_file() else []
