"""eval.py: describe and evaluate a checkpoint, compared to the dense network."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from models import widths
from slimming.channels.scaling import present_channels
from slimming.commands.evaluate.settings import EvaluationRun
from slimming.commands.settings import check_data_path
from slimming.data import datasets, loading
from slimming.data.image_folder import Stream
from slimming.errors import UserError
from slimming.measuring import figures as measuring_figures
from slimming.measuring.figures import BATCHES, measure
from slimming.runtime.device import choose_device
from slimming.slicing import kernels
from slimming.slicing.prune import without_masked_channels
from slimming.storage import architecture, checkpoint
from slimming.storage.architecture import Architecture
from slimming.storage.checkpoint import Contents
from slimming.training import loop


@dataclass(frozen=True)
class Subject:
    """A checkpoint and its networks: the one in the file, the equivalent slim one, and the original
    dense one."""

    run: EvaluationRun
    path: Path
    contents: Contents
    network: Architecture
    model: nn.Module
    slim: nn.Module
    dense: nn.Module
    device: torch.device
    pruned: bool
    layers: dict[str, list[int]]  # output channels in the slim and in the dense network


def load(run: EvaluationRun) -> Subject:
    """Load the checkpoint of ``run``. UserError if its settings contradict the file."""
    path = run.subject.path
    contents = checkpoint.read(path)
    run = replace(run, data=run.data.resolved(contents.get("dataset")))
    request = replace(run.subject.request(run.data), num_classes=run.subject.num_classes)
    if request.arch == "resnet" and str(contents.get("arch")).startswith("resnet"):
        request = replace(request, arch=contents["arch"])  # in the original that is ResNet-56
    model, network = architecture.rebuild(path, contents, request)
    slim, dense = without_masked_channels(model, network.cfg), replace(network, cfg=None).build()
    left = channels(slim)
    layers = {name: [left[name], count] for name, count in channels(dense).items()}
    pruned = is_pruned(slim, layers)
    if run.subject.pruned and not pruned:  # False is the default of the original: it claims nothing
        raise UserError(f"{path} contains a dense network, but --pruned True was given")
    device = choose_device(run.data.device, run.data.no_cuda)
    model, slim, dense = (m.to(device).eval() for m in (model, slim, dense))
    return Subject(run, path, contents, network, model, slim, dense, device, pruned, layers)


def channels(model: nn.Module) -> dict[str, int]:
    """The output channels of each layer; for a BN, those that its channel selection keeps."""
    present = {name: int(mask.sum()) for name, mask in present_channels(model).items()}
    return {name: shape[-1] for name, shape in widths(model).items()} | present


def is_pruned(slim: nn.Module, layers: dict[str, list[int]]) -> bool:
    """Whether channels are missing, or many weights are exactly zero."""
    whole, zeros = (
        measuring_figures.count_parameters(slim),
        sum(measuring_figures.count_zeros(slim).values()),
    )
    sparse = whole - zeros < (1 - kernels.SPARSE) * whole
    return sparse or any(left != full for left, full in layers.values())


def evaluate(subject: Subject) -> dict:
    """The requested figures: accuracies as fractions, latencies in ms, FLOPs per image."""
    settings = subject.run.answers
    answer = describe(subject) if settings.everything else {}
    if settings.everything or settings.test_acc:
        answer["test"] = score(subject, "test")
    if settings.train_acc:
        answer["train"] = score(subject, "train")
    if settings.everything or settings.flops or settings.compression:
        answer |= compare_sizes(subject)
    return answer


def describe(subject: Subject) -> dict:
    """The network, and what its file records, None if missing."""
    path, contents = subject.path, subject.contents
    answer: dict = {"checkpoint": str(path), "file_bytes": path.stat().st_size}
    answer |= {"network": str(subject.network), **asdict(subject.network)}
    del answer["cfg"]
    for name in ("epoch", "best_prec1"):
        value = contents.get(name)
        value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        answer[name] = value if isinstance(value, int | float) else None
    return {**answer, "pruned": subject.pruned, "device": str(subject.device)}


def compare_sizes(subject: Subject) -> dict:
    """The requested sizes and latencies of the slim network and the dense one."""
    settings, pixels = subject.run.answers, subject.network.image_size
    batches = BATCHES if settings.everything else ()
    images = torch.zeros(max(batches, default=1), 3, pixels, pixels, device=subject.device)
    both = measure([subject.slim, subject.dense], images, batches)
    slim, dense = (figures.answer() for figures in both)
    ratios = {name: dense[name] / max(slim[name], 1e-9) for name in dense}
    compression = {name: ratios[name] for name in ("parameters", "FLOPs", "bytes")}
    if settings.everything:
        speed_up = {str(count): ratios[f"latency_{count}_ms"] for count in BATCHES}
        answer = {**slim, "compression": compression, "speed_up": speed_up}
        return {**answer, "dense": dense, "layers": subject.layers}
    answer = {n: slim[n] for n in ("FLOPs", "effective_FLOPs")} if settings.flops else {}
    return {**answer, "compression": compression} if settings.compression else answer


def score(subject: Subject, part: str) -> dict[str, float]:
    """Top-1 and loss on a split of the dataset, not augmented. UserError if it is unavailable."""
    settings, network, device = subject.run.data, subject.network, subject.device
    batch = settings.test_batch_size
    check_data_path(settings.data_path)
    folder = settings.folder(network.dataset)
    archive = datasets.ON_DISK.get(network.dataset)
    if archive and not settings.download and not (folder / archive).is_dir():
        raise UserError(
            f"{network.dataset} is not in {folder}: add --download, set --data to its folder, or "
            "use only --flops or --compression, which need no data"
        )
    loader = loading.batches_for(network, part, batch, device, settings)
    loader.augment = False
    if isinstance(loader, Stream):  # its dataset would still use random crops
        loader = loader.without_augmentation()
    asked = None if subject.contents.get("classes") else subject.run.subject.num_classes
    loading.check_classes(loader, network.num_classes, subject.contents, subject.path, asked)
    return loop.test(subject.model, loader)._asdict()
