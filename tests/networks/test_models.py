"""Sizes, shapes and names of the networks, and the identity of channel selection."""

import pytest
import torch

from models import NETWORKS, channel_selection, densenet, resnet, vgg
from slimming.channels.scaling import batch_norms
from slimming.measuring import figures

TABLE = [  # arch, depth, weights for 10 and 100 classes, BN channels, FLOPs of one image
    ("vgg", 11, 9_228_362, 9_274_532, 2_752, 305_539_072),
    ("vgg", 13, 9_413_066, 9_459_236, 2_944, 456_534_016),
    ("vgg", 16, 14_724_042, 14_770_212, 4_224, 626_403_328),
    ("vgg", 19, 20_035_018, 20_081_188, 5_504, 796_272_640),
    ("resnet", 20, 219_482, 242_612, 1_360, 67_474_432),
    ("resnet", 56, 590_426, 613_556, 4_048, 174_429_184),
    ("resnet", 110, 1_146_842, 1_169_972, 8_080, 334_861_312),
    ("resnet", 164, 1_703_258, 1_726_388, 12_112, 495_293_440),
    ("densenet", 40, 1_059_298, 1_100_428, 9_360, 565_834_656),
    ("densenet", 100, 7_083_538, 7_189_468, 59_400, 3_633_486_816),
]


@pytest.mark.parametrize(
    "arch, depth, masks", [("vgg", 19, 0), ("resnet", 20, 912), ("densenet", 40, 9_360)]
)
def test_the_original_counts_the_masks_too(arch, depth, masks):
    """For ResNet-20 it prints 220,394."""
    model = NETWORKS[arch](depth=depth)
    own = figures.count_parameters(model, masks=True)
    assert own == sum(p.numel() for p in model.parameters())
    assert own - figures.count_parameters(model) == masks
    assert arch != "resnet" or own == 220_394


@pytest.mark.parametrize(
    "arch, depth, ten, hundred, channels, flops",
    [pytest.param(*row, marks=pytest.mark.slow if row[1] >= 100 else ()) for row in TABLE],
)
def test_parameters_channels_and_flops_are_those_of_the_papers(
    arch, depth, ten, hundred, channels, flops
):
    model = NETWORKS[arch](depth=depth, dataset="cifar10")
    assert figures.count_parameters(model) == ten
    assert sum(bn.num_features for bn in batch_norms(model).values()) == channels
    assert figures.count_flops(model) == flops
    with torch.device("meta"):
        larger = NETWORKS[arch](depth=depth, dataset="cifar100")
    assert figures.count_parameters(larger) == hundred


def test_the_networks_start_as_the_paper_says():
    model = resnet(depth=56)
    for bn in batch_norms(model).values():
        assert (bn.weight == 0.5).all() and (bn.bias == 0).all()
    conv = model.layer3[0].conv2
    assert conv.bias is None
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_state_dict_keys_travel_between_suites():
    assert {"feature.0.weight", "feature.1.running_var", "classifier.bias"} <= set(
        vgg(depth=11).state_dict()
    )
    block = {
        f"layer1.0.{name}"
        for name in (
            "bn1.weight",
            "select.indexes",
            "conv1.weight",
            "bn2.weight",
            "conv2.weight",
            "bn3.weight",
            "conv3.weight",
            "downsample.0.weight",
        )
    }
    keys = set(resnet(depth=20).state_dict())
    assert block | {"conv1.weight", "bn.bias", "select.indexes", "fc.weight"} <= keys
    keys = set(densenet(depth=40).state_dict())
    assert {
        "dense3.11.bn1.weight",
        "dense1.0.select.indexes",
        "dense2.4.conv1.weight",
        "trans2.select.indexes",
        "trans1.conv1.weight",
        "select.indexes",
        "fc.bias",
    } <= keys
    assert not any("kept" in key for key in keys)


@pytest.mark.parametrize("build, depth", [(vgg, 12), (resnet, 18), (resnet, 2), (densenet, 41)])
def test_a_depth_that_does_not_exist_is_an_error_that_names_those_that_do(build, depth):
    with pytest.raises(ValueError, match=r"depth of \w+ must be"):
        build(depth=depth)


@pytest.mark.parametrize("cfg", [[1] * 18, [0] * 19, [1.5] * 19, ["M"] * 19, [True] * 19])
def test_a_cfg_that_does_not_fit_is_an_error(cfg):
    with pytest.raises(ValueError, match="cfg has"):
        resnet(depth=20, cfg=cfg)


def test_selection_of_everything_is_the_identity_and_costs_nothing():
    x = torch.randn(2, 4, 3, 3)
    assert channel_selection(4)(x) is x


def test_selection_gathers_after_keep_load_and_direct_writes():
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0])
    x = torch.randn(2, 4, 3, 3)
    kept, loaded, written = (channel_selection(4) for _ in range(3))
    kept.keep(mask)
    loaded.load_state_dict(kept.state_dict())
    written.indexes.data.copy_(mask)
    written.eval()
    for select in (kept, loaded, written):
        assert torch.equal(select(x), x[:, [0, 3]])
    kept.keep(torch.ones(4))
    assert kept(x) is x


def test_a_selection_keeps_its_index_tensor_where_it_is():
    """A CUDA graph or a compiled forward holds on to the tensor."""
    select = channel_selection(4)
    select.keep(torch.tensor([1, 0, 1, 1]))
    before = select.kept
    select.train().eval()
    assert select.kept is before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gathering_keeps_the_layout_and_has_the_gradient_of_indexing(layout):
    select = channel_selection(6)
    select.keep(torch.tensor([0, 1, 1, 0, 1, 0]))
    x = torch.randn(2, 6, 4, 5).to(memory_format=layout).requires_grad_()
    out = select(x)
    assert torch.equal(out, x[:, [1, 2, 4]]) and out.is_contiguous(memory_format=layout)
    grad = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, x, grad)
    (plain,) = torch.autograd.grad(x[:, [1, 2, 4]], x, grad)
    assert torch.equal(ours, plain)
