"""The library by itself: built as a wheel, installed beside a foreign package called `models`."""

import copy
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time

import pytest
import torch
from conftest import NARROW, SMALLEST, randomize
from torch import nn
from warm import ROOT

import slimming
import slimming.channels.widths
from models import NETWORKS
from slimming import __main__ as command
from slimming import progress, slicing
from slimming.channels.inputs import tensors
from slimming.channels.labels import Trace
from slimming.channels.operations import EVERY
from slimming.channels.scaling import batch_norms
from slimming.choosing.importance import MEASURES, Evidence
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.storage import architecture, checkpoint
from slimming.storage.architecture import Architecture
from slimming.training import penalties

PROGRAM = """
import models, slimming, torch, torchvision
assert models.theirs and "site" in slimming.__file__
net = torchvision.models.resnet18(num_classes=10).eval()
images = torch.rand(4, 3, 64, 64)
slim = slimming.prune(net, images, ratio=0.5)
slimming.save(slim, "slim.pth")
again = slimming.load("slim.pth", build=lambda: torchvision.models.resnet18(num_classes=10))
assert torch.equal(again(images), slim.model(images)) and slim.difference <= 1e-4
torch.testing.assert_close(slimming.deploy(again)(images), again(images), rtol=1e-3, atol=1e-4)
print(slim.figures.parameters)
"""


@pytest.mark.slow
def test_the_wheel_works_beside_a_foreign_package_called_models(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "slimming", source / "slimming")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", *options, "--target", site, wheel], check=True)
    assert {path.name for path in site.iterdir() if path.is_dir()} >= {"slimming"}
    assert not (site / "models").exists()
    (tmp_path / "mine" / "models").mkdir(parents=True)
    (tmp_path / "mine" / "models" / "__init__.py").write_text("theirs = True\n")
    (tmp_path / "mine" / "program.py").write_text(PROGRAM)
    libraries = sysconfig.get_paths()["purelib"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), libraries])}
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path / "mine",
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 11_181_642


@pytest.mark.parametrize("arch", SMALLEST)
def test_the_paper_s_networks_come_back_from_a_file(arch, tmp_path):
    def build():
        return NETWORKS[arch](depth=SMALLEST[arch], num_classes=10)

    images = torch.rand(2, 3, 32, 32)
    slim = slimming.prune(randomize(build()), images, ratio=0.4, measure="bn")
    slimming.save(slim.model, tmp_path / "slim.pth")
    again = slimming.load(tmp_path / "slim.pth", build)
    assert torch.equal(again(images), slim.model(images)) and again.cfg == slim.cfg


class Wrapper(nn.Module):
    """A network whose only child has the name of DataParallel's."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel], ids=["plain", "DataParallel"])
@pytest.mark.parametrize("build", [Wrapper, lambda: Wrapper().module])
def test_a_child_called_module_is_no_data_parallel(build, wrap, tmp_path):
    images = torch.rand(2, 3, 8, 8)
    slim = slimming.prune(build(), images)
    slimming.save(wrap(slim.model), tmp_path / "slim.pth")
    assert torch.equal(slimming.load(tmp_path / "slim.pth", build)(images), slim.model(images))


@pytest.mark.slow
@pytest.mark.parametrize("arch", SMALLEST)
def test_a_checkpoint_without_masks_or_counts_loads_as_in_the_scripts(arch, tmp_path):
    """mask-impl has no channel selection, and PyTorch before 0.4.1 counts no batches."""
    network = Architecture(arch, SMALLEST[arch], "digits", 10)
    masked = importlib.import_module("mask-impl.models").NETWORKS[arch](depth=network.depth)
    randomize(masked)
    for name, value in batch_norms(masked).items():
        if name.endswith("bn2"):
            value.weight.data[:2] = value.bias.data[:2] = 0
    contents = architecture.contents_of(masked, network, 1, 0.5)
    state = contents["state_dict"]
    for counts in (True, False):
        kept = {n: v for n, v in state.items() if counts or "num_batches" not in n}
        checkpoint.write(tmp_path / "masked", {**contents, "state_dict": kept})
        ours = slimming.load(tmp_path / "masked", network.build)
        theirs = architecture.load(tmp_path / "masked")[0].eval()
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.slow
@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "biased_loss_tracked"])
def test_every_measure_by_its_name(measure):
    net, images = randomize(NETWORKS["resnet"](depth=11)), torch.rand(4, 3, 32, 32)
    slim = slimming.prune(net, images, 0.3, measure=measure, labels=torch.arange(4), scope="layer")
    assert slim.difference <= 1e-4


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"measure": "l3"}, "unknown measure 'l3': use mag_based"),
        ({"measure": "biased_loss_tracked"}, "unknown measure"),
        ({"measure": "fisher"}, "needs images with labels"),
        ({"least": 1.5}, "least must be between 0 and 1"),
        ({"scope": "all"}, "'global' or 'layer'"),
        ({"ratio": 1}, "ratio"),
        ({"ignore": ["layer9"]}, "layer9"),
    ],
)
def test_wrong_arguments_say_what_is_right(wrong, says):
    net = NETWORKS["resnet"](depth=11).eval()
    with pytest.raises(UserError, match=says):
        slimming.prune(net, torch.rand(2, 3, 32, 32), **wrong)


def test_sparsity_training_in_a_loop_of_one_s_own():
    """The penalty is that of the scripts, and importing it does not import the data sets."""
    assert slimming.L1Penalty is penalties.L1Penalty and slimming.updateBN is penalties.updateBN
    assert {"L1Penalty", "updateBN"} <= set(slimming.__all__)
    code = "import slimming, sys; slimming.L1Penalty; print('slimming.data' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
    torch.manual_seed(0)
    model = NETWORKS["vgg"](depth=11, cfg=NARROW["vgg"], num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = slimming.L1Penalty(model, s=0.5)
    for _ in range(9):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.arange(4) % 2).backward()
        penalty.on_gradients()
        optimizer.step()
    gammas = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert gammas.abs().mean() < 0.2, "they start at 0.5"


NEEDS_LABELS = {"loss_based", "tfo", "fisher", "nvidia", "biased_loss", "grasp", "grad_preserve"}
NEEDS_LABELS |= {"taylor_group"}


@pytest.mark.slow
@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "biased_loss_tracked"])
def test_labels_are_needed_by_gradients_alone(measure):
    net, images = randomize(NETWORKS["resnet"](depth=11)), torch.rand(32, 3, 32, 32)
    if measure in NEEDS_LABELS:
        with pytest.raises(UserError, match="needs images with labels"):
            slimming.prune(net, images, 0.3, measure=measure)
    else:
        assert slimming.prune(net, images, 0.3, measure=measure).difference <= 1e-4


class Pair(nn.Module):
    """Two images and a mask by keyword, a dict with a list: what detectors take and return."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.other, self.mix = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(20, 16, 1)
        self.boxes, self.score = nn.Conv2d(16, 4, 1), nn.Linear(16, 5)

    def forward(self, image, depth, scale=None):
        x = torch.cat([self.norm(self.stem(image)).relu(), self.other(depth).relu()], 1)
        x = self.mix(x).relu()
        x = x if scale is None else x * scale
        return {"boxes": [self.boxes(x)], "scores": self.score(x.mean((2, 3)))}


ARGUMENTS = {
    "tuple": (torch.rand(4, 3, 8, 8), torch.rand(4, 1, 8, 8)),
    "dict": {"depth": torch.rand(4, 1, 8, 8), "image": torch.rand(4, 3, 8, 8), "scale": 2.0},
}


def run_on(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_and_outputs_are_trees(kind):
    net, inputs = randomize(Pair()), ARGUMENTS[kind]
    slim = slimming.prune(net, inputs, 0.4)
    ours, dense = run_on(slim.model, inputs), run_on(net, inputs)
    assert ours["boxes"][0].shape == dense["boxes"][0].shape
    assert slim.difference <= 1e-4 and slim.liveness > 0
    assert slim.figures.flops < 0.8 * figures.count_with(net, slicing.sample(net, inputs)).flops


@pytest.mark.parametrize("measure", ["loss_based", "fisher", "taylor_group", "grasp"])
def test_a_loss_of_the_outputs_of_any_form(measure):
    net, inputs = randomize(Pair()), ARGUMENTS["tuple"]
    slim = slimming.prune(
        net, inputs, measure=measure, loss=lambda out: out["scores"].square().mean()
    )
    assert slim.difference <= 1e-4


def test_the_loss_is_what_cross_entropy_with_labels_is_short_for():
    net, images, labels = tiny(), torch.rand(4, 3, 8, 8), torch.arange(4)
    short = slimming.prune(net, images, measure="tfo", labels=labels)
    loss = functools.partial(nn.functional.cross_entropy, target=labels)
    long = slimming.prune(net, images, measure="tfo", loss=loss)
    assert all(
        torch.equal(short.kept[n][s], long.kept[n][s]) for n in short.kept for s in short.kept[n]
    )


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    ).eval()  # fmt: skip


IMAGES = torch.rand(4, 3, 8, 8)


def test_scores_of_one_s_own():
    """A function of Evidence, or a dict: the channels with the lowest go."""
    wanted = {"0": torch.arange(8.0), "3": -torch.arange(12.0)}
    by_dict = slimming.prune(tiny(), IMAGES, scope="layer", measure=wanted)
    seen = []
    by_function = slimming.prune(
        tiny(), IMAGES, scope="layer", measure=lambda evidence: seen.append(evidence) or wanted
    )
    for slim in (by_dict, by_function):
        assert slim.kept["0"]["out"].tolist() == [False] * 4 + [True] * 4
        assert slim.kept["3"]["out"].tolist() == [True] * 6 + [False] * 6
    assert isinstance(seen[0], Evidence)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("measure", ["lamp", "loss_based"])
def test_the_dtype_of_a_network_stays(dtype, measure):
    slim = slimming.prune(
        tiny().to(dtype), IMAGES.to(dtype), measure=measure, loss=lambda out: out.square().mean()
    )
    assert {t.dtype for t in slim.model.parameters()} == {dtype} and slim.difference <= 1e-4


def test_what_is_returned_is_as_the_dense_network_was():
    net, calls = tiny().train(), []
    net[1].eval()
    net[3].bias.requires_grad_(False)
    net[0].register_forward_hook(lambda *_: calls.append(1))
    net.register_buffer("history", torch.arange(3))
    state = copy.deepcopy(net.state_dict())
    slim = slimming.prune(net, IMAGES).model
    assert slim.training and not slim[1].training and slim[0].training
    assert slim[3].weight.requires_grad and not slim[3].bias.requires_grad
    assert torch.equal(slim.history, net.history)
    calls.clear()
    slim(IMAGES)
    assert calls == [1]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert net.training and not net[1].training


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight, self.head = self.a.weight, nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.b(self.a(self.stem(x)).relu()).relu().mean((2, 3)))


def test_tied_weights_stay_one(tmp_path):
    slim = slimming.prune(Tied(), IMAGES)
    assert slim.model.a.weight is slim.model.b.weight and slim.model.a.weight.shape[0] < 8
    for name in ("slim.pth", "slim.safetensors"):
        slimming.save(slim, tmp_path / name)
        again = slimming.load(tmp_path / name, Tied)
        assert again.a.weight is again.b.weight
        assert torch.equal(again(IMAGES), slim.model.eval()(IMAGES))


def test_prune_again_what_was_pruned(tmp_path):
    first = slimming.prune(tiny(), IMAGES, 0.3)
    second = slimming.prune(first.model, IMAGES, 0.3)
    assert second.figures.parameters < first.figures.parameters and second.difference <= 1e-4
    slimming.save(second, tmp_path / "slim.pth")
    assert torch.equal(slimming.load(tmp_path / "slim.pth", tiny)(IMAGES), second.model(IMAGES))


def test_only_is_the_opposite_of_ignore():
    assert slimming.prune(tiny(), IMAGES, only="0").cfg["3"] == [4, 12]
    assert slimming.prune(tiny(), IMAGES, only=["3"]).cfg["0"] == [3, 8]
    net = NETWORKS["resnet"](depth=11)
    widths = slimming.prune(nn.Sequential(net), torch.rand(2, 3, 32, 32), only="0.layer2").cfg
    dense = slimming.channels.widths.widths(nn.Sequential(net))
    assert {name.split(".")[1] for name in widths if widths[name] != dense[name]} == {"layer2"}


@pytest.mark.parametrize(
    "limit", [{"params": 0.6}, {"flops": 0.5}, {"flops": 20_000, "params": 0.9}, {"params": 700}]
)
def test_budgets(limit):
    net = tiny()
    dense = figures.count_with(net, IMAGES[:1])
    slim = slimming.prune(net, IMAGES, **limit)
    for name, full, left in (
        ("params", dense.parameters, slim.figures.parameters),
        ("flops", dense.flops, slim.figures.flops),
    ):
        if name in limit:
            most = limit[name] * full if limit[name] <= 1 else limit[name]
            assert left <= most, "and not far below"
    assert any(
        left > 0.8 * (limit[n] * full if limit[n] <= 1 else limit[n])
        for n, full, left in (
            ("params", dense.parameters, slim.figures.parameters),
            ("flops", dense.flops, slim.figures.flops),
        )
        if n in limit
    )


class Two(nn.Module):
    """Its other branch runs only when asked."""

    def __init__(self):
        super().__init__()
        self.stem, self.other, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Linear(8, 4)

    def forward(self, x, which="head"):
        x = self.stem(x)
        return self.head(x.mean((2, 3))) if which == "head" else self.other(x)


def test_layers_that_did_not_run_are_named():
    with pytest.warns(UserWarning, match="do not reach .*: other;"):
        slimming.prune(Two(), IMAGES)


def test_by_hand_what_no_layer_reads_any_more_is_zero_and_changes_nothing():
    """The proof in plain PyTorch: in the dense network, weights for channels that `kept` does not
    hold are zero; the slim network computes the same."""
    net = tiny()
    slim = slimming.prune(net, IMAGES)
    for name, sides in slim.kept.items():
        if "in" in sides:
            net.get_submodule(name).weight.data[:, ~sides["in"]] = 0
    assert not slim.kept["3"]["in"].all() and torch.equal(
        slim.kept["0"]["out"], slim.kept["3"]["in"]
    )
    torch.testing.assert_close(slim.model(IMAGES), net(IMAGES))
    assert slim.model[0].out_channels == int(slim.kept["0"]["out"].sum())
    assert torch.equal(slim.model[0].weight, net[0].weight[slim.kept["0"]["out"]])


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("shapes")


@pytest.mark.parametrize(
    "net, inputs, wrong, says",
    [
        (tiny, IMAGES, {"ratio": 0.5, "flops": 0.5}, "contradict"),
        (tiny, IMAGES, {"loss": torch.sum, "labels": torch.arange(4)}, "contradict"),
        (tiny, IMAGES, {"flops": -1}, "positive"),
        (tiny, IMAGES, {"params": 5}, "budget cannot be met"),
        (tiny, IMAGES, {"only": "9"}, "no layer called 9"),
        (tiny, IMAGES, {"only": "7"}, "no layer of the network can be pruned"),
        (tiny, IMAGES, {"measure": {"9": torch.ones(8)}}, "no such layer"),
        (tiny, IMAGES, {"measure": {"0": torch.ones(7)}}, "0, which has 8 channels"),
        (tiny, IMAGES, {"measure": lambda evidence: None}, "not a NoneType"),
        (tiny, IMAGES, {"measure": "tfo", "labels": torch.arange(4) + 9}, "labels"),
        (tiny, IMAGES, {"measure": "tfo", "loss": lambda out: 1.0}, "must return a tensor"),
        (tiny, IMAGES, {"measure": "tfo", "loss": lambda out: out}, "must return a tensor"),
        (Tied, torch.rand(4, 1, 8, 8), {}, "Tied fails on these inputs"),
        (Fails, IMAGES, {}, "Fails fails"),
        (tiny, IMAGES[:0], {}, "at least one sample"),
        (tiny, "image.png", {}, "must have a tensor"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), IMAGES, {}, "0.weight has no values yet"),
        (lambda: torch.jit.trace(tiny(), IMAGES), IMAGES, {}, "pass the nn.Module"),
        (Pair, ARGUMENTS["tuple"], {"measure": "obs"}, "one tensor"),
        (Pair, ARGUMENTS["tuple"], {"measure": "tfo", "labels": torch.arange(4)}, "logits"),
    ],
)
def test_what_cannot_be_done_is_told(net, inputs, wrong, says):
    with pytest.raises(UserError, match=says):
        slimming.prune(net(), inputs, **wrong)


class Halves(nn.Module):
    """Its code holds the number of channels, which no weight tells."""

    def __init__(self):
        super().__init__()
        self.c = 8
        self.cv1, self.m = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.cv2 = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        a, b = self.cv1(x).split((self.c, self.c), 1)
        x = self.cv2(torch.cat([a, b, self.m(b).relu()], 1)).relu()
        return self.head(x.mean((2, 3)))


class Normed(nn.Module):
    """GroupNorm with and without weights, layer scale, a buffer that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.plain = nn.GroupNorm(4, 16, affine=False)
        self.conv, self.scale = nn.Conv2d(16, 16, 3, padding=1), nn.Parameter(torch.rand(16, 1, 1))
        self.register_buffer("shift", torch.rand(1, 16, 1, 1), persistent=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.scale * self.plain(self.conv(x) + self.shift)
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["slim.pth", "slim.safetensors"])
@pytest.mark.parametrize("build", [Halves, Normed, Pair, tiny])
def test_a_file_holds_all_that_was_set(build, name, dtype, tmp_path):
    """Weights, numbers in the code of modules, loose parameters and buffers: to the bit; what is
    pruned again too."""
    inputs = ARGUMENTS["tuple"] if build is Pair else (IMAGES,)
    once = slimming.prune(build().to(dtype), inputs, 0.4)
    for slim in (once, slimming.prune(once.model, inputs, 0.3)):
        assert slim.figures.parameters < figures.count_parameters(build())
        slimming.save(slim, tmp_path / name)
        for again in (
            slimming.load(tmp_path / name, build),
            slimming.load_into(build().eval(), tmp_path / name),
            slimming.load(tmp_path / name, functools.partial(copy.deepcopy, slim.model)),
        ):
            own = [t.to(dtype) for t in inputs]
            ours, theirs = tensors(again(*own)), tensors(slim.model.eval()(*own))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert slimming.prune(again, inputs, 0.1).difference <= 1e-4


def test_the_numbers_of_a_split_are_in_the_file(tmp_path):
    slim = slimming.prune(Halves(), IMAGES)
    slimming.save(slim, tmp_path / "slim.pth")
    again = slimming.load(tmp_path / "slim.pth", Halves)
    assert slim.model.c == again.c < 8


@pytest.mark.parametrize("name", ["slim.pth", "slim.safetensors"])
def test_files_that_are_damaged_or_of_another_network(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(UserError, match="cannot read"):
        slimming.load(path, tiny)
    slimming.save(slimming.prune(Halves(), IMAGES), path)
    dense = tiny()
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(UserError, match="of another network"):
        slimming.load_into(dense, path)
    assert all(torch.equal(v, before[n]) for n, v in dense.state_dict().items())

    class Other(Halves):
        def __init__(self):
            super().__init__()
            self.c = "8"

    with pytest.raises(UserError, match=r"c = \d for the network, the dense network 8"):
        slimming.load(path, Other)
    with pytest.raises(UserError, match="must return the dense network"):
        slimming.load(path, lambda: None)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError):
        slimming.load(path, Halves)


def test_a_safetensors_file_holds_no_code_and_other_programs_read_it(tmp_path):
    from safetensors.torch import load_file

    slim = slimming.prune(tiny(), IMAGES)
    slimming.save(slim, tmp_path / "slim.safetensors")
    read = load_file(tmp_path / "slim.safetensors")
    assert all(torch.equal(read[n], v) for n, v in slim.model.state_dict().items())


def test_a_long_trace_says_so_on_a_terminal(monkeypatch, capsys):
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            time.sleep(0.3)
            return self.b(self.a(x))

    monkeypatch.setattr(progress, "AFTER", 0.05)
    slimming.inspect(Slow(), torch.rand(1, 3, 8, 8))
    assert capsys.readouterr().err == "", "not in a file or a pipe"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    slimming.inspect(Slow(), torch.rand(1, 3, 8, 8))
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "following what Slow does to its channels ..." and len(told) == 2


class Returns(nn.Module):
    """A network whose outputs go through a function."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.b(self.a(x).relu()))


@pytest.mark.parametrize(
    "function", [lambda y: y.detach().tolist(), lambda y: float(y.sum()), lambda y: None]
)
def test_outputs_without_tensors_prove_nothing(function):
    with pytest.raises(UserError, match="returns no tensors but a"):
        slimming.prune(Returns(function), torch.rand(2, 3, 8, 8))


def test_what_is_not_a_number_proves_nothing():
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(UserError, match="inputs have values that are NaN"):
        slimming.prune(Returns(nn.Identity()), images * float("nan"))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    net[1].running_var[2] = float("nan")
    with pytest.raises(UserError, match=r"1\.running_var has values that are NaN"):
        slimming.inspect(net, images)
    with pytest.raises(UserError, match="not finite on these inputs"):
        slimming.prune(Returns(lambda y: y / 0 - y / 0), images)
    with pytest.raises(UserError, match="not finite on these inputs"):
        slimming.deploy(net, images)


def test_a_compiled_network_is_named():
    net = torch.compile(Returns(nn.Identity()))
    with pytest.raises(UserError, match=r"the one that torch\.compile was given"):
        slimming.inspect(net, torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    "context", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode]
)
def test_what_surrounds_the_call_does_not_matter(context):
    net, images = Returns(nn.Identity()), torch.rand(2, 3, 8, 8)
    plain = slimming.prune(net, images)
    with context():
        same = slimming.prune(net, torch.clone(images))
        told = slimming.inspect(net, images)
    assert torch.equal(plain.model.a.weight, same.model.a.weight) and len(told.groups) == 1
    assert same.model.a.weight.requires_grad and not same.model.a.weight.is_inference()


def test_a_file_of_other_kernels_is_of_another_network(tmp_path):
    def build(size):
        return nn.Sequential(
            nn.Conv2d(3, 8, size, padding=size // 2), nn.Flatten(), nn.Linear(512, 4)
        )

    slimming.save(slimming.prune(build(3), torch.rand(2, 3, 8, 8)), tmp_path / "slim.pth")
    with pytest.raises(UserError, match="not of a slim version"):
        slimming.load(tmp_path / "slim.pth", lambda: build(5))


def test_an_empty_name_is_no_layer():
    with pytest.raises(slimming.UserError, match="no layer called"):
        slimming.prune(Returns(nn.Identity()), torch.rand(2, 3, 8, 8), ignore=[""])


def test_shapes_are_written_as_timm_writes_them(tmp_path):
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4))
    slim = slimming.prune(dense, torch.rand(2, 3, 8, 8))
    slimming.save(slim, tmp_path / "slim.txt")
    written = (tmp_path / "slim.txt").read_text()
    assert written == "0.weight:[4, 3, 3, 3]***2.weight:[4, 144]"
    with pytest.raises(UserError, match="only the shapes of a network"):
        slimming.load_into(slim.model, tmp_path / "slim.txt")


def test_timm_builds_a_slim_network_from_its_shapes(tmp_path):
    models = pytest.importorskip("timm.models")
    dense, images = models.create_model("ecaresnet50d").eval(), torch.rand(1, 3, 64, 64)
    slim = slimming.prune(dense, images, ratio=0.3)
    slimming.save(slim, tmp_path / "slim.txt")
    theirs = models.adapt_model_from_string(dense, (tmp_path / "slim.txt").read_text())
    theirs.load_state_dict(slim.model.state_dict())
    assert torch.equal(theirs(images), slim.model(images))


def test_inspect_tells_what_can_go_and_what_stays():
    told = slimming.inspect(tiny(), IMAGES)
    first, second = told.groups
    assert (first.name, first.channels, first.read_by) == ("0", 8, ["3"])
    assert first.written_by == ["0", "1"] and told.pinned == {"the outputs": ["7"]}
    one = nn.Sequential(
        nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 4),
    )  # fmt: skip
    dense, left = (figures.count_with(net.eval(), IMAGES[:1]) for net in (tiny(), one))
    assert told.parameters == dense.parameters and told.flops == dense.flops
    assert told.prunable_parameters == pytest.approx(1 - left.parameters / dense.parameters)
    assert told.prunable_flops == pytest.approx(1 - left.flops / dense.flops)
    assert json.loads(json.dumps(told.as_dict()))["groups"][1]["name"] == second.name == "3"
    assert "stays: 7 (the outputs)" in str(told)
    assert "did not run with these inputs: other" in str(slimming.inspect(Two(), IMAGES))


class Sorts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 8, 8])
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


def test_inspect_names_what_pins_where_nothing_can_go():
    told = slimming.inspect(Sorts(), IMAGES)
    assert not told.groups and "conv (normalised over all channels (LayerNorm) in norm)" in str(
        told
    )
    with pytest.raises(UserError, match="LayerNorm"):
        slimming.prune(Sorts(), IMAGES)


NETWORK = """
from torch import nn, ones

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))

def with_inputs():
    return build(), ones(2, 3, 8, 8)

def broken():
    return 1 / 0
"""


def test_inspect_from_the_command_line(tmp_path, monkeypatch, capsys):
    def tells(*words):
        monkeypatch.setattr("sys.argv", ["slimming", "inspect", *words])
        command.main()
        return capsys.readouterr().out

    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "net.py").write_text(NETWORK)
    file = tmp_path / "net.py"
    table = tells(f"{file}:build", "--input", "1x3x8x8")
    assert table == tells(f"{file}:with_inputs") and "in 1 group" in table
    assert json.loads(tells(f"{file}:with_inputs", "--json"))["groups"][0]["channels"] == 8
    for words, says in (
        ([f"{file}:build"], "--input SHAPE is required"),
        ([f"{file}:build", "--input", "1x3x9x9"], "Sequential fails on these inputs"),
        ([f"{file}:build", "--input", "1xx3"], "--input"),
        ([f"{file}:broken"], "broken fails .ZeroDivisionError"),
        ([f"{file}:nothing"], "no function called nothing"),
        ([str(file)], "expected FILE.py:build"),
        ([f"{tmp_path / 'other.py'}:build"], "expected FILE.py:build"),
    ):
        with pytest.raises(UserError, match=says):
            tells(*words)


def test_wiring_is_told_to_be_needed_no_more():
    class Wired(nn.Sequential):
        def wiring(self):
            raise AssertionError

    with pytest.warns(UserWarning, match=r"Wired\.wiring\(\) is no longer needed"):
        slimming.inspect(Wired(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)), torch.rand(1, 3, 8, 8))


class Borrowed(nn.Module):
    """One layer's number of channels shapes what another one wrote."""

    def __init__(self):
        super().__init__()
        self.stem, self.value = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.wide, self.last = nn.Conv2d(12, 40, 3, padding=1), nn.Conv2d(40, 5, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.value(x).flatten(1).view(x.shape).relu()
        return self.last(self.wide(x).relu())


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.8])
def test_a_budget_where_two_layers_need_the_same_number(limit):
    """A trial that takes the same share of both does not see it."""
    torch.manual_seed(0)
    model, x = Borrowed(), torch.rand(2, 3, 8, 8)
    slim = slimming.prune(model, x, flops=limit, measure="l1")
    dense = slimming.prune(model, x, ratio=0.0).figures.flops
    assert slim.figures.flops <= limit * dense
    assert slim.model.stem.out_channels == slim.model.value.out_channels == 12
    pinned = slimming.inspect(model, x).pinned
    assert any("the code of the network holds" in reason for reason in map(str, pinned)), pinned


def test_what_is_no_network_or_no_number_is_told(tmp_path):
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        torch.rand(2, 3, 8, 8),
    )
    slim = slimming.prune(model, x)
    wider = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 4, 3))
    mistakes = {
        "ratio must be a number": lambda: slimming.prune(model, x, ratio="0.5"),
        "flops must be a number": lambda: slimming.prune(model, x, flops="half"),
        "the Slim that `prune` returned": lambda: slimming.repair(slim.model, model, x),
        "not: NoneType": lambda: slimming.save(None, tmp_path / "slim.pth"),
        "not a program": lambda: slimming.save(slim, tmp_path / "slim.onnx"),
        "not: str": lambda: slimming.deploy("slim.pth"),
        "not: OrderedDict": lambda: slimming.distill(slim, model.state_dict()),
        "s must be a number": lambda: slimming.Sparsity(model, x, s="1e-4"),
        "a function that returns": lambda: slimming.load(tmp_path / "slim.pth", model),
        "not: str$": lambda: slimming.load_into("slim.pth", model),
        "not a Sequential": lambda: slimming.optimizer_state(model, None),
        "are by name": lambda: slimming.compare([model, slim], x),
        "by name: ": lambda: slimming.compare({"dense": model}, x, top1=0.5),
        "use no other limit": lambda: slimming.rounds(model, x, ratio=0.5),
        "round_to must be an integer": lambda: slimming.prune(model, x, round_to=7.5),
        "pass its `model`": lambda: slimming.prune(slim, x),
        "0 differs": lambda: slimming.repair(slim, wider, torch.rand(64, 3, 8, 8)),
        "`temperature` is for": lambda: slimming.distill(slim, model, 2.0)(x),
    }
    for words, mistake in mistakes.items():
        with pytest.raises(UserError, match=words):
            mistake()
    assert not list(tmp_path.iterdir())
    torch.testing.assert_close(slimming.deploy(slim, x)(x), slim.model.eval()(x))
    assert slimming.distill(slim, model)(x).dim() == 0


def test_rounds_to_a_budget_that_cannot_be_kept_fail_before_the_first():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        torch.rand(2, 3, 8, 8),
    )
    with pytest.raises(UserError, match="flops"):
        slimming.rounds(model, x, to=0.01, steps=3)


class Spectrum(nn.Module):
    """Two channels become the parts of one complex number."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 8, 1)
        self.c = nn.Conv1d(8, 3, 1)

    def forward(self, x):
        y = self.b(self.a(x).relu())
        pairs = y.view(len(y), 4, 2, -1).transpose(2, 3).contiguous()
        parts = torch.view_as_real(torch.fft.fft(torch.view_as_complex(pairs)))
        return self.c(parts.transpose(2, 3).reshape(y.shape))


def test_complex_numbers_hold_two_channels_which_stay():
    torch.manual_seed(0)
    model, x = Spectrum(), torch.rand(2, 2, 16)
    assert any("view_as_complex" in str(reason) for reason in slimming.inspect(model, x).pinned)
    slim = slimming.prune(model, x, ratio=0.5)
    assert slim.model.a.out_channels == 4 and slim.model.b.out_channels == 8


def test_labels_that_became_complex_are_not_kept():
    """`unique`, which pins labels, does not know them (torchaudio's HDemucs)."""
    trace = Trace(nn.Sequential(), EVERY)
    numbers = torch.tensor([1 + 2j, 3 + 4j])
    with pytest.raises(TypeError, match="two labels"):
        trace.put(numbers, numbers)
