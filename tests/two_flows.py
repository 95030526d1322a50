"""Run by torchrun from test_flowprune.py: flowprune.py, each process leaving its own weights."""

import os

import torch

import flowprune
from slimming.cli import entry
from slimming.runtime import distributed
from slimming.training.trainer import Experiment

save = Experiment._save


def save_own(self, epoch, *told):
    save(self, epoch, *told)
    path = os.path.join(os.environ["OWN"], f"{epoch}-{distributed.rank()}.pth")
    torch.save({"cfg": self.network.cfg, **self.model.state_dict()}, path)


if __name__ == "__main__":
    Experiment._save = save_own
    entry.run(flowprune.main)
