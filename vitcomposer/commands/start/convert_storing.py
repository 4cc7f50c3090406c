"""The options of ``vitcomposer convert`` that say how images are stored, given by hand or by a recipe (``--for``)."""

import argparse
from typing import TYPE_CHECKING, Any

from vitcomposer.commands.arguments import add_reading, given_reading
from vitcomposer.errors import require

if TYPE_CHECKING:
    from vitcomposer.data.conversion.encode import StoreOptions
    from vitcomposer.data.conversion.for_recipe import Needs
    from vitcomposer.data.conversion.sources import Source


def add_storing(group: Any) -> None:
    """Add the options to a group of a parser."""
    help_text = (
        "store what this recipe reads: a page or its name, such as vit_s_medium. Prints columns and bytes before "
        "anything is written; the options below win"
    )
    group.add_argument("--for", dest="recipe", metavar="YAML", help=help_text)
    group.add_argument(
        "--seekable",
        action=argparse.BooleanOptionalAction,
        help="rewrite JPEGs losslessly so that parts can be decoded alone (default: on for the split train, else off)",
    )
    help_text = "resize images whose shorter side is larger and store them as JPEG"
    group.add_argument("--short-side", type=int, metavar="PIXELS", help=help_text)
    group.add_argument("--quality", type=int, default=95, help="of resized images, 4:2:0 (default: %(default)s)")
    help_text = "share of the images stored as raw pixels: about five times the bytes, no decoding"
    group.add_argument("--raw-fraction", type=float, default=0.0, metavar="SHARE", help=help_text)
    help_text = (
        "add a column image_small of raw pixels with this shorter side, from which training cuts views of at most 3/5 "
        "of it"
    )
    group.add_argument("--raw-below", type=int, metavar="PIXELS", help=help_text)
    help_text = "store that column as JPEG of this quality: fewer bytes, more decoding (default: raw pixels)"
    group.add_argument("--small-quality", type=int, metavar="QUALITY", help=help_text)
    help_text = (
        "apply: turn images upright by their EXIF orientation (default of folder and list); keep: read them as they "
        "are stored, as ImageNet's papers do (default of torchvision)"
    )
    group.add_argument("--exif", choices=("apply", "keep"), help=help_text)
    add_reading(group)
    help_text = "store PNG, CMYK and the like anew as JPEG of this quality (default: as they are)"
    group.add_argument("--reencode", type=int, metavar="QUALITY", help=help_text)


def read_needs(args: argparse.Namespace) -> "Needs | None":
    """What the recipe of ``--for`` reads.

    Raises:
        ConfigError: Its page is none, or an option says otherwise.
    """
    if args.recipe is None:
        return None
    from vitcomposer.config import load
    from vitcomposer.data.conversion.for_recipe import needs_of

    needs = needs_of(load(args.recipe, count_classes=False), args.recipe)
    unlabelled = vars(args).get("unlabelled", False)  # of folders alone
    rule = f"left out with --for {needs.name}, which learns from labels"
    require(not (unlabelled and needs.has_labels), "--unlabelled", rule, unlabelled, "Leave out one of the two.")
    return needs


def store_options(args: argparse.Namespace, needs: "Needs | None") -> "StoreOptions":
    """What was given, and what a recipe needs beside it."""
    from vitcomposer.data.conversion.encode import StoreOptions

    given = StoreOptions(
        seekable=args.seekable,
        short_side=args.short_side,
        quality=args.quality,
        raw_fraction=args.raw_fraction,
        raw_below=args.raw_below,
        reencode=args.reencode,
        exif=args.exif,
        reading=given_reading(args),
        small_quality=args.small_quality,
    )
    if needs is None:
        return given
    from vitcomposer.data.conversion.for_recipe import fit

    return fit(needs, given, args.out)


def print_plan(needs: "Needs", source: "Source", stored: "StoreOptions") -> None:
    """What will be stored for a recipe, with its bytes."""
    from vitcomposer.data.conversion.for_recipe import describe, estimate

    exif = stored.exif or source.exif
    turned = "turned upright by EXIF" if exif == "apply" else "read as they are stored, EXIF or not"
    print(f"for {needs.name}: images are {turned}")
    for line in describe(needs, stored, estimate(source, stored)):
        print(line, flush=True)
