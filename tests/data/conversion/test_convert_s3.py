"""Conversion to a bucket of a real S3 server on the loopback interface."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_train, tiny_photo_overrides
from tests.data.conversion.conversion import read_shards, stream, tree
from tests.faults.object_store import bucket as bucket
from tests.faults.object_store import client
from tests.faults.object_store import server as server
from vitcomposer.data.conversion.sources import FolderSource
from vitcomposer.data.conversion.write import convert

pytestmark = pytest.mark.timeout(120)


def test_bucket_holds_what_a_folder_would(folder: Path, tmp_path: Path, bucket: str) -> None:
    from vitcomposer.stores.objects import open_store

    url = f"{bucket}/deep/images"
    local = tmp_path / "local"
    (folder / "train/cat/000.JPEG").write_bytes(b"x")
    convert(FolderSource(folder), local, workers=1, shard_size="8kb", max_bad_fraction=0.05)
    summary = convert(FolderSource(folder), url, workers=2, shard_size="8kb", max_bad_fraction=0.05)
    store = open_store(url)
    assert (store.read("left_out.csv") or b"").startswith(b"split,path,reason\ntrain,train/cat/000.JPEG,no image")
    remote = {name: hashlib.sha256(store.read(name) or b"").hexdigest() for name in store.sizes()}
    assert remote == tree(local)
    assert json.loads((local / "summary.json").read_text())["splits"] == summary
    assert stream(tmp_path / "cache", "train", remote=url) == read_shards(local, "train")
    seen: list[tuple[int, int]] = []
    options = {"shard_size": "8kb", "max_bad_fraction": 0.05}
    convert(FolderSource(folder), url, workers=1, on_progress=lambda *counts: seen.append(counts), **options)
    assert seen == [(35, 35)]


def test_bucket_conversion_continues_from_its_markers(folder: Path, tmp_path: Path, bucket: str) -> None:
    from vitcomposer.stores.objects import open_store

    url = f"{bucket}/broken"
    convert(FolderSource(folder), url, workers=1, shard_size="8kb")
    connection = client()
    for name in ("train/index.json", "train/shard.00001.mds", ".convert/train/done/00001.json", "summary.json"):
        connection.delete_object(Bucket="converted", Key=f"broken/{name}")
    seen: list[tuple[int, int]] = []
    convert(FolderSource(folder), url, workers=1, shard_size="8kb", on_progress=lambda *counts: seen.append(counts))
    assert 0 < seen[0][0] < 35 and seen[1:] == [(count, 35) for count in range(seen[0][0], 36)]
    convert(FolderSource(folder), tmp_path / "local", workers=1, shard_size="8kb")
    store = open_store(url)
    assert {name: hashlib.sha256(store.read(name) or b"").hexdigest() for name in store.sizes()} == tree(
        tmp_path / "local"
    )


def test_parts_in_a_bucket_are_merged_to_what_one_conversion_makes(folder: Path, tmp_path: Path, bucket: str) -> None:
    from vitcomposer.data.conversion.parts import convert_part, merge
    from vitcomposer.stores.objects import open_store

    url = f"{bucket}/parts"
    for index in (1, 0):
        convert_part(FolderSource(folder), url, index, 2, workers=1, shard_size="8kb")
    convert(FolderSource(folder), tmp_path / "one", workers=1, shard_size="8kb")
    assert json.loads((tmp_path / "one/summary.json").read_text())["splits"] == merge(url)
    store = open_store(url)
    names = [name for name in store.sizes() if "/shares/" not in name]
    assert {name: hashlib.sha256(store.read(name) or b"").hexdigest() for name in names} == tree(tmp_path / "one")


def test_bucket_that_is_missing_is_one_error(folder: Path, bucket: str) -> None:
    with pytest.raises(ValueError, match="s3://nothing-here/x cannot be reached at http://127.0.0.1"):
        convert(FolderSource(folder), "s3://nothing-here/x", workers=1)


def test_bucket_is_inspected_like_a_folder(folder: Path, bucket: str) -> None:
    from vitcomposer.data.conversion.inspect import inspect_data

    url = f"{bucket}/inspected"
    convert(FolderSource(folder), url, workers=1, shard_size="8kb")
    reports = inspect_data(url, verify=True)
    assert [(report.name, report.samples, report.problems) for report in reports] == [
        ("train", 28, []),
        ("val", 7, []),
    ]
    assert reports[0].first_sample.startswith("image: ")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_run_streams_from_a_bucket(folder: Path, tmp_path: Path, bucket: str, workers: str) -> None:
    url = f"{bucket}/streamed{workers}"
    convert(FolderSource(folder), url, workers=1, shard_size="8kb")
    overrides = [
        *tiny_photo_overrides(tmp_path / "cache", tmp_path, "s3"),
        f"data.remote={url}",
        f"data.num_workers={workers}",
        "model.num_classes=3",
        "augment.repeated_augmentation=1",
        "global_train_batch_size=4",
        "max_duration=1ep",
    ]
    assert run_train([str(ROOT / "yamls/deit_ti.yaml"), *overrides]) == 0
    assert json.loads((tmp_path / "s3" / "summary.json").read_text())["images_seen"] == 28
    cached = {path.name for path in (tmp_path / "cache/train").glob("*.mds")}
    index = json.loads((tmp_path / "cache/train/index.json").read_text())
    assert cached == {shard["raw_data"]["basename"] for shard in index["shards"]}
