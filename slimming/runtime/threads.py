"""The threads that PyTorch computes with on the CPU, and the load of the machine."""

import os

import torch

MOST = 1024  # OpenMP ends the process where the system refuses it a thread


def use(count: int | None) -> None:
    """Compute with this many threads, before any work starts. None leaves it to PyTorch, which goes
    by OMP_NUM_THREADS (torchrun sets it to 1) or takes one for each core."""
    if count:
        torch.set_num_threads(count)


def tell_load(device: torch.device) -> None:
    """Where the work is done by the CPU and the load of the machine is above its number of cores,
    print what helps: two runs of two threads on two cores do 195 images/s each, of one thread 480.
    """
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except (AttributeError, OSError):  # Windows has no such average
        return
    if device.type == "cpu" and load > cores and torch.get_num_threads() > 1:
        told = f"note: the load of this machine is {load:.1f} (cores: {cores})"
        print(f"{told}: runs side by side are faster with --threads 1", flush=True)
