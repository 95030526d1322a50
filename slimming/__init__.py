"""Prune convolutional networks exactly (Network Slimming, Liu et al., ICCV 2017).

sparsity = slimming.Sparsity(model, images, s=1e-4)  # in your training loop
print(slimming.inspect(model, images))  # what can go
slim = slimming.prune(model, images, ratio=0.5)
slim = slimming.repair(slim, model, training_images)
slimming.save(slim, "slim.pth")
model = slimming.load("slim.pth", build=lambda: resnet18(num_classes=10))
fast = slimming.deploy(model)
"""

from slimming import moved
from slimming.api import (
    Inspection,
    L1Penalty,
    Slim,
    compare,
    deploy,
    inspect,
    load,
    load_into,
    optimizer_state,
    prune,
    repair,
    rounds,
    save,
    updateBN,
)
from slimming.errors import UserError
from slimming.sparsity import Sparsity, distill

moved.install()

__all__ = [
    "Inspection",
    "L1Penalty",
    "Slim",
    "Sparsity",
    "UserError",
    "compare",
    "deploy",
    "distill",
    "inspect",
    "load",
    "load_into",
    "optimizer_state",
    "prune",
    "repair",
    "rounds",
    "save",
    "updateBN",
]
