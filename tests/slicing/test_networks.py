"""The networks beside the paper's, torchvision's zoo, and widths by the name of a layer."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import randomize
from torch import nn
from torchvision import models as torchvision_models
from warm import ROOT

from models import NETWORKS, PAPER_DEPTH, cifar_resnet, constructor, mobilenet, resize, widths, zoo
from models.mobilenet import BLOCKS
from slimming.measuring.figures import count_parameters

ZOO = "resnet18 vgg16 vgg16_bn mobilenet_v2 mobilenet_v3_large densenet121 efficientnet_b0"
MORE = "resnet50 regnet_y_400mf googlenet squeezenet1_1"


def halved(model):
    """Half of every width but those of the images and the classes."""
    full = widths(model).items()
    return {name: [w if w in (3, 10) else w // 2 for w in shape] for name, shape in full}


def resnet_parameters(depth, classes):
    """He et al., section 4.2, with projections; each convolution has the γ and β of a BN."""
    n = (depth - 2) // 6
    stages = sum(9 * (2 * n - 1) * planes**2 + 2 * (2 * n) * planes for planes in (16, 32, 64))
    shapes_change = sum((9 + 1) * planes * 2 * planes + 2 * 2 * planes for planes in (16, 32))
    return 9 * 3 * 16 + 2 * 16 + 9 * 16 * 16 + stages + shapes_change + 65 * classes


def mobilenet_parameters(classes, share=1):
    chain = [32 // share, *(width // share for width, _ in BLOCKS)]
    blocks = sum(11 * a + (a + 2) * b for a, b in pairwise(chain))
    return (9 * 3 + 2) * chain[0] + blocks + (chain[-1] + 1) * classes


def test_parameters_are_those_of_the_papers():
    assert count_parameters(NETWORKS["resnet-56"]()) == 855_770 == resnet_parameters(56, 10)
    assert count_parameters(cifar_resnet(20, "cifar100")) == resnet_parameters(20, 100)
    assert count_parameters(mobilenet()) == 3_217_226 == mobilenet_parameters(10)
    assert count_parameters(mobilenet("cifar100")) == mobilenet_parameters(100)
    assert count_parameters(NETWORKS["resnet-18"]()) == 11_173_962
    assert count_parameters(NETWORKS["resnet-34"]()) == 21_282_122
    assert count_parameters(mobilenet(cfg=halved(mobilenet()))) == mobilenet_parameters(10, share=2)


@pytest.mark.parametrize("arch", sorted(NETWORKS.keys() - PAPER_DEPTH.keys()))
def test_a_slim_network_is_rebuilt_from_its_cfg_and_computes_the_same(arch):
    torch.manual_seed(0)
    dense, images = NETWORKS[arch](), torch.randn(2, 3, 32, 32)
    assert dense(images).shape == (2, 10)
    slim = randomize(NETWORKS[arch](cfg=halved(dense)))
    assert widths(slim) == halved(dense)
    again = resize(dense, widths(slim)).eval()
    again.load_state_dict(slim.state_dict())
    assert torch.equal(again(images), slim(images))
    assert str(again) == str(slim)  # what a layer prints of itself is true


def test_resize_changes_nothing_but_the_widths():
    def layers(wide, outputs):
        return nn.Sequential(
            nn.Conv2d(8, wide, 3, 2, "valid", 2, 2, bias=False, padding_mode="reflect"),
            nn.Conv2d(wide, wide, (1, 3), groups=wide),
            nn.BatchNorm2d(wide, 1e-3, 0.2, affine=False),
            nn.PReLU(wide),
            nn.Linear(wide, outputs),
        )

    net, wanted = layers(8, 4).double().requires_grad_(False), layers(6, 2)
    slim = resize(net, {"0": [8, 6], "1": [6, 6], "2": [6], "3": [6], "4": [6, 2]})
    assert slim is net and str(slim) == str(wanted)
    wanted.load_state_dict(slim.state_dict())
    assert all(p.dtype == torch.double and not p.requires_grad for p in slim.parameters())


WRONG = {
    "not a layer with channels": [{"conv9": [3, 3]}, {"relu": [3]}, {"": [3]}],
    "whose full widths": [{"bn": [3, 3]}, {"conv": [3]}, {"conv": 3}],
    "integers from 1": [{"bn": [w]} for w in (0, -1, 2.0, True, "2", 9)] + [{"conv": [8, 9]}],
    "is depthwise": [{"depthwise": [2, 4]}],
    "must divide": [{"grouped": [3, 4]}, {"grouped": [4, 3]}],
    "must be a dict of layer names": [[4, 6]],
}


@pytest.mark.parametrize("message, cfg", [(text, cfg) for text in WRONG for cfg in WRONG[text]])
def test_a_cfg_that_does_not_fit_is_an_error_and_changes_nothing(message, cfg):
    net = nn.ModuleDict({"fc": nn.Linear(8, 4), "relu": nn.ReLU(), "bn": nn.BatchNorm2d(8)})
    convs = {"conv": 1, "grouped": 2, "depthwise": 8}
    net.update({name: nn.Conv2d(8, 8, 3, groups=groups) for name, groups in convs.items()})
    before = widths(net)
    with pytest.raises(ValueError, match=message):
        resize(net, {"fc": [2, 2], **cfg} if isinstance(cfg, dict) else cfg)
    assert widths(net) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ZOO.split(), *MORE.split()])
def test_torchvision_s_networks_take_small_images_dense_and_slim(name):
    with torch.device("meta"):
        dense = zoo.classifier(name)
        slim = zoo.classifier(name, cfg=halved(dense))
        assert dense(torch.zeros(2, 3, 32, 32)).shape == slim(torch.zeros(2, 3, 32, 32)).shape
    assert (dense.arch, dense.num_classes, widths(slim)) == (name, 10, halved(dense))


def test_small_images_get_a_stem_that_does_not_shrink_them():
    with torch.device("meta"):
        small, large = (zoo.classifier("resnet50", image_size=size) for size in (64, 65))
        stem, vgg = zoo.classifier("mobilenet_v2").features[0][0], zoo.classifier("vgg16_bn")
    assert str(small.conv1) == str(nn.Conv2d(3, 64, 3, padding=1, bias=False))
    assert isinstance(small.maxpool, nn.Identity)
    assert str(large) == str(torchvision_models.resnet50(num_classes=10))
    assert stem.stride == (1, 1) and stem.kernel_size == (3, 3)
    assert str(vgg.classifier) == str(nn.Linear(512, 10))
    assert zoo.classifier("resnet18", image_size=224)(torch.zeros(2, 3, 224, 224)).shape == (2, 10)


def test_pretrained_weights_are_loaded_where_they_fit(monkeypatch):
    source = torchvision_models.resnet18().state_dict()
    fetch = torchvision_models.WeightsEnum
    monkeypatch.setattr(fetch, "get_state_dict", lambda *_, **__: source)
    model = zoo.classifier("resnet18", weights="DEFAULT")
    fresh = [n for n, v in model.state_dict().items() if not v.equal(source[n])]
    assert fresh == ["conv1.weight", "fc.weight", "fc.bias"]
    monkeypatch.setattr(fetch, "get_state_dict", lambda *_, **__: Path("/none").stat())
    with pytest.raises(ValueError, match=r"^cannot load the weights .*: .* No such file"):
        zoo.classifier("resnet18", weights="DEFAULT")


def test_what_cannot_be_built_is_an_error():
    for wrong in ({"name": "resnet19"}, {"name": "alexnet"}, {"weights": "BEST"}, {"dataset": "x"}):
        with pytest.raises(ValueError, match=r"resnet19|alexnet does not support|BEST|num_classes"):
            zoo.classifier(**{"name": "resnet18", **wrong})
    with pytest.raises(ValueError, match=r"must be 6n\+2"):
        cifar_resnet(18)


@pytest.mark.slow
def test_networks_are_found_by_name_and_torchvision_is_imported_only_if_needed():
    assert constructor("mobilenet") is mobilenet and constructor("resnet-19") is None
    with torch.device("meta"):
        assert constructor("resnet50")(num_classes=7).fc.out_features == 7
    code = "import sys, models; models.constructor('vgg'); sys.exit('torchvision' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
