"""The steps of gpu.py, in order of worth: what each runs, and how long at most."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setup:
    """What steps run on: a device, an image folder, a folder for files to keep between calls; with
    ``dry``, as little as possible. ``seconds`` are what a step has."""

    device: str
    data: Path
    work: Path
    dry: bool = False
    seconds: float = 0


@dataclass(frozen=True)
class Step:
    """A step: ``command`` gives the words after ``python``. Without ``minutes``, it takes what is
    left; it is not started with fewer than ``least`` seconds."""

    name: str
    minutes: float | None
    what: str
    command: Callable[[Setup], str]
    least: float = 30


def correct(setup: Setup) -> str:
    some = "tests/runtime/test_device.py -k one_training_step" if setup.dry else "tests"
    return f"-m pytest -p no:cacheprovider -m device --device {setup.device} -rs {some}"


def speed(setup: Setup) -> str:
    more = "--batch 64" if not setup.dry else ""
    return f"benchmarks/speed.py --device {setup.device} {_size(setup, more)}"


def large(setup: Setup) -> str:
    more = "--batch 256 --batch 1024" if not setup.dry else "--variant amp"
    return f"benchmarks/speed.py --device {setup.device} {_size(setup, more)}"


def compiled(setup: Setup) -> str:
    more = "--batch 64 --variant amp+compile" if not setup.dry else "--variant amp"
    return f"benchmarks/speed.py --device {setup.device} {_size(setup, more)}"


def inference(setup: Setup) -> str:
    more = "--batch 1 --batch 64 --batch 256 --compile"
    more = "--quick --network vgg --batch 1" if setup.dry else more
    return f"benchmarks/inference.py --device {setup.device} {more}"


def profiled(setup: Setup) -> str:
    few = " --quick --network resnet-11 --batch 4" if setup.dry else ""
    return f"benchmarks/on_gpu/profiled.py --device {setup.device}{few}"


def processes(setup: Setup) -> str:
    return f"benchmarks/on_gpu/processes.py {_places(setup)}"


def accuracy(setup: Setup) -> str:
    return f"benchmarks/on_gpu/accuracy.py --seconds {setup.seconds:.0f} {_places(setup)}"


def _size(setup: Setup, more: str) -> str:
    """The networks and the batch sizes of speed.py, and ``more`` flags."""
    if setup.dry:
        return f"--quick --network resnet-11 --batch 4 {more}"
    return f"--network vgg-19 --network resnet-164 --network densenet-40 {more}"


def _places(setup: Setup) -> str:
    words = ["--device", setup.device, "--data", str(setup.data), "--work", str(setup.work)]
    return shlex.join([*words, *(["--quick"] if setup.dry else [])])


STEPS = (
    Step("correct", 4, "the tests that have a device: compared with the CPU", correct),
    Step("speed", 4, "training at batch size 64: the original loop, fp32, TF32, bf16", speed),
    Step("speed-large", 3, "the same at batch sizes 256 and 1024", large),
    Step("speed-compile", 5, "the same at batch size 64 with --compile (CUDA graphs)", compiled),
    Step("inference", 3, "pruned networks: batch sizes 1, 64, 256, with CUDA graphs", inference),
    Step("profile", 1, "where the time of a training step goes, by operator", profiled),
    Step("processes", 2, "two processes: on one GPU by gloo, on two by NCCL, --sync-bn", processes),
    Step(
        "accuracy",
        None,
        "train, prune, repair, fine-tune: VGG-19, ResNet-164, DenseNet-40",
        accuracy,
        least=180,
    ),
)
