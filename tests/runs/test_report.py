import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vitcomposer.runs.report import write_report


def write_run(folder: Path, lines: list[dict[str, Any]], **files: str) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def line(step: int, **metrics: float | None) -> dict[str, Any]:
    speed = {"throughput/images_per_sec": 900.0 + step, "throughput/data_wait_fraction": 0.1}
    return {"step": step, "epoch": step / 10, "lr": 0.1 / step, "loss/train/total": 5.0 / step, **speed, **metrics}


def evaluated(step: int) -> dict[str, Any]:
    return line(step) | {"metrics/eval/top1": 0.5, "metrics/ema/top1": 0.6, "metrics/eval/loss": 2.0}


SUMMARY = {
    "recipe": "supervised",
    "model": "deit_small",
    "top1": 0.7981,
    "top5": None,
    "steps": 375300,
    "seconds": 3725.4,
}


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    lines = [evaluated(step) if step % 10 == 0 else line(step) for step in range(1, 301)]
    return write_run(
        tmp_path / "deit<s>",
        lines,
        summary_json=json.dumps({**SUMMARY, "finished": True, "peak_memory_bytes": 3 * 2**30}),
        config_yaml="recipe: supervised\nname: <script>alert(1)</script>\n",
        environment_json='{"python": "3.11"}',
    )


def test_report_is_one_file_with_picture_summary_and_config(whole_run: Path) -> None:
    path = write_report(whole_run)
    text = path.read_text()
    assert path == whole_run / "report.html"
    for shown in ("79.81%", "375,300", "1 h 02 min 05 s", "3.00", "deit_small", "&quot;python&quot;: &quot;3.11&quot;"):
        assert shown in text
    assert re.search(r"<th>Top-5</th><td>-</td>", text)
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(e) for e in embedded] == [(whole_run / "curves.png").read_bytes()]
    assert not re.search(r'(src|href)="(?!data:)', text), "nothing is fetched"
    assert Image.open(whole_run / "curves.png").size == (1200, 800)


def test_text_of_the_run_is_escaped(whole_run: Path) -> None:
    text = write_report(whole_run).read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "<h1>deit&lt;s&gt;</h1>" in text


def colours(png: bytes) -> int:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    # Saturated pixels: curves are coloured, axes and text are not.
    pixels = image.quantize(256).convert("RGB").getdata()
    return sum(max(p) - min(p) > 60 for p in pixels)


def test_curves_hold_what_was_measured(whole_run: Path, tmp_path: Path) -> None:
    write_report(whole_run)
    bare = write_run(tmp_path / "bare", [{"step": 1, "epoch": 0.1, "loss/train/total": 1.0}])
    write_report(bare)
    assert colours((whole_run / "curves.png").read_bytes()) > 20 * colours((bare / "curves.png").read_bytes()) > 0


def test_run_without_labels_shows_its_neighbours(tmp_path: Path) -> None:
    measured = {"knn/top1": 0.5, "knn/top1_k10": 0.5, "knn/top1_k100": 0.4, "knn/top1_k20": 0.45}
    knn = {key.removeprefix("knn/"): value for key, value in measured.items()}
    lines = [line(step, **measured) for step in range(1, 40)]
    folder = write_run(tmp_path / "swav", lines, summary_json=json.dumps({"recipe": "swav", "knn": knn}))
    text = write_report(folder).read_text()
    assert "<th>k-NN top-1</th><td>50.00% (k = 10), 45.00% (k = 20), 40.00% (k = 100)</td>" in text
    bare = write_run(tmp_path / "bare", [line(step) for step in range(1, 40)])
    write_report(bare)
    assert colours((folder / "curves.png").read_bytes()) > colours((bare / "curves.png").read_bytes()) + 1000


def test_attention_and_everything_else_logged_get_pictures(tmp_path: Path) -> None:
    gates = {f"attention/gate/layer{i}/head{j}": 0.7 for i in range(1, 8) for j in (1, 2)}
    reach = {f"attention/nonlocality/layer{i}": 2.0 + i for i in range(1, 13)}
    heads = {"metrics/eval/top1_a": 0.1, "metrics/eval/top1_b": 0.2, "swav/prototype_usage": 0.9}
    folder = write_run(tmp_path / "run", [line(step, **gates, **reach, **heads) for step in (1, 2)])
    assert write_report(folder).read_text().count("<img ") == 3
    with_gates, more = Image.open(folder / "attention.png").size, Image.open(folder / "more.png").size
    (folder / "metrics.jsonl").write_text(json.dumps(line(1, **reach)) + "\n")
    text = write_report(folder).read_text()
    assert text.count("<img ") == 2 and "Attention</h2>" in text and not (folder / "more.png").exists()
    assert Image.open(folder / "attention.png").size[1] < with_gates[1], "no rows of gates"
    assert more == (1200, 280), "a row: the heads of a probe share a picture"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [line(1)],
        [line(step) for step in range(1, 4)],
        [evaluated(1)],
        [{"step": 1, "epoch": 0, "loss/train/total": None}],
        [{"step": 4, "epoch": 1, "metrics/eval/top1": 0.5}],
    ],
    ids=["empty", "one-step", "no-evaluation", "one-evaluation", "nan-loss", "evaluation-only"],
)
def test_young_run_gets_a_report(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "young", lines)
    assert "has not ended yet" in write_report(folder).read_text()


def test_torn_last_line_is_left_out(whole_run: Path) -> None:
    before = write_report(whole_run).read_text()
    with open(whole_run / "metrics.jsonl", "a") as file:
        file.write('{"step": 301, "ep')
    assert write_report(whole_run).read_text() == before


def test_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run_folder must be the folder of a run.*got .*Give the folder"):
        write_report(tmp_path)
