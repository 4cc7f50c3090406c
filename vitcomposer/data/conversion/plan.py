"""Plans which image goes into which shard, and records it so that a later call continues the same conversion.

A split's images are shuffled and cut into chunks from their sizes alone, before anything is read. A chunk is the unit
of work: one task makes it, and a done-marker says that it is stored.
"""

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vitcomposer.data.conversion.encode import StoreOptions
from vitcomposer.data.conversion.shard import empty_shard_bytes, sample_overhead
from vitcomposer.data.conversion.sources import Item, Source, hash_order
from vitcomposer.stores.objects import Store

STATE = ".convert"
_SHOWN = 10  # classes that an error lists


class Chunk(NamedTuple):
    """What becomes one shard, or several where stored images are larger than they came."""

    split: str
    number: int
    items: list[Item]
    options: StoreOptions
    limit: int  # of a shard, in bytes
    plan: str  # hash of the plan that it belongs to

    @property
    def marker(self) -> str:
        return done_marker(self.split, self.number)

    def basename(self, shard: int) -> str:
        """File of its first, second, ... shard; names sort as the shards of the split do."""
        return f"shard.{self.number:05}" + (f"_{shard:03}" if shard else "") + ".mds"


def done_marker(split: str, number: int) -> str:
    """Name of the object that says that a chunk is stored."""
    return f"{STATE}/{split}/done/{number:05}.json"


def plan_split(store: Store, source: Source, split: str, limit: int, options: StoreOptions) -> list[Chunk]:
    """Record the plan, or compare with the one on record, and cut the items into chunks.

    Both splits are shuffled. In training StreamingDataset shuffles within blocks of neighbouring shards only, so a
    shard must hold a mixture of classes; of ``val`` any first part is then a fair sample.

    Raises:
        ValueError: The split was begun with another source or other options; the message says which.
    """
    items = sorted(source.splits[split], key=lambda item: hash_order(options.seed, item.name))
    listing = json.dumps([list(item) for item in items]).encode()
    folder = f"{STATE}/{split}"
    old = read_plan(store, split)
    if options.seekable is None:
        options = dataclasses.replace(options, seekable=old["stored"]["--seekable"] if old else split == "train")
    if options.exif is None:
        exif = old["stored"].get("--exif", "keep") if old else source.exif
        options = dataclasses.replace(options, exif=exif)
    plan = {
        "class_names": source.class_names,
        "images": len(items),
        "items_sha256": hashlib.sha256(listing).hexdigest(),
        "seed": options.seed,
        "shard_size": limit,
        "stored": options.recorded(),
    }
    if old is None:
        if store.read(f"{split}/index.json", 0, 1) is not None:
            raise ValueError(f"{store.url}/{split} already holds a data set of another making. Choose an empty place.")
        store.write(f"{folder}/items.json.gz", gzip.compress(listing, mtime=0))
        store.write(f"{folder}/plan.json", to_json(plan))
    elif old != plan:
        found = _difference(old, plan, items, lambda: store.read(f"{folder}/items.json.gz"))
        raise ValueError(
            f"{store.url}/{split} was begun with other input: {found}. Repeat the first call, or choose an empty place."
        )
    whole = Chunk(split, 0, items, options, limit, plan_hash(plan))
    return list(_cut(whole))


def read_plan(store: Store, split: str) -> dict[str, Any] | None:
    """The plan on record."""
    plan = read_json(store, f"{STATE}/{split}/plan.json")
    if plan is not None:  # before there were options everything was stored as it came
        plan.setdefault("stored", StoreOptions(seekable=False).recorded())
    return plan


def plan_hash(plan: dict[str, Any]) -> str:
    """A digest of all that decides the shards of a split."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def check_room(store: Store, pending: list[Chunk]) -> None:
    """Raise ValueError if the disk cannot take the images as they came, which is the least that is stored.

    Resized and re-encoded images may be smaller; then nothing is known before they are made.
    """
    chunks = [chunk for chunk in pending if not chunk.options.short_side and not chunk.options.reencode]
    needed = sum(item.size + sample_overhead(chunk.options.columns) for chunk in chunks for item in chunk.items)
    free = store.free_bytes()
    if free is not None and needed > free:
        raise ValueError(
            f"{store.url} must have room for {needed / 1e9:.1f} GB more, it has {free / 1e9:.1f} GB. Free some space."
        )


def read_json(store: Store, name: str) -> Any:
    """An object's content, or None when there is no such object."""
    data = store.read(name)
    return None if data is None else json.loads(data)


def to_json(value: Any) -> bytes:
    """The form of all JSON files beside the index."""
    return (json.dumps(value, indent=1) + "\n").encode()


def _cut(whole: Chunk) -> Iterator[Chunk]:
    """Chunks whose shards stay within the limit, filled as MDSWriter fills them."""
    columns, limit = whole.options.columns, whole.limit
    empty, overhead = empty_shard_bytes(limit, columns), sample_overhead(columns)
    number, size, chosen = 0, empty, []
    for item in whole.items:
        expected = item.size + overhead
        if whole.options.seekable:  # so that one shard nearly always takes them; a photograph grows by 2 to 3 %
            expected += item.size // 25 + 32
        if chosen and size + expected > limit:
            yield whole._replace(number=number, items=chosen)
            number, size, chosen = number + 1, empty, []
        chosen.append(item)
        size += expected
    yield whole._replace(number=number, items=chosen)


def plan_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first setting in which two plans differ, in words; None where all are equal."""
    if old["shard_size"] != new["shard_size"]:
        return f"--shard-size was {old['shard_size']} bytes and is {new['shard_size']} bytes"
    if old["seed"] != new["seed"]:
        return f"--seed was {old['seed']} and is {new['seed']}"
    for flag in {**old["stored"], **new["stored"]}:
        before, now = old["stored"].get(flag), new["stored"].get(flag)
        if before != now:
            return f"{flag} was {_setting(before)} and is {_setting(now)}"
    return None


def _difference(old: dict, new: dict, items: list[Item], read_listing: Callable[[], bytes | None]) -> str:
    setting = plan_difference(old, new)
    if setting:
        return setting
    before = {name: rest for name, *rest in json.loads(gzip.decompress(read_listing() or gzip.compress(b"[]")))}
    now = {item.name: [item.size, item.label] for item in items}
    kinds = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
        "with another size or label": [name for name in now if name in before and now[name] != before[name]],
    }
    found = [f"{len(names)} images are {kind} (such as {min(names)})" for kind, names in kinds.items() if names]
    return "; ".join(found) or f"the classes were {old['class_names'][:_SHOWN]} and are {new['class_names'][:_SHOWN]}"


def _setting(value: bool | int | float | None) -> str:
    if value is None:
        return "not given"
    return str(value) if not isinstance(value, bool) else "on" if value else "off"
