"""Translates a network of ours into timm's name and arguments, so that ``timm.create_model`` builds and fills it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from vitcomposer.models import convit, resnet, vit
from vitcomposer.models.trunks import Trunk
from vitcomposer.schema import Model


@dataclass(frozen=True)
class TimmForm:
    """What timm needs to build a network.

    Attributes:
        architecture: For ``timm.create_model``.
        model_args: Its arguments, without the number of classes.
        head: Names of the classifier layers.
        first_conv: Name of the layer that sees the images.
        global_pool: How features become one vector.
    """

    architecture: str
    model_args: dict[str, Any]
    head: str | list[str]
    first_conv: str
    global_pool: str


def timm_form(network: nn.Module, model: Model) -> TimmForm | None:
    """How timm calls a network with learned positions; None for one with a convolutional stem, which timm lacks.

    Raises:
        ValueError: timm has no such network.
    """
    if isinstance(network, Trunk):
        facts, page = network.of_timm, cast(Any, network).pretrained_cfg
        rates = ("drop_rate", "attn_drop_rate", "drop_path_rate")  # which are for training
        arguments = {key: value for key, value in facts.arguments.items() if key not in rates}
        first, pool = page.get("first_conv", ""), getattr(network, "global_pool", "")
        head = facts.heads[0] if len(facts.heads) == 1 else list(facts.heads)
        pool = pool if isinstance(pool, str) else page.get("pool", "avg")
        return TimmForm(facts.name.partition(".")[0], arguments, head, first_conv=first, global_pool=pool)
    if isinstance(network, resnet.ResNet):
        return TimmForm(model.name, {}, head="fc", first_conv="conv1", global_pool="avg")
    if isinstance(network, vit.VisionTransformer):
        config = network.config
        arguments = {
            "embed_dim": config.embed_dim,
            "class_token": config.class_token,
            "no_embed_class": not config.prefix_positions,
            "init_values": config.init_values or None,
            "fc_norm": False,  # timm's norm after the average; ours comes before
        }
        name, head = f"{model.name}_224", ["head", "head_dist"] if config.dist_token else "head"
    elif isinstance(network, convit.ConViT):
        config = network.config
        if config.init_values:
            raise ValueError(
                f"model.init_values must be 0 for --format safetensors of {model.name}, timm's ConViT has no "
                f"LayerScale, got {config.init_values}. Use --format onnx or torch-export."
            )
        # timm's embed_dim is the width of one head.
        width = config.embed_dim // config.num_heads
        arguments = {"embed_dim": width, "local_up_to_layer": config.local_up_to_layer}
        name, head = model.name.removesuffix("_plus"), "head"
    else:
        raise ValueError(f"model.name must be a network that timm has for --format safetensors, got {model.name!r}.")
    if config.stem != "linear":
        return None
    common = {
        "img_size": network.image_size,
        "patch_size": config.patch_size,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "global_pool": config.pool,
    }
    return TimmForm(name, {**common, **arguments}, head, first_conv="patch_embed.proj", global_pool=config.pool)


def save_tensors(network: nn.Module, path: Path) -> None:
    """The weights by timm's names, which are ours."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    # Its save_file makes files that nobody else may read.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def from_folder(folder: Path) -> Callable[[Tensor], Tensor]:
    """What timm makes of the folder."""
    import timm

    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except RuntimeError as error:  # tensors of other shapes or names
        line = " ".join(str(error).split())[:200]
        raise ValueError(
            f"timm must load what --format safetensors writes, it says: {line} Use --format onnx or torch-export."
        ) from error
