"""Train Vision Transformers fast and accurately on MosaicML Composer.

``vitcomposer.load("runs/photos").predict(images)`` uses a trained classifier (``evaluation.classifier``). It is
imported on first use: importing this package imports nothing heavy.
"""

from importlib import import_module
from typing import Any

__version__ = "0.4.0"
_HOME = {"Classifier": "vitcomposer.evaluation.classifier", "load": "vitcomposer.evaluation.classifier"}

__all__ = ["Classifier", "load"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
