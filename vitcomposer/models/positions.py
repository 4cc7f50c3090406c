"""Tells a network where a patch is: absolute position embeddings and the relative positions of ConViT.

Shapes: N = rows * columns patches in row-major order, D width, P rows of class and distillation tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def resize_positions(positions: Tensor, *, old_grid: Grid, new_grid: Grid, num_prefix_rows: int) -> Tensor:
    """Position embedding for another grid of patches, bicubic with antialiasing as timm does it.

    Args:
        positions: (1, P + N, D); the first ``num_prefix_rows`` rows belong to tokens that are no patches and are kept.
        old_grid: Rows and columns of patches that ``positions`` was made for.
        new_grid: Rows and columns of patches wanted.
        num_prefix_rows: P, 0 where class and distillation token have no position.

    Returns:
        (1, P + new N, D) in the dtype of ``positions``; the same tensor if the grids agree.
    """
    if old_grid == new_grid:
        return positions
    prefix, patches = positions[:, :num_prefix_rows], positions[:, num_prefix_rows:]
    # Interpolating in half precision would move every embedding by its rounding error, so at least float32.
    image = patches.to(torch.promote_types(positions.dtype, torch.float32))
    image = image.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    patches = image.flatten(2).transpose(1, 2).to(positions.dtype)  # (1, new N, D)
    return torch.cat((prefix, patches), dim=1) if num_prefix_rows else patches  # (1, P + new N, D)


def sincos_positions(grid: Grid, embed_dim: int, kind: str = "sincos", *, temperature: float = 10000.0) -> Tensor:
    """Fixed 2D sine-cosine position embedding of a patch at column x and row y.

    ``sincos`` is big_vision's (arXiv:2205.01580, section 2): ``[sin(x w), cos(x w), sin(y w), cos(y w)]`` with
    ``w_i = temperature ** (-i / (D / 4 - 1))`` for ``i = 0 .. D / 4 - 1``. ``sincos_moco3`` is that of MoCo-v3's code
    (arXiv:2104.02057): it divides i by D / 4, so its lowest frequency is a little higher, and has y before x.

    Returns:
        (1, N, D) float32.

    Raises:
        ValueError: if ``embed_dim`` is not a multiple of 4 or is below 8.
    """
    if embed_dim % 4 or embed_dim < 8:
        lower = max(8, embed_dim // 4 * 4)
        raise ValueError(
            f"model.embed_dim must be a multiple of 4 and at least 8 for model.position_embedding={kind}, "
            f"got {embed_dim}; use {lower} or {lower + 4}"
        )
    frequencies = embed_dim // 4
    # float64 until the end: float32 powers would cost the high frequencies their last digits.
    exponents = torch.arange(frequencies, dtype=torch.float64) / (frequencies - (kind == "sincos"))
    omega = torch.exp(-math.log(temperature) * exponents)  # (D / 4,)
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid)
    axes = [axis.reshape(-1, 1) * omega for axis in torch.meshgrid(rows, columns, indexing="ij")]  # y, x: (N, D / 4)
    first, second = axes if kind == "sincos_moco3" else axes[::-1]
    embedding = torch.cat((first.sin(), first.cos(), second.sin(), second.cos()), dim=1)  # (N, D)
    return embedding.float().unsqueeze(0)


def axis_offsets(size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Offsets, key minus query, between ``size`` rows or columns of patches.

    The relative position of ConViT (arXiv:2103.10697) is (column offset, row offset, squared distance): all of
    it follows from the offsets along the two axes.

    Returns:
        (size, size), indexed [query, key].
    """
    position = torch.arange(size, device=device, dtype=dtype)  # key j minus query i stands at [i, j]
    return position.unsqueeze(0) - position.unsqueeze(1)
