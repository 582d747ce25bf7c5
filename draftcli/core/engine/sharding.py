"""Activation checkpointing, compile and FSDP2, applied from outside to plain models, in this order.

`speed_up` does what one process can do for itself, when the model is built; `shard` comes last, when the processes are
there (DRaFTPModel.configure_sharded_model).

The models know nothing of devices or processes (the separation of torchtitan's parallelize step).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from draftcli.config import ShardingConfig
from draftcli.core.engine.runtime import Runtime
from draftcli.core.precision import HALF
from draftcli.errors import InputError, first_line

ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
COMPILATIONS = 256  # of one function, beyond which torch gives up and computes as it always did
COMPILER = "inductor"  # torch's own
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # each is gathered, computed and let go of by itself


def speed_up(settings: ShardingConfig, runtime: Runtime, unet: Any, base_unet: Any | None, vae: Any) -> None:
    """Apply `settings` to the networks, in place: memory layout, attention, activation checkpointing, compile.

    Raises:
        InputError: sharding.attention names a kernel that does not work here.
    """
    if settings.channels_last:
        for network in filter(None, [unet, base_unet, vae]):
            network.to(memory_format=torch.channels_last)
    if settings.attention != "auto":
        check_attention(settings.attention, runtime)
        for network in filter(None, [unet, base_unet]):
            choose_attention(network, settings.attention)
    if settings.activation_checkpointing:
        checkpoint_activations(unet, vae)
    if settings.compile:
        for network in filter(None, [unet, base_unet]):
            compile_blocks(network)


def working_attention(runtime: Runtime) -> list[str]:
    """The names in ATTENTION, of those kernels that compute on this device in this dtype, forward and backward."""
    works: list[str] = []
    for name, backend in ATTENTION.items():
        q = torch.ones(1, 2, 64, 64, device=runtime.device, dtype=runtime.dtype, requires_grad=True)
        with suppress(RuntimeError), warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # of the reasons why it does not
            F.scaled_dot_product_attention(q, q, q).sum().backward()
            works.append(name)
    return works


def check_attention(name: str, runtime: Runtime) -> None:
    """Raise InputError where the kernel does not work here."""
    if name not in (works := working_attention(runtime)):
        where = f"on {runtime.device} in {str(runtime.dtype).removeprefix('torch.')}"
        raise InputError(f"sharding.attention {name} does not work {where}; what does: auto, {', '.join(works)}")


def choose_attention(unet: nn.Module, name: str) -> None:
    """Have every attention of `unet` use one kernel of ATTENTION, also where backward computes it again."""
    for module in unet.modules():
        if type(module).__name__ == "Attention":
            module.forward = _with_kernel(module.forward, ATTENTION[name])


def _with_kernel(forward: Callable[..., Any], backend: SDPBackend) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(backend):
            return forward(*args, **kwargs)

    return call


def compile_blocks(unet: nn.Module) -> None:
    """torch.compile on every transformer and residual block by itself: equal blocks share what was compiled.

    It stands inside activation checkpointing, which calls blocks from without, and inside FSDP2's hooks.
    """
    import torch._dynamo

    # One graph for each shape of block, with and without gradient and LoRA, by batch size: more than the 8 of torch.
    torch._dynamo.config.recompile_limit = max(COMPILATIONS, torch._dynamo.config.recompile_limit)
    for block in unet.modules():
        if type(block).__name__ in BLOCKS:
            block.forward = compiled(block.forward)


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile, which happens on the first call.

    Raises:
        InputError: by that call, where torch.compile does not work, as without a C++ compiler.
    """
    from torch._dynamo.exc import TorchDynamoException

    by_torch = torch.compile(forward, backend=COMPILER)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return by_torch(*args, **kwargs)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)  # what the compiler says, without torch's frame
            reason = f"{type(cause).__name__}: {first_line(cause)}"
            raise InputError(f"torch.compile does not work here, set sharding.compile=false ({reason})") from error

    return call


def checkpoint_activations(unet: Any, vae: Any) -> None:
    """Recompute activations in backward instead of keeping them.

    The UNet by diffusers' own switch, block by block. The decoder residual block by residual block: one of its
    blocks at 1024 x 1024 in float32 would keep 10 GiB.
    """
    unet.enable_gradient_checkpointing()
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return call


def splits_weights(settings: ShardingConfig) -> bool:
    """Whether the networks are to be split over the processes: fsdp, and there are several."""
    return settings.strategy == "fsdp" and dist.is_initialized() and dist.get_world_size() > 1


def is_source() -> bool:
    """Whether this is the process that reads a network which will be split, for all."""
    return dist.get_rank() == 0


def make_mesh(settings: ShardingConfig, device: torch.device) -> DeviceMesh:
    """The processes as FSDP2 wants them: (ranks,), or (copies, shard_size) where shard_size of them share a copy.

    Neighbours share a copy, so that on several nodes of shard_size GPUs each the weights never leave a node.

    Raises:
        InputError: no process group is initialised, or shard_size does not divide the processes.
    """
    if not dist.is_initialized():
        raise InputError("sharding needs several processes: start with torchrun")
    ranks = dist.get_world_size()
    size = settings.shard_size or ranks
    if ranks % size:
        good = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise InputError(f"sharding.shard_size {size} does not divide the {ranks} processes; those that do: {good}")
    if size == ranks:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    grid = torch.arange(ranks).view(-1, size)
    # init_device_mesh would give these groups torch's own time-out: ten minutes with NCCL.
    timeout = timedelta(minutes=settings.timeout_minutes)
    groups: Any = [dist.new_subgroups_by_enumeration(some.tolist(), timeout=timeout)[0] for some in (grid.T, grid)]
    return DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=("replicate", "shard"))


def shard(unet: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2, in place: every transformer and residual block a group of its own, then the rest as the root.

    Parameters become DTensors split over `mesh`, and each block is gathered when it runs; what is on the CPU moves to
    the mesh's device block by block. Call it after the adapter is attached, activations are checkpointed and blocks
    compiled, and before the optimizer is made.

    Args:
        unet: a plain network.
        mesh: from `make_mesh`.
        dtype: of the matrix products. Where it is a half precision, weights travel in it, which halves what float32
            master weights send; autocast would have rounded them all the same (the norms' few excepted). Gradients
            travel in float32.
    """
    half = dtype in HALF
    # Inputs are autocast's: rounding a timestep of 999 to bfloat16 would make it 1000.
    policy = MixedPrecisionPolicy(dtype if half else None, torch.float32 if half else None, cast_forward_inputs=False)
    for block in unet.modules():
        if type(block).__name__ in BLOCKS:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(unet, mesh=mesh, mp_policy=policy)


def hollow(network: nn.Module) -> Any:
    """A copy of `network` whose parameters are on the meta device: nothing of its size is allocated."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, empty)


def hand_out(weights: Mapping[str, Tensor], network: nn.Module, device: torch.device) -> None:
    """Give every process its part of the weights that process 0 has: collective, tensor by tensor.

    Args:
        weights: process 0's whole tensors, by name; not looked at in the others.
        network: split; in processes other than 0 it may be without weights.
        device: of the mesh.
    """
    _allocate(network, device)
    names = network.state_dict().keys()
    whole_weights: dict[str, Any] = {name: weights[name] for name in names} if is_source() else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, whole_weights, options=options)


def copy_parts(source: nn.Module, target: nn.Module, device: torch.device) -> None:
    """Make `target`, split and without weights, equal `source`, which is split alike: nothing is sent."""
    _allocate(target, device)
    tensors = zip(
        chain(source.parameters(), source.buffers()), chain(target.parameters(), target.buffers()), strict=True
    )
    for theirs, own in tensors:
        _fill(own, theirs)


def _allocate(network: nn.Module, device: torch.device) -> None:
    if any(p.is_meta for p in network.parameters()):
        network.to_empty(device=device)


@torch.no_grad()
def _fill(own: Tensor, part: Tensor) -> None:
    local(own).copy_(local(part))


def whole(tensor: Tensor) -> Tensor:
    """All of a split tensor, in every process: collective. Any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a split tensor, the same memory. Any other as it is."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor that every process has, split as `pattern` is; each takes its part, nothing is sent."""
    if not isinstance(pattern, DTensor):
        return tensor
    tensor = tensor.to(pattern.device_mesh.device_type)
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)


def as_part_of(part: Tensor, pattern: Tensor) -> Tensor:
    """This process's part of something that is split as `pattern` is, as the tensor it is a part of."""
    if not isinstance(pattern, DTensor):
        return part
    return DTensor.from_local(
        part, pattern.device_mesh, pattern.placements, run_check=False, shape=pattern.shape, stride=pattern.stride()
    )
