"""Random numbers that are functions of a seed."""

import os
import random

import numpy as np
import torch

STREAMS = 2  # the version of the streams of `epoch_generator`
SHUFFLE, DROPOUT, AUGMENTATION = range(3)  # what they are for


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and PyTorch; with ``deterministic`` use only repeatable CUDA kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def epoch_generator(
    *numbers: int, purpose: int = SHUFFLE, version: int = STREAMS
) -> torch.Generator:
    """A generator on the CPU that is a function of the ``numbers`` (seed, epoch, ...).

    Each ``purpose`` has its own stream: the numbers (s, e) and (s, e, 0) alone give the same one.
    In ``version`` 1 of the streams all purposes share one; a checkpoint records the version, so
    that a run is resumed with its own.
    """
    key = (purpose,) if purpose != SHUFFLE and version > 1 else ()
    words = np.random.SeedSequence(numbers, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))
