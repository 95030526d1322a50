"""A network in a process with PyTorch's defaults, as a user starts it.

The scripts of this suite keep freed memory (`slimming.runtime.device`), which speeds up the dense
network, too: beside this process, one sees how much.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch import nn

from slimming.runtime.device import LAYOUT

PAUSE = 0.02  # seconds, in which idle threads of the other process stop spinning

held = {}  # by the process: its network, and the images

Passes = Callable[[torch.Tensor], Callable[[], float]]  # images -> a forward pass of them


@contextlib.contextmanager
def process(model: nn.Module) -> Iterator[Passes]:
    """A function from images (N, 3, H, W) to a forward pass of ``model`` on the CPU, which returns
    its seconds."""
    spawning = multiprocessing.get_context("spawn")
    begin = (model, torch.get_num_threads())
    with ProcessPoolExecutor(1, spawning, initializer=_hold, initargs=begin) as pool:

        def passes(images: torch.Tensor) -> Callable[[], float]:
            pool.submit(_feed, images.numpy()).result()
            return lambda: pool.submit(_forward).result()

        yield passes


def _hold(model: nn.Module, threads: int) -> None:
    torch.set_num_threads(threads)
    held["model"] = model.eval().to(memory_format=LAYOUT)


def _feed(images: np.ndarray) -> None:
    held["images"] = torch.from_numpy(images).to(memory_format=LAYOUT)


@torch.no_grad()
def _forward() -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    held["model"](held["images"])
    taken = time.perf_counter() - start
    time.sleep(PAUSE)
    return taken
