"""Says which labels count in a metric, and how unequal the classes of a data set are."""

from pathlib import Path

from vitcomposer.json_file import read_json
from vitcomposer.schema import Data

IGNORE_LABEL = -100  # of padding: torch's cross-entropy and torchmetrics (ignore_index) leave it out
UNEQUAL = 3.0  # above it the mean of the classes' accuracies is told before that of the images
_MOST_BYTES = 1 << 24


def class_imbalance(data: Data) -> float | None:
    """Training images of the largest class over those of the smallest, by the ``summary.json`` that convert wrote.

    None where there is no such file, such as for a data set in a bucket, or where a class has no image.
    """
    if data.source != "mds" or data.local is None:
        return None
    try:
        summary = read_json(Path(data.local, "summary.json"), _MOST_BYTES)
        counts = [int(count) for count in summary["splits"][data.train_split]["class_counts"].values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # it is not ours, or damaged
        return None
    return max(counts) / min(counts) if counts and min(counts) > 0 else None
