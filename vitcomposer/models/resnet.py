"""ResNet (arXiv:1512.03385) by timm, behind the interface of the transformers; parameter names are timm's."""

from typing import Any

from timm.models import resnet

# timm's block and the number of blocks of each stage: arXiv:1512.03385, Table 1.
VARIANTS: dict[str, tuple[Any, tuple[int, int, int, int]]] = {
    "resnet18": (resnet.BasicBlock, (2, 2, 2, 2)),
    "resnet34": (resnet.BasicBlock, (3, 4, 6, 3)),
    "resnet50": (resnet.Bottleneck, (3, 4, 6, 3)),
}
RESIDUAL_BLOCKS = (resnet.BasicBlock, resnet.Bottleneck)
_STRIDE = 32


class ResNet(resnet.ResNet):
    """A ResNet.

    The last gamma of every residual branch starts at one, as in torchvision and unlike timm: LARS gives a parameter of
    norm zero the whole learning rate. No source says what the recipes with a ResNet did.

    ``forward_features`` gives (B, num_features, H / 32, W / 32), ``forward`` of a model without classes their mean.
    Every image size from 32 pixels on is accepted.

    Attributes:
        image_size: Side in pixels the model is trained with, which changes nothing in it.
        num_prefix_tokens: 0, there are no tokens.
    """

    num_prefix_tokens = 0

    def __init__(self, name: str, *, num_classes: int, image_size: int) -> None:
        if image_size < _STRIDE:
            raise ValueError(f"model.image_size must be at least {_STRIDE} for {name}, got {image_size}; use {_STRIDE}")
        block, layers = VARIANTS[name]
        super().__init__(block, layers, num_classes=num_classes, zero_init_last=False)
        self.image_size = image_size

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beside those with one dimension: none."""
        return set()
