"""The pruning methods of run.py, by name.

Each takes the flags, the dense network on the CPU, its `Network` and the test data, and returns the
pruned network, what was chosen (None if the network keeps its shape), and the largest relative
difference of its logits from those of the dense network by mask (None if it is that network).
"""

import copy

import torch
from torch import nn

from models import PAPER_DEPTH
from slimming.data import loading
from slimming.pruning import importance, kernels, ranking, slicing
from slimming.pruning.groups import check_names, groups, inside, need_library
from slimming.runtime.device import choose_device
from slimming.storage.architecture import Network

SAMPLES = 2560  # training images that measures with gradients look at


def check(args) -> None:
    """UserError now, rather than after days of training, if the data is not there or the network
    cannot be pruned by --pruning-method."""
    traced = not args.skip_pruning and args.pruning_method != "intra-kernel"
    if traced:
        need_library()
    size, dataset = args.image_size or Network.image_size, args.dataset or "cifar10"
    depth = args.depth or PAPER_DEPTH.get(args.arch)
    loader = loading.batches(dataset, "test", 1, torch.device("cpu"), size, args)
    model = Network(args.arch, depth, dataset, len(loader.classes), None, size).build().eval()
    check_names(model, args.ignore)
    if not traced:
        return
    found = groups(model, torch.zeros(1, 3, size, size), args.ignore)
    measure = {"slimming": "bn", "channel": args.importance}.get(args.pruning_method, "l1")
    if measure in importance.GRADIENT_FREE:
        scores = importance.MEASURES[measure](importance.Evidence(model, []))
        ranking.choose(found, scores, args.pruning_ratio)


def loader_of(args, network: Network, part: str):
    """The 'train' or 'test' batches of the network's data."""
    device = choose_device(args.device, args.no_cuda)
    size = args.test_batch_size if part == "test" else args.batch_size
    return loading.batches(network.dataset, part, size, device, network.image_size, args)


def _prune_channels(args, model: nn.Module, network: Network, loader, measure: str):
    batches = []
    if measure not in importance.GRADIENT_FREE:
        batches = loading.samples(loader_of(args, network, "train"), SAMPLES, 0, measure == "grasp")
        model = model.to(loader.device)
    temperature = importance.TEMPERATURES.get(measure, 1.0)
    evidence = importance.Evidence(model, batches, temperature, seed=args.seed)
    scores = importance.MEASURES[measure](evidence)
    slimmed = slicing.prune(
        model.cpu(),
        scores,
        args.pruning_ratio,
        loader.first(64),
        local=not args.global_pruning,
        round_to=args.round_to,
        ignore=args.ignore,
    )
    return slimmed.model, slimmed.choice, slimmed.difference


def _by_importance(args, model: nn.Module, network: Network, loader):
    return _prune_channels(args, model, network, loader, args.importance)


def _by_scaling_factor(args, model: nn.Module, network: Network, loader):
    return _prune_channels(args, model, network, loader, "bn")


def _kernels(args, model: nn.Module, network: Network, loader):
    """Mask kernels; remove the channels that no filter reads any more."""
    model, images = copy.deepcopy(model), loader.first(1)
    masks = kernels.kernel_masks(model, args.pruning_ratio, not args.global_pruning)
    inner = {m.layer for group in groups(model, images) for m in group.members}
    masks = {name: mask for name, mask in masks.items() if name in inner}
    kernels.zero_weights(model, _without(masks, args.ignore))
    found = groups(model, images, args.ignore)
    slimmed = slicing.apply(model, found, kernels.unread_channels(model, found), loader.first(64))
    return slimmed.model, slimmed.choice, slimmed.difference


def _patterns(args, model: nn.Module, network: Network, loader):
    """Mask the weights outside of each kernel's pattern; the network keeps its shape."""
    model = copy.deepcopy(model)
    masks = kernels.pattern_masks(model, args.pruning_ratio, not args.global_pruning)
    kernels.zero_weights(model, _without(masks, args.ignore))
    return model, None, None


METHODS = {
    "channel": _by_importance,
    "slimming": _by_scaling_factor,
    "kernel": _kernels,
    "intra-kernel": _patterns,
}


def _without(masks: dict, ignore: list[str]) -> dict:
    return {n: m for n, m in masks.items() if not any(inside(n, i) for i in ignore)}
