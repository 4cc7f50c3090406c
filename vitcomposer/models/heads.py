"""Projection heads of self-supervised training, from features (B, in) to embeddings, prototype scores or logits."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vitcomposer.models.cpu_linear import linear
from vitcomposer.models.initialization import INIT_STD
from vitcomposer.models.transformer import check_choice
from vitcomposer.schema.dino import DINO
from vitcomposer.schema.moco import MoCo
from vitcomposer.schema.simclr import SimCLR
from vitcomposer.schema.swav import SwAV

Activation = Literal["relu", "gelu"]
# The width of DINO's hidden layers and of the unit vectors before its last layer, in all of its published runs.
DINO_HIDDEN_DIM, DINO_BOTTLENECK_DIM = 2048, 256


class MLPHead(nn.Sequential):
    """Linear layers with batch norm and activation between them, the last one without; (B, in) to (B, out).

    SimCLR's, MoCo-v3's (``last_batch_norm=True``: one without scale and shift) and the first part of SwAV's and DINO's.
    A linear layer that batch norm follows has no bias, which the norm would take away again.

    Args:
        dims: Widths from the features to the output, such as (384, 4096, 4096, 256): one layer less than widths.
        batch_norm: After every linear layer but the last.
        last_batch_norm: After the last one, without scale and shift.

    Raises:
        ValueError: Less than two widths, or one below 1.
    """

    def __init__(
        self,
        dims: Sequence[int],
        batch_norm: bool,
        *,
        last_batch_norm: bool = False,
        activation: Activation = "relu",
    ) -> None:
        if len(dims) < 2 or min(dims) < 1:
            raise ValueError(f"dims must be two or more widths, from the features to the output, got {list(dims)}")
        check_choice("activation", activation, ("relu", "gelu"))
        layers: list[nn.Module] = []
        last = len(dims) - 2
        for index in range(len(dims) - 1):
            normalized = last_batch_norm if index == last else batch_norm
            layers.append(nn.Linear(dims[index], dims[index + 1], bias=not normalized))
            if normalized:
                layers.append(nn.BatchNorm1d(dims[index + 1], affine=index < last))
            if index < last:
                layers.append(nn.ReLU() if activation == "relu" else nn.GELU())
        super().__init__(*layers)


class SwAVHead(nn.Module):
    """Embedding on the unit sphere and its scores for one or several sets of prototypes (arXiv:2006.09882, A.1).

    The prototypes are the rows of ``prototypes0.weight``, ``prototypes1.weight``, ... and of length 1 from the start;
    :meth:`normalize_prototypes` keeps them so after an optimizer step.

    Args:
        dims: As of :class:`MLPHead`, such as (384, 2048, 128).
        batch_norm: As of :class:`MLPHead`.
        num_clusters: Number of prototypes of each set, such as (3000,).

    Raises:
        ValueError: No set of prototypes, an empty one, or ``dims`` that :class:`MLPHead` refuses.
    """

    def __init__(
        self, dims: Sequence[int], batch_norm: bool, num_clusters: Sequence[int], *, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        if not num_clusters or min(num_clusters) < 1:
            raise ValueError(f"num_clusters must be one or more numbers of prototypes, got {list(num_clusters)}")
        self.projection = MLPHead(dims, batch_norm, activation=activation)
        self._names = [f"prototypes{index}" for index in range(len(num_clusters))]
        for name, count in zip(self._names, num_clusters, strict=True):
            self.add_module(name, nn.Linear(dims[-1], count, bias=False))
        self.normalize_prototypes()

    @property
    def prototypes(self) -> list[nn.Parameter]:
        """The weight (K, D) of every set."""
        return [self.get_parameter(f"{name}.weight") for name in self._names]

    def forward(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Embeddings (B, D) of length 1, and the scores (B, K) of every set: cosines."""
        projected = self.projection(features)  # (B, D)
        # Codes divide the scores by epsilon = 0.05: half precision would change them by more than 5 %.
        with torch.autocast(features.device.type, enabled=False):
            embeddings = _unit(projected)
            return embeddings, [linear(embeddings, weight.to(embeddings.dtype)) for weight in self.prototypes]

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Bring every prototype back to length 1, in place; for after each optimizer step."""
        for weight in self.prototypes:
            rows = weight.to_local() if isinstance(weight, DTensor) else weight  # FSDP2 shares out whole rows
            rows.copy_(F.normalize(rows, dim=1))


class DINOHead(nn.Module):
    """Three layers with GELU, unit length, and a last layer of unit-length rows (arXiv:2104.14294, appendix C).

    Weights start as N(0, 0.02^2) and biases at 0; parameters of the last layer are ``last_layer.*``.

    Args:
        in_dim: Width of the features.
        out_dim: K, 65536 in the paper.
        norm_last_layer: Keep the rows of the last layer at length 1; otherwise their lengths are learned.
        batch_norm: As of :class:`MLPHead`.
    """

    def __init__(self, in_dim: int, out_dim: int, *, norm_last_layer: bool = True, batch_norm: bool = False) -> None:
        super().__init__()
        dims = (in_dim, DINO_HIDDEN_DIM, DINO_HIDDEN_DIM, DINO_BOTTLENECK_DIM)
        self.projection = MLPHead(dims, batch_norm, activation="gelu")
        self.last_layer = WeightNormLinear(DINO_BOTTLENECK_DIM, out_dim, learn_length=not norm_last_layer)
        for module in self.projection:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, K) of features (B, in_dim)."""
        return self.last_layer(_unit(self.projection(features)))  # (B, bottleneck) to (B, K)


class WeightNormLinear(nn.Module):
    """A linear map without bias whose rows are directions times a length (arXiv:1602.07868).

    Args:
        learn_length: The lengths are parameters that start at 1; otherwise they are 1.
    """

    def __init__(self, in_dim: int, out_dim: int, *, learn_length: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())
        self.length = nn.Parameter(torch.ones(out_dim, 1)) if learn_length else None

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.direction, dim=1)  # eq. 2 of the paper: w = g v / |v|
        return linear(x, weight if self.length is None else weight * self.length)


def build_swav_head(cfg: SwAV) -> SwAVHead:
    """The head of a yaml."""
    return SwAVHead(cfg.head.dims, cfg.head.batch_norm, cfg.head.num_clusters)


def build_simclr_head(cfg: SimCLR) -> MLPHead:
    """The head of a yaml."""
    return MLPHead(cfg.head.dims, cfg.head.batch_norm)


def build_moco_heads(cfg: MoCo) -> tuple[MLPHead, MLPHead]:
    """Projector and predictor of a yaml, with batch norm after every layer (arXiv:2104.02057, section 4)."""
    projector = MLPHead(cfg.head.projector_dims, True, last_batch_norm=True)
    return projector, MLPHead(cfg.head.predictor_dims, True, last_batch_norm=True)


def build_dino_head(cfg: DINO, width: int) -> DINOHead:
    """The head of a yaml, for features of this width."""
    return DINOHead(width, cfg.head.out_dim, norm_last_layer=cfg.head.norm_last_layer, batch_norm=cfg.head.batch_norm)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
