"""The data of an experiment, and the evaluation of networks on it."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from slimming.data import loading
from slimming.data.batches import Batches
from slimming.data.stream import Stream
from slimming.reports.figures import stage_text
from slimming.runtime.device import choose_device
from slimming.storage import architecture, checkpoint
from slimming.storage.architecture import Architecture
from slimming.training import loop
from slimming.workflows.experiment_settings import ExperimentSettings
from slimming.workflows.record import figures_of


class Evaluated(NamedTuple):
    """A network, its architecture, and its score on the test data."""

    model: nn.Module
    network: Architecture
    score: loop.Score


def batches(settings: ExperimentSettings, network: Architecture, part: str) -> Batches | Stream:
    """The 'train' or 'test' batches of the network's data, on the device."""
    data = settings.data.source
    device = choose_device(data.device, data.no_cuda)
    size = data.test_batch_size if part == "test" else settings.base.batch_size
    return loading.batches_for(network, part, size, device, data, settings.base.seed)


def evaluate(settings: ExperimentSettings, path: Path) -> Evaluated:
    """Evaluate the network in ``path``. UserError if it is not the requested one, or its classes
    are not those of the data."""
    contents = checkpoint.read(path)
    model, network = architecture.rebuild(path, contents, settings.asked(contents))
    loader = batches(settings, network, "test")
    loading.check_classes(loader, network.num_classes, contents, str(path))
    score = loop.test(model.to(loader.device), loader)
    return Evaluated(model.cpu(), network, score)


def print_figures(settings: ExperimentSettings) -> None:
    """Print the accuracy, size and FLOPs of the network in --model-path."""
    path = settings.execution.model_path
    assert path, "--eval-only needs --model-path"
    model, network, score = evaluate(settings, path)
    print(stage_text(str(network), figures_of(model, network, score)))
