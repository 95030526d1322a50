"""Two processes on one machine, started by torchrun as people start them."""

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from conftest import make_images, succeed
from warm import ROOT, on_processes, run, start

from slimming.data.batches import Batches, Split, loss_weight
from slimming.runtime import distributed
from slimming.storage import checkpoint

MAIN = (
    "main.py -sr --s 0.001 --dataset folder --arch resnet --depth 11 --batch-size 16 --seed 3 "
    "--no-tensorboard"
)


def share(rank, ranks, count=50, augment=True):
    images = torch.arange(count).view(count, 1, 1, 1).expand(count, 3, 32, 32).byte()
    split = Split(images, torch.arange(count), ["a"])
    return Batches(split, 16, augment=augment, rank=rank, ranks=ranks)


def test_the_shares_of_all_processes_are_the_batches_of_one():
    whole = [labels for _, labels in share(0, 1)]
    parts = [[labels for _, labels in share(rank, 3)] for rank in range(3)]
    # the last batch, of 2 images, is too small for 3 processes to train on
    for batch, *pieces in zip(whole[:-1], *parts, strict=True):
        assert torch.equal(torch.cat(pieces).sort().values, batch.sort().values)
    weights = [loss_weight(share(0, 3), 0, len(part[0])) for part in parts]
    assert [len(part[0]) for part in parts] == [6, 5, 5] and sum(weights) == pytest.approx(3)


def test_every_test_image_is_in_one_share():
    labels = [labels for rank in range(3) for _, labels in share(rank, 3, augment=False)]
    assert torch.cat(labels).sort().values.tolist() == list(range(50))


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path):
    """The first step's loss is that of one process; the file is the same kind of file."""
    data = f"--data {make_images(tmp_path / 'images')}"
    printed = succeed(f"{MAIN} {data} --epochs 2 --save {tmp_path / 'two'}", processes=2)
    assert printed.count("Test set") == 2, "one voice"
    alone = succeed(f"{MAIN} {data} --epochs 2 --save {tmp_path / 'one'}")
    two, one = (checkpoint.read(tmp_path / d / "checkpoint.pth.tar") for d in ("two", "one"))
    assert two.keys() == one.keys() and two["epoch"] == 2
    assert two["state_dict"].keys() == one["state_dict"].keys()
    assert alone.count("Test set") == 2
    # and goes on with any number of processes
    last = tmp_path / "two" / "checkpoint.pth.tar"
    succeed(f"main.py --resume {last} {data} --epochs 3 --no-tensorboard")
    assert checkpoint.read(last)["epoch"] == 3
    succeed(f"{MAIN} {data} --resume {last} --epochs 4", processes=3)
    assert checkpoint.read(last)["epoch"] == 4


@pytest.mark.device
def test_all_processes_end_with_identical_weights_and_the_gradient_of_the_whole_batch(device):
    assert succeed(f"tests/two_processes.py {device.type}", processes=2).count("identical") == 1


def test_processes_share_gpus_if_there_are_more_of_them(monkeypatch):
    """NCCL refuses two processes on one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for gpus, device, backend in (2, "cuda:1", "nccl"), (1, "cuda:0", "gloo"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert distributed.local_device(None, no_cuda=False) == device
        assert distributed.backend(torch.device(device)) == backend
    assert distributed.local_device("cpu", no_cuda=False) == "cpu"
    assert distributed.backend(torch.device("cpu")) == "gloo"


def test_a_restart_finds_nothing_of_the_attempt_before():
    """Processes in any order; one of them died before it heard the number of the first attempt."""
    store = dist.HashStore()
    store.set("key/1", "of a dead process")
    for order in (0, 1, 2), (2, 1, 0), (1, 0, 2):
        with ThreadPoolExecutor() as pool:
            parts = []
            for number in order:
                parts.append(pool.submit(distributed.store_of_this_attempt, store, number, 3))
                time.sleep(0.05)
        for part in parts:
            assert not part.result().check(["address"])
        parts[0].result().set("address", "")
        assert all(part.result().check(["address"]) for part in parts)
    with pytest.raises(RuntimeError, match="1 of 2 processes"):
        distributed.store_of_this_attempt(dist.HashStore(), 0, 2, patience=0.1)


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_the_run_finishes(tmp_path):
    images = make_images(tmp_path / "images", train=40)
    command = f"{MAIN} --data {images} --epochs 5 --save {tmp_path}"
    succeed(f"{command}/whole", processes=2)
    last = tmp_path / "killed" / "checkpoint.pth.tar"
    process = start(on_processes(f"{command}/killed --resume auto", restarts=3))
    while not last.exists() and process.is_alive():
        time.sleep(0.01)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.join(240)
    assert process.exitcode == 0
    whole, killed = (
        checkpoint.read(tmp_path / d / "checkpoint.pth.tar") for d in ("whole", "killed")
    )
    assert killed["epoch"] == 5
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, killed["state_dict"][name]), name


@pytest.mark.slow
def test_what_cannot_be_shared_is_one_line(tmp_path):
    """Too small a batch; machines that do not see the same checkpoint; pruning by two processes."""
    images = make_images(tmp_path / "images")
    command = f"{MAIN} --data {images} --batch-size 1 --save {tmp_path / 'out'}"
    done = run(command, processes=2)
    assert done.stderr.count("--batch-size 1 is too small for 2 processes") == 1
    assert done.returncode == 2 and "Traceback" not in done.stderr
    done = run(f"resprune.py --model {tmp_path / 'none'}", env={"WORLD_SIZE": "2"})
    assert done.returncode == 2 and "single process" in done.stderr


SMALL = "--dataset folder --arch resnet --depth 11 --batch-size 16 --no-cuda"


ERRORS = {
    "flags": ("main.py -sr --sparsity lots", "main.py: error: argument --s/--sparsity"),
    "file": (f"main.py {SMALL} --refine none", "main.py: error: cannot read none"),
    "diverged": (
        f"main.py -sr --s 1 {SMALL} --lr 1e30",
        "main.py: error: the loss is nan",
    ),
    "memory": ("tests/two_errors.py both memory", "two_errors.py: error: out of memory"),
    "first": ("tests/two_errors.py 0 disk", "two_errors.py: error: the disk is full"),
    "other": ("tests/two_errors.py 1 disk", "two_errors.py: error: the disk is full"),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_one_line_of_one_process(images, tmp_path, error):
    """Of the first, unless another one alone has met it."""
    command, says = ERRORS[error]
    place = f"--data {images} --save {tmp_path}" if command.startswith("main.py") else ""
    done = run(f"{command} {place}", processes=2)
    assert done.returncode == (1 if error == "diverged" else 2)
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith(says), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_torchrun_tells_whose_error_it_was():
    command, says = ERRORS["other"]
    done = run(on_processes(command), env={"PYTHONPATH": str(ROOT)})
    told = done.stderr.partition("torch/distributed/elastic")[0].splitlines()
    ours = [line for line in told if ".py: error: " in line]
    assert len(ours) == 1 and ours[0].startswith(says), done.stderr
    assert "Traceback" not in "".join(told) and done.stderr.count("Traceback") == 1, done.stderr
    root = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1 " in root and "exitcode  : 2 " in root
