"""Files of slim networks: by their suffix .safetensors, the shapes in timm's form (.txt), or as
torch.save writes them. Reading them runs no code."""

import json
from pathlib import Path
from typing import Any

import torch

from slimming.errors import UserError
from slimming.runtime import optional
from slimming.storage import checkpoint, files

SAFE = ".safetensors"
SHAPES = ".txt"  # as in timm/models/_pruned, which `adapt_model_from_string` of timm reads
KEY = "slimming"  # of the metadata of a safetensors file: all but the tensors, as JSON


def write(path: str | Path, contents: dict[str, Any]) -> None:
    """Write ``contents``: two dicts of tensors, "state_dict" and "buffers", and plain values. A
    file of `SHAPES` holds only the shapes of the weights."""
    if Path(path).suffix == SHAPES:
        state = contents["state_dict"].items()
        shapes = [f"{name}:{list(t.shape)}" for name, t in state if name.endswith(".weight")]
        files.write_bytes(path, "***".join(shapes).encode())
        return
    if Path(path).suffix != SAFE:
        checkpoint.write(path, contents)
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


def read(path: str | Path) -> dict[str, Any]:
    """The contents of a file of `write`, or of a checkpoint of the scripts. UserError if it is
    missing, damaged, or another type of file."""
    if Path(path).suffix == SHAPES:
        raise UserError(f"{path} has only the shapes of a network: load the file with its weights")
    if Path(path).suffix != SAFE:
        return checkpoint.read(path)
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
    return {**told, "state_dict": state, "buffers": buffers}


def widths_of(contents: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The buffers that are in no state dict, and the numbers of modules, of read ``contents``.
    UserError if they are something else."""
    buffers, numbers = contents.get("buffers", {}), contents.get("numbers", {})
    plain = isinstance(numbers, dict) and all(isinstance(v, dict) for v in numbers.values())
    if not plain or not checkpoint.is_state_dict(buffers):
        raise UserError(
            "the file is damaged: its numbers of channels are not as `save` writes them"
        )
    return buffers, numbers
