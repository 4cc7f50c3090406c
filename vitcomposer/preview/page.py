"""Lays the cells of a preview out on one picture, every view pixel by pixel, and writes it over nothing but its own."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from vitcomposer.errors import require
from vitcomposer.escape import for_terminal
from vitcomposer.preview.batches import Cell, Pixels, Preview, Section
from vitcomposer.whole_files import write_whole

SIGNATURE = "vitcomposer preview"  # in the field Software of the file
PAGE, MARGIN, GAP, APART, LINE = 1800, 16, 4, 24, 18  # pixels: width, around it, between tiles and cells, line of text
LEAST_TILE = 96  # pixels of the largest view of a page: smaller ones are shown as squares of whole pixels
_GROUP_COLOURS = ("#e4572e", "#2e86ab", "#76b041", "#8d5fd3")
_INK, _PALE, _PAPER = "#1b1b1b", "#6a6a6a", "#ffffff"


def draw(preview: Preview, title: str) -> Image.Image:
    """The page. A view of S pixels takes k * S pixels, k a whole number that is the same for all of them."""
    sides = [view.shape[0] for section in preview.sections for cell in section.cells for view in cell.views]
    factor = max(1, LEAST_TILE // max(sides))
    tile = factor * max(sides)
    parts = [_section(section, factor, tile) for section in preview.sections]
    head = [title, *preview.facts]
    height = MARGIN + LINE * (len(head) + 1) + sum(part.height + 2 * MARGIN for part in parts)
    page = Image.new("RGB", (2 * MARGIN + max(part.width for part in parts), height), _PAPER)
    _write(page, MARGIN, MARGIN, head, bold=True)
    top = 2 * MARGIN + LINE * len(head)
    for part in parts:
        page.paste(part, (MARGIN, top))
        top += part.height + 2 * MARGIN
    return page.crop((0, 0, page.width, top))


def _section(section: Section, factor: int, tile: int) -> Image.Image:
    cells = [_cell(cell, factor, tile) for cell in section.cells]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    across = max(1, min(len(cells), PAGE // (width + APART)))
    down = -(-len(cells) // across)
    words = [section.title, section.columns]
    top = LINE * len(words) + GAP
    total = max(across * (width + APART), max(round(_font().getlength(text)) for text in words))
    picture = Image.new("RGB", (total, top + down * (height + APART)), _PAPER)
    _write(picture, 0, 0, words, bold=True)
    for at, cell in enumerate(cells):
        picture.paste(cell, ((at % across) * (width + APART), top + (at // across) * (height + APART)))
    return picture


def _cell(cell: Cell, factor: int, tile: int) -> Image.Image:
    """A row of tiles over the lines of text, which are cut where the tiles end."""
    tiles = [] if cell.original is None else [_original(cell.original, cell.boxes, tile)]
    tiles += [Image.fromarray(_enlarged(view, factor)) for view in cell.views]
    width = sum(each.width for each in tiles) + GAP * (len(tiles) - 1)
    picture = Image.new("RGB", (width, tile + LINE * len(cell.lines)), _PAPER)
    left = 0
    for each in tiles:
        picture.paste(each, (left, 0))
        left += each.width + GAP
    _write(picture, 0, tile, cell.lines, bold=False)
    return picture


def _enlarged(view: Pixels, factor: int) -> Pixels:
    return np.ascontiguousarray(view.repeat(factor, axis=0).repeat(factor, axis=1))


def _original(pixels: Pixels, boxes: Sequence[Sequence[tuple[int, int, int, int]]], tile: int) -> Image.Image:
    """The image within a square, with the outlines of its crops in a colour for each group."""
    height, width = pixels.shape[:2]
    scale = tile / max(height, width)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.new("RGB", (tile, tile), _PAPER)
    small = Image.fromarray(pixels).resize(shape, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST)
    picture.paste(small, (0, 0))
    pen = ImageDraw.Draw(picture)
    for group, colour in zip(boxes, _GROUP_COLOURS * len(boxes), strict=False):
        for top, left, box_height, box_width in group:
            corners = (left, top, left + box_width, top + box_height)
            x0, y0, x1, y1 = (round(corner * scale) for corner in corners)
            pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
    return picture


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13)


def _write(picture: Image.Image, left: int, top: int, lines: Sequence[str], *, bold: bool) -> None:
    pen, font = ImageDraw.Draw(picture), _font()
    for at, line in enumerate(lines):
        text = for_terminal(line)
        while text and font.getlength(text) > picture.width - left:
            text = f"{text[:-4]}..." if len(text) > 4 else ""
        pen.text((left, top + at * LINE), text, fill=_INK if at == 0 else _PALE, font=font, stroke_width=0.3 * bold)


def check_place(path: Path) -> None:
    """Refuse a file that preview has not written, before any work is done.

    Raises:
        ConfigError: It is another's.
    """
    require(
        not path.exists() or _is_own(path),
        "--out",
        "a new file, or one that `vitcomposer preview` has written",
        str(path),
        "Choose another name, or move the file away.",
    )


def _is_own(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.format == "PNG" and picture.info.get("Software") == SIGNATURE
    except (OSError, ValueError):
        return False


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG that says who has written it."""
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", SIGNATURE)
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=about, optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
