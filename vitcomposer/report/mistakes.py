"""Shows what a classifier confuses: its weakest classes, its worst pairs and its surest mistakes, with their images."""

from collections.abc import Sequence

import numpy as np

from vitcomposer.escape import for_html
from vitcomposer.evaluation.confused import confusions
from vitcomposer.report.page import section, shown, table, text
from vitcomposer.report.photos import SIDE, find_photos
from vitcomposer.report.statistics import class_mean, class_scores, standard_error, surest_mistakes
from vitcomposer.report.story import Story
from vitcomposer.report.words import percent, whole_percent
from vitcomposer.runs.predictions import Predictions

_PAIRS, _PHOTOS_OF_A_PAIR, _SUREST, _CLASSES = 6, 4, 12, 8


def mistakes(story: Story) -> str:
    """The section; empty for a run without labels."""
    found, title = story.said, "What does it confuse?"
    if found is None:
        measured = story.top1 is not None
        return section(title, text("The run kept no predictions of single images.", "soft")) if measured else ""
    wrong = int((~found.right).sum())
    if not wrong:
        return section(title, text(f"Nothing: all {len(found.label):,} images are right."), _classes(story, found))
    worst = confusions(found.label, found.prediction)[:_PAIRS]
    pairs = [(true, guess, _rows_of(found, true, guess)) for true, guess, _ in worst]
    surest = surest_mistakes(found, _SUREST).tolist()
    rows = [*surest, *(row for _, _, each in pairs for row in each[:_PHOTOS_OF_A_PAIR])]
    photos, why = find_photos(story, (int(found.sample_id[row]) for row in rows))
    lead = f"{wrong:,} of {len(found.label):,} images are wrong ({story.weights or 'weights'} of step {found.step:,})."
    parts = [text(lead), text(why, "soft"), "<h3>Worst pairs</h3>"]
    parts.append(f'<div class="pairs">{"".join(_pair(story, found, photos, *pair) for pair in pairs)}</div>')
    parts += ["<h3>Surest mistakes</h3>", _surest(story, found, photos, surest), _classes(story, found)]
    return section(title, *parts)


def _rows_of(found: Predictions, true: int, guess: int) -> list[int]:
    """Of a pair, the surest first."""
    rows = np.flatnonzero((found.label == true) & (found.prediction == guess))
    return rows[np.argsort(-np.nan_to_num(found.confidence[rows]), kind="stable")].tolist()


def _pair(story: Story, found: Predictions, photos: dict[int, str], true: int, guess: int, rows: list[int]) -> str:
    images = int((found.label == true).sum())
    names = [for_html(story.class_name(label)) for label in (true, guess)]
    share = whole_percent(len(rows) / images)
    words = f"<b>{names[0]}</b> taken for <b>{names[1]}</b>: {shown(f'{len(rows)} of {images} ({share})')}"
    return f'<div class="pair">{words}{_strip(story, found, photos, rows[:_PHOTOS_OF_A_PAIR], named=False)}</div>'


def _surest(story: Story, found: Predictions, photos: dict[int, str], rows: list[int]) -> str:
    if any(int(found.sample_id[row]) in photos for row in rows):
        return _strip(story, found, photos, rows, named=True)
    return table(
        [
            (
                f"image {found.sample_id[row]}",
                f"{story.class_name(int(found.prediction[row]))} {percent(float(found.confidence[row]))}",
                f"{story.class_name(int(found.label[row]))} {percent(float(found.label_probability[row]))}",
            )
            for row in rows
        ],
        ("", "said", "is"),
    )


def _strip(story: Story, found: Predictions, photos: dict[int, str], rows: Sequence[int], *, named: bool) -> str:
    """Images side by side, those there are, each with how sure the network was."""
    figures = []
    for row in rows:
        sample_id = int(found.sample_id[row])
        if sample_id not in photos:
            continue
        said, sure = story.class_name(int(found.prediction[row])), float(found.confidence[row])
        true, own = story.class_name(int(found.label[row])), float(found.label_probability[row])
        alt = for_html(f"image {sample_id}: {true} taken for {said}")
        words = shown(f"{whole_percent(sure)} sure")
        if named:
            words = f"said <b>{for_html(said)}</b> {shown(f'{whole_percent(sure)}, is {true} {whole_percent(own)}')}"
        picture = f'<img alt="{alt}" title="{alt}" width="{SIDE}" height="{SIDE}" src="{photos[sample_id]}">'
        figures.append(f"<figure>{picture}{words}</figure>")
    return f'<div class="photos">{"".join(figures)}</div>' if figures else ""


def _classes(story: Story, found: Predictions) -> str:
    """The weakest classes, and the mean of all."""
    scores = class_scores(found)
    rows = []
    for score in scores[:_CLASSES]:
        other = ""
        if score.taken_for is not None:
            label, count = score.taken_for
            other = f"{story.class_name(label)} ({whole_percent(count / score.images)})"
        error = standard_error(score.top1, score.images)
        rows.append((story.class_name(score.label), percent(score.top1, error), f"{score.images:,}", other))
    mean, error = class_mean(scores)
    sure = float(np.nanmean(found.confidence)) if np.isfinite(found.confidence).any() else None
    words = f"The mean of the {len(scores):,} classes is {percent(mean, error)}."
    if sure is not None:
        words += f" It is {percent(sure)} sure in the mean, and right in {percent(float(found.right.mean()))}."
    title = "Weakest classes" if len(scores) > len(rows) else "Classes, the weakest first"
    return f"<h3>{title}</h3>\n{table(rows, ('', 'top-1', 'images', 'mostly taken for'))}\n{text(words)}"
