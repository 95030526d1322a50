"""Two processes of test_distributed.py: one epoch on two processes, looked at from inside. The
device may be named."""

import copy
import sys

import torch
import torch.nn.functional as F

from models import vgg
from slimming.cli import entry
from slimming.data.batches import Batches, Split
from slimming.errors import UserError
from slimming.runtime import distributed
from slimming.runtime.device import choose_device
from slimming.training import loop
from slimming.training.penalties import L1Penalty
from slimming.training.trainer import make_optimizer


def main() -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    device = choose_device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    stdout = sys.stdout
    distributed.start(device)
    rank, ranks = distributed.rank(), distributed.world_size()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 900, 3)
    ).to(device)
    alone = copy.deepcopy(model)
    images = torch.randint(256, (21, 3, 32, 32), dtype=torch.uint8)
    split = Split(images.to(device), torch.randint(3, (21,)).to(device), ["a", "b", "c"])
    shared = Batches(split, 8, augment=True, rank=rank, ranks=ranks)

    # Without BN, shares of unequal size give exactly the gradient of the whole batch.
    optimizer = make_optimizer(model, 0.01, 0.9, 1e-4)
    loop.train(distributed.wrap(model), shared, optimizer)
    plain = make_optimizer(alone, 0.01, 0.9, 1e-4)
    for images, labels in Batches(split, 8, augment=True):
        plain.zero_grad()
        F.cross_entropy(alone(images), labels).backward()
        plain.step()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    network = vgg(depth=11, num_classes=3).to(device)
    optimizer = make_optimizer(network, 0.1, 0.9, 1e-4)
    loop.train(distributed.wrap(network), shared, optimizer, 0, [L1Penalty(network, 0.01)])
    distributed.broadcast_buffers(network)
    for name, value in network.state_dict().items():
        largest, smallest = value.clone(), value.clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        assert torch.equal(largest, smallest), name
    if rank == 0:
        print("identical")
    distributed.check_same(7, device, "")
    assert (sys.stdout is stdout) == (rank == 0), "one process prints"
    try:
        distributed.check_same(rank, device, "not the same epoch")
    except UserError:
        distributed.stop()
        assert sys.stdout is stdout, "all print again"
    else:
        raise AssertionError("different numbers went unnoticed")


if __name__ == "__main__":
    entry.run(main)
