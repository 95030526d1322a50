"""Small networks, small image folders, and the scripts as processes."""

import copy
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is there: the tests run side by side

import numpy as np
import pytest
import torch
from PIL import Image
from warm import run

from models import NETWORKS
from slimming.data import datasets
from slimming.data.pixels import Split
from slimming.measuring import profiling
from slimming.pruning import slicing
from slimming.pruning.groups import declared
from slimming.pruning.scaling import batch_norms, zero_channels
from slimming.storage import architecture, checkpoint

SMALLEST = {"vgg": 11, "resnet": 11, "densenet": 7}  # the smallest depth of each network
NARROW = {"vgg": [12, "M", 16, "M", 20, 16, "M", 24, 20, "M", 24, 28]}  # to be quick
UNREACHABLE = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "HTTP", "HTTPS")}


def pytest_addoption(parser):
    text = "where tests marked `device` run: cpu (the default), cuda, ..."
    parser.addoption("--device", default="cpu", help=text)


@pytest.fixture
def device(request):
    """The device of --device, with fp32 products of full precision."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.config.getoption("--device"))
    torch.backends.cudnn.allow_tf32 = tf32


def succeed(command, *more, **kwargs):
    """Run a script that must succeed, a command line and further words; return its output."""
    done = run(command, *more, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fails(tmp_path, command, *more, status=2, says=(), **kwargs):
    """The command ends with one line that holds ``says``, and no file is new."""
    before = sorted(tmp_path.rglob("*"))
    done = run(command, *more, cwd=tmp_path, **kwargs)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    for words in [says] if isinstance(says, str) else says:
        assert words in lines[0]
    assert sorted(tmp_path.rglob("*")) == before
    return lines[0]


def randomize(model, seed=0):
    """Give γ, β and the running statistics random values, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for bn in batch_norms(model).values():
        bn.weight.data.normal_(0, 0.5, generator=generator)
        bn.bias.data.normal_(0, 0.2, generator=generator)
        bn.running_mean.normal_(0, 0.2, generator=generator)
        bn.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def keep_only(model, keep):
    """What is left of a network with ``wiring()`` when each BN keeps the channels of ``keep``."""
    return slicing.sliced(model, slicing.kept_channels(model, declared(model), keep))


def zero_others(model, keep):
    """The same by mask: a copy in which the γ and β of all other channels are zero."""
    return zero_channels(copy.deepcopy(model).eval(), keep)


def save_network(path, arch, depth, dataset="digits", num_classes=10, cfg=None, **more):
    """Write a checkpoint of a network with random scaling factors; return the path."""
    network = architecture.Architecture(arch, depth, dataset, num_classes, cfg)
    torch.manual_seed(0)
    model = randomize(network.build())
    checkpoint.write(path, architecture.contents_of(model, network, 1, 0.5, **more))
    return path


def make_images(folder, classes=("blue", "red"), train=24, test=8, size=(32, 32), ending=".png"):
    """An image folder in which each class has its own colour, with noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., label % 3] //= 4
                Image.fromarray(pixels).save(place / f"{i}{ending}")
    return folder


def same(a, b):
    """Whether two nested structures are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


@pytest.fixture
def few_digits(monkeypatch):
    """In this process `--dataset digits` has 50 images in each part."""
    load = datasets.load

    def first(name, *where):
        images, labels, classes = load(name, *where)
        count = 50 if name == "digits" else len(images)
        return Split(images[:count], labels[:count], classes)

    monkeypatch.setattr(datasets, "load", first)


@pytest.fixture
def quick(monkeypatch):
    """In this process latency is not waited for: it grows with the images and from network to
    network."""

    def latencies(models, images):
        return [(len(images) + i) / 1e3 for i in range(len(models))]

    monkeypatch.setattr(profiling, "latencies", latencies)


@pytest.fixture(params=SMALLEST)
def small(request):
    """A small network of each architecture with random scaling factors."""
    torch.manual_seed(0)
    return randomize(NETWORKS[request.param](depth=SMALLEST[request.param], num_classes=10))
