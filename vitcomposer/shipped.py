"""Where the yamls and the measurements lie: beside the package in a checkout, within it in a wheel (setup.py)."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _folder(in_wheel: str, in_checkout: str) -> Path:
    shipped = _PACKAGE / in_wheel
    return shipped if shipped.is_dir() else _PACKAGE.parent / in_checkout


YAMLS = _folder("yamls", "yamls")
RESULTS = _folder("results", "benchmarks/results")
