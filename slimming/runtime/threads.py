"""The CPU threads that PyTorch uses, and the load of the machine."""

import os

import torch

MAX_THREADS = 1024  # OpenMP aborts the process if the system cannot create a thread


def use(count: int | None) -> None:
    """Use ``count`` threads; call it before any computation. None keeps PyTorch's default:
    OMP_NUM_THREADS (torchrun sets it to 1), or one thread per core."""
    if count:
        torch.set_num_threads(count)


def print_load_note(device: torch.device) -> None:
    """On the CPU, print a note if the load of the machine exceeds its number of cores: on two
    cores, two runs with two threads process 195 images/s each, with one thread 480."""
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except (AttributeError, OSError):  # unavailable on Windows
        return
    if device.type == "cpu" and load > cores and torch.get_num_threads() > 1:
        note = f"note: the load of this machine is {load:.1f} (cores: {cores})"
        print(f"{note}: concurrent runs are faster with one thread each", flush=True)
