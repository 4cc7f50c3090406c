"""Draws the pictures of docs/pictures from the report of a run, in a Chromium: python -m tests.pictures RUN."""

import io
import sys
from pathlib import Path

from PIL import Image

from tests.browser import browser, program

FOLDER = Path(__file__).resolve().parent.parent / "docs/pictures"
SIZES = {"desktop": (1280, 1600, False), "phone": (375, 1400, False), "dark": (1280, 1600, True)}
COLOURS = 128  # of a picture: a page of text and lines has few
MOST_BYTES = 200_000


def main(run: str) -> int:
    if program() is None:
        print("error: pictures need Chromium. apt-get install chromium", file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    with browser() as tab:
        for name, (width, height, dark) in SIZES.items():
            tab.look(Path(run, "report.html"), width, height, dark=dark)
            picture = Image.open(io.BytesIO(tab.picture())).convert("RGB")
            path = FOLDER / f"report_{name}.png"
            picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
            assert path.stat().st_size < MOST_BYTES, path
            print(path.relative_to(FOLDER.parent.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
