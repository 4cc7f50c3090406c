"""Images: write them as MDS shards, read them back, crop, augment and mix them.

The public names load on first use, because the loader brings Composer along, which takes seconds to import.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "MultiCrop": "vitcomposer.data.multicrop",
    "build_dataspec": "vitcomposer.data.loader",
    "convert": "vitcomposer.data.conversion.write",
    "decode_crop": "vitcomposer.data.jpeg.decode",
}

__all__ = ["MultiCrop", "build_dataspec", "convert", "decode_crop"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
