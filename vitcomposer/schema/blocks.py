"""The keys of the blocks that the yamls of several recipes share, such as ``data`` and ``optimizer``."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from vitcomposer.data.jpeg import MAX_PIXELS
from vitcomposer.errors import require, require_within
from vitcomposer.schema.times import check_interval

MAX_IMAGE_SIZE = 16384  # pixels of a side
MAX_SECONDS = 1e6  # eleven days; timers of the system take no endless numbers
MAX_BATCH = 10**7  # images
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def require_plain_address(key: str, address: str | None) -> None:
    """Raise ConfigError for an address that carries a password or a signature: it would be in every file of the run."""
    secret = address is not None and re.search(r"://[^/\s]*:[^/\s]*@|://[^\s]*[?#]", address) is not None
    remedy = "Take them out: every store reads its own from the environment (docs/object_stores.md)."
    shown = re.sub(r"://[^/\s]*@", "://...@", re.split(r"[?#]", address or "")[0])
    require(not secret, key, "an address without password, query and signature", shown, remedy)


def require_fraction(key: str, value: float, remedy: str) -> None:
    """:func:`require` of a number from 0 to 1."""
    require(0.0 <= value <= 1.0, key, "in [0, 1]", value, remedy)


def check_colors(block: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Refuse what no image of values from 0 to 1 is normalised by."""
    require_within(f"{block}mean", mean, -10, 10, "Use the ImageNet values.")
    require(all(s > 0 for s in std), f"{block}std", "positive", std, "Use the ImageNet values.")
    require_within(f"{block}std", std, 0.001, 100, "Use the ImageNet values.")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images are and how they reach the device. Nothing here but ``balance`` changes what a model learns.

    ``remote`` is anything StreamingDataset takes (``s3://bucket/imagenet``, ``gs://``, ``oci://``, ``hf://``, ...) and
    ``local`` the folder that caches it; ``local`` alone is a data set on disk. Splits are folders below both.
    """

    source: Literal["mds", "synthetic"] = "mds"
    remote: str | None = None
    local: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    num_workers: int | str = "auto"  # per rank; auto: by the CPU cores that the ranks of a machine may use
    prefetch_factor: int = 2  # batches per worker
    timeout: float = 600.0  # seconds the loader waits for one batch
    cache_limit: str | None = None  # bytes of disk per node, such as 200gb
    predownload: int | None = None  # samples per worker
    download_retry: int = 5  # tries of a shard after the first, with pauses of 1, 2, 4, ... 30 seconds between them
    download_timeout: float = 60.0  # seconds without a byte after which a try is given up (s3://)
    max_pixels: int = MAX_PIXELS  # of an image, by its header; one that has more counts as broken
    validate_hash: str | None = "xxh64"  # checked where the index carries that hash
    max_bad_fraction: float = 0.001  # images of a split that cannot be decoded, left out; more end the run
    num_canonical_nodes: int | None = None
    shuffle_block_size: int | None = None
    balance: Literal["sqrt", "full"] | None = None  # class of n images: share n (null), its root, or the same as others
    # Where flips, colour, blur and geometry run, with the same pixels. auto: on a GPU, but RandAugment only where the
    # workers would be the limit, which the start of a run finds out.
    augment_on: Literal["auto", "worker", "device"] = "auto"
    synthetic_samples: int = 1_281_167  # per epoch, of source: synthetic

    def __post_init__(self) -> None:
        given = self.source == "synthetic" or self.remote is not None or self.local is not None
        remedy = "Set data.local=FOLDER, data.remote=s3://BUCKET/PATH with data.local=CACHE, or data.source=synthetic."
        require(given, "data.local", "set for source: mds", self.local, remedy)
        require(
            self.remote is None or self.local is not None,
            "data.local",
            "a cache folder when data.remote is set",
            self.local,
            "Set data.local=/fast/disk/cache.",
        )
        require_plain_address("data.remote", self.remote)
        limit = self.cache_limit
        found = None if limit is None else re.fullmatch(r"(\d+(?:\.\d+)?) *[kmgt]?b?", limit.lower())
        known = limit is None or (found is not None and float(found[1]) > 0)
        require(known, "data.cache_limit", "a number of bytes above 0", limit, "Write it like 200gb.")
        workers = self.num_workers
        fits, remedy = workers == "auto" or not isinstance(workers, str), "0 loads in the main process."
        require(fits, "data.num_workers", "a number, or auto", workers, "Leave it out for auto.")
        require_within("data.num_workers", None if isinstance(workers, str) else workers, 0, 1024, remedy)
        require_within("data.prefetch_factor", self.prefetch_factor, 1, 1024, "2 is usual.")
        for name, usual in (("timeout", 600), ("download_timeout", 60)):
            value = getattr(self, name)
            rule = f"a number of seconds above 0 and at most {MAX_SECONDS:.0f}"
            require(0 < value <= MAX_SECONDS, f"data.{name}", rule, value, f"{usual} is usual.")
        require_within("data.max_pixels", self.max_pixels, 1, 1 << 40, f"{MAX_PIXELS} is usual.")
        require_within("data.download_retry", self.download_retry, 0, 1000, "5 is usual.")
        for name in ("predownload", "num_canonical_nodes", "shuffle_block_size"):
            require_within(f"data.{name}", getattr(self, name), 1, 10**9, "null is usual.")
        remedy = "0 lets none pass, 0.001 one in a thousand."
        require_fraction("data.max_bad_fraction", self.max_bad_fraction, remedy)
        require_within("data.synthetic_samples", self.synthetic_samples, 1, 10**9, "Use 1024.")

    def split_name(self, split: Literal["train", "val"]) -> str:
        """The folder of a split."""
        return self.train_split if split == "train" else self.val_split


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to one training image, in this order: crop, flip, RandAugment or 3-Augment, jitter, erasing."""

    crop_scale: tuple[float, float]  # share of the area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear"]
    flip_prob: float
    rand_augment: str | None  # timm's name, such as rand-m9-mstd0.5-inc1
    three_augment: bool  # DeiT III
    color_jitter: float  # brightness, contrast and saturation; 0 is off
    random_erasing: float  # probability; pixel noise, 2 to 33 % of the area
    repeated_augmentation: int  # views of one image in a global batch; 1 is off
    shared_decodes: bool = False  # its views on one rank from one decode; DeiT's are on different ranks
    low_resolution: bool = False  # crop from the column image_small (`vitcomposer convert --raw-below`) in all steps
    low_resolution_stages: bool = True  # in the steps whose views it has the pixels for, 3/5 of its shorter side
    decode_scale: Literal["exact", "dct"] = "exact"  # dct: boxes of twice the image size at reduced scale, approximate
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(
            1e-6 <= low <= high <= 1, "augment.crop_scale", "0 < low <= high <= 1", self.crop_scale, "Use [0.08, 1.0]."
        )
        low, high = self.crop_ratio
        fits, remedy = 0.01 <= low <= high <= 100, "Use [0.75, 1.3333]."
        require(fits, "augment.crop_ratio", "0.01 <= low <= high <= 100", self.crop_ratio, remedy)
        require_fraction(
            "augment.flip_prob", self.flip_prob, "Use 0.5, or 0 where left and right differ (digits, text)."
        )
        require_fraction("augment.random_erasing", self.random_erasing, "Use 0.25, or 0 to switch it off.")
        require_within("augment.color_jitter", self.color_jitter, 0, 10, "0 switches it off.")
        views = self.repeated_augmentation
        require_within("augment.repeated_augmentation", views, 1, 1000, "DeiT uses 3; 1 switches it off.")
        require(
            self.repeated_augmentation > 1 or not self.shared_decodes,
            "augment.shared_decodes",
            "false where augment.repeated_augmentation is 1",
            self.shared_decodes,
            "Set augment.repeated_augmentation=3, or leave it out.",
        )
        require(
            not (self.rand_augment and self.three_augment),
            "augment.three_augment",
            "false with augment.rand_augment",
            self.three_augment,
            "Choose one of the two.",
        )
        check_colors("augment.", self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixup and CutMix with DeiT's switch (timm's semantics): lambda is drawn per batch, pair or image."""

    mixup_alpha: float  # 0 is off
    cutmix_alpha: float  # 0 is off
    prob: float  # of mixing at all
    switch_prob: float  # of CutMix when both are on
    mode: Literal["batch", "pair", "elem"]
    label_smoothing: float

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            fits = value == 0 or 0.001 <= value <= 1000
            require(fits, f"mixing.{name}", "0, or from 0.001 to 1000", value, "0 switches it off.")
        require_fraction("mixing.prob", self.prob, "1 mixes every batch.")
        require_fraction("mixing.switch_prob", self.switch_prob, "0.5 gives CutMix half of the batches.")
        require(
            0 <= self.label_smoothing < 1, "mixing.label_smoothing", "in [0, 1)", self.label_smoothing, "DeiT uses 0.1."
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Shorter side to ``image_size / crop_ratio``, then the centre ``image_size`` pixels."""

    crop_ratio: float
    interpolation: Literal["bicubic", "bilinear"]
    image_size: int | None = None  # null: the training size
    global_batch_size: int | None = None  # null: the training batch

    def __post_init__(self) -> None:
        require_within("evaluation.crop_ratio", self.crop_ratio, 0.1, 1, "DeiT uses 0.875.")
        require_within("evaluation.image_size", self.image_size, 1, MAX_IMAGE_SIZE, "null is the training size.")
        require_within("evaluation.global_batch_size", self.global_batch_size, 1, MAX_BATCH, "null follows training.")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """``lr`` is the peak at ``lr_batch_size`` images a step; at another batch it follows ``lr_scaling``."""

    name: str  # adamw, sgd, adamw_schedulefree, lamb, or any of timm's
    lr: float
    lr_batch_size: int
    lr_scaling: Literal["linear", "sqrt", "none"]  # Goyal et al., arXiv:1706.02677
    weight_decay: float
    # Not decayed, beside biases and what is one-dimensional; null: the network's tokens and positions.
    no_weight_decay: list[str] | None = None
    decay_all: bool = False  # norms and biases too, as SwAV's LARS does, which adapts only what it decays
    layer_decay: float = 1.0  # factor of the learning rate from each block to the one below it; 1 is off
    options: dict[str, Any] = field(default_factory=dict)  # betas, eps, momentum, ...: of that optimizer

    def __post_init__(self) -> None:
        rule, remedy = "above 0 and at most 10000", "DeiT uses 5e-4 at 512 images."
        require(0 < self.lr <= 10_000, "optimizer.lr", rule, self.lr, remedy)
        require_within("optimizer.lr_batch_size", self.lr_batch_size, 1, MAX_BATCH, "DeiT uses 512.")
        require_within("optimizer.weight_decay", self.weight_decay, 0, 1000, "DeiT uses 0.05.")
        named, rule = self.no_weight_decay, "null with optimizer.decay_all, which spares nothing"
        require(not self.decay_all or named is None, "optimizer.no_weight_decay", rule, named, "Drop one of the two.")
        remedy = "0.75 is usual for fine-tuning, 1 switches it off."
        require(0 < self.layer_decay <= 1, "optimizer.layer_decay", "in (0, 1]", self.layer_decay, remedy)

    def peak_lr(self, global_train_batch_size: int) -> float:
        """The highest learning rate of the run."""
        factor = global_train_batch_size / self.lr_batch_size
        return self.lr * {"linear": factor, "sqrt": factor**0.5, "none": 1.0}[self.lr_scaling]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up from ``alpha_i`` to 1, then a cosine to ``alpha_f``, as factors of the peak learning rate.

    ``cosine_from: start`` counts the cosine's phase from the first step, as DeiT and timm do; ``warmup`` from the end
    of the warm-up, as big_vision does. ``progress: compute`` moves both by the share of the run's training FLOPs that
    is spent, as EfficientTrain++ does (arXiv:2405.08768): a step on small images then counts for less.
    """

    t_warmup: str  # Composer time string, in the units of max_duration or a share such as 0.05dur
    alpha_i: float
    alpha_f: float
    cosine_from: Literal["start", "warmup"]
    progress: Literal["steps", "compute"] = "steps"  # the same where all steps cost the same

    def __post_init__(self) -> None:
        require_fraction("schedule.alpha_i", self.alpha_i, "It is the first learning rate as a share of the peak.")
        require_fraction("schedule.alpha_f", self.alpha_f, "It is the last learning rate as a share of the peak.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One execution: its folder, what it prints and saves, and how it uses the device.

    ``compile`` makes one graph of the whole forward pass for every image size; what would fall back to eager is an
    error. ``attention_backends`` are what fused attention may use on a GPU, the first that can run the call is taken
    (null: PyTorch's own order); benchmarks/gpu.py measures which order is fastest. ``parallelism: fsdp2`` has each rank
    keep a share of the weights, their average and the optimizer's state, where ``ddp`` has each rank keep them all; it
    trains the same, saves memory and costs communication; with it ``compile`` makes graphs of the blocks, between which
    weights are gathered. ``activation_checkpointing`` is the share of the transformer blocks whose activations are
    computed again in the backward pass instead of kept; it trains the same, bit for bit.
    """

    name: str  # config.load fills in the name of the yaml
    folder: str = "runs"
    remote: str | None = None  # where on an object store a copy of the folder is kept, such as s3://bucket/runs
    eval_interval: str = "1ep"
    save_interval: str = "1ep"
    keep_checkpoints: int = 2
    best_by: Literal["top1", "class_top1", "loss"] = (
        "top1"  # which number judges an evaluation; class_top1: mean of classes
    )
    keep_best: bool = True  # the checkpoint of the best evaluation stays, beside the newest ones
    patience: int | None = None  # evaluations without a better one after which the run ends; null: never
    max_hours: float | None = None  # after which the run ends, all its starts together; null: never
    log_interval: str = "10ba"
    attention_interval: str | None = None  # of measuring non-locality and gates of a transformer; null: not at all
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=list)
    progress_bar: bool = True
    output: Literal["text", "quiet", "json"] = "text"  # quiet: errors and the result alone; json: an object a line
    device_train_microbatch_size: int | str | None = None  # null: the device's share of the batch; auto: what fits
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    activation_checkpointing: float = 0.0  # 1: all blocks
    sharded_checkpoints: bool = False  # fsdp2 on a disk that all nodes see: each rank writes its share, into one folder
    compile: bool = False
    attention_backends: list[Literal["cudnn", "flash", "efficient", "math"]] | None = None
    deterministic: bool = False
    dist_timeout: float = 600.0  # seconds that a rank waits for the others before the run ends
    skip_nonfinite_steps: int = 0  # of the whole run: left out where a gradient is NaN or infinite; then the run ends

    def __post_init__(self) -> None:
        plain = self.name not in ("", ".", "..") and not set(self.name) & {"/", "\0"}
        rule = "the name of one folder, of at most 200 bytes and without /"
        fits = plain and len(self.name.encode(errors="surrogateescape")) <= 200
        require(fits, "run.name", rule, self.name, "Set run.name=demo_2; run.folder says where it lies.")
        local = "://" not in self.folder
        require(local, "run.folder", "a folder on this machine", self.folder, "Add run.remote=s3://BUCKET/PATH for it.")
        require_plain_address("run.remote", self.remote)
        known = self.remote is None or re.match(r"(s3|gs|azure|oci)://[^/]+", self.remote) is not None
        remedy = "Write it like s3://BUCKET/runs."
        require(known, "run.remote", "null or an address that starts with s3, gs, azure or oci", self.remote, remedy)
        for name in ("eval_interval", "save_interval", "log_interval", "attention_interval"):
            check_interval(f"run.{name}", getattr(self, name))
        require_within("run.keep_checkpoints", self.keep_checkpoints, 1, 10**6, "2 is usual.")
        require_within("run.patience", self.patience, 1, 10**6, "null trains to the end.")
        hours, rule = self.max_hours, "null, or a number of hours above 0 and at most 100000"
        require(hours is None or 0 < hours <= 1e5, "run.max_hours", rule, hours, "null trains to the end.")
        wait, remedy = self.dist_timeout, "Allow for the longest save and download; 600 is usual."
        rule = f"a number of seconds above 0 and at most {MAX_SECONDS:.0f}"
        require(0 < wait <= MAX_SECONDS, "run.dist_timeout", rule, wait, remedy)
        skip, remedy = self.skip_nonfinite_steps, "0 ends the run at the first."
        require_within("run.skip_nonfinite_steps", skip, 0, 10**9, remedy)
        size = self.device_train_microbatch_size
        fits = size is None or size == "auto" or (not isinstance(size, str) and 1 <= size <= MAX_BATCH)
        require(fits, "run.device_train_microbatch_size", "1 or more, auto or null", size, "Leave it out.")
        shares, remedy = self.sharded_checkpoints, "Leave it out."
        fits = not shares or self.parallelism == "fsdp2"
        require(fits, "run.sharded_checkpoints", "false with run.parallelism=ddp", shares, remedy)
        require(not shares or self.remote is None, "run.sharded_checkpoints", "false with run.remote", shares, remedy)
        remedy = "1 is all of them, 0 switches it off."
        require_fraction("run.activation_checkpointing", self.activation_checkpointing, remedy)
        backends = self.attention_backends
        named = backends is None or (backends and len(set(backends)) == len(backends))
        remedy = "Write [cudnn, flash, efficient, math], or null for PyTorch's own order."
        require(bool(named), "run.attention_backends", "one or more names, each once", backends, remedy)
