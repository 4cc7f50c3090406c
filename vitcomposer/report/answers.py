"""Answers, in a few words each, what one asks first: is it learning, how good is it, how fast, what did it cost."""

import math

from vitcomposer.report.page import Card
from vitcomposer.report.statistics import (
    SHOWN,
    ClassScore,
    class_mean,
    class_scores,
    interval,
    is_unequal,
    standard_error,
)
from vitcomposer.report.story import Story
from vitcomposer.report.words import duration, flops, hours, percent, whole_percent

_MUCH_WAITING = 0.1  # of the training time
_ENOUGH = 3  # evaluations that make a trend


def answers(story: Story) -> list[Card]:
    """The four of them."""
    return [learning(story), quality(story), speed(story), cost(story)]


def learning(story: Story) -> Card:
    """Whether accuracy, or else the loss, has moved from where it began, and whether it still does."""
    question = "Is it learning?"
    x = x_of(story)
    for key, name in ((f"metrics/{story.kind}/top1", "Top-1"), ("knn/top1", "k-NN top-1")):
        at, values = story.series(key, x)
        if values:
            return Card(question, *_trend(story, name, at, values, x))
    _, losses = story.series("loss/train/total", "step")
    if len(losses) < 2:
        return Card(question, "Not known yet", "Nothing was evaluated, and the loss was logged once at most.")
    part = max(1, len(losses) // 20)
    first, last = (math.fsum(values) / part for values in (losses[:part], losses[-part:]))
    answer = "The loss falls" if last < first else "The loss does not fall"
    return Card(question, answer, f"From {first:.4g} to {last:.4g}. Nothing was evaluated.")


def _trend(story: Story, name: str, at: list[float], values: list[float], x: str) -> tuple[str, str]:
    images, first, last = story.evaluated_images, values[0], values[-1]
    error = standard_error(last, images) if images else 0.0
    chance = 1 / story.classes if story.classes else None
    path = f"{name} went from {percent(first)} to {percent(last)}" if len(values) > 1 else f"{name} is {percent(last)}"
    path += f"; guessing gives {percent(chance)}" if chance else ""
    if chance is not None and last - chance <= SHOWN * (standard_error(chance, images) if images else 0.0):
        return "Not shown", f"{path}."
    best = max(range(len(values)), key=values.__getitem__)
    if values[best] - last > SHOWN * error:
        return "It was", f"{path}. It was {percent(values[best])} at {x} {at[best]:,g}: it has got worse since."
    if len(values) < _ENOUGH:
        return "Yes", f"{path}."
    before = max(values[: min(math.ceil(0.8 * len(values)), len(values) - 1)])
    if last - before > SHOWN * error:
        return "Yes, and it goes on", f"{path}. The last fifth still added: a longer run may add more."
    return "Yes", f"{path}. The last fifth added nothing that is shown."


def x_of(story: Story) -> str:
    """What curves are drawn over: less than an epoch is better told in steps."""
    return "epoch" if story.lines and (story.lines[-1].get("epoch") or 0) >= 1 else "step"


def quality(story: Story) -> Card:
    """The accuracy with its standard error."""
    question, top1, images = "How good is it?", story.top1, story.evaluated_images
    name, weights = "top-1", f" of the {story.weights}" if story.weights else ""
    if top1 is None:
        top1, name, weights = story.last("knn/top1"), "k-NN top-1", ""
    if top1 is None:
        return Card(question, "Not measured", "No accuracy was logged.")
    if not images:
        return Card(question, percent(top1), f"{name}{weights}; on how many images is not known.")
    scores = class_scores(story.said) if story.said is not None else []
    if scores and is_unequal(scores):
        mean, error = class_mean(scores)
        behind = (
            f"Mean of the {len(scores):,} classes{weights}, which have {scores_range(scores)} images; \u00b1 is one "
            f"standard error. Top-1 of all {images:,} images: {percent(top1, standard_error(top1, images))}."
        )
        return Card(question, percent(mean, error), behind)
    low, high = interval(top1, images)
    behind = (
        f"{name}{weights} on {images:,} images, \u00b1 one standard error. Two of them (95 %): "
        f"{100 * low:.1f} to {percent(high)}."
    )
    return Card(question, percent(top1, standard_error(top1, images)), behind)


def scores_range(scores: list[ClassScore]) -> str:
    """From how many images a class has to how many another has."""
    images = [score.images for score in scores]
    return f"{min(images):,} to {max(images):,}"


def speed(story: Story) -> Card:
    """Images a second, and what limits them."""
    question = "How fast is it?"
    rate = story.number("images_per_sec") or story.last("throughput/images_per_sec")
    waited = story.number("data_wait_fraction")
    waited = story.last("throughput/data_wait_fraction") if waited is None else waited
    if rate is None:
        return Card(question, "Not measured", "It took too few steps.")
    if waited is None:
        return Card(question, f"{rate:,.0f} images/s", "In training.")
    limit = "The network is the limit." if waited <= _MUCH_WAITING else "More data.num_workers may save some of it."
    behind = f"{whole_percent(waited)} of the training time waits for data. {limit}"
    return Card(question, f"{rate:,.0f} images/s", behind)


def cost(story: Story) -> Card:
    """Hours of devices, and FLOPs."""
    question, spent = "What did it cost?", story.device_hours
    if spent is None or story.seconds is None:
        return Card(question, "Not measured", "Nothing was logged.")
    facts = [f"{story.ranks} x {device_name(story)}, {duration(story.seconds)} with evaluations and checkpoints"]
    work, used, memory = (story.number(key) for key in ("train_flops", "mfu", "peak_memory_bytes"))
    facts += [flops(work)] if work else []
    facts += [f"{whole_percent(used)} of the peak (MFU)"] if used else []
    facts += [f"{memory / 2**30:.1f} GiB of its memory at most"] if memory else []
    return Card(question, f"{hours(spent)} {hours_name(story)}", f"{'; '.join(facts)}.")


def hours_name(story: Story) -> str:
    """What :attr:`Story.device_hours` are called."""
    return "GPU-hours" if story.on_gpu else "CPU-hours"


def device_name(story: Story) -> str:
    """Such as ``NVIDIA H200`` or ``CPU of 2 cores``."""
    if story.on_gpu:
        return str(story.summary.get("device") or "GPU")
    cpu = story.environment.get("cpu")
    cores = cpu.get("cores") if isinstance(cpu, dict) else None
    return f"process on a CPU of {cores} cores" if isinstance(cores, int) else "process on a CPU"
