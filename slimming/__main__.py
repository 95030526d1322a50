"""`python -m slimming inspect FILE.py:build`: what can be pruned of a network."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming.api import inspect
from slimming.channels.inputs import Inputs
from slimming.cli import entry
from slimming.cli.flags import Parser
from slimming.errors import UserError


def make_parser() -> Parser:
    parser = Parser("Tell what can be pruned of a network, and what cannot.")
    parser.prog = "python -m slimming"
    parser.add_argument("command", choices=["inspect"], help="what to do")
    parser.add_argument(
        "network",
        metavar="FILE.py:build",
        help="a file of Python and a function in it that returns the network, or the network and "
        "its inputs (a tensor, a tuple of arguments, a dict of keyword arguments)",
    )
    parser.add_argument(
        "--input",
        metavar="1x3x224x224",
        action="append",
        default=[],
        type=shape,
        help="the shape of an input; once for each argument",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split("x"))
    if min(sizes) < 1:
        raise ValueError(text)
    return sizes


def built(place: str) -> Any:
    """What the function says that ``place`` names, FILE.py:build."""
    file, _, name = place.rpartition(":")
    path = Path(file or place)
    if not file or not path.is_file():
        raise UserError(f"{place}: expected FILE.py:build, a file and a function in it")
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no file of Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        build = getattr(module, name, None)
        if not callable(build):
            raise UserError(f"{path} has no function called {name}")
        return build()
    except UserError:
        raise
    except Exception as error:  # the user's own code
        raise UserError(f"{place} fails ({type(error).__name__}: {error})") from error


def read(place: str, shapes: list[tuple[int, ...]]) -> tuple[nn.Module, Inputs]:
    """The network and its inputs."""
    found = built(place)
    model, inputs = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise UserError(f"{place} returns a {type(model).__name__}, not an nn.Module")
    if shapes:
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        random = torch.Generator().manual_seed(0)
        drawn = tuple(torch.rand(shape, generator=random).to(dtype) for shape in shapes)
        inputs = drawn if len(drawn) > 1 else drawn[0]
    if inputs is None:
        raise UserError("--input SHAPE is required, such as 1x3x224x224, or return (model, inputs)")
    return model, inputs


def main() -> None:
    args = make_parser().parse_args()
    told = inspect(*read(args.network, args.input))
    print(json.dumps(told.as_dict(), indent=1) if args.json else told)


if __name__ == "__main__":
    sys.argv[0] = "slimming"  # the name in errors
    entry.run(main)
