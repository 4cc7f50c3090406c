"""Sets how a run computes its numbers, never which: compiled, with which attention kernel, on shares of the weights."""

import functools
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from composer.utils import FSDP2Config, ParallelismConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from vitcomposer.errors import ConfigError, require
from vitcomposer.models.layers import Block
from vitcomposer.models.transformer import ImageTransformer, num_recomputed
from vitcomposer.models.trunks import Trunk, blocks_in
from vitcomposer.schema import Run
from vitcomposer.schema.recipe import Trainable

GRAPH_LIMIT = 8  # four image sizes in training, that of evaluation, and a few stages of patch dropout
SHARDED = "fsdp2"
AUTO = "auto"
ELEMENTWISE, BY_NORM = ("adamw", "sgd"), ("lamb", "lars")
# timm takes the norms of many tensors at once, which torch 2.7 cannot where they are shares; nor can its DDP split a
# graph of which a part is computed again.
HAS_NORMS = SPLITS_RECOMPUTED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
SHAREABLE = (*ELEMENTWISE, *BY_NORM) if HAS_NORMS else ELEMENTWISE  # do to shares what they do to the whole tensor
CLIPPED = ("norm", "value", "norm_per_parameter")
ATTENTION_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def check_execution(
    run: Run, *, device: str, device_batch_size: int, algorithms: Collection[str] = (), world_size: int = 1
) -> None:
    """Refuse what the device does not have and what a graph cannot take.

    Args:
        algorithms: Names of those of the run.
        world_size: Number of ranks.

    Raises:
        ConfigError: The key of ``run``.
    """
    backends = run.attention_backends
    rule = "null on a CPU, which has one kernel"
    require(device == "gpu" or backends is None, "run.attention_backends", rule, backends, "Leave it out.")
    if run.compile and run.parallelism != SHARDED and world_size > 1:
        rule = "0 with run.compile and DDP on several ranks before torch 2.14"
        fits, remedy = SPLITS_RECOMPUTED or not run.activation_checkpointing, "Or set run.parallelism=fsdp2."
        require(fits, "run.activation_checkpointing", rule, run.activation_checkpointing, remedy)
    micro = run.device_train_microbatch_size
    if isinstance(micro, str):
        _check_auto(run, device, algorithms)
        return
    require(
        not run.compile or micro is None or device_batch_size % micro == 0 or micro > device_batch_size,
        "run.device_train_microbatch_size",
        f"a divisor of the {device_batch_size} images of a rank with run.compile, which makes a graph for every size",
        micro,
        "Choose a divisor, or set run.compile=false.",
    )


def _check_auto(run: Run, device: str, algorithms: Collection[str]) -> None:
    """Composer begins with the device's whole share, and halves it and repeats the step as often as memory runs out."""
    key = "run.device_train_microbatch_size"
    rule = "a number of images, or left out, on a CPU: no error tells when its memory is full, the system ends the run"
    require(device == "gpu", key, rule, AUTO, "Leave it out, or choose a divisor of the device's share of the batch.")
    rule = f"a number of images with run.parallelism={SHARDED}, whose gathered weights Composer cannot take back"
    remedy = "Start once with run.parallelism=ddp to find one, or halve it until it fits."
    require(run.parallelism != SHARDED, key, rule, AUTO, remedy)
    rule = "a number of images with run.compile, which would make graphs for each size that is tried"
    require(not run.compile, key, rule, AUTO, "Read trainer/device_train_microbatch_size of a run without run.compile.")
    rule = "a number of images with algorithms.SAM: a step that is repeated would begin at weights that SAM has moved"
    require("SAM" not in algorithms, key, rule, AUTO, "Choose a divisor of the device's share of the batch.")


def recompute_activations(task: nn.Module, share: float) -> None:
    """Have that share of the blocks that learn, the first ones, keep their input alone until the backward pass.

    Losses and gradients stay what they are, bit for bit.

    Raises:
        ConfigError: No transformer block learns.
    """
    found = False
    for network in [module for module in task.modules() if isinstance(module, ImageTransformer | Trunk)]:
        blocks = network.block_list if isinstance(network, Trunk) else network.blocks
        learning = [block for block in blocks if any(p.requires_grad for p in block.parameters())]
        for block in learning[: num_recomputed(share, len(learning))]:
            found = True
            if isinstance(block, Block):
                block.recompute = True
            else:
                _recompute_forward(block, share)
    rule = "0 where no transformer block learns"
    require(found, "run.activation_checkpointing", rule, share, "Leave it out.")


def _recompute_forward(block: nn.Module, share: float) -> None:
    """Have a block of timm keep its inputs alone; within the module, as our own blocks do it."""
    normed = next((each for each in block.modules() if isinstance(each, _BatchNorm)), None)
    rule = "0 for a network with batch norms, whose running statistics would count each image twice"
    require(normed is None, "run.activation_checkpointing", rule, share, "Leave it out.")
    block.__class__ = _recomputed(type(block))


@functools.cache
def _recomputed(base: type) -> type:
    """A class, since a copy of a network keeps it and would share a function that is set on one."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(functools.partial(base.forward, self), *args, use_reentrant=False, **kwargs)
        return base.forward(self, *args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward, "__module__": __name__})


def compile_forward(module: nn.Module, graphs: int = GRAPH_LIMIT) -> None:
    """Compile the forward pass of a module in place, whole, with a graph for every shape and no dynamic ones.

    A graph break is an error, and so is a graph more than ``graphs``: nothing falls back to eager in silence, and
    nothing compiles without end. Names in the state dict stay.

    Composer's ``compile_config`` compiles around DDP and so leaves evaluation in eager mode on several ranks. Here DDP
    lies around the compiled forward; its buckets still split the captured graph, so gradients travel while the
    backward pass goes on.

    Raises:
        ConfigError: By the forward pass, at a shape too many.
    """
    # Not above: it takes a second, and few runs are compiled.
    from torch._dynamo.exc import FailOnRecompileLimitHit

    limits: Any = torch._dynamo.config
    limits.recompile_limit = graphs  # torch's own value is 8; importing timm.optim makes it a million
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, graphs)
    compiled = torch.compile(module.forward, fullgraph=True, dynamic=False)

    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit as error:  # whose words are other ones in each torch
            raise ConfigError(
                f"run.compile must be false for a network that sees more than {GRAPH_LIMIT} shapes of images, each of "
                "which is a graph of its own. Set run.compile=false, or use fewer sizes."
            ) from error

    module.forward = forward


def compile_networks(networks: Sequence[nn.Module], *, shared: bool) -> None:
    """Compile each network whole or, where FSDP2 shares its weights, each block by itself: it gathers between them.

    Blocks alike share their graphs. What lies outside of the blocks then stays in eager mode.
    """
    if not shared:
        for network in networks:
            compile_forward(network)
        return
    blocks = list(dict.fromkeys(block for network in networks for block in blocks_in(network)))
    for block in blocks:
        compile_forward(block, graphs=GRAPH_LIMIT * len(blocks))  # those that drop different shares are not alike


def check_shares(cfg: Trainable) -> None:
    """Refuse what needs a tensor as a whole.

    Raises:
        ConfigError: The optimizer or an algorithm.
    """
    remedy = "Set run.parallelism=ddp."
    rule = f"{', '.join(SHAREABLE[:-1])} or {SHAREABLE[-1]} with {SHARDED}, which shows it a share of each tensor"
    newer = " With lamb and lars it needs torch 2.14." if cfg.optimizer.name in BY_NORM else ""
    require(cfg.optimizer.name in SHAREABLE, "optimizer.name", rule, cfg.optimizer.name, remedy + newer)
    rule = f"left out with {SHARDED}, under which it is untested"
    require("SAM" not in cfg.algorithms, "algorithms.SAM", rule, "SAM", remedy)
    clipping = cfg.algorithms.get("GradientClipping", {}).get("clipping_type", "norm")
    rule = f"{', '.join(CLIPPED[:-1])} or {CLIPPED[-1]} with {SHARDED}"
    require(clipping in CLIPPED, "algorithms.GradientClipping.clipping_type", rule, clipping, remedy)


def share_blocks(task: nn.Module, run: Run, *, world_size: int) -> ParallelismConfig:
    """FSDP2 with every block of a network gathered by itself, in float32: autocast computes what it does under DDP.

    What else the networks of the task have, and each of its heads, is gathered as one.

    A checkpoint is one file of whole tensors as DDP writes it, so a run may go on with either, on any number of ranks;
    or, with ``run.sharded_checkpoints``, a folder with which FSDP2 goes on, on any number of ranks above one.

    Raises:
        ConfigError: One rank, or no blocks.
    """
    remedy = "Set run.parallelism=ddp."
    require(world_size > 1, "run.parallelism", "ddp on one rank, which has nobody to share with", SHARDED, remedy)
    networks = [child for child in task.children() if blocks_in(child)]
    require(bool(networks), "run.parallelism", "ddp for a network without blocks", SHARDED, remedy)
    for network in networks:  # by a name that is no attribute of nn.Module
        setattr(network, "fsdp_wrap_fn", functools.partial(_is_among, set(blocks_in(network))))  # noqa: B010
    # A dict would need an environment variable too: its key fsdp2 Composer passes over, and trains DDP.
    saved = "sharded" if run.sharded_checkpoints else "full"
    return ParallelismConfig(fsdp2=FSDP2Config(state_dict_type=saved, mixed_precision="FULL"))


def _is_among(blocks: set[nn.Module], module: nn.Module) -> bool:
    return module in blocks


def average_gradients(task: nn.Module) -> None:
    """Have FSDP2's gradients be the mean over the ranks as DDP's are, where the collectives of the device give the sum.

    Gloo takes ``ReduceOp.AVG`` of a reduce-scatter for ``SUM`` and says nothing (torch 2.7), so that gradients on CPUs
    are too large by the number of ranks. What this torch does is measured, since later ones may divide by themselves.
    """
    shared = [module for module in task.modules() if isinstance(module, FSDPModule)]
    weight = next((p for module in shared for p in cast(nn.Module, module).parameters()), None)
    if weight is None:
        return
    probe = skip_init(nn.Linear, 1, 1, bias=False, device=weight.device)  # draws no random numbers
    fully_shard(probe)
    probe(torch.ones(1, 1, device=weight.device)).sum().backward()
    grad = cast(DTensor, probe.weight.grad)  # pyright: ignore[reportAttributeAccessIssue]
    found = grad.full_tensor().item()

    def divide(reduced: Tensor) -> None:  # before the gradients of microbatches are added up
        reduced.div_(found)

    for module in shared if found != 1 else []:
        module.set_all_reduce_hook(divide)


def attention_order(names: Sequence[str] | None) -> AbstractContextManager[Any]:
    """Within it fused attention uses only the named backends, the first that can run the call; None changes nothing."""
    if names is None:
        return nullcontext()
    return sdpa_kernel([ATTENTION_BACKENDS[name] for name in names], set_priority=True)
