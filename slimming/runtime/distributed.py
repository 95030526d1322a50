"""Processes started by torchrun: their ranks, their collectives, and which one prints."""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slimming.errors import UserError

PATIENCE = 10  # seconds between the same error in one process and in another
_silence = contextlib.ExitStack()  # while it is open, this process does not print


def launched() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_process() -> bool:
    """Whether this is the first process, the one that prints; works before `start` too."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def wait_for_other_errors(explained: bool) -> None:
    """Delay an error so that another process can print its own: torchrun then ends this one.

    The first process prints an ``explained`` error immediately. Another process waits until the
    first one has had time to raise the same error. An unexplained error is usually a lost
    connection to a process that failed, so it waits too.
    """
    turns = (not explained) + (not is_first_process())
    if launched() and turns:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while it waits prints no traceback
        time.sleep(turns * PATIENCE)


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(name: str | None, no_cuda: bool) -> str | None:
    """The device of this process; on CUDA, the GPU of its local rank. Processes share the GPUs if
    there are more of them."""
    cuda = not no_cuda and (name or "cuda") == "cuda" and torch.cuda.is_available()
    if not launched() or not cuda:
        return name
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def backend(device: torch.device) -> str:
    """How the processes communicate: by NCCL if each has a GPU of its own, else by gloo."""
    if device.type != "cuda":
        return "gloo"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return "nccl" if here <= torch.cuda.device_count() else "gloo"


def start(device: torch.device) -> None:
    """Join the other processes (see `backend`). Only the first one prints."""
    if not launched() or dist.is_initialized():
        return
    name, bound = backend(device), None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        bound = device if name == "nccl" else None
    store, number, processes = next(dist.rendezvous("env://"))
    dist.init_process_group(
        name,
        store=store_of_this_attempt(store, number, processes),
        rank=number,
        world_size=processes,
        device_id=bound,  # otherwise the first barrier guesses the GPU
    )
    if device.type == "cuda" and name == "gloo":
        print(f"note: several processes share {device}, so they communicate by gloo, not by NCCL")
    if rank():
        nowhere = _silence.enter_context(open(os.devnull, "w"))  # noqa: SIM115
        _silence.enter_context(contextlib.redirect_stdout(nowhere))


def store_of_this_attempt(
    store: dist.Store, number: int, processes: int, patience: float = 300
) -> dist.Store:
    """The part of torchrun's store that belongs to the current start of all processes.

    torchrun keeps one store across restarts. A process that reads the address of a killed process
    from it would wait forever (pytorch/pytorch issue 135712), and restart counts differ between
    machines. So the first process numbers the attempts, and sends the number to every other process
    under a key that only that process knows. RuntimeError after ``patience`` seconds.
    """
    if number:
        key = uuid.uuid4().hex
        store.set(f"key/{number}", key)
        attempt = store.get(key).decode()
        store.set(f"{attempt}/here/{number}", "")
        return dist.PrefixStore(attempt, store)
    attempt = str(store.add("attempts", 1))
    missing, deadline = set(range(1, processes)), time.monotonic() + patience
    while missing:
        for other in missing:
            if store.check([f"key/{other}"]):  # possibly of a dead process, which is harmless
                store.set(store.get(f"key/{other}").decode(), attempt)
        missing = {other for other in missing if not store.check([f"{attempt}/here/{other}"])}
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(missing)} of {processes} processes did not start")
        time.sleep(0.01)
    return dist.PrefixStore(attempt, store)


def stop() -> None:
    """Leave the group together: a process must not exit while others still communicate. Then each
    of them prints again."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    _silence.close()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block before the others: it downloads, they read."""
    if world_size() > 1 and rank():
        dist.barrier()
    yield
    if world_size() > 1 and not rank():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_first(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The ``tensor`` of the first process, in every process, sent over ``device``."""
    if world_size() == 1:
        return tensor
    sent = tensor.to(device)
    dist.broadcast(sent, 0)
    return sent.to(tensor.device)


def check_same(number: int, device: torch.device, message: str) -> None:
    """UserError with ``message`` in every process unless all have the same ``number``."""
    if world_size() > 1:
        ends = torch.tensor([number, -number], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends.sum().item():
            raise UserError(message)


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the running statistics of the first process to all others."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wrap(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel, which averages gradients in each backward pass.
    `broadcast_buffers` is for the statistics of BNs, once an epoch."""
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    own = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, own, broadcast_buffers=False)


def synchronize_bn(model: nn.Module, device: torch.device) -> nn.Module:
    """Compute batch statistics over all processes. UserError unless ``device`` is CUDA."""
    if device.type != "cuda":
        raise UserError("`sync_bn` needs CUDA: SyncBatchNorm of PyTorch runs only there; omit it")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def one_process(work: str) -> None:
    """UserError if torchrun started several processes; ``work`` is what does not support them."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{work} runs in a single process: start it without torchrun")
