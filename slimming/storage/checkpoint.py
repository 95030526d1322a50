"""Checkpoint files: loading runs no code, writing is atomic.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts: its `Contents`.
"""

import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast, get_args, get_type_hints

import torch
from torch import nn

from slimming.errors import UserError, raise_if_of_the_machine
from slimming.runtime import optional
from slimming.storage import files

# what zipfile raises for a damaged header, entry or stream
DAMAGED_ZIP = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError),
    *(NotImplementedError, RuntimeError, OverflowError),
)

MASKS = ".indexes"  # how the names of the masks of channel selection end
WRAPPED = "module."  # the prefix that DataParallel and DistributedDataParallel add to each name


class Contents(TypedDict, total=False):
    """What a checkpoint may hold; further keys are the states of callbacks, by their names. `read`
    refuses a file in which one of `CHECKED` has another type; None counts as missing."""

    state_dict: dict[str, torch.Tensor]
    # the network: see `slimming.storage.architecture.Architecture`
    arch: str
    depth: int
    dataset: str
    num_classes: int
    cfg: list | dict
    image_size: int
    options: dict
    preprocessing: dict
    # the run: see `slimming.training.trainer.Trainer`
    epoch: int  # the number of finished epochs
    best_prec1: float  # a fraction, 0 to 1; the original writes a tensor
    optimizer: dict | None
    scaler: dict
    history: list  # a record of each epoch
    settings: dict  # those that a resumed run takes over
    streams: int
    classes: list  # their names
    # what pruning did
    before_pruning: dict  # loss and prec1 of the full network
    holds_zeros: bool  # zeros of convolutions stay zero
    repair: dict  # the scores of the dense, the pruned and the repaired network
    kept: dict  # the channels that each layer of the base network keeps
    # files of `slimming.save`
    numbers: dict  # numbers of channels that are set in the code of modules
    buffers: dict  # those that are in no state dict


CHECKED = ("arch", "depth", "dataset", "num_classes", "cfg", "image_size", "options")


def serialize(contents: Mapping[str, Any]) -> bytes:
    """The bytes of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save(dict(contents), buffer)
    return buffer.getvalue()


def write(path: str | Path, contents: Mapping[str, Any]) -> None:
    """Write a checkpoint; see `slimming.storage.files.write_bytes`."""
    files.write_bytes(path, serialize(contents))


def read(path: str | Path) -> Contents:
    """The contents of a checkpoint, on the CPU. Code in a file is never run.

    A bare state dict is read as a checkpoint that contains nothing else; the prefix of
    DataParallel is removed from names. UserError if the file is missing, empty, truncated, no
    checkpoint, damaged, or contains more than tensors and plain values.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    _check_sums(path, data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says what is wrong
            contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged data can raise anything
        raise_if_of_the_machine(error)
        pickled = data.startswith((b"PK", b"\x80"))
        if pickled and "weights_only" in str(error).lower():
            raise UserError(
                f"{path} is damaged or contains more than tensors and plain values: it was not "
                "loaded, because that could run code"
            ) from error
        raise UserError(
            f"{path} is not a readable checkpoint: it is empty, truncated or another type of file"
        ) from error
    if isinstance(contents, dict) and contents and is_state_dict(contents):
        contents = {"state_dict": contents}
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), dict):
        raise UserError(f"{path} is not a checkpoint of this suite: it has no state_dict")
    state = contents["state_dict"]
    if not is_state_dict(state):
        raise UserError(
            f"{path} is not a checkpoint of this suite: its state_dict has values that are not "
            "tensors"
        )
    if all(name.startswith(WRAPPED) for name in state):
        state = {name.removeprefix(WRAPPED): value for name, value in state.items()}
    types = get_type_hints(Contents)
    for name in CHECKED:
        value = contents.get(name)
        if value is not None and type(value) not in (get_args(types[name]) or (types[name],)):
            raise UserError(f"{path} is damaged: its {name} is {value!r}")
    return cast(Contents, {**contents, "state_dict": state})


def _check_sums(path: str | Path, data: bytes) -> None:
    """UserError if a part of a zip file, which is what torch.save writes, is not as it was written:
    torch.load does not look at the checksums of the weights."""
    try:
        if not zipfile.is_zipfile(io.BytesIO(data)):
            return  # of a version before 1.6, or what `read` refuses
        damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()
    except DAMAGED_ZIP as error:
        raise_if_of_the_machine(error)
        damaged = "its header"
    if damaged:
        raise UserError(
            f"{path} is damaged: {damaged} is not as it was written. Copy or train it again"
        )


def fitted(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """``state`` under the names of ``model``'s state dict, whatever program wrote it.

    `read` has removed the prefix of DataParallel: it comes back if it is the name of a child. Masks
    of channel selection that are missing are ones, and those of ones that the model does not have
    are left out. Counts of batches, which files of PyTorch before 0.4.1 lack, are the model's.
    """
    own = model.state_dict()
    if own and all(name.startswith(WRAPPED) for name in own):
        state = {name if name in own else WRAPPED + name: value for name, value in state.items()}
    found = own.copy()
    found.clear()
    for name, value in state.items():
        if name in own or not name.endswith(MASKS) or not bool(value.all()):
            found[name] = value
    for name, value in own.items():
        if name.endswith(MASKS):
            found.setdefault(name, torch.ones_like(value))
        elif name.endswith("num_batches_tracked"):
            found.setdefault(name, value)
    vars(found).update(vars(own))  # the version metadata of the layers
    return found


def is_state_dict(value: object) -> bool:
    """Whether ``value`` is a dict of tensors by name."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def save_checkpoint(state: dict, is_best: bool, filepath: str | Path) -> None:
    """Write ``state`` to checkpoint.pth.tar in the folder ``filepath`` and, if it is the best, to
    model_best.pth.tar without its optimizer. Same signature as in the original scripts."""
    write(Path(filepath) / "checkpoint.pth.tar", state)
    if is_best:
        write(Path(filepath) / "model_best.pth.tar", {**state, "optimizer": None})


SAFE = ".safetensors"
SHAPES = ".txt"  # as in timm/models/_pruned, which `adapt_model_from_string` of timm reads
KEY = "slimming"  # of the metadata of a safetensors file: all but the tensors, as JSON


def write_slim(path: str | Path, contents: Mapping[str, Any]) -> None:
    """Write ``contents``: two dicts of tensors, "state_dict" and "buffers", and plain values. A
    file of `SHAPES` holds only the shapes of the weights."""
    if Path(path).suffix == SHAPES:
        state = contents["state_dict"].items()
        shapes = [f"{name}:{list(t.shape)}" for name, t in state if name.endswith(".weight")]
        files.write_bytes(path, "***".join(shapes).encode())
        return
    if Path(path).suffix != SAFE:
        write(path, contents)
        return
    optional.need("safetensors.torch", "safetensors", f"a {SAFE} file")
    from safetensors.torch import save

    buffers = contents["buffers"]
    told = {name: v for name, v in contents.items() if name not in ("state_dict", "buffers")}
    metadata = {"format": "pt", KEY: json.dumps({**told, "buffers": list(buffers)})}
    tensors = {  # tied weights stand there twice: the format has no others
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in {**contents["state_dict"], **buffers}.items()
    }
    files.write_bytes(path, save(tensors, metadata=metadata))


def read_slim(path: str | Path) -> Contents:
    """The contents of a file of `write_slim`, or of a checkpoint of the scripts. UserError if it is
    missing, damaged, or another type of file."""
    if Path(path).suffix == SHAPES:
        raise UserError(f"{path} has only the shapes of a network: load the file with its weights")
    if Path(path).suffix != SAFE:
        return read(path)
    optional.need("safetensors", "safetensors", f"a {SAFE} file")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            told = json.loads((opened.metadata() or {}).get(KEY, "{}"))
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        buffers = {name: state.pop(name) for name in told.pop("buffers", [])}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"cannot read {path}: it is missing, truncated or no safetensors file ({error})"
        ) from error
    return cast(Contents, {**told, "state_dict": state, "buffers": buffers})


def widths_of(contents: Contents) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The buffers that are in no state dict, and the numbers of modules, of read ``contents``.
    UserError if they are something else."""
    buffers, numbers = contents.get("buffers", {}), contents.get("numbers", {})
    plain = isinstance(numbers, dict) and all(isinstance(v, dict) for v in numbers.values())
    if not plain or not is_state_dict(buffers):
        raise UserError(
            "the file is damaged: its numbers of channels are not as `save` writes them"
        )
    return buffers, numbers
