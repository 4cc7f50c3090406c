"""What the tests of faults share: each tells what a user saw, for the table in benchmarks/results/faults.md."""

import json
import os
import re
from collections.abc import Callable

import pytest

from tests.faults.object_store import bucket, images, proxy, server

__all__ = ["bucket", "images", "proxy", "server"]

Tell = Callable[[str, str, float], None]


@pytest.fixture
def tell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tell:
    """``tell(fault, seen, seconds)``: a row of the table, kept when benchmarks/faults.py runs the tests.

    ``seen`` is the line that the run printed, or what it did where a fault is mended in silence; ``seconds`` lie
    between the fault and the error or, where the run goes on, the first step after it.
    """

    folders = re.compile(rf"{re.escape(str(tmp_path_factory.getbasetemp()))}/[^/\s'\"`]+")

    def keep(fault: str, seen: str, seconds: float) -> None:
        seen = folders.sub("...", seen)  # a temporary folder says nothing to a reader
        row = {"fault": fault, "seen": seen, "seconds": round(seconds, 2), "test": request.node.nodeid}
        path = os.environ.get("VITCOMPOSER_FAULTS")
        if path:
            with open(path, "a", encoding="utf-8") as file:  # one write, so that rows of several workers stay whole
                file.write(json.dumps(row) + "\n")

    return keep
