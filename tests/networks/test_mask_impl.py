"""mask-impl by itself, and the two meanings of ``cfg``: the shapes of the weights, or what a mask
keeps of full ones."""

import copy
import importlib
import itertools
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import (
    NARROW,
    SMALLEST,
    keep_only,
    make_images,
    randomize,
    save_network,
    succeed,
    zero_others,
)
from torch import nn
from warm import ROOT

import models
import slimming
from slimming.channels.scaling import batch_norms
from slimming.choosing.threshold import choose_channels
from slimming.errors import UserError
from slimming.storage import architecture, checkpoint
from slimming.storage.architecture import Architecture, Request

MASK_NETWORKS = importlib.import_module("mask-impl.models").NETWORKS
PRUNER = {"vgg": "vggprune.py", "resnet": "resprune.py", "densenet": "denseprune.py"}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
ORIGINAL = """
import copy, pickle, sys
import torch
import torch.nn as nn
import models
from models import *
from models.densenet import densenet
from models.preresnet import resnet
from models.vgg import vgg

folder = sys.argv[1]
images = torch.load(folder + '/images')
for arch, depth in {'vgg': 11, 'resnet': 11, 'densenet': 7}.items():
    assert isinstance(models.__dict__[arch], type) and models.__dict__[arch] is globals()[arch]
    torch.manual_seed(0)
    model = models.__dict__[arch](dataset='cifar10', depth=depth)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.weight.data.normal_(0, 0.5)
        m.bias.data.normal_(0, 0.2)
    if arch != 'vgg':
        norms[1].weight.data.mul_(1e-4)  # a layer that dies
    gammas = torch.cat([m.weight.data.abs() for m in norms])
    thre = gammas.sort()[0][int(len(gammas) * 0.6)]
    cfg = []
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            mask = m.weight.data.abs().gt(thre).float()
            m.weight.data.mul_(mask)
            m.bias.data.mul_(mask)
            cfg.append(int(mask.sum()))
        elif isinstance(m, nn.MaxPool2d):
            cfg.append('M')
    assert not any('indexes' in name for name in model.state_dict())
    torch.save({'cfg': cfg, 'state_dict': model.state_dict()}, folder + '/' + arch + '.pth.tar')
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(copied) is type(model)
    torch.save(copied.eval()(images).detach(), folder + '/' + arch + '.logits')
sys.path.append('..')
from slimming import slicing
from slimming.slicing import proof
slim = slicing.without_dead_channels(copied)
assert 'select.indexes' in slim.state_dict() and type(slim) is not type(model)
assert proof.prove_equal(slim, copied, images) <= 1e-4
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Pruned files as a program of the original's users writes them in mask-impl, and logits."""
    folder = tmp_path_factory.mktemp("original")
    torch.save(IMAGES, folder / "images")
    command = [sys.executable, "-c", ORIGINAL, str(folder)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=ROOT / "mask-impl", env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    make_images(folder / "data", classes=tuple("abcdefghij"), train=4, test=2)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


def kept(model, state):
    """The channels of each BN whose γ is not zero, with VGG's 'M'."""
    counts = iter([int((state[f"{name}.weight"] != 0).sum()) for name in batch_norms(model)])
    return [width if width == "M" else next(counts) for width in model.cfg]


@pytest.mark.slow
def test_inside_mask_impl_models_are_its_own(original):
    """What ORIGINAL imports and asserts there."""
    assert {f"{arch}.pth.tar" for arch in SMALLEST} <= {path.name for path in original.iterdir()}


@pytest.mark.parametrize("arch", SMALLEST)
def test_the_networks_are_classes_beside_those_of_the_suite(arch):
    build = MASK_NETWORKS[arch]
    assert isinstance(build, type) and issubclass(build, models.NETWORKS[arch])
    model = randomize(build(depth=SMALLEST[arch], dataset="cifar10"))
    assert not any("indexes" in name for name in model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is build and torch.equal(logits(copied), logits(model))
    slim = keep_only(model, choose_channels(model, 0.4).kept)
    assert type(slim) is models.NETWORKS[arch]
    assert arch == "vgg" or isinstance(slim.select, models.channel_selection)


BLOCKS = {
    "resnet": ("layer1.0", "BCBCBCRS"),  # `downsample` is a Sequential
    "densenet": ("dense1.0", "BCR"),
}


@pytest.mark.parametrize("arch", BLOCKS)
def test_no_layer_stands_where_the_original_has_none(arch):
    """Programs look at the layer before or after a BN in modules()."""
    model = randomize(MASK_NETWORKS[arch](depth=SMALLEST[arch], dataset="cifar10"))
    name, layers = BLOCKS[arch]
    kinds = {"B": nn.BatchNorm2d, "C": nn.Conv2d, "R": nn.ReLU, "S": nn.Sequential}
    block = [type(layer) for layer in model.get_submodule(name).children()]
    assert block == [kinds[letter] for letter in layers]
    walked = list(model.modules())
    for bn, after in itertools.pairwise(walked):
        assert type(bn) is not nn.BatchNorm2d or type(after) in (nn.Conv2d, nn.ReLU)
    # and the deployment form is the one of the suite's network
    suite = models.NETWORKS[arch](depth=SMALLEST[arch], dataset="cifar10")
    suite.load_state_dict(model.state_dict(), strict=False)
    forms = [slimming.deploy(network) for network in (model, suite)]
    merged = [[type(m) for m in f.modules() if type(m) is not nn.Identity] for f in forms]
    assert merged[0][1:] == merged[1][1:]
    assert torch.equal(logits(forms[0]), logits(forms[1]))


@pytest.mark.parametrize("networks", [models.NETWORKS, MASK_NETWORKS])
@pytest.mark.parametrize("arch", SMALLEST)
def test_a_pruned_file_of_the_original_is_a_full_network(original, arch, networks):
    given = {"arch": arch, "depth": SMALLEST[arch], "dataset": "cifar10"}
    model, network, contents = architecture.load(
        original / f"{arch}.pth.tar", Request(**given), networks
    )
    assert network == Architecture(arch, SMALLEST[arch], "cifar10", 10, cfg=None)
    assert torch.equal(logits(model), torch.load(original / f"{arch}.logits"))
    assert contents["cfg"] == kept(model, model.state_dict())
    assert arch == "vgg" or 0 in contents["cfg"]


@pytest.mark.parametrize("arch", SMALLEST)
def test_the_scripts_read_a_pruned_file_of_the_original(original, arch, tmp_path):
    path = original / f"{arch}.pth.tar"
    told = f"--dataset folder --data {original / 'data'} --depth {SMALLEST[arch]}"
    refine = f"--refine {path} --arch {arch} --epochs 1 --no-tensorboard --save {tmp_path}"
    printed = succeed(f"mask-impl/main_mask.py {refine} {told}", cwd=ROOT / "mask-impl")
    assert "is not pruned" not in printed
    tuned, pruned = checkpoint.read(tmp_path / "checkpoint.pth.tar"), checkpoint.read(path)
    model = models.NETWORKS[arch](depth=SMALLEST[arch])
    assert tuned["cfg"] is None
    assert kept(model, tuned["state_dict"]) == pruned["cfg"]
    printed = succeed(f"eval.py {path} --model {arch} {told} --pruned True --compression")
    assert "compression" in printed
    prune = f"--model {path} {told} --percent 0.1 --save {tmp_path}"
    succeed(f"{PRUNER[arch]} {prune}/slim")
    assert architecture.load(tmp_path / "slim" / "pruned.pth.tar")[1].cfg
    succeed(f"mask-impl/prune_mask.py --arch {arch} {prune}/masked")
    again = checkpoint.read(tmp_path / "masked" / "pruned.pth.tar")["cfg"]
    pairs = [pair for pair in zip(again, pruned["cfg"], strict=True) if pair[0] != "M"]
    assert all(now <= before for now, before in pairs) and again != pruned["cfg"]


def test_main_py_trains_the_full_network_of_such_a_file(original, tmp_path):
    refine = f"main.py --refine {original / 'resnet.pth.tar'} --arch resnet --depth 11 --epochs 1"
    data = f"--dataset folder --data {original / 'data'}"
    printed = succeed(f"{refine} {data} --save {tmp_path} --no-tensorboard")
    assert "resnet-11 for folder (10 classes)" in printed and "slim" not in printed
    assert "is not pruned" not in printed
    assert architecture.load(tmp_path / "checkpoint.pth.tar")[1].cfg is None


@pytest.mark.parametrize("arch", SMALLEST)
def test_ours_carry_the_kept_channels(original, arch, tmp_path):
    path = save_network(tmp_path / "dense", arch, SMALLEST[arch], "folder")
    contents = checkpoint.read(path)
    dead = list(batch_norms(models.NETWORKS[arch](depth=SMALLEST[arch])))[1]
    contents["state_dict"][f"{dead}.weight"] *= 1e-4
    checkpoint.write(path, contents)
    prune = f"mask-impl/prune_mask.py --model {path} --percent 0.4"
    succeed(f"{prune} --data {original / 'data'} --save {tmp_path / 'out'}")
    target = tmp_path / "out" / "pruned.pth.tar"
    model, network, pruned = architecture.load(target, networks=MASK_NETWORKS)
    assert pruned["cfg"] == kept(model, pruned["state_dict"]) and 0 in pruned["cfg"]
    assert str(pruned["cfg"]) in (tmp_path / "out" / "prune.txt").read_text()
    assert network == Architecture(arch, SMALLEST[arch], "folder", 10, cfg=None)
    # a file from before has None there
    checkpoint.write(target, {**pruned, "cfg": None})
    before, known, _ = architecture.load(target, networks=MASK_NETWORKS)
    assert known == network and torch.equal(logits(before), logits(model))


def test_a_channel_without_gamma_stays_so_whatever_its_beta_is(original, tmp_path):
    """As in the original, which zeroes its gradients in each step."""
    path = save_network(tmp_path / "pruned", "vgg", 11, "folder", cfg=NARROW["vgg"])
    contents = checkpoint.read(path)
    contents["state_dict"]["feature.1.weight"][:2] = 0
    contents["state_dict"]["feature.1.bias"][:2] = torch.tensor([0.0, 0.5])
    checkpoint.write(path, contents)
    command = f"mask-impl/main_mask.py --refine {path} --epochs 2 -sr --batch-size 8"
    data = f"--data {original / 'data'} --no-tensorboard --no-cuda"
    assert "2 channels with γ = 0 are not trained" in succeed(
        f"{command} {data} --save {tmp_path / 'out'}"
    )
    state = checkpoint.read(tmp_path / "out" / "checkpoint.pth.tar")["state_dict"]
    gamma, beta = state["feature.1.weight"], state["feature.1.bias"]
    assert not gamma[:2].any() and gamma[2:].all()
    assert beta[0] == 0 and 0.4999 < beta[1] < 0.5, "weight decay alone"


@pytest.mark.slow
def test_the_shapes_of_the_weights_say_which_cfg_it_is(small, tmp_path):
    arch, path = type(small).__name__, tmp_path / "file"
    network = Architecture(arch, SMALLEST[arch], "cifar10", 10)
    keep = choose_channels(small, 0.4).kept
    slim, masked = keep_only(small, keep), zero_others(small, keep)
    for model, cfg in ((slim, slim.cfg), (masked, None), (small, None)):
        told = replace(network, cfg=slim.cfg)  # the same list beside all of them
        checkpoint.write(path, architecture.contents_of(model, told, 0, 0.5))
        loaded, found, _ = architecture.load(path)
        assert found == replace(network, cfg=cfg)
        assert torch.equal(logits(loaded), logits(model))
    checkpoint.write(path, architecture.contents_of(small, replace(network, cfg=small.cfg), 0, 0.5))
    assert architecture.load(path)[1] == network


@pytest.mark.parametrize(
    "cfg", [[5] * 9, [17] + [5] * 9, [-1] + [5] * 9, [True] * 10, [5.0] * 10, ["M"] + [5] * 9, []]
)
def test_a_cfg_that_fits_neither_is_one_clear_error(tmp_path, cfg):
    contents = checkpoint.read(save_network(tmp_path / "file", "resnet", 11))
    checkpoint.write(tmp_path / "file", {**contents, "cfg": cfg})
    with pytest.raises(UserError, match=r"resnet-11") as error:
        architecture.load(tmp_path / "file")
    assert "\n" not in str(error.value)


def test_a_mask_on_a_slim_network_leaves_it_its_shapes(original, tmp_path):
    dense, network, _ = architecture.load(save_network(tmp_path / "dense", "vgg", 11, "folder"))
    slim = keep_only(dense, choose_channels(dense, 0.8).kept)
    known = replace(network, cfg=slim.cfg)
    checkpoint.write(tmp_path / "slim", architecture.contents_of(slim, known, 0, 0.5))
    prune = f"mask-impl/prune_mask.py --model {tmp_path / 'slim'} --percent 0.4"
    succeed(f"{prune} --data {original / 'data'} --save {tmp_path / 'out'}")
    masked, found, _ = architecture.load(tmp_path / "out" / "pruned.pth.tar")
    assert found == known
    keep = choose_channels(slim, 0.4, at_least_one=False).kept
    assert torch.equal(logits(masked), logits(zero_others(slim, keep)))
