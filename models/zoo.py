"""torchvision's classification models by name, adapted to small images."""

from http.client import HTTPException
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import torch
from torch import nn

from slimming.channels.widths import resize

from .basics import count_classes

SMALL = 64  # pixels; up to this size, a stem that downsamples by 4 leaves too few pixels
OPTIONS = {"aux_logits": False, "transform_input": True, "init_weights": True}
# what torch.hub raises: network and disk, another hash, a damaged archive
UNAVAILABLE = (
    *(OSError, HTTPException, RuntimeError, ValueError, EOFError, BadZipFile),
    *(UnpicklingError, KeyError),
)
WITH_OPTIONS = ("googlenet", "inception_v3")  # their weights expect the input transform


def names() -> list[str]:
    """The names of torchvision's classification models."""
    from torchvision import models  # imported late: takes a second

    return models.list_models(module=models)


def classifier(
    name: str,
    dataset: str = "cifar10",
    cfg: dict[str, list[int]] | None = None,
    num_classes: int | None = None,
    image_size: int = 32,
    weights: str | None = None,
) -> nn.Module:
    """torchvision's ``name``: (N, 3, image_size, image_size) images -> (N, num_classes) logits.

    Up to 64 pixels the stem has stride 1, the max pooling after a 7x7 stem is omitted, and VGG has
    a single linear layer as its classifier; there are no auxiliary classifiers. ``weights``,
    'DEFAULT' or a name in torchvision, are loaded for each layer whose shape fits. ``cfg``: the
    widths of layers by name (`models.resize`), which get random weights. ValueError for an unknown
    name, images that are too small, a cfg that does not fit, or unavailable weights.

    >>> classifier("resnet18", num_classes=7)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 7])
    """
    if name not in names():
        raise ValueError(f"torchvision has no classification model called {name!r}")
    classes = count_classes(dataset, num_classes)
    model = _build(name, classes)
    if image_size <= SMALL:
        _fit_small_images(model, classes)
    _check_size(model, name, image_size)
    if weights is not None:
        _load_pretrained(model, name, weights)
    if cfg is not None:
        resize(model, cfg)
    vars(model).update(arch=name, num_classes=classes)
    return model


def transforms(name: str, weights: str) -> Any:
    """torchvision's preset for images of the network ``name`` with ``weights``: ``resize_size``,
    ``crop_size``, ``interpolation``, ``mean`` and ``std``. ValueError if there are no such weights.

    >>> transforms("resnet18", "DEFAULT").crop_size
    [224]
    """
    return _weights(name, weights).transforms()


def _build(name: str, num_classes: int) -> nn.Module:
    from torchvision import models

    options = {"num_classes": num_classes, **(OPTIONS if name in WITH_OPTIONS else {})}
    try:
        return models.get_model(name, weights=None, **options)
    except NotImplementedError:  # on "meta": regnets compute their widths with tensors
        with torch.device("cpu"):
            return models.get_model(name, weights=None, **options).to("meta")


def _fit_small_images(model: nn.Module, num_classes: int) -> None:
    from torchvision.models import VGG

    if isinstance(model, VGG):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, num_classes)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    name, stem = layers[0]
    if not isinstance(stem, nn.Conv2d) or stem.stride != (2, 2):
        return
    if stem.kernel_size == (3, 3):
        stem.stride = (1, 1)
        return
    bias = stem.bias is not None
    smaller = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=bias)
    nn.init.kaiming_normal_(smaller.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(name, smaller)
    behind, layer = layers[1]
    if isinstance(layer, nn.MaxPool2d):
        model.set_submodule(behind, nn.Identity())


def _check_size(model: nn.Module, name: str, size: int) -> None:
    """ValueError if the network does not support images of this size; computes only shapes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state = {n: t.to("meta") for n, t in tensors}
    image = torch.empty(1, 3, size, size, device="meta")
    try:
        torch.func.functional_call(model.eval(), state, image)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} does not support images of {size} pixels: {reason}") from error
    model.train()


def _weights(name: str, weights: str) -> Any:
    """torchvision's entry for these weights."""
    from torchvision import models

    known = models.get_model_weights(name).__members__
    if weights not in known:
        raise ValueError(f"{name} has no weights called {weights!r}: use {', '.join(known)}")
    return known[weights]


def _load_pretrained(model: nn.Module, name: str, weights: str) -> None:
    from torchvision import models

    entry = _weights(name, weights)
    try:
        state = models.get_model(name, weights=entry).state_dict()
    except UNAVAILABLE as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot load the weights {weights} of {name}: {reason}") from error
    own = model.state_dict()
    for key in list(state):  # in place: the dict has the version metadata of the layers
        if key not in own or own[key].shape != state[key].shape:
            del state[key]
    model.load_state_dict(state, strict=False)
