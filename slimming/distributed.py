"""Processes that torchrun started: who this one is, sums over all of them, one voice."""

import contextlib
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slimming.errors import UserError


def launched() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(name: str | None, no_cuda: bool) -> str | None:
    """The device of this process: the GPU of its local rank where several share a machine."""
    cuda = not no_cuda and (name or "cuda") == "cuda" and torch.cuda.is_available()
    return f"cuda:{os.environ['LOCAL_RANK']}" if launched() and cuda else name


def start(device: torch.device) -> None:
    """Join the other processes: NCCL on CUDA, gloo elsewhere. Only the first one prints."""
    if not launched() or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def stop() -> None:
    """Leave the group together: a process that left early could end while others still talk."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process runs the block alone, then the others: it downloads, they read."""
    if world_size() > 1 and rank():
        dist.barrier()
    yield
    if world_size() > 1 and not rank():
        dist.barrier()


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of ``tensor`` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def share_buffers(model: nn.Module) -> None:
    """Give every process the running statistics of the first."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wrap(model: nn.Module) -> nn.Module:
    """The model with gradients that are averaged over the processes in each backward pass."""
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def synchronize_bn(model: nn.Module, device: torch.device) -> nn.Module:
    """Batch statistics over all processes. UserError off CUDA, where PyTorch has none."""
    if device.type != "cuda":
        raise UserError("--sync-bn needs CUDA: PyTorch has no synchronised BatchNorm elsewhere")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
