"""What an evaluation said about each image is kept, whole, and read back or refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import PHOTOS, VAL_PER_CLASS
from vitcomposer.runs.predictions import Predictions, read_predictions, write_predictions

HEAD = "sample_id,label,prediction,confidence,label_probability,step\n"


@pytest.mark.parametrize(("name", "measured"), [("predictions.csv", ""), ("predictions_ema.csv", "_ema")])
def test_run_keeps_what_its_last_evaluation_said(trained_run: Path, name: str, measured: str) -> None:
    found = read_predictions(trained_run / name)
    summary = json.loads((trained_run / "summary.json").read_text())
    assert found is not None and found.step == summary["steps"]
    assert found.right.mean() == pytest.approx(summary[f"top1{measured}"])
    images = VAL_PER_CLASS * len(PHOTOS)
    assert found.sample_id.tolist() == list(range(images)), "each once, the short last batch too"
    assert np.bincount(found.label).tolist() == [VAL_PER_CLASS] * len(PHOTOS)
    assert np.all(found.confidence >= found.label_probability)
    surer = found.confidence - found.label_probability
    assert np.all(surer[found.right] == 0) and surer[~found.right].max() > 0.01, "a wrong one may be a tie"
    assert found.confidence.min() >= 1 / len(PHOTOS) - 1e-4


def test_two_kinds_of_weights_have_a_file_each(trained_run: Path) -> None:
    raw, average = (read_predictions(trained_run / f"predictions{kind}.csv") for kind in ("", "_ema"))
    assert raw is not None and average is not None
    assert np.array_equal(raw.label, average.label) and not np.array_equal(raw.confidence, average.confidence)


def test_order_of_the_ranks_does_not_matter(tmp_path: Path) -> None:
    share = np.array([0.9, 0.25, np.nan])
    found = Predictions(np.array([7, 2, 4]), np.array([0, 1, 2]), np.array([0, 2, 2]), share, share, 30)
    write_predictions(tmp_path / "p.csv", found)
    lines = ["2,1,2,0.2500,0.2500,30", "4,2,2,nan,nan,30", "7,0,0,0.9000,0.9000,30"]
    assert (tmp_path / "p.csv").read_text() == HEAD + "\n".join(lines) + "\n"
    again = read_predictions(tmp_path / "p.csv")
    assert again is not None and again.sample_id.tolist() == [2, 4, 7] and again.right.tolist() == [False, True, True]
    assert read_predictions(tmp_path / "none.csv") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        HEAD,
        HEAD + "0,1,1,0.5,0.5,3",  # cut
        HEAD + "0,1,1,0.5,0.5\n",
        HEAD + "0,1,1,0.5,0.5,3\n0,1,1,0.5,0.5,3\n",
        HEAD + "0,1,1,1.5,0.5,3\n",
        HEAD + "-1,1,1,0.5,0.5,3\n",
        HEAD + "0,1.5,1,0.5,0.5,3\n",
        HEAD + "0,1e300,1,0.5,0.5,3\n",
        HEAD + "0,16777216,1,0.5,0.5,3\n",
        HEAD + "nan,1,1,0.5,0.5,3\n",
        HEAD + "0,<b>,1,0.5,0.5,3\n",
        HEAD + "0,\u00e9,1,0.5,0.5,3\n",
        "a,b\n1,2\n",
    ],
)
def test_damaged_file_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(ValueError, match=r"p\.csv is not as a run wrote it: .* Delete it"):
        read_predictions(tmp_path / "p.csv")
