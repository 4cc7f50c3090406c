"""Lists the published files of weights that our yamls and docs name: address, size, licence, hash, how to get them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from vitcomposer.errors import did_you_mean
from vitcomposer.shipped import YAMLS

FOLDER = "weights"  # where the yamls have them

_HASH = re.compile(r"-([0-9a-f]{8})\.")  # of a name as torch.hub has them: how the file's sha256 begins
_DEIT, _DINO = "https://dl.fbaipublicfiles.com/deit", "https://dl.fbaipublicfiles.com/dino"
_CONVIT, _MOCO = "https://dl.fbaipublicfiles.com/convit", "https://dl.fbaipublicfiles.com/moco-v3"
_APACHE, _NO_COMMERCE = "Apache-2.0", "CC-BY-NC-4.0"


@dataclass(frozen=True)
class Published:
    """One file.

    Attributes:
        url: Of those who made it.
        what: The network and what it learned from.
        parameters: Of the network, each a float32: no whole file is smaller than that.
        licence: That of the repository which names the file (its LICENSE, read in November 2026).
    """

    url: str
    what: str
    parameters: int
    licence: str

    @property
    def name(self) -> str:
        """Of the file."""
        return self.url.rpartition("/")[2]

    @property
    def short(self) -> str:
        """Its name without what follows the first dot, which a command line may leave out."""
        return self.name.partition(".")[0]

    @property
    def sha256(self) -> str:
        """The first digits of its hash, as published in its name; empty where none are."""
        found = _HASH.search(self.name)
        return found[1] if found else ""

    @property
    def least_bytes(self) -> int:
        """Of a whole file."""
        return 4 * self.parameters

    def fits(self, sha256: str) -> bool:
        """Whether a file of this hash, in hexadecimal digits, is the published one, as far as that is known."""
        return sha256.startswith(self.sha256)


PUBLISHED = (
    Published(f"{_DEIT}/deit_3_small_224_21k.pth", "DeiT III-S, ImageNet-21k, then 1k", 22_059_496, _APACHE),
    Published(f"{_DEIT}/deit_tiny_patch16_224-a1311bcf.pth", "DeiT-Ti, ImageNet-1k", 5_717_416, _APACHE),
    Published(f"{_DEIT}/deit_small_patch16_224-cd65a155.pth", "DeiT-S, ImageNet-1k", 22_050_664, _APACHE),
    Published(f"{_DEIT}/deit_base_patch16_224-b5f2ef4d.pth", "DeiT-B, ImageNet-1k", 86_567_656, _APACHE),
    Published(f"{_DEIT}/regnety_160-a5fe301d.pth", "RegNetY-16GF, DeiT's teacher", 83_590_140, _APACHE),
    Published(f"{_CONVIT}/convit_tiny.pth", "ConViT-Ti, ImageNet-1k", 5_710_512, _APACHE),
    Published(f"{_CONVIT}/convit_small.pth", "ConViT-S, ImageNet-1k", 27_777_322, _APACHE),
    Published(f"{_CONVIT}/convit_base.pth", "ConViT-B, ImageNet-1k", 86_540_040, _APACHE),
    Published(
        f"{_DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
        "ViT-S/16 by DINO, no labels",
        21_665_664,
        _APACHE,
    ),
    Published(f"{_MOCO}/vit-s-300ep/vit-s-300ep.pth.tar", "ViT-S/16 by MoCo-v3, no labels", 21_590_016, _NO_COMMERCE),
)


def find_published(name: str) -> Published | None:
    """The entry of a file's name, with or without its ending."""
    return next((each for each in PUBLISHED if name in (each.name, each.short)), None)


def how_to_get(path: str, key: str | None = None) -> str:
    """What to do about a file that is not there: a command that fetches it, and what else there is.

    Args:
        key: Of the configuration, whose value the path is.
    """
    known, folder = find_published(Path(path).name), str(Path(path).parent)
    another = {None: "name another", "init.weights": "set init.weights=null to start from nothing"}
    otherwise = another.get(key, f"set {key}=FILE")
    if known is None or known.name != Path(path).name:
        hint = did_you_mean(Path(path).name, [each.name for each in PUBLISHED])
        return f"Mend the path, or {otherwise}.{hint}"
    to = "" if folder == FOLDER else f" --to {shlex.quote(folder)}"
    size = f"{known.least_bytes / 1e6:.0f} MB"
    return f"Run `vitcomposer weights {known.short}{to}` ({size}), put the file there, or {otherwise}."


def named_by(name: str) -> list[str]:
    """The yamls of ours that name a file of the folder ``weights``."""
    line = re.compile(rf"^ *weights: {re.escape(f'{FOLDER}/{name}')}\s*(#.*)?$", re.M)
    return [path.stem for path in sorted(YAMLS.glob("*.yaml")) if line.search(path.read_text())]
