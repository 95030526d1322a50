"""Small networks, small image folders, and the scripts as processes."""

import contextlib
import copy
import fcntl
import os
import shutil

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is there: the tests run side by side

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import warm
from PIL import Image

from models import NETWORKS
from slimming import slicing
from slimming.channels.groups import declared
from slimming.channels.scaling import batch_norms, zero_channels
from slimming.data import datasets
from slimming.data.batches import Split, normalize
from slimming.storage import architecture
from slimming.storage import checkpoint as storage_checkpoint

SMALLEST = {"vgg": 11, "resnet": 11, "densenet": 7}  # the smallest depth of each network
NARROW = {"vgg": [12, "M", 16, "M", 20, 16, "M", 24, 20, "M", 24, 28]}  # to be quick
# of input that an exported network may have
KINDS = ("float32 NCHW", "float32 NHWC", "uint8 NCHW", "uint8 NHWC")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
UNREACHABLE = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "HTTP", "HTTPS")}


def pytest_addoption(parser):
    text = "where tests marked `device` run: cpu (the default), cuda, ..."
    parser.addoption("--device", default="cpu", help=text)


def pytest_collection_modifyitems(items):
    """A test that starts scripts takes seconds, too."""
    for item in items:
        names = getattr(getattr(item, "function", None), "__code__", None)
        if names and {"succeed", "fails", "start"} & {*names.co_names}:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def one_thread():
    """Exported networks set the number of threads, and others would wait for each other."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def device(request):
    """The device of --device, with fp32 products of full precision."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.config.getoption("--device"))
    torch.backends.cudnn.allow_tf32 = tf32


def succeed(command, *more, **kwargs):
    """Run a script that must succeed, a command line and further words; return its output."""
    done = warm.run(command, *more, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fails(tmp_path, command, *more, status=2, says=(), **kwargs):
    """The command ends with one line that holds ``says``, and no file is new."""
    before = sorted(tmp_path.rglob("*"))
    done = warm.run(command, *more, cwd=tmp_path, **kwargs)
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


def keep_only(model, keep, coupled=None):
    """What is left of one of the paper's networks when each BN keeps the channels of ``keep``."""
    return slicing.sliced(model, slicing.kept_channels(coupled or declared(model), keep))


def zero_others(model, keep):
    """The same by mask: a copy in which the γ and β of all other channels are zero."""
    return zero_channels(copy.deepcopy(model).eval(), keep)


def save_network(path, arch, depth, dataset="digits", num_classes=10, cfg=None, **more):
    """Write a checkpoint of a network with random scaling factors; return the path."""
    network = architecture.Architecture(arch, depth, dataset, num_classes, cfg)
    torch.manual_seed(0)
    model = randomize(network.build())
    storage_checkpoint.write(path, architecture.contents_of(model, network, 1, 0.5, **more))
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
    """In this process latency is not measured, and nothing drawn: see `warm.shorten`."""
    warm.shorten(monkeypatch.setattr)


@pytest.fixture(params=SMALLEST)
def small(request):
    """A small network of each architecture with random scaling factors."""
    torch.manual_seed(0)
    return randomize(NETWORKS[request.param](depth=SMALLEST[request.param], num_classes=10))


@pytest.fixture(params=SMALLEST)
def narrow(request):
    """The same, the VGG with few channels."""
    arch = request.param
    torch.manual_seed(0)
    build = NETWORKS[arch]
    return randomize(build(depth=SMALLEST[arch], num_classes=10, cfg=NARROW.get(arch)))


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: the one of the system, or playwright's own."""
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with contextlib.ExitStack() as stack:
        try:
            play = stack.enter_context(api.sync_playwright())
            opened = play.chromium.launch(executable_path=path, args=QUIET.split())
        except api.Error:
            pytest.skip("no browser: install chromium, or run `playwright install chromium`")
        stack.callback(opened.close)
        yield opened


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Make a folder of this name, with ``make(folder)``, in the first process of pytest-xdist that
    needs it."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name, make):
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def slim_digits(once):
    """The checkpoint of a tiny slim VGG-11 for digits, pruned and repaired, about 95 % accurate."""
    return once("slim-digits", train_slim_digits) / "pruned" / "pruned.pth.tar"


def train_slim_digits(folder):
    start = save_network(folder / "narrow.pth.tar", "vgg", 11, cfg=NARROW["vgg"])
    short = "--epochs 10 --batch-size 32 --lr 0.05 --no-cuda --no-tensorboard"
    train = f"main.py -sr --s 0.001 --dataset digits {short}"
    succeed(train, "--refine", start, "--save", folder / "sparse")
    prune = "vggprune.py --percent 0.3 --repair --no-cuda"
    succeed(prune, "--model", folder / "sparse", "--save", folder / "pruned")


@pytest.fixture(scope="session")
def digits_onnx(slim_digits, once):
    """The ONNX file of `slim_digits` for a kind of input, with a fixed batch size or any."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="pip install -r requirements-export.txt")

    def exported(kind="float32 NCHW", batch=None):
        dtype, layout = kind.lower().split()
        command = f"export.py {slim_digits} --no-cuda --threads 1 --form folded --layout {layout}"
        command += " --uint8" if dtype == "uint8" else ""
        command += f" --batch {batch} --no-dynamic-batch" if batch else " --batch 4"
        folder = once(f"{kind} {batch}", lambda folder: succeed(command, "--save", folder))
        return folder / "pruned.onnx"

    return exported


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """PNG files of six test digits, and of one each in another size and shape, grey, and with a
    palette."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = datasets.load("digits", folder, "test").images.permute(0, 2, 3, 1).numpy()
    for i in range(6):
        Image.fromarray(digits[i]).save(folder / f"digit-{i}.png")
    Image.fromarray(digits[6]).resize((97, 61), Image.Resampling.BICUBIC).save(folder / "large.png")
    Image.fromarray(digits[7]).resize((20, 45), Image.Resampling.BICUBIC).save(folder / "small.png")
    Image.fromarray(digits[8]).convert("L").save(folder / "grey.png")
    Image.fromarray(digits[9]).quantize(16).save(folder / "palette.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def answers(slim_digits, pictures):
    """The class of each picture by PyTorch and its probability: [("3", 0.95), ...]."""
    return _answers(slim_digits, pictures, border=0)


@pytest.fixture(scope="module")
def bordered(slim_digits, pictures, digits_onnx, tmp_path_factory):
    """The ONNX file of `slim_digits` as if it had been trained on 28x28 images, and `answers`."""
    onnx = pytest.importorskip("onnx")
    model, path = onnx.load(digits_onnx()), tmp_path_factory.mktemp("bordered") / "bordered.onnx"
    (crop,) = (entry for entry in model.metadata_props if entry.key == "crop")
    crop.value = "pad 2"
    onnx.save(model, path)
    return path, _answers(slim_digits, pictures, border=2)


def _answers(checkpoint, pictures, border):
    model, _, _ = architecture.load(checkpoint)
    opened, size = [Image.open(path).convert("RGB") for path in pictures], (32 - 2 * border,) * 2
    images = np.stack([np.asarray(i.resize(size, Image.Resampling.BILINEAR)) for i in opened])
    padded = F.pad(torch.from_numpy(images).permute(0, 3, 1, 2), 4 * (border,))
    with torch.inference_mode():
        logits = model.eval()(normalize(padded))
    odds, classes = logits.softmax(1).max(1)
    told = [(str(int(label)), float(odd)) for label, odd in zip(classes, odds, strict=True)]
    assert len({label for label, _ in told}) > 3  # or all could be right by chance
    return told


def agree(told, answers):
    """Whether (class, "95.1 %") are those of PyTorch, to the last digit or the one before it."""
    assert [label for label, _ in told] == [label for label, _ in answers]
    odds = [float(text.rstrip(" %")) / 100 for _, text in told]
    assert odds == pytest.approx([odd for _, odd in answers], abs=0.002)
    return True
