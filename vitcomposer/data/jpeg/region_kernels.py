"""Compiled region decode: of a seekable JPEG (see vitcomposer.data.jpeg.seekable) the pixels of a box.

Nothing here trusts a byte of the file: every size is checked against the header, the index and the data's length, and
a segment that is not consumed to its last byte is damage.
"""

import numpy as np

from vitcomposer.data.jpeg import header_kernels as header
from vitcomposer.data.jpeg.entropy_kernels import SLACK, decode_segments, gather_band
from vitcomposer.data.jpeg.header_kernels import LENGTHS
from vitcomposer.data.jpeg.kernel import kernel, part
from vitcomposer.data.jpeg.pixel_kernels import TILE, colour_line, gray_line, inverse_dct, upsample_line

DONE, REFUSED, GROW = 0, 1, 2  # what decode_box returns


@part
def _span(first, count, chroma, ratio):
    """First chroma sample and the end of those that the triangle filter needs for count pixels from first on."""
    if ratio == 1:
        return first, first + count
    # Pixel x lies in sample x // 2 and takes a quarter of the sample before it (x even) or after it (x odd).
    return max((first - 1) >> 1, 0), min(((first + count) >> 1) + 1, chroma)


@part
def _tiles(lanes):
    return (lanes + TILE - 1) // TILE


@part
def _place_component(c, region, planes, blocks, lanes, lane):  # noqa: PLR0913, PLR0917
    """Give the blocks of a component their lanes and their homes in its plane; the lane after the last.

    Args:
        region: (blocks of an MCU across, down, first block column needed, end, MCUs of a band).
        planes: (offset of the plane, blocks of its width, all in words; first of its blocks within an MCU).
        blocks: kinds and slots, in the order of the stream; lanes: homes, strides and the
            way from one band to the next.
    """
    across, down, first, end, mcus = region
    plane, stride, within = planes
    kinds, slots = blocks
    homes, strides, advances = lanes
    per_mcu = len(kinds) // mcus
    trash = len(homes) * 64  # a tile of coefficients that nobody reads, for blocks left of the box
    # The order of T.81, A.2.3: MCU by MCU, and within it the blocks of each component row by row.
    for m in range(mcus):
        for y in range(down):
            for x in range(across):
                n = m * per_mcu + within + y * across + x
                column = m * across + x
                kinds[n] = c
                if column < first or column >= end:
                    slots[n] = trash
                    continue
                slots[n] = lane // TILE * 64 * TILE + lane % TILE
                homes[lane] = plane + y * 8 * stride + column - first  # in words: a row of a block is one
                strides[lane] = stride
                advances[lane] = down * 8 * stride
                lane += 1
    return lane


@kernel
def decode_box(data, box, state, scratch, out):
    """RGB of box (top, left, height, width) into out, flat uint8; DONE or why not.

    Args:
        data: The file. Nothing but its bytes is used, whatever they are.
        state: info, quant, raw, lookup, limits, bases: the header as numbers and the tables, kept between calls.
        scratch: clean, coef, words, plan, sums; after GROW info[WANTED:] holds the sizes of the first four.
    """
    info, quant, raw, lookup, limits, bases = state
    clean, coef, words, plan, sums = scratch
    # The index is an APP11 segment right after SOI.
    if len(data) < LENGTHS + 2 or data[2] != 0xFF or data[3] != 0xEB or header.little(data, 6, 8) != header.MAGIC:
        return REFUSED
    if not header.read_header(data, info, quant, raw, lookup, limits) or not header.read_index(data, info):
        return REFUSED
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1:
        return REFUSED
    if top + height > info[header.HEIGHT] or left + width > info[header.WIDTH]:
        return REFUSED

    across, down, colour = info[header.ACROSS], info[header.DOWN], info[header.COMPONENTS] == 3
    chroma_width = (info[header.WIDTH] + across - 1) // across
    chroma_height = (info[header.HEIGHT] + down - 1) // down
    # Chroma samples needed (of a grey image pixels); 8 x 8 of them are an MCU.
    x0, x1 = _span(left, width, chroma_width, across)
    y0, y1 = _span(top, height, chroma_height, down)
    step, per_row = info[header.STEP], info[header.PER_ROW]
    s0, s1 = x0 // 8 // step, ((x1 - 1) // 8) // step + 1  # segments of an MCU row: first and end
    b0, b1 = y0 // 8, (y1 - 1) // 8 + 1  # MCU rows, or bands
    origin, bands, count = s0 * step, b1 - b0, s1 - s0
    mcus = (x1 - 1) // 8 + 1 - origin  # of a band, from the first segment's on
    per_mcu = across * down + (2 if colour else 0)

    # First and end column of the blocks needed, counted from the first segment's; the planes hold them and no more.
    luma0, luma1 = left // 8 - origin * across, (left + width - 1) // 8 + 1 - origin * across
    chroma0, chroma1 = (x0 // 8 - origin, mcus) if colour else (0, 0)
    luma_stride, chroma_stride = luma1 - luma0, chroma1 - chroma0  # in words of eight samples
    luma_plane = 8 * TILE
    blue_plane = luma_plane + luma_stride * bands * 8 * down
    red_plane = blue_plane + chroma_stride * bands * 8
    lines = red_plane + chroma_stride * bands * 8
    line = (2 * (x1 - x0) + 7) // 8
    tiles = _tiles(luma_stride * down) + 2 * _tiles(chroma_stride)

    total, start, most, used = info[header.ROWS] * per_row, info[header.SCAN], 0, 0
    # Only the lengths of the segments are in the file. Each is followed by a marker of two bytes.
    for n in range(b0 * per_row):
        start += header.little(data, LENGTHS + 2 * n, 2) + 2
    first_start = start
    for n in range(b0 * per_row, b1 * per_row):
        size = header.little(data, LENGTHS + 2 * n, 2) + 2
        start += size
        if s0 <= n % per_row < s1:
            used += size
            most = max(most, size)
    for n in range(b1 * per_row, total):
        start += header.little(data, LENGTHS + 2 * n, 2) + 2
    # A file of another length than the index says was cut or added to. A block has at least two bits, so that few bytes
    # cannot ask for much memory.
    if start != len(data) or used * 4 < mcus * bands * per_mcu:
        return REFUSED
    blocks = mcus * per_mcu
    info[header.WANTED] = most * count + SLACK  # clean: the segments of a band
    info[header.WANTED + 1] = (tiles + 1) * 64 * TILE  # coef: one tile more, which nobody reads
    info[header.WANTED + 2] = lines + 2 * line  # words: scratch, planes, two chroma lines at full width
    # plan, cut up below, and sums.
    info[header.WANTED + 3] = max(2 * blocks + 3 * tiles * TILE + tiles + 3 * count + 1, x1 - x0 + 2)
    if (
        len(clean) < info[header.WANTED]
        or len(coef) < info[header.WANTED + 1]
        or len(words) < info[header.WANTED + 2]
        or min(len(plan), len(sums)) < info[header.WANTED + 3]
        or len(out) < 3 * height * width
    ):
        return GROW

    kinds, plan = plan[:blocks], plan[blocks:]  # int64 (blocks of a band,), and slots
    slots, plan = plan[:blocks], plan[blocks:]
    homes, plan = plan[: tiles * TILE], plan[tiles * TILE :]  # int64 (tiles * TILE,), and strides and advances
    strides, plan = plan[: tiles * TILE], plan[tiles * TILE :]
    advances, plan = plan[: tiles * TILE], plan[tiles * TILE :]
    quant_of, plan = plan[:tiles], plan[tiles:]
    starts, spans = plan[: count + 1], plan[count + 1 : 3 * count + 1]
    coef = coef[: info[header.WANTED + 1]]
    homes[:] = -1
    advances[:] = 0
    stream, lanes = (kinds, slots), (homes, strides, advances)
    lane = _place_component(0, (across, down, luma0, luma1, mcus), (luma_plane, luma_stride, 0), stream, lanes, 0)
    # A tile has one quantisation table: chroma starts with another tile, and red shares blue's last one if it shares
    # its table.
    lane = _tiles(lane) * TILE
    quant_of[: lane // TILE] = info[header.QUANT]
    for c in range(1, 3 if colour else 1):
        tile = _tiles(lane)
        if info[header.QUANT + c] != info[header.QUANT + c - 1]:
            lane = tile * TILE
        quant_of[tile:] = info[header.QUANT + c]
        plane = blue_plane if c == 1 else red_plane
        lane = _place_component(
            c, (1, 1, chroma0, chroma1, mcus), (plane, chroma_stride, across * down + c - 1), stream, lanes, lane
        )
    quant_of = quant_of[: _tiles(lane)]
    for n in range(6):
        bases[n] = info[header.TABLES + n]
    last = bases[6:12]  # DC predictions of both streams
    start = first_start
    for band in range(b0, b1):
        for n in range(per_row + 1):
            if s0 <= n <= s1:
                starts[n - s0] = start
            if n < per_row:
                start += header.little(data, LENGTHS + 2 * (band * per_row + n), 2) + 2
        if not gather_band(data, band * per_row + s0, starts, total, clean, spans):
            return REFUSED
        # The transform has left samples here, and of zeros the decoder writes none.
        coef[:] = 0
        if not decode_segments(
            clean, spans, (step * per_mcu, blocks), kinds, slots, bases, (lookup, raw, limits), last, coef
        ):
            return REFUSED
        inverse_dct(coef, quant, quant_of, homes, strides, words)
        for n in range(lane):
            homes[n] += advances[n]

    planes = words.view(np.uint8)  # a byte a sample
    for y in range(top, top + height):
        luma = 8 * (luma_plane + (y - b0 * 8 * down) * luma_stride) + left - 8 * (origin * across + luma0)
        at = 3 * width * (y - top)
        if not colour:
            gray_line(planes, luma, out, at, width)
            continue
        near = y // down
        # The lower of two pixel rows blends with the chroma row below, the upper one with that above; at the edge of
        # the image with itself.
        far = min(max(near + 1 if y & 1 else near - 1, 0), chroma_height - 1) if down == 2 else near
        column = x0 - 8 * (origin + chroma0)
        blue = 8 * (blue_plane + (near - b0 * 8) * chroma_stride) + column
        red = 8 * (red_plane + (near - b0 * 8) * chroma_stride) + column
        if across > 1 or down > 1:
            step_far = 8 * (far - near) * chroma_stride
            ratio = (across, down, y & 1)
            needed = sums[: x1 - x0 + 2]
            upsample_line(planes, blue, blue + step_far, x0, chroma_width, needed, 8 * lines, ratio)
            upsample_line(planes, red, red + step_far, x0, chroma_width, needed, 8 * (lines + line), ratio)
            blue = 8 * lines + left - x0 * across
            red = blue + 8 * line
        colour_line(planes, luma, blue, red, out, at, width)
    return DONE
