"""``python -m vitcomposer`` is ``vitcomposer``."""

import sys

from vitcomposer.cli import main

if __name__ == "__main__":
    sys.exit(main())
