"""How a run computes its numbers, never which: compiled, with which attention kernel, on shares of the weights."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitcomposer.models.layers import Block
from vitcomposer.schema import Run, require

GRAPH_LIMIT = 8  # four image sizes in training, that of evaluation, and a few stages of patch dropout
SHARDED = "fsdp2"
ELEMENTWISE = ("adamw", "sgd")  # optimizers that do to a share of a tensor what they do to the tensor
ATTENTION_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def check_execution(run: Run, *, device: str, device_batch_size: int) -> None:
    """Refuse what the device does not have and what a graph cannot take.

    Raises:
        ConfigError: The key of ``run``.
    """
    backends = run.attention_backends
    rule = "null on a CPU, which has one kernel"
    require(device == "gpu" or backends is None, "run.attention_backends", rule, backends, "Leave it out.")
    micro = run.device_train_microbatch_size
    require(
        not run.compile or micro is None or device_batch_size % micro == 0 or micro > device_batch_size,
        "run.device_train_microbatch_size",
        f"a divisor of the {device_batch_size} images of a rank with run.compile, which makes a graph for every size",
        micro,
        "Choose a divisor, or set run.compile=false.",
    )


def compile_forward(module: nn.Module) -> None:
    """Compile the forward pass of a module in place, whole, with a graph for every shape and no dynamic ones.

    A graph break is an error, and so is a shape more than ``GRAPH_LIMIT``: nothing falls back to eager in silence, and
    nothing compiles without end. Names in the state dict stay.

    Composer's ``compile_config`` compiles around DDP and so leaves evaluation in eager mode on several ranks. Here DDP
    lies around the compiled forward; its buckets still split the captured graph, so gradients travel while the
    backward pass goes on.
    """
    torch._dynamo.config.recompile_limit = GRAPH_LIMIT  # torch's own value; importing timm.optim makes it a million
    module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)


def shard_blocks(network: nn.Module, cfg: Any, *, world_size: int) -> ParallelismConfig:
    """FSDP2 with every transformer block gathered by itself, in float32: autocast computes what it does under DDP.

    A checkpoint is one file of whole tensors as DDP writes it, so a run may go on with either, on any number of ranks.

    Raises:
        ConfigError: One rank, no transformer blocks, or something that needs a tensor as a whole.
    """
    remedy = "Set run.parallelism=ddp."
    require(world_size > 1, "run.parallelism", "ddp on one rank, which has nobody to share with", SHARDED, remedy)
    blocks = any(isinstance(module, Block) for module in network.modules())
    require(blocks, "run.parallelism", "ddp for a network without transformer blocks", SHARDED, remedy)
    require(not cfg.run.compile, "run.compile", f"false with {SHARDED}, which gathers between the blocks", True, remedy)
    rule = f"{' or '.join(ELEMENTWISE)} with {SHARDED}, which shows it a share of each tensor"
    require(cfg.optimizer.name in ELEMENTWISE, "optimizer.name", rule, cfg.optimizer.name, remedy)
    rule = f"left out with {SHARDED}, under which it is untested"
    require("SAM" not in cfg.algorithms, "algorithms.SAM", rule, "SAM", remedy)
    clipping = cfg.algorithms.get("GradientClipping", {}).get("clipping_type", "norm")
    require(clipping == "norm", "algorithms.GradientClipping.clipping_type", f"norm with {SHARDED}", clipping, remedy)
    setattr(network, "fsdp_wrap_fn", lambda module: isinstance(module, Block))  # noqa: B010 (no attribute of nn.Module)
    # A dict would need an environment variable too: its key fsdp2 Composer passes over, and trains DDP.
    return ParallelismConfig(fsdp2=FSDP2Config(state_dict_type="full", mixed_precision="FULL"))


def attention_order(names: Sequence[str] | None) -> AbstractContextManager[Any]:
    """Within it fused attention uses only the named backends, the first that can run the call; None changes nothing."""
    if names is None:
        return nullcontext()
    return sdpa_kernel([ATTENTION_BACKENDS[name] for name in names], set_priority=True)
