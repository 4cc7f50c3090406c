"""Called by test_self_supervised.py under a launcher: every method on the ranks there are, one after the other."""

import sys
from pathlib import Path

from tests.conftest import run_train
from tests.self_supervised.test_self_supervised import METHODS, page, tiny


def main() -> int:
    runs, digits = sys.argv[1:]
    return max(run_train([page(method), *tiny(method, Path(digits), Path(runs), method)]) for method in METHODS)


if __name__ == "__main__":
    sys.exit(main())
