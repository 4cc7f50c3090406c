"""Records what makes a run this run: its configuration and the images that it began with, beside its checkpoints.

``identity.json`` holds both with a digest, so that a damaged ``config.yaml`` keeps no run from going on, and other
images under the same path are noticed, and other pixels of the same images: it names the resize.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitcomposer.data.jpeg import RESIZE
from vitcomposer.runs import layout
from vitcomposer.runs.metrics import read_object
from vitcomposer.schema.recipe import Recipe
from vitcomposer.whole_files import write_whole

_DIGEST = "sha256"

Images = dict[str, Any]  # of a split, see mds.shards.images_of


def plain(cfg: Recipe) -> dict[str, Any]:
    """A configuration in the types of JSON."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def identity_of(cfg: Recipe, config_yaml: str, images: Mapping[str, Images | None]) -> dict[str, Any]:
    """The content of the file, for :func:`write_identity`."""
    digest = hashlib.sha256(config_yaml.encode()).hexdigest()
    return {"config_sha256": digest, "config": plain(cfg), "images": images, "resize": RESIZE}


def write_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Create or replace the file."""
    write_whole(folder / layout.IDENTITY, json.dumps({**identity, _DIGEST: _digest(identity)}, indent=1) + "\n")


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What :func:`write_identity` wrote; None where there is none, or it is damaged."""
    found = read_object(folder / layout.IDENTITY)
    if found is None or found.pop(_DIGEST, None) != _digest(found):
        return None
    return found


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def difference(before: Images, now: Images) -> tuple[str, str, str] | None:
    """The key to look at, and in what the images of a split differ: what they were, and what they are."""
    if before["source"] != now["source"]:
        return "data.source", f"images of data.source={before['source']}", f"images of data.source={now['source']}"
    if before["classes"] is not None and now["classes"] is not None and before["classes"] != now["classes"]:
        return "data.local", *_differing_names(before["classes"], now["classes"])
    if None not in (before["samples"], now["samples"]) and before["samples"] != now["samples"]:
        key = "data.synthetic_samples" if now["source"] == "synthetic" else "data.local"
        return key, f"{before['samples']:,} images", f"{now['samples']:,} images"
    if None not in (before["index"], now["index"]) and before["index"] != now["index"]:
        was, is_now = (f"an index.json of sha256 {each['index'][:12]}" for each in (before, now))
        return "data.local", was, is_now
    small = before.get("image_small"), now.get("image_small")
    if None not in small and small[0] != small[1]:
        was, is_now = (f"views of at most {size} pixels cut from image_small" for size in small)
        return "augment.low_resolution_stages", was, is_now
    return None


def _differing_names(before: list[str], now: list[str]) -> tuple[str, str]:
    if len(before) != len(now):
        return f"{len(before):,} classes", f"{len(now):,} classes"
    at = [label for label, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1]]
    more = f" and {len(at) - 5} more" if len(at) > 5 else ""
    was, is_now = (f"the classes {', '.join(names[label] for label in at[:5])}{more}" for names in (before, now))
    return was, is_now
