"""The network that a checkpoint describes."""

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from models import NETWORKS, PAPER_DEPTH, constructor
from slimming.errors import UserError
from slimming.storage import checkpoint
from slimming.storage.checkpoint import MASKS, Contents, fitted, read
from slimming.storage.preprocessing import CIFAR, Preprocessing

# the convolutions that are counted, depth = layers for each of them + others
BLOCKS = {
    "vgg": (r"feature\.\d+\.weight", 1, 3),
    "resnet": (r"layer1\.\d+\.conv1\.weight", 9, 2),
    "densenet": (r"dense1\.\d+\.conv1\.weight", 3, 4),
}
OF_CLASSES = {10: "cifar10", 100: "cifar100"}  # by the number of classes


@dataclass(frozen=True)
class Architecture:
    """The description of a network: ``--arch``, ``--depth`` and ``--dataset``, the widths of a slim
    network (``cfg``; None for a full or a masked one), and the height and width of its images in
    pixels.

    ``depth`` is None if the architecture has one depth only. ``cfg`` is a list for the networks of
    the paper, and a dict of the widths of each layer for all others (`models.resize`). ``options``
    are further arguments of the constructor, such as the growthRate of a DenseNet.
    ``preprocessing``: how pictures become its input, that of its weights if they were pretrained.
    """

    arch: str
    depth: int | None
    dataset: str
    num_classes: int
    cfg: list | dict | None = None
    image_size: int = 32
    options: dict | None = None
    preprocessing: Preprocessing = CIFAR

    def __str__(self) -> str:
        slim = "slim " if self.cfg else ""
        data = f"{self.dataset} ({self.num_classes} classes)"
        size = f" at {self.image_size} pixels" if self.image_size != 32 else ""
        options = "".join(f", {name} {value}" for name, value in (self.options or {}).items())
        return f"{slim}{self.name} for {data}{size}{options}"

    @property
    def name(self) -> str:
        """The architecture with its depth: vgg-19, mobilenet."""
        return f"{self.arch}-{self.depth}" if self.depth else self.arch

    def check(self, networks: dict = NETWORKS) -> None:
        """UserError if there is no such network. Builds it on the meta device, which is fast."""
        with torch.device("meta"):
            self.build(networks)

    def build(self, networks: dict = NETWORKS) -> nn.Module:
        """A new network with random weights. UserError if there is no such network."""
        make = constructor(self.arch) if networks is NETWORKS else networks.get(self.arch)
        if make is None:
            raise UserError(f"unknown network {self.arch!r}: use {', '.join(networks)}")
        shape = {"dataset": self.dataset, "cfg": self.cfg, "num_classes": self.num_classes}
        shape |= self.options or {}
        if self.arch in PAPER_DEPTH:
            shape["depth"] = self.depth
        elif self.depth:
            raise UserError(f"{self.arch} has only one depth: omit `depth` {self.depth}")
        elif self.arch not in NETWORKS:
            shape["image_size"] = self.image_size
        if self.options and self.arch != "densenet":
            raise UserError(
                f"{', '.join(self.options)} can be set for densenet only: omit them for {self.arch}"
            )
        try:
            return make(**shape)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"cannot build {self.name}: {error}") from error


@dataclass(frozen=True)
class Request:
    """What a command asks of the network: the fields of its `Architecture`, None where the file
    decides. ``preprocessing`` is that of a file that stores none. ``spelled`` is how ``--arch`` was
    typed: preact_res<depth> implies CIFAR-10, if nothing gives a dataset."""

    arch: str | None = None
    depth: int | None = None
    dataset: str | None = None
    num_classes: int | None = None
    cfg: list | dict | None = None
    image_size: int | None = None
    options: dict | None = None
    preprocessing: Preprocessing | None = None
    spelled: str | None = None

    def architecture(self) -> Architecture:
        """The network that is asked for, if nothing else describes it."""
        assert self.arch and self.dataset and self.num_classes
        return Architecture(
            self.arch,
            self.depth,
            self.dataset,
            self.num_classes,
            self.cfg,
            self.image_size or Architecture.image_size,
            self.options,
            self.preprocessing or CIFAR,
        )


NOTHING = Request()


def describe(path: str | Path | None, contents: Contents, request: Request) -> Request:
    """What the checkpoint records of its network, completed by what the ``request`` asks for.

    Files of the original suite record less; the request fills in the rest, and then what the
    weights tell (`infer`), which is printed. UserError, with both values, if the request
    contradicts the file.
    """
    values: dict[str, Any] = {}
    for name in ("arch", "depth", "dataset", "num_classes", "cfg", "image_size"):
        asked, stored = getattr(request, name), contents.get(name)
        if asked is not None and stored is not None and asked != stored:
            word = name.replace("_", " ")
            raise UserError(f"{path} has {word} {stored!r}, but {asked!r} was requested")
        if stored is not None:
            values[name] = stored
    recorded = replace(
        request,
        **values,
        options=_options(path, contents.get("options"), request.options),
        preprocessing=_preprocessing(path, contents, request.preprocessing),
    )
    described = infer(path, contents.get("state_dict"), recorded)
    if described.dataset is None and str(request.spelled).startswith("preact_res"):
        return replace(described, dataset="cifar10")  # the default of the suite that uses this name
    return described


def infer(path: str | Path | None, state: object, recorded: Request) -> Request:
    """What is ``recorded`` of the network with the weights ``state``, completed by what their names
    and shapes tell, which is printed. The original suite records neither architecture nor depth nor
    dataset.

    The architecture is one of the paper's, if the file has exactly its names. 10 or 100 classes of
    a network of this suite mean CIFAR, which is all that the original trains on.
    """
    if not isinstance(state, dict) or not checkpoint.is_state_dict(state):
        return recorded
    arch, depth, dataset = recorded.arch, recorded.depth, recorded.dataset
    if arch is None or (depth is None and arch in PAPER_DEPTH):
        arch, depth = next(_with_names(state, arch, depth), (arch, depth))
    if dataset is None and arch in NETWORKS:
        dataset = OF_CLASSES.get(recorded.num_classes or _count_outputs(state) or 0)
    found: dict[str, Any] = {"arch": arch, "depth": depth, "dataset": dataset}
    new = {n: v for n, v in found.items() if v is not None and getattr(recorded, n) is None}
    if new:
        told = ", ".join(f"{name} {value}" for name, value in new.items())
        advice = "; if it was trained on other data, give its dataset" if "dataset" in new else ""
        _print_once(f"note: {path} does not record its network. Its weights are of {told}{advice}")
    return replace(recorded, **new)


def _with_names(
    state: dict[str, torch.Tensor], arch: str | None, depth: int | None
) -> Iterator[tuple[str, int]]:
    """The networks of the paper whose state dict has the names of ``state``; counts of batches and
    masks of channel selection do not matter."""
    for name in [arch] if arch else PAPER_DEPTH:
        first, per_block, others = BLOCKS[name]
        count = sum(bool(re.fullmatch(first, key)) and state[key].dim() == 4 for key in state)
        guess = depth or per_block * count + others
        try:
            with torch.device("meta"):
                own = Architecture(name, guess, "cifar10", 10).build().state_dict()
        except UserError:
            continue
        if _essential(own) == _essential(state):
            yield name, guess


def _essential(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.endswith((MASKS, "num_batches_tracked"))}


@functools.cache  # a file may be described several times
def _print_once(text: str) -> None:
    print(text, flush=True)


def _options(path: str | Path | None, stored: dict | None, asked: dict | None) -> dict | None:
    """The ``stored`` options of a file, completed by the ``asked`` ones. UserError if they
    differ."""
    stored = stored or {}
    for name, value in (asked or {}).items():
        if name in stored and stored[name] != value:
            raise UserError(f"{path} has {name} {stored[name]!r}, but {value!r} was requested")
    return {**(asked or {}), **stored} or None


def _preprocessing(
    path: str | Path | None, contents: Contents, default: Preprocessing | None
) -> Preprocessing:
    """The preprocessing that a file stores. Files of this suite before it was stored, which record
    their architecture, used that of CIFAR; for others it is the ``default``."""
    stored = contents.get("preprocessing")
    if stored is None:
        return CIFAR if contents.get("arch") or default is None else default
    try:
        return Preprocessing.read(stored)
    except ValueError as error:
        raise UserError(f"{path} is damaged: its preprocessing is {stored!r}") from error


def load_network(
    path: str | Path, contents: Contents, network: Architecture, networks: dict = NETWORKS
) -> nn.Module:
    """The network of a checkpoint with its weights, on the CPU.

    ``networks`` are the constructors by name, with or without channel selection. Full weights
    load into both. UserError if the weights do not fit ``network``.
    """
    model = network.build(networks)
    state = fitted(contents["state_dict"], model)
    own = model.state_dict()
    masks = {name for name in state.keys() - own.keys() if name.endswith(MASKS)}
    if masks and state.keys() - masks <= own.keys():
        raise UserError(f"{path} uses channel selection: load it with main.py, not with mask-impl")
    for name in {**state, **own}:
        if name not in state or name not in own:
            where = "has no" if name not in state else "has an unexpected"
            raise UserError(f"{path} does not contain a {network}: it {where} {name}")
        if state[name].shape != own[name].shape:
            raise UserError(
                f"{path} does not contain a {network}: {name} has shape "
                f"{tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            )
    try:
        model.load_state_dict(state)
        with torch.no_grad():
            images = torch.zeros(1, 3, network.image_size, network.image_size)
            model.eval()(images)  # the selected channels must fit the next layer
    except RuntimeError as error:
        raise UserError(
            f"{path} does not contain a valid {network}: its masks and widths do not match"
        ) from error
    return model


def load(
    path: str | Path, request: Request = NOTHING, networks: dict = NETWORKS
) -> tuple[nn.Module, Architecture, Contents]:
    """Read a checkpoint and rebuild its network: (model, network, the whole contents).

    ``request``: what describes the network, for files that do not record it.

    >>> model, network, contents = load("logs/pruned.pth.tar")  # doctest: +SKIP
    """
    contents = read(path)
    return *rebuild(path, contents, request, networks), contents


def rebuild(
    path: str | Path, contents: Contents, request: Request = NOTHING, networks: dict = NETWORKS
) -> tuple[nn.Module, Architecture]:
    """The network that the ``contents`` of the file at ``path`` and the ``request`` describe, with
    its weights. UserError if they contradict each other."""
    return restore(path, contents, describe(path, contents, request), networks)


def restore(
    path: str | Path, contents: Contents, described: Request, networks: dict = NETWORKS
) -> tuple[nn.Module, Architecture]:
    """The network of a file that is `describe`d, with its weights. UserError if it is not known, or
    if the weights are of another one."""
    one_depth = described.arch and described.arch not in PAPER_DEPTH
    needed = ("arch", "dataset") if one_depth else ("arch", "depth", "dataset")
    missing = [name for name in needed if getattr(described, name) is None]
    if missing:
        raise UserError(
            f"{path} does not record its {' and '.join(missing)}: add "
            f"{' '.join(f'`{name}`' for name in missing)}"
        )
    outputs = described.num_classes or _count_outputs(contents["state_dict"])
    network = replace(described, num_classes=outputs).architecture()
    if _counts_kept_channels(network, contents["state_dict"], networks):
        network = replace(network, cfg=None)
    return load_network(path, contents, network, networks), network


def _counts_kept_channels(network: Architecture, state: dict, networks: dict) -> bool:
    """Whether ``cfg`` counts the channels that a mask keeps (possibly none in a layer) while the
    weights are those of the full network, as in the pruned files of mask-impl. In all other files
    it gives the shapes of the weights."""
    if not isinstance(network.cfg, list):
        return False
    with torch.device("meta"):
        full = replace(network, cfg=None).build(networks)
    if not _is_part(network.cfg, getattr(full, "cfg", [])):
        return False
    own = full.state_dict()  # compare input channels only: the number of classes may differ
    return all(state[n].shape[1:] == own[n].shape[1:] for n in own.keys() & state.keys())


def _is_part(cfg: list, full: list) -> bool:
    """Whether each width in ``cfg`` is from 0 to the one in ``full``."""
    return len(cfg) == len(full) and all(
        kept == whole if whole == "M" else type(kept) is int and 0 <= kept <= whole
        for kept, whole in zip(cfg, full, strict=True)
    )


def contents_of(
    model: nn.Module,
    network: Architecture,
    epoch: int,
    best_prec1: float,
    optimizer: dict | None = None,
    **more: Any,
) -> Contents:
    """The `Contents` of a checkpoint: the keys that every checkpoint has, then ``more``.

    ``epoch`` counts the finished epochs, ``best_prec1`` is a fraction from 0 to 1.
    """
    contents = {
        "epoch": epoch,
        "state_dict": model.state_dict(),
        "best_prec1": float(best_prec1),
        "optimizer": optimizer,
        **asdict(network),
        "preprocessing": network.preprocessing.to_store(),
        **more,
    }
    return cast(Contents, contents)


def _count_outputs(state: dict) -> int | None:
    """The outputs of the classifier: the rows of its weight, or of the last weight."""
    weights = {name: weight for name, weight in state.items() if weight.dim() > 1}
    heads = [weights[name] for name in ("classifier.weight", "fc.weight") if name in weights]
    heads += list(weights.values())[-1:]
    return len(heads[0]) if heads else None
