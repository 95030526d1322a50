"""Images from DataLoader workers are the same whatever the number of workers."""

import gc
import multiprocessing
import os
import re
import signal
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import NARROW, make_images, succeed
from PIL import Image

import slimming
from slimming.cli import entry
from slimming.data import image_folder
from slimming.data.batches import normalize
from slimming.data.image_folder import Stream
from slimming.errors import UserError
from slimming.runtime.device import AUGMENTATION, SHUFFLE, epoch_generator
from slimming.slicing import unread
from slimming.storage import checkpoint
from slimming.storage.architecture import Architecture
from slimming.training.settings import TrainSettings
from slimming.training.trainer import Trainer


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("large"), train=20, test=6, size=(80, 60))


def stream(folder, part, workers=0, **settings):
    _, samples, classes = image_folder.scan_folder(folder, part)
    settings = {"batch_size": 16, "augment": part == "train", "seed": 1, **settings}
    return Stream(samples, classes, 48, torch.device("cpu"), workers, **settings)


def epoch(loader, number):
    loader.epoch = number
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.slow
def test_an_epoch_does_not_depend_on_the_number_of_workers(large):
    alone, helped = stream(large, "train"), stream(large, "train", workers=2)
    epoch(helped, 0)
    for number in (1, 0):
        for a, b in zip(epoch(alone, number), epoch(helped, number), strict=True):
            assert torch.equal(a, b)
    images, labels = epoch(alone, 1)
    assert images.shape == (40, 3, 48, 48) and labels.bincount().tolist() == [20, 20]
    assert not torch.equal(labels, epoch(alone, 2)[1])


def test_every_epoch_and_seed_augments_each_image_anew(large):
    def by_label(seed, number):  # one image a class, whose place in the epoch does not matter
        loader = stream(large, "train", seed=seed)
        loader.dataset.samples = [loader.dataset.samples[0], loader.dataset.samples[-1]]
        loader.num_images = 2
        images, labels = epoch(loader, number)
        return images[labels.argsort()]

    first = by_label(1, 0)
    assert torch.equal(by_label(1, 0), first)
    for other in (by_label(1, 1), by_label(2, 0)):
        assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_workers_take_no_random_number_from_dropout(large, workers):
    """They start in other epochs of a resumed run, which must end as the whole run."""
    loader, before = stream(large, "train", workers), torch.get_rng_state()
    epoch(loader, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stored, purpose", [({}, SHUFFLE), ({"streams": 2}, AUGMENTATION)])
def test_a_run_of_before_is_resumed_with_the_crops_of_before(large, stored, purpose):
    loader = stream(large, "train")
    network = Architecture("vgg", 11, "folder", 2, NARROW["vgg"], image_size=48)
    trainer = Trainer(network.build(), network, loader, loader, TrainSettings())
    trainer.from_contents("file", {"epoch": 1, "best_prec1": 0.5, **stored})
    path = loader.dataset.samples[7][0]
    torch.manual_seed(epoch_generator(1, 3, 7, purpose=purpose).initial_seed())
    expected = loader.dataset.transform(image_folder.read_image(path))
    assert torch.equal(loader.dataset[3, 7][0], expected)


def test_the_test_is_the_centre_and_shares_are_disjoint(large):
    whole, labels = epoch(stream(large, "test"), 0)
    with Image.open(large / "test" / "blue" / "0.png") as image:
        scaled = image.resize((72, 54), Image.Resampling.BILINEAR).crop((12, 3, 60, 51))
    expected = normalize(torch.from_numpy(np.array(scaled)).permute(2, 0, 1)[None])
    torch.testing.assert_close(whole[:1], expected, rtol=0, atol=0.05)
    parts = [epoch(stream(large, "test", rank=rank, ranks=2), 0)[1] for rank in range(2)]
    assert torch.equal(torch.cat(parts).sort().values, labels.sort().values)
    assert torch.equal(stream(large, "test").first(3), whole[:3])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(tmp_path, workers):
    folder = make_images(tmp_path, train=2, test=2)
    (folder / "test" / "red" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^cannot read the image .*red/1\.png") as error:
        epoch(stream(folder, "test", workers), 0)
    assert "Traceback" not in str(error.value)


@pytest.mark.slow
def test_the_workflow_at_another_size(large, tmp_path):
    data = f"--data {large} --workers 1"
    train = f"main.py -sr --dataset folder {data} --arch resnet --depth 11 --epochs 1"
    succeed(f"{train} --image-size 48 --save {tmp_path}")
    assert checkpoint.read(tmp_path / "checkpoint.pth.tar")["image_size"] == 48
    assert "slim equals masked" in succeed(f"resprune.py --model {tmp_path} {data}")
    pruned = tmp_path / "pruned.pth.tar"
    succeed(f"main.py --refine {pruned} {data} --epochs 1 --save {tmp_path / 'fine'}")


@pytest.mark.slow
def test_workers_end_with_the_pass_or_the_training_that_needed_them(large):
    gc.collect()  # of a pass that an error ended, as in other tests
    loader = stream(large, "test", workers=1)
    epoch(loader, 0)
    assert not multiprocessing.active_children()
    with loader.keeping_workers():
        epoch(loader, 0)
        (worker,) = multiprocessing.active_children()
        epoch(loader, 1)
        assert multiprocessing.active_children() == [worker]
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_dead_worker_is_told_by_the_loader_not_by_other_code(large, tmp_path):
    """PyTorch would raise it in whatever code runs when it dies, such as the check of a file."""
    checkpoint.write(tmp_path / "intact", {"state_dict": {"a": torch.ones(1)}})
    loader = stream(large, "test", workers=1)
    with loader.keeping_workers():
        epoch(loader, 0)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while os.path.exists(f"/proc/{worker.pid}/exe") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert checkpoint.read(tmp_path / "intact")["state_dict"]["a"] == 1
        with pytest.raises(UserError, match=r"images died .*memory") as error:
            epoch(loader, 1)
    assert "damaged" not in str(error.value)


FAILURES = [
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError("no memory"),
]


class Failing(torch.nn.Module):
    """A network in whose forward something else fails."""

    def __init__(self, error):
        super().__init__()
        self.layer, self.error = torch.nn.Conv2d(3, 4, 1), error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", FAILURES, ids=["worker", "memory", "MemoryError"])
@pytest.mark.parametrize(
    "use",
    [
        lambda net, images: slimming.deploy(net),
        lambda net, images: unread.trace(net),
        lambda net, images: unread.without_unread_channels(net),
        lambda net, images: slimming.prune(net, images),
    ],
)
def test_a_network_is_not_explained_by_a_failure_of_the_machine(use, error):
    with pytest.raises(type(error), match=re.escape(str(error))):
        use(Failing(error), torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize("error", FAILURES, ids=["worker", "memory", "MemoryError"])
def test_an_intact_file_is_not_damaged_because_the_machine_fails(
    large, tmp_path, monkeypatch, error
):
    def fail(*_, **__):
        raise error

    checkpoint.write(tmp_path / "intact", {"state_dict": {"a": torch.ones(1)}})
    for owner, name in ((torch, "load"), (zipfile.ZipFile, "testzip")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(type(error), match=re.escape(str(error))):
                checkpoint.read(tmp_path / "intact")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(error), match=re.escape(str(error))):
        image_folder.read_image(str(large / "test" / "blue" / "0.png"))


@pytest.mark.parametrize(
    "error, says",
    [(FAILURES[0], "images died (DataLoader worker (pid 7)"), (FAILURES[1], "out of memory")],
)
def test_a_failure_of_the_machine_is_one_line(monkeypatch, capsys, error, says):
    def fail():
        raise error

    monkeypatch.setattr("sys.argv", ["run.py"])
    with pytest.raises(SystemExit) as stopped:
        entry.run(fail)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and says in line and "damaged" not in line
