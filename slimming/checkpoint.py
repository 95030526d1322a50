"""Checkpoints: read without running code, written whole or not at all, turned back into networks.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts. It always says which network
it holds (`Network`), so that nobody needs flags to load it.
"""

import contextlib
import io
import os
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from models import NETWORKS
from slimming.errors import UserError

MASKS = ".indexes"
STORED = {
    "arch": str,
    "depth": int,
    "dataset": str,
    "num_classes": int,
    "cfg": list,
    "image_size": int,
}


@dataclass(frozen=True)
class Network:
    """Which network: what ``--arch``, ``--depth`` and ``--dataset`` say, the widths of a slim one
    (``cfg``; None for a full network), and the height and width of its images in pixels."""

    arch: str
    depth: int
    dataset: str
    num_classes: int
    cfg: list | None = None
    image_size: int = 32

    def __str__(self) -> str:
        slim = "slim " if self.cfg else ""
        data = f"{self.dataset} ({self.num_classes} classes)"
        size = f" at {self.image_size} pixels" if self.image_size != 32 else ""
        return f"{slim}{self.arch}-{self.depth} for {data}{size}"

    def check(self, networks: dict = NETWORKS) -> None:
        """UserError if there is no such network; costs next to nothing."""
        with torch.device("meta"):
            self.build(networks)

    def build(self, networks: dict = NETWORKS) -> nn.Module:
        """A new network with fresh weights. UserError if there is no such network."""
        if self.arch not in networks:
            raise UserError(f"no network is called {self.arch!r}: use {', '.join(networks)}")
        try:
            return networks[self.arch](
                depth=self.depth, dataset=self.dataset, cfg=self.cfg, num_classes=self.num_classes
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"cannot build {self.arch}-{self.depth}: {error}") from error


def serialize(contents: dict) -> bytes:
    """The bytes of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def write(path: str | Path, contents: dict) -> None:
    """Write a checkpoint; see `write_bytes`."""
    write_bytes(path, serialize(contents))


def write_bytes(path: str | Path, data: bytes, suffix: str = ".tmp") -> None:
    """Replace the file at ``path`` so that a reader sees the old file or the new one, never half.

    The bytes go to a file beside it (its name ends in ``suffix``; where several processes may
    write the same file, each needs its own), are flushed to disk, and take the name in one step.
    UserError if that fails (a full disk, no permission); an older file is then still there.
    """
    path = Path(path)
    beside = path.with_name(path.name + suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; what was there before is kept") from error


def read(path: str | Path) -> dict:
    """The contents of a checkpoint, on the CPU. It is data only: code in a file is refused.

    UserError if the file is missing, empty, cut short, something else, or holds more than tensors
    and plain values.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said once, below
            contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds, one for each way to be broken
        pickled = data.startswith((b"PK", b"\x80"))
        if pickled and "weights_only" in str(error).lower():
            raise UserError(
                f"{path} is not a checkpoint of plain tensors (or is damaged): it was "
                "not loaded, because loading it could run code"
            ) from error
        raise UserError(
            f"{path} is not a readable checkpoint: empty, cut short or another kind of file"
        ) from error
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), dict):
        raise UserError(f"{path} is no checkpoint of this suite: it holds no state_dict")
    entries = contents["state_dict"].items()
    if not all(isinstance(n, str) and isinstance(v, torch.Tensor) for n, v in entries):
        raise UserError(f"{path} is no checkpoint of this suite: its state_dict is not of tensors")
    return contents


def describe(path: str | Path, contents: dict, given: dict) -> dict:
    """What the checkpoint says of its network, completed by the flags in ``given``.

    Flags that are None were not given. A file of the original suite knows less than ours: there
    the flags count. UserError where a flag contradicts the file; it names both.
    """
    known = {}
    for field in fields(Network):
        flag, stored = given.get(field.name), contents.get(field.name)
        if stored is not None and type(stored) is not STORED[field.name]:
            raise UserError(f"{path} is damaged: its {field.name} is {stored!r}")
        if flag is not None and stored is not None and flag != stored:
            name = field.name.replace("_", " ")
            raise UserError(f"{path} holds {name} {stored!r}, but {flag!r} was asked for")
        known[field.name] = flag if stored is None else stored
    return known


def load_network(
    path: str | Path, contents: dict, network: Network, networks: dict = NETWORKS
) -> nn.Module:
    """The network of a checkpoint with its weights, on the CPU.

    ``networks`` are the constructors by name: those with channel selection or those without. Full
    weights of the one load into the other. UserError if the weights do not fit ``network``.
    """
    model = network.build(networks)
    state = _match_masks(contents["state_dict"], model)
    own = model.state_dict()
    masks = {name for name in state.keys() - own.keys() if name.endswith(MASKS)}
    if masks and state.keys() - masks <= own.keys():
        raise UserError(f"{path} selects channels: it is for the main suite, not for mask-impl")
    for name in {**state, **own}:
        if name.endswith("num_batches_tracked"):
            continue  # PyTorch before 0.4.1 wrote none
        if name not in state or name not in own:
            where = "has no" if name not in state else "has an unexpected"
            raise UserError(f"{path} does not hold a {network}: it {where} {name}")
        if state[name].shape != own[name].shape:
            raise UserError(
                f"{path} does not hold a {network}: {name} is "
                f"{tuple(state[name].shape)} and should be {tuple(own[name].shape)}"
            )
    try:
        model.load_state_dict(state)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, 32, 32))  # selected channels must fit the layer behind
    except RuntimeError as error:
        raise UserError(
            f"{path} does not hold a working {network}: its masks and widths contradict each other"
        ) from error
    return model


def load(
    path: str | Path, given: dict | None = None, networks: dict = NETWORKS
) -> tuple[nn.Module, Network, dict]:
    """Read a checkpoint and rebuild its network: (model, network, the whole contents).

    ``given``: what flags say of the network; needed for files that do not say it themselves.

    >>> model, network, contents = load("logs/pruned.pth.tar")  # doctest: +SKIP
    """
    contents = read(path)
    return *rebuild(path, contents, given or {}, networks), contents


def rebuild(
    path: str | Path, contents: dict, given: dict, networks: dict = NETWORKS
) -> tuple[nn.Module, Network]:
    """The network that the ``contents`` of the file at ``path`` and the flags ``given`` describe,
    with its weights. UserError if they contradict each other."""
    known = describe(path, contents, given)
    missing = [name for name in ("arch", "depth", "dataset") if known[name] is None]
    if missing:
        raise UserError(
            f"{path} does not say its {' and '.join(missing)}: give "
            f"{' '.join('--' + name for name in missing)}"
        )
    known["num_classes"] = known["num_classes"] or _count_outputs(contents["state_dict"])
    known["image_size"] = known["image_size"] or Network.image_size
    network = Network(**known)
    return load_network(path, contents, network, networks), network


def contents_of(
    model: nn.Module,
    network: Network,
    epoch: int,
    best_prec1: float,
    optimizer: dict | None = None,
    **more,
) -> dict:
    """The dict that is saved: the keys of every checkpoint, then ``more``.

    ``epoch`` counts the finished epochs, ``best_prec1`` is a fraction from 0 to 1.
    """
    return {
        "epoch": epoch,
        "state_dict": model.state_dict(),
        "best_prec1": float(best_prec1),
        "optimizer": optimizer,
        **asdict(network),
        **more,
    }


def find(path: Path, *patterns: str) -> Path:
    """A path to a file as it is; in a folder, the one file that matches the first pattern which
    matches any. UserError if none does, or several."""
    if path.name == "best_acc" and not path.exists():
        path = path.parent  # where another implementation keeps its best model
    if not path.is_dir():
        return path
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{path} holds {', '.join(f.name for f in found)}: name the file")
    raise UserError(f"{path} is a folder without {' or '.join(patterns)}: name the file")


def _flush_folder(folder: Path) -> None:
    """The new name survives a power cut too, where the system can promise that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _match_masks(state: dict, model: nn.Module) -> dict:
    """Give weights without masks full masks, or drop full masks that the model has no place for."""
    own = model.state_dict()
    full = {
        name: torch.ones_like(own[name])
        for name in own
        if name.endswith(MASKS) and name not in state
    }
    extra = {
        name
        for name in state
        if name.endswith(MASKS) and name not in own and bool(state[name].all())
    }
    return {**{n: v for n, v in state.items() if n not in extra}, **full}


def _count_outputs(state: dict) -> int | None:
    heads = [state[name] for name in ("classifier.weight", "fc.weight") if name in state]
    return len(heads[0]) if heads and heads[0].dim() else None
