"""Draws the pictures of ``vitcomposer attention`` by matplotlib, without a display."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from vitcomposer.models.attention import (
    BlockAttention,
    attention_rollout,
    patch_distances,
    reads_token,
    seen_by_output,
)
from vitcomposer.models.positions import Grid

HEAT, MARK = "inferno", "#39d0ff"  # of attention, and of the patch that looks
BLUE, ORANGE, GREY = "#1f5fa8", "#d1600a", "#6e6e6e"
CELL = 1.9  # inches of the picture of a head
MOST_COLUMNS = 8
OVERVIEW = 3.2  # inches of the pictures above the heads


def draw_image(
    network: Any,
    photo: Tensor,
    blocks: Sequence[BlockAttention],
    *,
    layers: Sequence[int],
    heads: Sequence[int],
) -> Figure:
    """One image, its attention rollout, and the maps of heads.

    Where the head of the network reads a class token, a map is what the token attends to, elsewhere the mean over all
    patches; in layers that the class token has not joined yet, what the patch in the middle attends to. Colours of a
    map go from 0 to its highest value.

    Args:
        photo: uint8 (3, S, S).
        blocks: All of them, of this image alone.
        layers, heads: Whose maps are drawn, from 0.
    """
    reader = "class token" if reads_token(network) else "mean over the patches"
    columns = min(MOST_COLUMNS, max(3, len(heads)))
    lines = -(-len(heads) // columns)
    heights = [OVERVIEW, *[1.25 * CELL * lines + 0.3] * len(layers)]
    figure = Figure(figsize=(max(8.0, CELL * columns), sum(heights)), dpi=110, layout="constrained")
    above, *parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat
    _draw_overview(above, network, photo, blocks, reader)
    for part, layer in zip(parts, layers, strict=True):
        block = blocks[layer]
        attention, query = block.map[0], None
        if block.num_prefix_tokens < network.num_prefix_tokens and reads_token(network):
            query = _middle(block.grid)
            maps = attention[:, query]
        else:
            maps = _as_read(network, block, attention)
        part.suptitle(f"layer {layer + 1}, attention of the {'marked patch' if query is not None else reader}")
        panels = list(part.subplots(lines, columns, squeeze=False).flat)
        _hide(panels[len(heads) :])
        for axes, head in zip(panels, heads, strict=False):
            _draw_map(axes, maps[head], block.grid, f"head {head + 1}", query)
    return figure


def _draw_overview(
    figure: SubFigure, network: Any, photo: Tensor, blocks: Sequence[BlockAttention], reader: str
) -> None:
    last = blocks[-1]
    rollout = attention_rollout([block.map for block in blocks])[0]
    maps = {
        f"attention rollout, {reader}": seen_by_output(network, rollout),
        f"last layer, mean of the heads, {reader}": seen_by_output(network, last.map[0].mean(dim=0)),
    }
    picture, *others = figure.subplots(1, 3)
    pixels = photo.permute(1, 2, 0).numpy()
    picture.imshow(pixels)
    picture.set_title("image", fontsize="small")
    for axes, (title, values) in zip(others, maps.items(), strict=True):
        axes.imshow(pixels)
        heat = values.reshape(last.grid).numpy()
        size = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
        veil = 0.2 + 0.6 * heat / heat.max()  # what nobody looks at stays visible
        axes.imshow(heat, cmap=HEAT, vmin=0, alpha=veil, interpolation="bilinear", extent=size)
        axes.set_title(title, fontsize="small")
    for axes in (picture, *others):
        axes.axis("off")


def _as_read(network: Any, block: BlockAttention, attention: Tensor) -> Tensor:
    """(h, R C), also of a local layer of a network that reads the mean of the patches."""
    if block.num_prefix_tokens:
        return seen_by_output(network, attention)
    return attention.mean(dim=-2)


def draw_layers(reach: Tensor, gates: Sequence[Tensor], grid: Grid) -> Figure:
    """Non-locality over the layers, and the gates of those that have them (arXiv:2103.10697, section 4).

    Args:
        reach: (layers, h) in patches.
        gates: (h,) of each gated layer.
    """
    layers = range(1, len(reach) + 1)
    figure = Figure(figsize=(11 if gates else 6.5, 4.2), dpi=110, layout="constrained")
    left, *right = figure.subplots(1, 1 + bool(gates), squeeze=False).flat
    even = patch_distances(grid, like=reach).mean().item()
    left.axhline(even, color=GREY, linestyle="--", linewidth=1, label="even attention")
    _draw_heads(left, layers, reach.numpy(), BLUE)
    left.set(title="How far attention reaches", ylabel="mean distance (patches)")
    left.set_ylim(bottom=0)
    for axes in right:
        _draw_heads(axes, layers[: len(gates)], np.stack([gate.numpy() for gate in gates]), ORANGE)
        axes.set(title="Gate: share of positional attention", ylim=(0, 1))
    for axes in (left, *right):
        axes.set_xlabel("layer")
        axes.set_xticks(layers)
        axes.set_xlim(0.5, len(reach) + 0.5)
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def _draw_heads(axes: Axes, layers: Sequence[int], values: np.ndarray, color: str) -> None:
    axes.plot(layers, values.mean(axis=1), color=color, linewidth=1.8, label="mean of the heads")
    spread = [layer for layer in layers for _ in range(values.shape[1])]
    axes.scatter(spread, values.ravel(), color=color, s=14, alpha=0.5, linewidths=0, label="each head")


def draw_positions(positions: Sequence[Tensor], gates: Sequence[Tensor], grid: Grid, *, heads: Sequence[int]) -> Figure:
    """What the patch in the middle attends to by position alone: a row for each gated layer, a column for each head.

    Args:
        positions: (h, R C, R C) of each gated layer.
        gates: (h,) of each.
    """
    query = _middle(grid)
    size = (max(6.0, 0.8 * CELL * len(heads)), 0.95 * CELL * len(positions) + 0.4)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle("Positional attention of the marked patch, and its share (gate)")
    panels = figure.subplots(len(positions), len(heads), squeeze=False)
    for layer, row in enumerate(panels):
        for axes, head in zip(row, heads, strict=True):
            title = f"layer {layer + 1}, head {head + 1}: {gates[layer][head]:.0%}"
            _draw_map(axes, positions[layer][head, query], grid, title, query)
    return figure


def _draw_map(axes: Axes, values: Tensor, grid: Grid, title: str, query: int | None) -> None:
    axes.imshow(values.reshape(grid).numpy(), cmap=HEAT, vmin=0)
    axes.set_title(title, fontsize="small")
    axes.axis("off")
    if query is not None:
        row, column = divmod(query, grid[1])
        axes.plot(column, row, marker="s", markersize=5, markerfacecolor="none", markeredgecolor=MARK)


def _middle(grid: Grid) -> int:
    return grid[0] // 2 * grid[1] + grid[1] // 2


def _hide(panels: Sequence[Axes]) -> None:
    for axes in panels:
        axes.set_visible(False)
