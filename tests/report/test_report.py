"""The page of one run: what it answers, that it holds what was measured, and that nothing in it acts."""

import base64
import html
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.conftest import PHOTOS, read_photo
from tests.report.runs import HOSTILE, SUMMARY, evaluated, line, said, write_run
from vitcomposer import config
from vitcomposer.cli import COMMANDS, main
from vitcomposer.data.jpeg.upright import with_mark
from vitcomposer.data.labeled_sets import open_split
from vitcomposer.report import has_report, report_at_end, write_report
from vitcomposer.report.answers import answers, learning
from vitcomposer.report.charts import Series, chart, si
from vitcomposer.report.photos import SIDE, find_photos, small_picture
from vitcomposer.report.story import command_words, read_story

CONFIG = {"recipe": "supervised", "model": {"num_classes": 3, "name": "deit"}}


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    lines = [evaluated(step) if step % 10 == 0 else line(step) for step in range(1, 301)]
    environment = {"python": "3.11", "command": f"train.py demo run.name={HOSTILE}", "packages": {"torch": HOSTILE}}
    names = [HOSTILE, "b" * 300, "c"]
    folder = write_run(
        tmp_path / "deit<s>",
        lines,
        summary_json=SUMMARY,
        config_yaml=f"name: {HOSTILE}",
        environment_json=environment,
        class_names_json=names,
    )
    return said(folder, [0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 0, 2, 2], "predictions_ema.csv")


def test_page_answers_what_is_asked_first(whole_run: Path) -> None:
    path = write_report(whole_run)
    text = path.read_text().replace("\u00a0", " ")
    assert path == whole_run / "report.html"
    for shown in ("5,321 images/s", "8.3 GPU-hours", "8 x NVIDIA H200, 1 h 2 min", "6 GFLOP", "3.0 GiB", "2 % of the"):
        assert shown in text
    assert "60.0 ± 17.3 %" in text, "of the average, which is better, on the eight images it was measured on"
    assert "Two of them (95 %): 28.2 to 85.1 %." in text
    assert "3 of 8 images are wrong (average (EMA) of step 300)." in text
    assert text.count("<svg ") >= 5 and text.count('role="img"') == text.count("<svg ")


def test_nothing_in_the_page_acts_or_is_fetched(whole_run: Path) -> None:
    text = write_report(whole_run).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "<h1>deit&lt;s&gt;</h1>" in text
    assert not re.search(r'(src|href)="(?!data:image/jpeg;base64,)', text) and "url(" not in text
    assert "\u202e" not in text and "\x1b" not in text and "\\u202e" in text
    assert not re.search(r"<[^>]*\son\w+=", text), "no handler of an event"
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text


def test_mistakes_are_listed_where_their_images_are_not_here(whole_run: Path) -> None:
    text = write_report(whole_run).read_text().replace("\u00a0", " ")
    assert "There are no pictures" in text and "<td>image 1</td>" not in text
    assert f"taken for <b>{'b' * 300}</b>: 2 of 3 (67 %)" in text
    assert "The mean of the 3 classes is" in text


def test_of_unequal_classes_their_mean_is_told_first(tmp_path: Path) -> None:
    lines = [evaluated(step) | {"metrics/ema/class_top1": 0.7} for step in (1, 2)]
    folder = said(write_run(tmp_path / "a", lines), [0] * 8 + [1, 1], [0] * 8 + [0, 1], "predictions_ema.csv")
    quality = answers(read_story(folder))[1]
    assert quality.answer == "75.0 \u00b1 17.7 %"
    assert quality.behind.startswith("Mean of the 2 classes of the average (EMA), which have 2 to 8 images")
    assert quality.behind.endswith("Top-1 of all 10 images: 60.0 \u00b1 15.5 %.")
    text = write_report(folder).read_text().replace("\u00a0", " ")
    assert "<figcaption>Mean of the classes" in text and "Mean of classes, average, EMA</th><td>75.0" in text


def accuracies(*values: float) -> list[dict[str, Any]]:
    return [{"step": at, "epoch": at, "metrics/eval/top1": value} for at, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("lines", "answer"),
    [
        (accuracies(0.2, 0.5, 0.9), "Yes, and it goes on"),
        (accuracies(0.2, 0.9, 0.9, 0.9, 0.9), "Yes"),
        (accuracies(0.2, 0.9), "Yes"),
        (accuracies(0.2, 0.95, 0.6), "It was"),
        (accuracies(0.33, 0.34), "Not shown"),
        (accuracies(0.9), "Yes"),
        ([line(step) for step in range(1, 50)], "The loss falls"),
        ([{"step": step, "loss/train/total": 1.0 + step} for step in range(9)], "The loss does not fall"),
        ([line(1)], "Not known yet"),
        ([], "Not known yet"),
    ],
)
def test_whether_it_learns(lines: list[dict[str, Any]], answer: str, tmp_path: Path) -> None:
    identity = {"config": CONFIG, "images": {"val": {"samples": 400}}}
    story = read_story(write_run(tmp_path / "run", lines))
    story = type(story)(**{**vars(story), "settings": {"model.num_classes": 3}, "images": identity["images"]})
    assert learning(story).answer == answer


def test_run_without_labels_shows_its_neighbours_and_no_confusion(tmp_path: Path) -> None:
    measured = {"knn/top1": 0.5, "knn/top1_k10": 0.5, "knn/top1_k100": 0.4, "knn/top1_k20": 0.45}
    lines = [line(step, **measured) for step in range(1, 40)]
    text = write_report(write_run(tmp_path / "swav", lines, summary_json={"recipe": "swav"})).read_text()
    assert "confuse" not in text
    curve = text[text.index("<figcaption>k-NN top-1") :].partition("</figure>")[0]
    assert curve.index("k = 10<") < curve.index("k = 20<") < curve.index("k = 100<")
    assert "k-NN top-1, k = 100" in text


def test_attention_and_everything_else_logged_is_drawn(tmp_path: Path) -> None:
    gates = {f"attention/gate/layer{i}/head{j}": 0.7 for i in range(1, 8) for j in (1, 2)}
    reach = {f"attention/nonlocality/layer{i}": 2.0 + i for i in range(1, 25)}
    heads = {"metrics/eval/top1_a": 0.1, "metrics/eval/top1_b": 0.2, "swav/prototype_usage": 0.9}
    folder = write_run(tmp_path / "run", [line(step, **gates, **reach, **heads) for step in (1, 2)])
    text = write_report(folder).read_text()
    assert text.count("Gates of layer") == 14, "a picture of each layer, with its words"
    far = text[text.index("<figcaption>How far attention") :].partition("</figure>")[0]
    assert far.count('class="line"') == 24 and far.count('class="name"') == 12
    more = text[text.index("More measurements") :].partition("</details>")[0]
    captions = re.findall("<figcaption>(.*?)</figcaption>", more)
    assert captions == ["metrics/eval/top1", "swav/prototype_usage"], "the heads of a probe share a picture"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [line(1)],
        [line(step) for step in range(1, 4)],
        [evaluated(1)],
        [{"step": 1, "epoch": 0, "loss/train/total": None}],
        [{"step": 4, "epoch": 1, "metrics/eval/top1": 0.5}],
        [{"step": step, "epoch": 0, "loss/train/total": 1e299 * (-1) ** step} for step in range(4)],
        [{"step": step, "epoch": 0, "loss/train/total": 1 + step * 1e-16} for step in range(4)],
    ],
    ids=["empty", "one-step", "no-evaluation", "one-evaluation", "nan-loss", "evaluation-only", "huge", "tiny"],
)
def test_young_run_gets_a_report(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "young", lines)
    text = write_report(folder).read_text()
    assert "has not ended yet" in text and "nan" not in text.lower().replace("finance", "") and "inf" not in text


@pytest.mark.parametrize("summary", [[], {"seconds": "x", "world_size": -1, "device": [], "train_flops": {}}, "{"])
def test_damaged_files_are_left_out_and_named(summary: Any, tmp_path: Path, capsys: Any) -> None:
    environment = {"cpu": 3, "packages": [], "command": "train.py 'a", "gpus": 1, "python": 3}
    folder = write_run(tmp_path / "run", [evaluated(3)], summary_json=summary, environment_json=environment)
    (folder / "predictions_ema.csv").write_text("half")
    (folder / "class_names.json").write_text("{}")
    (folder / "config.yaml").write_text(": :")
    text = write_report(folder).read_text()
    errors = capsys.readouterr().err
    for name in ("predictions_ema.csv", "class_names.json", "config.yaml"):
        assert name in text and name in errors


def test_torn_last_line_is_left_out(whole_run: Path) -> None:
    before = write_report(whole_run).read_text()
    with open(whole_run / "metrics.jsonl", "a") as file:
        file.write('{"step": 301, "ep')
    assert write_report(whole_run).read_text() == before


def test_folder_without_metrics_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="RUN must be the folder of a run.*got .*Give the folder"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: RUN must be the folder of a run")


def test_what_keeps_a_report_from_being_written_ends_no_run(whole_run: Path, capsys: Any) -> None:
    (whole_run / "report.html").mkdir()
    report_at_end(whole_run)
    assert re.search(r"^note: .*report\.html could not be written: IsADirectoryError", capsys.readouterr().err, re.M)
    (whole_run / "report.html").rmdir()
    assert not has_report(whole_run)
    report_at_end(whole_run)
    assert has_report(whole_run)
    os.utime(whole_run / "report.html", (1, 1))
    assert not has_report(whole_run), "a later number came"


def test_lines_keep_their_ends_and_their_mean_when_they_are_thinned() -> None:
    count = 37_530
    text = chart("t", [Series("a", range(count), range(count))], x_name="x", y_name="y")
    points = re.search(r'class="line" d="M([^"]+)"', text)
    assert points is not None and len(points[1].split("L")) == 240
    assert [si(value) for value in (0, 0.05, 1234, 35e6, 4e-5, 2.5e18, -1500)] == [
        *("0", "0.05", "1.23k", "35M", "4e-05", "2.5E", "-1.5k"),
    ]


def distance(address: str, image: Image.Image) -> float:
    """Mean difference of a picture in a page from the middle of an image, of 255."""
    shown = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    return float(np.abs(np.asarray(shown, int) - np.asarray(ImageOps.fit(image, (SIDE, SIDE)), int)).mean())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    read_photo("china").resize((301, 203)).save(buffer, "JPEG", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(buffer))
    address = small_picture(with_mark(buffer.getvalue(), orientation))
    assert distance(address, upright) < 6
    assert orientation == 1 or distance(address, ImageOps.mirror(upright)) > 20


def test_run_has_the_photos_of_its_mistakes(trained_run: Path, photo_mds: Path) -> None:
    """The report that the run itself has written."""
    story = read_story(trained_run)
    assert story.said is not None
    photos, why = find_photos(story, story.said.sample_id.tolist())
    assert len(photos) == len(story.said.sample_id) and why == ""
    images = open_split(str(photo_mds / "val"), 8).samples
    for sample_id in (0, 17, 47):
        stored = Image.open(io.BytesIO(bytes(images[sample_id]["image"]))).convert("RGB")
        assert distance(photos[sample_id], stored) < 6
    text = (trained_run / "report.html").read_text()
    wrong = int((~story.said.right).sum())
    assert wrong and min(wrong, 12) <= text.count("<img ") <= 36 and "There are no pictures" not in text
    assert any(f"taken for <b>{name}</b>" in text for name in PHOTOS)
    assert len(text) < 400_000


@pytest.mark.parametrize(
    ("command", "page", "overrides"),
    [
        ("composer -n 8 train.py yamls/demo.yaml 'run.name=a b'", "yamls/demo.yaml", ["run.name=a b"]),
        ("vitcomposer train deit_s data.local=/x.yaml", "deit_s", ["data.local=/x.yaml"]),
        ("python -m vitcomposer.train --x mine.yml", "mine.yml", []),
        ("python -m pytest tests", None, []),
        ("train.py 'x", None, []),
    ],
)
def test_command_says_yaml_and_overrides(command: str, page: str | None, overrides: list[str], tmp_path: Path) -> None:
    story = read_story(write_run(tmp_path / "run", [], environment_json={"command": command}))
    assert command_words(story) == (page, overrides)


def test_what_differs_from_the_yaml_is_shown(tmp_path: Path) -> None:
    cfg = config.load("demo", ["max_duration=9ep", "algorithms.EMA=null"])
    command = "train.py demo max_duration=9ep algorithms.EMA=null"
    folder = write_run(tmp_path / "run", [], environment_json={"command": command, "git_commit": "abc"})
    (folder / "config.yaml").write_text(config.to_yaml(cfg))
    text = write_report(folder).read_text()
    table = text[text.index("What differs from demo") :].partition("</table>")[0]
    table = table.replace("<wbr>", "")
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("<tr>")[2:]]
    assert rows == [["max_duration", "60ep", "9ep"], ["algorithms.EMA.smoothing", "0.99", "-"]] + rows[2:]
    assert [row[0] for row in rows[2:]] == ["algorithms.EMA.update_interval"]
    assert f"git checkout abc\n{command}" in text


def test_commands_that_it_gives_are_there_and_take_what_it_gives(trained_run: Path) -> None:
    text = html.unescape(re.sub("<[^>]+>", "\n", (trained_run / "report.html").read_text()))
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if "vitcomposer " in line[:40]]
    given = {words[1]: words[2:] for words in lines if words[0].endswith("vitcomposer")}
    assert given.keys() == {"train", "predict", "export", "report"}
    assert given.keys() <= {command.name for command in COMMANDS}
    page, name = given["train"]
    assert config.load(page, [name]).run.name == "photos_again"
    assert {given[each][0] for each in ("predict", "export", "report")} == {str(trained_run)}


def test_photos_of_other_images_are_not_shown(trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    story = read_story(run)
    for change, why in (
        ({"data.local": str(tmp_path)}, "are not in"),
        ({"data.val_split": "train"}, "other images"),
    ):
        moved = type(story)(**{**vars(story), "settings": {**story.settings, **change}})
        photos, reason = find_photos(moved, [1])
        assert photos == {} and why in reason


def test_command_needs_no_torch(trained_run: Path, tmp_path: Path) -> None:
    """It answers in half a second of CPU."""
    out = tmp_path / "page.html"
    code = (
        "import sys; from vitcomposer.cli import main; status = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", f"{code}; sys.exit(status)", "report", str(trained_run), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(out) and "Is it learning?" in done.stdout
    assert out.read_text() == (trained_run / "report.html").read_text()
    assert json.loads((trained_run / "environment.json").read_text())["git_commit"] in out.read_text()
