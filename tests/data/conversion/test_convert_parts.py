"""Conversion in parts on several machines: one result, whoever makes which part, when, and how often."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.data.conversion.conversion import jpeg, run_cli, tree, write_images
from vitcomposer.cli import main
from vitcomposer.data.conversion.encode import StoreOptions
from vitcomposer.data.conversion.parts import convert_part, merge
from vitcomposer.data.conversion.sources import FolderSource, ListSource
from vitcomposer.data.conversion.write import convert

pytestmark = pytest.mark.timeout(120)

VARIABLES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")


def make(folder: Path, out: Path, *parts: int, count: int, **options) -> None:
    for index in parts:
        convert_part(FolderSource(folder), out, index, count, **{"workers": 1, "shard_size": "8kb", **options})


def data_set(out: Path) -> dict[str, str]:
    """All files but the markers of parts."""
    return {name: digest for name, digest in tree(out).items() if "/shares/" not in name}


@pytest.mark.parametrize("count", [1, 3, 40])
def test_merged_parts_equal_one_conversion(folder: Path, tmp_path: Path, count: int) -> None:
    (folder / "train/cat/000.JPEG").write_bytes(jpeg(0)[:300])
    summary = convert(FolderSource(folder), tmp_path / "one", workers=1, shard_size="8kb", max_bad_fraction=0.05)
    make(folder, tmp_path / "out", *reversed(range(count)), count=count, max_bad_fraction=0.05)
    assert not (tmp_path / "out/train/index.json").exists()
    assert merge(tmp_path / "out") == summary
    assert data_set(tmp_path / "out") == tree(tmp_path / "one")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    make(folder, tmp_path / "out", 0, count=count, max_bad_fraction=0.05)
    assert merge(tmp_path / "out") == summary
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_part_writes_its_shards_alone(folder: Path, tmp_path: Path) -> None:
    convert(FolderSource(folder), tmp_path / "one", workers=1, shard_size="8kb")
    make(folder, tmp_path / "out", 1, count=3)
    shards = sorted((tmp_path / "one").rglob("*.mds"))
    found = sorted((tmp_path / "out").rglob("*.mds"))
    assert [path.relative_to(tmp_path / "out") for path in found] == [
        path.relative_to(tmp_path / "one") for path in shards[1::3]
    ]


def test_merge_names_the_parts_that_are_missing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="holds none that is done"):
        merge(out)
    make(folder, out, 0, 3, count=5)
    with pytest.raises(ValueError, match="missing is part 1, 2, 4 of 5"):
        merge(out)
    make(folder, out, 1, count=2)
    with pytest.raises(
        ValueError, match="missing is part 0 of 2 and 1, 2, 4 of 5. It was begun with different --parts"
    ):
        merge(out)
    make(folder, out, 0, count=2)
    convert(FolderSource(folder), tmp_path / "one", workers=1, shard_size="8kb")
    merge(out)
    assert data_set(out) == tree(tmp_path / "one")


def test_part_with_more_bad_images_than_the_split_may_have_is_not_done_until_it_may(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "train/cat/000.JPEG").write_bytes(jpeg(0)[:300])
    failed = []
    for index in range(4):
        try:
            make(folder, tmp_path / "out", index, count=4)
        except ValueError as error:
            failed.append(index)
            assert "train/cat/000.JPEG" in str(error) and "1 of 28 in the split train, got 0.01" in str(error)
    assert len(failed) == 1
    with pytest.raises(ValueError, match=f"missing is part {failed[0]} of 4"):
        merge(tmp_path / "out")
    make(folder, tmp_path / "out", *failed, count=4, max_bad_fraction=0.05)
    assert merge(tmp_path / "out")["train"]["left_out"] == 1


def test_merge_counts_the_bad_images_of_all_parts(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in range(4):
        (folder / f"train/cat/00{number}.JPEG").write_bytes(jpeg(number)[:300])
    make(folder, out, *range(3), count=3, max_bad_fraction=0.11)  # three of 28 in one part
    options = {"workers": 1, "shard_size": "8kb", "max_bad_fraction": 0.11}
    assert sum(convert_part(FolderSource(folder), out, index, 3, **options) for index in range(3)) == 4
    with pytest.raises(ValueError, match=r"4 of 28 in the split train, got 0\.1"):
        merge(out)
    assert not (out / "train/index.json").exists()
    with pytest.raises(ValueError, match=r"got 0 \(--strict\)"):
        merge(out, max_bad_fraction=0.0)
    assert main(["convert", "merge", str(out), "--max-bad-fraction", "0.15"]) == 0
    assert (out / "left_out.csv").read_text().count("Truncated File Read") == 4


def test_parts_of_two_plans_are_refused_and_made_again(folder: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    make(folder, out, 0, 2, count=3)
    with pytest.raises(ValueError, match="--seed was 0 and is 1"):
        make(folder, out, 1, count=3, seed=1)
    # two machines that begin at the same moment both find no plan on record: each writes its own
    make(folder, other, 1, count=3, seed=1)
    for path in other.rglob("*"):
        name = path.relative_to(other)
        if path.is_file() and ("done" in name.parts or "shares" in name.parts or path.suffix == ".mds"):
            (out / name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="split train .* part 1 of 3 is not: --seed was 0 and is 1. Make it again"):
        merge(out)
    make(folder, out, 1, count=3)
    with pytest.raises(ValueError, match="split val .* is not: .*shards written over"):
        merge(out)
    make(folder, out, 0, 2, count=3)
    merge(out)
    convert(FolderSource(folder), tmp_path / "one", workers=1, shard_size="8kb")
    assert data_set(out) == tree(tmp_path / "one")


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    for split, names in (("train", "ab"), ("val", "ac")):
        write_images(tmp_path / split, dict.fromkeys(names, 2))
        lines = [f"{name}/{number:03}.JPEG,{name}\n" for name in names for number in range(2)]
        (tmp_path / f"{split}.csv").write_text("".join(lines))
        source = ListSource(tmp_path / f"{split}.csv", split=split, root=tmp_path / split)
        convert_part(source, tmp_path / "out", 0, 1, workers=1)
    with pytest.raises(ValueError, match="must have the same classes"):
        merge(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part", "3", "--parts", "3"], "--part must be from 0 to 2 with --parts 3, got 3"),
        (["--part", "-1", "--parts", "3"], "--part must be a number from 0, or auto, got '-1'"),
        (["--part", "0", "--parts", "0"], "--parts must be 1 or more, got 0"),
        (["--part", "auto", "--parts", "3"], "unless SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX is set"),
        (["--part", "0"], "--parts must be given with --part"),
        (["--parts", "3"], "--parts must be given with --part or --engine ray, got 3"),
        (["--engine", "ray"], "--parts must be given with --engine ray"),
        (["--engine", "ray", "--parts", "3", "--part", "0"], "--part must be left out with --engine ray"),
    ],
)
def test_wrong_part_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert main(["convert", "digits", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


def kill_amid(process: subprocess.Popen, out: Path, markers: str) -> dict[Path, int]:
    """Kill -9 after five done-markers; they and their times."""
    deadline = time.monotonic() + 60
    while len(found := list(out.glob(f".convert/train/done/{markers}"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    return {path: path.stat().st_mtime_ns for path in found}


def test_parts_at_once_with_one_killed_give_the_same_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    write_images(images, {"a": 120, "b": 120}, size=150)
    options = ["--shard-size", "20kb", "--workers", "1", "--no-seekable", "--part", "auto", "--parts", "2"]
    args = ["convert", "folder", str(images), str(out), *options]
    command = [sys.executable, "-m", "vitcomposer", *args]
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    killed = subprocess.Popen(command, env={**clean, VARIABLES[0]: "0"}, stdout=subprocess.DEVNULL)
    other = subprocess.Popen(command, env={**clean, VARIABLES[1]: "1"}, stdout=subprocess.DEVNULL)
    written = kill_amid(killed, out, "*[02468].json")
    assert other.wait() == 0 and {path.name for path in out.rglob("*-of-*")} == {"00001-of-00002.json"}
    monkeypatch.setenv(VARIABLES[0], "0")
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "continuing" in text and "part 0 of 2 is done" in text
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in written.items())
    assert main(["convert", "merge", str(out)]) == 0
    convert(FolderSource(images), tmp_path / "one", workers=1, shard_size="20kb", stored=StoreOptions(seekable=False))
    assert data_set(out) == tree(tmp_path / "one")


@pytest.mark.slow
def test_local_ray_killed_and_called_again_gives_the_same_data_set(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    images, out = tmp_path / "images", tmp_path / "out"
    write_images(images, {"a": 300, "b": 300}, size=150)
    args = ("convert", "folder", images, out, "--shard-size", "20kb", "--workers", "2", "--engine", "ray")
    args = (*args, "--parts", "4")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["HOME"] = str(tmp_path)  # where Ray keeps a token
    command = [sys.executable, "-m", "vitcomposer", *map(str, args)]
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    written = kill_amid(killed, out, "*.json")
    assert not (out / "train/index.json").exists()
    time.sleep(5)  # tasks of a dead driver end by themselves
    result = run_cli(*args, env=environment)
    assert result.returncode == 0, result.stderr
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in written.items())
    convert(FolderSource(images), tmp_path / "one", workers=1, shard_size="20kb")
    assert data_set(out) == tree(tmp_path / "one")


@pytest.mark.slow
def test_spark_recipe_of_the_documentation_gives_the_same_data_set(tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    write_images(tmp_path / "photos", {"a": 6, "b": 6})
    spark = (ROOT / "docs/convert.md").read_text().partition("## Spark")[2]
    code = re.findall(r"```python\n(.*?)```", spark, re.S)[0].replace("/shared/", f"{tmp_path}/")
    (tmp_path / "recipe.py").write_text(code)
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    result = subprocess.run([sys.executable, tmp_path / "recipe.py"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    convert(FolderSource(tmp_path / "photos"), tmp_path / "one", workers=1)
    assert data_set(tmp_path / "datasets/photos") == tree(tmp_path / "one")
