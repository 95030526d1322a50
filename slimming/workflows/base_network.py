"""The network that an experiment prunes: check that it can be pruned, and find its weights."""

from pathlib import Path

import torch

from models import NETWORKS, zoo
from slimming.channels.groups import check_names
from slimming.data import loading
from slimming.data.batches import Batches
from slimming.data.stream import Stream
from slimming.errors import UserError
from slimming.pruning import allocation, importance, ranking
from slimming.pruning.allocation import Prunable
from slimming.pruning.slicing.trial import groups
from slimming.settings import specs
from slimming.storage import architecture, checkpoint
from slimming.workflows.experiment import same_settings
from slimming.workflows.experiment_settings import BaseTrainingSettings, ExperimentSettings
from slimming.workflows.scoring import evaluate

SPARSE = "slimming"  # the pruning method whose base network is trained with a penalty
# the settings that a base network depends on
OF_BASE = {"model", "depth", "weights", "dataset", "data", "image_size", "no_fp16", "s"}
OF_BASE |= {entry.name for entry, _ in specs(BaseTrainingSettings)}


def check(settings: ExperimentSettings) -> None:
    """UserError, before any training, if the data is unavailable or the network cannot be pruned by
    --pruning-method."""
    pruning = settings.pruning
    slices = not settings.execution.skip_pruning and pruning.pruning_method != "intra-kernel"
    loader = _test_images(settings)
    network = settings.architecture(len(loader.classes))
    model = network.build().eval()
    check_names(model, pruning.ignore)
    if not slices:
        return
    pixels = network.image_size
    removable = groups(model, torch.zeros(1, 3, pixels, pixels), pruning.ignore)
    if pruning.allocation:
        allocation.choose(Prunable(model, removable), pruning.pruning_ratio, pruning.allocation)
    elif pruning.measure in importance.GRADIENT_FREE:
        scores = importance.MEASURES[pruning.measure](importance.Evidence(model, []))
        ranking.choose(removable, scores, pruning.pruning_ratio)


def given(settings: ExperimentSettings) -> Path | None:
    """The checkpoint that base training starts from, or that replaces it with --skip-base-training;
    None for random weights. UserError if it is unavailable."""
    path = settings.execution.model_path
    if path:
        evaluate(settings, path)
        return path
    if settings.network.weights:
        return _pretrained(settings)
    if not settings.execution.skip_base_training:
        return None
    return _latest(settings) or _pretrained(settings)


def _latest(settings: ExperimentSettings) -> Path | None:
    """The base network that the latest experiment with this network, data and settings of base
    training saved, if any."""
    model, data = settings.network.model, settings.data.name
    pattern, depth = f"{model}_*_{data}_*/{model}_base.pth", settings.architecture(1).depth
    kept = (settings.network.output_dir / data).glob(pattern)
    for path in sorted(kept, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            fits = checkpoint.read(path).get("depth") in (None, depth)
        except UserError as error:  # of another experiment
            print(f"note: {error}: it is left out of the search for a base network")
            continue
        sparse = path.parent.name.startswith(f"{model}_{SPARSE}_")
        same = same_settings(path.parent / "config.json", settings, OF_BASE)
        if fits and same and sparse == (settings.pruning.pruning_method == SPARSE):
            return path
        if fits:
            print(f"note: {path} was trained with other settings: --model-path takes it anyway")
    return None


def _pretrained(settings: ExperimentSettings) -> Path:
    """Save torchvision's weights as a checkpoint for this data."""
    model = settings.network.model
    arch = settings.asked()["arch"]
    if arch in NETWORKS:
        raise UserError(
            f"pretrained weights of {arch} are unavailable, because it is not from torchvision: "
            "omit --weights and --skip-base-training, or give a network with --model-path"
        )
    loader = _test_images(settings)
    network = settings.architecture(len(loader.classes))
    try:
        pretrained = zoo.classifier(
            arch,
            num_classes=network.num_classes,
            image_size=network.image_size,
            weights=settings.network.weights or "DEFAULT",
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"pretrained weights of {model} are unavailable ({error}): train it with --save-model "
            "and without --skip-base-training, or give a network with --model-path"
        ) from error
    path = settings.network.output_dir / f"{model}_pretrained.pth"
    contents = architecture.contents_of(pretrained, network, 0, 0.0, classes=loader.classes)
    checkpoint.write(path, contents)
    return path


def _test_images(settings: ExperimentSettings) -> Batches | Stream:
    """The test images on the CPU, one per batch, for the classes of the data."""
    network = settings.architecture(num_classes=1)
    size, data = network.image_size, settings.data.source
    return loading.batches(network.dataset, "test", 1, torch.device("cpu"), size, data)
