"""``vitcomposer attention``: draws where a trained transformer looks.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcomposer.commands.arguments import add_reading, given_reading
from vitcomposer.data.jpeg import set_reading
from vitcomposer.errors import require
from vitcomposer.runs import layout
from vitcomposer.schema import Neighbors, Probe, SelfSupervised
from vitcomposer.schema.recipe import Recipe
from vitcomposer.whole_files import whole_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitcomposer.evaluation.trained import Trained, Weights
    from vitcomposer.models.attention import BlockAttention

EPILOG = """SOURCE is a run folder, a checkpoint in one, a folder of `vitcomposer export`, or a yaml with
init.weights=FILE, of networks trained without labels too. Layers and heads count from 1."""


def add_command(commands: Any) -> None:
    """Add ``attention`` to the subcommands of a parser."""
    parser = commands.add_parser("attention", description=_run.__doc__, epilog=EPILOG)
    parser.add_argument("source", help="run folder, checkpoint, exported folder or yaml")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the PNG files")
    help_text = "whose maps are drawn for each image (default: the last)"
    parser.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help=help_text)
    parser.add_argument("--heads", type=int, nargs="+", metavar="HEAD", help="whose maps are drawn (default: all)")
    help_text = "of the run's yaml, such as evaluation.image_size=384 or init.weights=FILE"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help_text)
    help_text = "auto: what the run measured as better, the trained weights or their average (default: %(default)s)"
    parser.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto", help=help_text)
    add_reading(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Draw the attention of a ViT, DeiT or ConViT: for each image the maps of the heads and attention rollout, then how
    far every layer reaches, and of a ConViT its gates and the positional attention of one patch."""
    import torch

    from vitcomposer.evaluation import attention_pictures as pictures
    from vitcomposer.models.attention import attention_size, nonlocality, observe_attention

    set_reading(given_reading(args))
    model = load_network(args.source, args.overrides, weights=args.weights)
    network = _transformer(model)
    depth, width = attention_size(network)
    layers = _choose("--layers", args.layers or [depth], depth)
    heads = _choose("--heads", args.heads or range(1, width + 1), width)
    photos, images = read_images(args.images, model)
    args.out.mkdir(parents=True, exist_ok=True)
    reach, blocks = [], []
    for name, photo, image in zip(_names(args.images), photos, images, strict=True):
        blocks = observe_attention(network, image[None], lambda block: block)
        reach.append(torch.stack([nonlocality(block) for block in blocks]))
        _save(pictures.draw_image(network, photo, blocks, layers=layers, heads=heads), args.out / name)
    _draw_network(network, blocks, torch.stack(reach).mean(dim=0), heads, args.out)
    return 0


def _draw_network(
    network: Any, blocks: "Sequence[BlockAttention]", reach: "Tensor", heads: list[int], out: Path
) -> None:
    """How far every layer reaches, and what a ConViT adds, which does not depend on the image."""
    from vitcomposer.evaluation import attention_pictures as pictures
    from vitcomposer.models.attention import positional_attention

    gates = [block.gate for block in blocks if block.gate is not None]
    grid = blocks[0].grid
    _save(pictures.draw_layers(reach, gates, grid), out / LAYERS)
    if gates:
        positions = positional_attention(network, grid)
        _save(pictures.draw_positions(positions, gates, grid, heads=heads), out / POSITIONS)


LAYERS, POSITIONS = "layers.png", "positional.png"


def load_network(source: str, overrides: Sequence[str], *, weights: "Weights") -> "Trained":
    """A trained classifier, or the trunk of a run without labels; its head is left out then.

    Raises:
        ConfigError, ValueError: As ``trained.load_trained``.
    """
    from vitcomposer import config
    from vitcomposer.evaluation.trained import load_trained

    path = Path(source)
    run = path if path.is_dir() else path.parent.parent
    page = path if path.suffix in (".yaml", ".yml") else run / layout.CONFIG
    cfg: Recipe | None = config.load(page, overrides) if page.is_file() else None
    if not isinstance(cfg, SelfSupervised | Probe | Neighbors):
        return load_trained(source, overrides, weights=weights)
    require(weights == "auto", "--weights", "auto for a network without classes", weights, "Leave it out.")
    return _load_trunk(cfg, path)


def _load_trunk(cfg: SelfSupervised | Probe | Neighbors, path: Path) -> "Trained":
    from vitcomposer.evaluation.trained import Trained, trained_upright
    from vitcomposer.models import load_weights
    from vitcomposer.training.network import build_network

    file = _file_of_trunk(cfg, path)
    model = replace(cfg.model, num_classes=0)
    network = build_network(model, replace(cfg.init, weights=None, train_blocks=None))
    load_weights(network, str(file), min_matched=1)
    colors: Any = cfg.crops if isinstance(cfg, SelfSupervised) else cfg.augment if isinstance(cfg, Probe) else cfg
    return Trained(
        network=network.eval(),
        model=model,
        image_size=cfg.evaluation.image_size or model.image_size,
        crop_ratio=cfg.evaluation.crop_ratio,
        interpolation=cfg.evaluation.interpolation,
        mean=tuple(colors.mean),
        std=tuple(colors.std),
        class_names=None,
        source=str(file),
        averaged=False,
        upright=trained_upright(cfg, path if path.is_dir() else None),
    )


def _file_of_trunk(cfg: SelfSupervised | Probe | Neighbors, path: Path) -> Path | str | None:
    # A probe and a search for neighbours leave the trunk as it was.
    own = isinstance(cfg, SelfSupervised) and path.suffix not in (".yaml", ".yml")
    file = (path / layout.LATEST_CHECKPOINT if path.is_dir() else path) if own else cfg.init.weights
    remedy = "Set init.weights=FILE."
    require(file is not None, "init.weights", "the file of the trained network", None, remedy)
    return file


def _transformer(model: "Trained") -> "nn.Module":
    from vitcomposer.models.attention import has_attention

    rule = "a ViT, DeiT or ConViT, or a network of timm of their shape, which have attention"
    require(has_attention(model.network), "SOURCE", rule, model.model.name, "Give another run.")
    return model.network


def _choose(option: str, numbers: Sequence[int], count: int) -> list[int]:
    """Indices from 0 of what the command line counts from 1."""
    wrong = [number for number in numbers if not 1 <= number <= count]
    require(not wrong, option, f"from 1 to {count}", (wrong or numbers)[0], "They count from 1.")
    return [number - 1 for number in numbers]


def read_images(paths: Sequence[str], model: "Trained") -> tuple["Tensor", "Tensor"]:
    """The evaluation's crop of each file: uint8 (n, 3, S, S) as it is shown, and normalised as the network gets it.

    Raises:
        ValueError: A file that is missing or no image.
    """
    from vitcomposer.data.augment.transforms import Normalize
    from vitcomposer.data.files import ImageFiles, crop_loader

    loader = crop_loader(
        ImageFiles(paths, upright=model.upright),
        image_size=model.image_size,
        crop_ratio=model.crop_ratio,
        interpolation=model.interpolation,
        batch_size=len(paths),
        workers=0,
    )
    (batch,) = loader
    for row, reason in batch["broken"]:
        raise ValueError(f"IMAGE must be an image file, {paths[row]} cannot be read: {reason}. Leave it out.")
    photos: Tensor = batch["image"]
    return photos, Normalize(model.mean, model.std)(photos)


def _names(paths: Sequence[str]) -> list[str]:
    """A file name for the picture of each image, different from each other and from those of the other pictures."""
    stems = [Path(path).stem for path in paths]
    taken = Counter(stems) + Counter((Path(LAYERS).stem, Path(POSITIONS).stem))
    return [f"{stem}-{n}.png" if taken[stem] > 1 else f"{stem}.png" for n, stem in enumerate(stems, start=1)]


def _save(figure: Any, path: Path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial)
    print(path)
