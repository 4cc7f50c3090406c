"""Writes trained networks as graphs that run without this code: ONNX and ``torch.export``, for any number of images."""

import copy
import json
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.naflexvit import NaFlexEmbeds
from torch import Tensor, nn

from vitcomposer.models import build_model
from vitcomposer.models.convit import GPSA
from vitcomposer.models.positions import Grid, axis_offsets, resize_positions
from vitcomposer.models.transformer import ImageTransformer
from vitcomposer.models.trunks import Trunk
from vitcomposer.schema import Model

INPUT, OUTPUT, FACTS = "images", "logits", "vitcomposer.json"
# The last opset of torch's exporter by tracing before 18 changed the reductions; runtimes have known it since 2022.
OPSET = 17
_TRACED_BATCH = 2  # a batch of 1 would be taken for a constant
_LARGEST_BATCH = 2**16
_LARGEST_ONNX = 2**31 - 1  # bytes: what one protobuf message holds


def settle(network: nn.Module, model: Model, image_size: int) -> tuple[nn.Module, Model]:
    """The same function of images of one size, with its positions as weights of exactly that size.

    The forward pass resizes positions where images have another size than the network was built for; graphs and timm
    want them fixed. Positions that are computed become learned ones of the same values.
    """
    computed = model.position_embedding not in (None, "learned")
    if image_size == model.image_size and not computed:
        return network, model
    model = replace(model, image_size=image_size)
    if computed:
        model = replace(model, position_embedding="learned")
    if isinstance(network, Trunk):
        return _settle_trunk(network, image_size), model
    settled = build_model(**model.options())
    state = network.state_dict()
    if isinstance(network, ImageTransformer) and isinstance(settled, ImageTransformer):
        own = network.num_position_rows
        positions = resize_positions(
            network.pos_embed.detach(), old_grid=network.grid_size, new_grid=settled.grid_size, num_prefix_rows=own
        )
        # A token without a position gets one of zeros.
        zeros = positions.new_zeros(1, settled.num_position_rows - own, positions.shape[2])
        state["pos_embed"] = torch.cat((zeros, positions), dim=1)
    settled.load_state_dict(state)
    return settled.eval(), model


def _settle_trunk(network: Trunk, image_size: int) -> nn.Module:
    """The network told its size, where timm's has to be told."""
    settled: Any = copy.deepcopy(network)
    if hasattr(settled, "set_input_size"):
        settled.set_input_size((image_size, image_size))
        facts = network.of_timm
        settled.of_timm = replace(facts, image_size=image_size, arguments=facts.arguments | {"img_size": image_size})
    return settled.eval()


def check_onnx(network: nn.Module) -> None:
    """What ONNX needs, before anything is written.

    Raises:
        ValueError: A package is missing, or the weights are larger than a file can be.
    """
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"--format onnx needs {' and '.join(missing)}, not installed. pip install 'vitcomposer[onnx]'")
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size > _LARGEST_ONNX:
        raise ValueError(f"--format onnx holds 2 GB of weights, these are {size / 1e9:.1f} GB. Use torch-export.")


def write_onnx(network: nn.Module, image_size: int, path: Path, facts: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Write the graph from ``images`` (batch, 3, H, W), normalised, to ``logits`` (batch, classes).

    Args:
        network: That :func:`settle` made.
        facts: Kept as JSON in the file's metadata under ``vitcomposer.json``.

    Returns:
        What onnxruntime makes of the file.
    """
    import onnx
    import onnxruntime

    with warnings.catch_warnings():
        # The trace turns the size of the images into constants, which is what is wanted; newer torch says that its
        # other exporter is the future, which needs one more package and gives graphs of another shape.
        warnings.simplefilter("ignore")
        try:
            with redirect_stdout(StringIO()):  # a failure prints the whole graph
                torch.onnx.export(
                    _with_constant_positions(network, image_size),
                    (_images(image_size),),
                    str(path),
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                    dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
                    opset_version=OPSET,
                    dynamo=False,
                )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError) as error:
            line = str(error).partition("\n")[0][:200]
            raise ValueError(f"--format onnx cannot write this network: {line}. Use --format torch-export.") from error
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {FACTS: json.dumps(facts)})
    onnx.save(graph, path)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def write_program(network: nn.Module, image_size: int, path: Path, facts: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Write what ``torch.export.load`` reads; otherwise as :func:`write_onnx`, the facts being an extra file."""
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    program = torch.export.export(network, (_images(image_size),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path, extra_files={FACTS: json.dumps(facts)})
    return torch.export.load(path).module()


def _images(image_size: int) -> Tensor:
    return torch.zeros(_TRACED_BATCH, 3, image_size, image_size)


@torch.no_grad()
def _with_constant_positions(network: nn.Module, image_size: int) -> nn.Module:
    """ConViT's positional attention computed now: it follows from the weights, and ONNX has no such threshold."""
    network = copy.deepcopy(network)
    if isinstance(network, Trunk):
        _spell_out(network, image_size)
    for module in network.modules():
        if isinstance(module, ImageTransformer):
            dtype = torch.promote_types(module.pos_embed.dtype, torch.float32)
            side = image_size // module.patch_size
            offsets = axis_offsets(side, device=module.pos_embed.device, dtype=dtype)
            for attention in module.modules():
                if isinstance(attention, GPSA):
                    _fix_factors(attention, attention.positional_factors(offsets, offsets))
    return network


def _spell_out(trunk: Trunk, image_size: int) -> None:
    """A network of timm without what a trace cannot hold: fused attention that is asked whether it is causal, rotations
    and NaFlex's positions that are made for the images in the forward pass, which become those of this size."""
    for module in trunk.modules():
        if hasattr(module, "fused_attn"):
            cast(Any, module).fused_attn = False
    rope: Any = getattr(trunk, "rope", None)
    patch = getattr(trunk, "patch_size", None)
    if rope is not None and patch is not None:
        _fix_rotations(rope, (image_size // patch, image_size // patch))
    embeds = getattr(trunk, "embeds", None)
    if isinstance(embeds, NaFlexEmbeds) and embeds.pos_embed is not None:
        _fix_positions(embeds, image_size)


def _fix_rotations(rope: Any, grid: Grid) -> None:
    embedding = rope.get_embed(shape=grid)

    def get_embed(*_: Any, **__: Any) -> Any:
        return embedding

    rope.get_embed = get_embed


def _fix_positions(embeds: Any, image_size: int) -> None:
    side, width = image_size // embeds.patch_size[0], embeds.pos_embed.shape[-1]
    positions = torch.zeros(1, side * side, width)
    embeds._apply_learned_pos_embed(positions, [side, side])
    embeds.pos_embed = nn.Parameter(positions.view(1, side, side, width))


def _fix_factors(attention: GPSA, factors: tuple[Tensor, Tensor]) -> None:
    def positional_factors(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return factors

    attention.positional_factors = positional_factors
