"""The keys of the blocks ``model`` and ``init``: which network, and what its weights start from."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vitcomposer.errors import require, require_within
from vitcomposer.schema.blocks import MAX_IMAGE_SIZE, require_fraction

TIMM = "timm/"  # before the name of a network of timm

_MODEL_RANGES: dict[str, tuple[float, float]] = {
    "image_size": (1, MAX_IMAGE_SIZE),
    "patch_size": (1, 1024),
    "embed_dim": (1, 65536),
    "depth": (1, 1000),
    "num_heads": (1, 1024),
    "mlp_ratio": (0.01, 100),
    "init_values": (0, 100),
    "local_up_to_layer": (0, 1000),
    "locality_strength": (1e-6, 1e6),
}


FOLLOWED = ("mean", "std", "crop_ratio", "interpolation")
# What timm's networks have no argument for, and what this yaml or nobody else may say to timm.
_OWN_OPTIONS = (
    "stem",
    "drop_path_mode",
    "position_embedding",
    "weight_init",
    "combine_heads",
    "local_up_to_layer",
    "locality_strength",
    "use_local_init",
)
_SAID_ELSEWHERE = {"num_classes": "num_classes", "img_size": "image_size", "global_pool": "pool"}
_NOT_FOR_TIMM = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "scriptable",
    "exportable",
    "no_jit",
    "features_only",
    "out_indices",
    "in_chans",
    "device",
    "dtype",
)
_LARGEST_ARGUMENT = 65536


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which network. ``name`` fixes the published structure; a field that is null keeps the published value.

    ``timm/NAME`` is any network of timm. Fields from ``patch_size`` to ``class_token`` are then the arguments of that
    name, ``pool`` is timm's ``global_pool`` and may be any of its values there by ``arguments: {global_pool: map}``.
    """

    name: str
    num_classes: int
    image_size: int  # pixels
    drop_path_rate: float
    drop_rate: float = 0.0
    attn_drop_rate: float | None = None
    drop_path_mode: Literal["linear", "constant"] | None = None
    pool: Literal["token", "avg"] | None = None
    patch_size: int | None = None  # pixels
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    init_values: float | None = None  # LayerScale
    qkv_bias: bool | None = None
    class_token: bool | None = None  # ViT only
    position_embedding: Literal["learned", "sincos", "sincos_moco3"] | None = None  # ViT only
    stem: Literal["linear", "conv"] | None = None  # how patches become tokens; null: linear
    weight_init: Literal["deit", "big_vision", "moco3"] | None = None  # as whose code starts the weights; null: deit
    combine_heads: Literal["logits", "probabilities"] | None = None  # distilled only: of what evaluation takes the mean
    local_up_to_layer: int | None = None  # ConViT only: the number of GPSA layers
    locality_strength: float | None = None  # ConViT only
    use_local_init: bool | None = None  # ConViT only
    arguments: dict[str, Any] = field(default_factory=dict)  # timm/ only: timm's own, such as reg_tokens: 4

    def __post_init__(self) -> None:
        require_within("model.num_classes", self.num_classes, 0, 10**7, "0 is a trunk, no head.")
        for name in ("drop_path_rate", "drop_rate", "attn_drop_rate"):
            rate = getattr(self, name)
            require(rate is None or 0 <= rate < 1, f"model.{name}", "in [0, 1)", rate, "Use 0 to switch it off.")
        for name, (low, high) in _MODEL_RANGES.items():
            remedy = "Use 224." if name == "image_size" else "null keeps the published value."
            require_within(f"model.{name}", getattr(self, name), low, high, remedy)
        if not self.name.startswith(TIMM):
            rule = f"left out for {self.name}; they are for model.name={TIMM}..."
            require(not self.arguments, "model.arguments", rule, self.arguments, "Set the keys of the block model.")
            return
        for name in _OWN_OPTIONS:
            rule, remedy = f"null for {self.name}, it is of our own networks", f"Set model.{name}=null."
            require(getattr(self, name) is None, f"model.{name}", rule, getattr(self, name), remedy)
        for name, value in self.arguments.items():
            self._check_argument(name, value)

    def _check_argument(self, name: str, value: Any) -> None:
        key, other = f"model.arguments.{name}", _SAID_ELSEWHERE.get(name)
        pool = name == "global_pool" and self.pool is None
        remedy = f"Set model.{other}." if other else "Leave it out."
        require(pool or (other is None and name not in _NOT_FOR_TIMM), key, "left out", value, remedy)
        rule = "set once, it is a key of model"
        fits = (
            getattr(self, name, None) is None if name in _MODEL_RANGES or name in ("qkv_bias", "class_token") else True
        )
        require(fits, key, rule, value, f"Drop it, or model.{name}.")
        rule = f"text, a number up to {_LARGEST_ARGUMENT}, a switch, or a list of such"
        require(_is_plain(value), key, rule, value, "Mend it.")

    def options(self) -> dict[str, Any]:
        """What the block sets, as the arguments of ``models.build_model``: a field that is null is left out."""
        found = {key: value for key, value in asdict(self).items() if value is not None}
        return found if self.arguments else {key: value for key, value in found.items() if key != "arguments"}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 1000 and all(map(_is_plain, value))
    if isinstance(value, str):
        return len(value) <= 200
    return value is None or (isinstance(value, bool | int | float) and abs(value) <= _LARGEST_ARGUMENT)


@dataclass(frozen=True, kw_only=True)
class Init:
    """What training starts from, and which part of the network it changes.

    ``weights`` is a checkpoint of a run or a file of timm, DeiT, ConViT, DINO, MoCo-v3 or SwAV, or ``timm:NAME.TAG`` or
    ``hf:OWNER/NAME`` on the Hugging Face hub, read without running code in it.
    """

    weights: str | None = None  # null: as the model initialises itself
    # What the images take from weights on a hub; null: of these what the yaml leaves out, which the start fills in.
    follow: list[Literal["mean", "std", "crop_ratio", "interpolation"]] | None = None
    min_matched: float = 0.9  # least share of the network, heads aside, that the file has to fill
    train_blocks: int | None = None  # the last blocks that learn, beside final norm and head; 0: the head; null: all

    def __post_init__(self) -> None:
        remedy = "0.9 refuses the file of another network; 1 takes nothing but the whole."
        require_fraction("init.min_matched", self.min_matched, remedy)
        blocks = self.train_blocks
        require_within("init.train_blocks", blocks, 0, 1000, "0 trains the head alone, null everything.")

    def check_no_blocks(self, recipe: str) -> None:
        """Refuse ``train_blocks`` in a recipe that decides by itself what learns."""
        rule = f"null in the recipe {recipe}, which decides by itself what learns"
        remedy = "Leave it out, or fine-tune with recipe: supervised."
        require(self.train_blocks is None, "init.train_blocks", rule, self.train_blocks, remedy)
