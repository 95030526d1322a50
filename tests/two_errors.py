"""Two processes of test_distributed.py: errors that two processes, or one of them, meet."""

import sys

import torch

from slimming.cli import entry
from slimming.errors import UserError
from slimming.runtime import distributed

CPU = torch.device("cpu")


def main() -> None:
    which, what = sys.argv[1:]
    distributed.start(CPU)
    if which in ("both", str(distributed.rank())):
        if what == "memory":
            raise MemoryError
        raise UserError("the disk is full")
    distributed.all_reduce_sum(torch.ones(1))  # for which the other process does not come


if __name__ == "__main__":
    distributed.PATIENCE = 2
    entry.run(main)
