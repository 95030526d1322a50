"""Programs as users of the original suite write them: masks by hand, constructors by position,
functions of the scripts, pruning loops that walk the modules."""

import copy
import importlib
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import SMALLEST, keep_only, randomize, same, succeed, zero_others
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from warm import ROOT

import main
import models
from models import channel_selection, densenet, resnet, vgg
from models.densenet import BasicBlock, Transition
from models.preresnet import Bottleneck
from slimming.channels.scaling import batch_norms
from slimming.deploy import fold
from slimming.measuring import figures
from slimming.storage import architecture, checkpoint
from slimming.training.trainer import load_momentum, make_optimizer

main_mask = importlib.import_module("mask-impl.main_mask")


def write_data(select, mask):
    select.indexes.data.copy_(mask)


def write_new_data(select, mask):
    select.indexes.data = mask.clone()


def write_entries_of_data(select, mask):
    for i in (mask == 0).nonzero().flatten().tolist():
        select.indexes.data[i] = 0


def write_without_gradient(select, mask):
    with torch.no_grad():
        select.indexes[mask == 0] = 0


def write_in_inference_mode(select, mask):
    with torch.inference_mode():
        select.indexes.mul_(mask)


def write_a_new_parameter(select, mask):
    select.indexes = nn.Parameter(mask.clone(), requires_grad=False)


def write_the_parameter_of_another(select, mask):
    other = channel_selection(len(mask))
    other.keep(mask)
    select.indexes = nn.Parameter(other.indexes, requires_grad=False)


def write_zeros_then_ones(select, mask):
    select.indexes.data.zero_()
    select.indexes.data[mask.nonzero().flatten().tolist()] = 1.0


def write_state_dict(select, mask):
    select.load_state_dict({"indexes": mask})


def write_state_dict_by_assignment(select, mask):
    select.load_state_dict({"indexes": mask.clone()}, assign=True)


def write_half_precision(select, mask):
    select.indexes.data = select.indexes.data.half() * mask


WRITES = [value for name, value in list(globals().items()) if name.startswith("write_")]


@pytest.fixture(params=WRITES, ids=lambda write: write.__name__)
def write(request):
    return request.param


@pytest.mark.parametrize("training", [True, False])
def test_whatever_writes_a_mask_is_obeyed_in_the_next_forward(write, training):
    x, first, second = torch.randn(2, 5, 3, 3), torch.tensor([1.0, 0, 1, 1, 0]), torch.zeros(5)
    second[3] = 1
    select = channel_selection(5).train(training)
    assert select(x) is x
    write(select, first)
    assert torch.equal(select(x), x[:, [0, 2, 3]])
    write(select, second)
    assert torch.equal(select(x), x[:, [3]])
    select.indexes.data[:] = 1
    assert select(x) is x


def test_every_write_to_a_mask_is_noticed_without_its_values(write):
    """A GPU is not waited for: there the version counter or another tensor tells of a write, or, of
    one through ``data``, the next ``train()`` or ``eval()``."""
    select, x = channel_selection(5), torch.randn(2, 5, 3, 3)
    for mask in (torch.tensor([1.0, 0, 1, 1, 0]), torch.tensor([0.0, 0, 0, 1, 0])):
        select(x)
        tensor, version = select.indexes, select.indexes._version
        write(select, mask)
        through_data = ".data" in inspect.getsource(write)
        seen = select.indexes is not tensor or select.indexes._version > version
        assert seen or through_data
        assert torch.equal(select.eval()(x), x[:, mask.bool()])


def test_a_view_that_was_handed_out_before_is_obeyed_too():
    select, x = channel_selection(3), torch.randn(1, 3, 2, 2)
    view, array = select.indexes.detach(), select.indexes.detach().numpy()
    select(x)
    version = select.indexes._version
    view[0] = 0
    assert select.indexes._version > version
    assert torch.equal(select(x), x[:, 1:])
    array[1] = 0  # NumPy's writes are seen on the CPU
    assert torch.equal(select(x), x[:, 2:])


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        copy.copy,
        lambda select: pickle.loads(pickle.dumps(select)),
        lambda select: torch.load(_saved(select), weights_only=False),
        lambda select: select.to(torch.device("cpu"), torch.float64),
        lambda select: select.to("meta").to_empty(device="cpu"),
    ],
)
def test_copies_and_moved_selections_obey(duplicate, write):
    x, mask = torch.randn(2, 4, 3, 3), torch.tensor([0.0, 1, 1, 0])
    select = channel_selection(4)
    select.keep(torch.tensor([1, 1, 0, 1]))
    twin = duplicate(select)
    twin.indexes.data.fill_(1)
    twin(x)
    write(twin, mask)
    assert torch.equal(twin(x), x[:, 1:3])


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_a_mask_first_read_in_inference_mode_trains():
    select, x = channel_selection(3), torch.randn(1, 3, 2, 2)
    select.indexes.data[0] = 0
    with torch.inference_mode():
        select(x)
    x.requires_grad_()
    select(x).sum().backward()
    assert x.grad[0, :, 0, 0].tolist() == [0, 1, 1]


def test_the_state_dict_holds_plain_tensors():
    model = resnet(depth=11)
    assert all(type(value) is torch.Tensor for value in model.state_dict().values())


def test_constructors_take_their_arguments_by_position():
    with torch.device("meta"):
        assert vgg("cifar100", 11, False).classifier.out_features == 100
        assert vgg("cifar10", 11, True, [8, "M", 8, "M", 8, 8, "M", 8, 8, "M", 8, 8]).cfg[0] == 8
        assert resnet(20, "cifar100").fc.out_features == 100
        assert resnet(11, "cifar10", [8, 16, 16, 9, 32, 32, 10, 64, 64, 11]).fc.in_features == 11
        assert densenet(7, 0, "cifar100", 12, 1).fc.out_features == 100
        assert densenet(7, 0, "cifar10", 12, 1, [4, 5, 6, 7, 8, 9]).fc.in_features == 9
        for name, depth in SMALLEST.items():
            model = models.__dict__[name](dataset="cifar100", depth=depth)
            assert isinstance(models.__dict__[name], type) and model.num_classes == 100
            assert models.__dict__[name](depth=depth, cfg=model.cfg).num_classes == 10


def test_blocks_take_the_arguments_of_the_original():
    x = torch.randn(2, 16, 8, 8)
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False))
    assert Bottleneck(16, 8, [16, 8, 8], 2, shortcut)(x).shape == (2, 32, 4, 4)
    assert Bottleneck(16, 4, [16, 4, 4])(x).shape == x.shape
    assert BasicBlock(16, 16)(x).shape == (2, 28, 8, 8)
    assert BasicBlock(16, 16, 1, 4, 0.5)(x).shape == (2, 20, 8, 8)
    assert Transition(16, 8, 16)(x).shape == (2, 8, 4, 4)


def test_networks_are_made_by_the_methods_of_the_original():
    from models.vgg import defaultcfg

    assert models.vgg.defaultcfg is defaultcfg and set(defaultcfg) == {11, 13, 16, 19}
    plain = vgg(depth=11).make_layers([4, "M", 6])
    assert [type(m) for m in plain] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Conv2d, nn.ReLU]
    net = resnet(depth=11)
    layer = net._make_layer(Bottleneck, 16, 2, [256, 16, 16, 64, 16, 16], stride=2)
    assert layer[0].downsample[0].stride == (2, 2) and layer[1].downsample is None
    net = densenet(depth=7)
    before = net.inplanes
    assert len(net._make_denseblock(BasicBlock, 2, [before, before + 12])) == 2
    assert net._make_transition(2, net.inplanes).conv1.out_channels == (before + 24) // 2


def test_vgg_starts_as_the_original():
    model = vgg(depth=11)
    assert (model.classifier.bias == 0).all()
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert all((bn.weight == 0.5).all() for bn in batch_norms(model).values())
    untouched = vgg(depth=11, init_weights=False)
    assert (batch_norms(untouched)["feature.1"].weight == 1).all()
    untouched._initialize_weights()
    assert (batch_norms(untouched)["feature.1"].weight == 0.5).all()


def test_growth_dropout_and_compression_work_from_training_to_fine_tuning(images, tmp_path):
    data = f"--data {images} --no-cuda"
    short = f"--dataset folder {data} --epochs 1 --no-tensorboard"
    rates = "--growth-rate 6 --drop-rate 0.2 --compression-rate 2"
    sparse, slim, refined = (tmp_path / name for name in ("sparse", "slim", "refined"))
    train = f"main.py -sr --arch densenet --depth 10 {rates} {short} --save {sparse}"
    assert "growthRate 6" in succeed(train)
    succeed(f"denseprune.py --percent 0.4 --model {sparse} {data} --save {slim}")
    succeed(f"main.py --refine {slim} {short} --save {refined}")
    model, network, contents = architecture.load(refined / "model_best.pth.tar")
    options = {"growthRate": 6, "dropRate": 0.2, "compressionRate": 2}
    assert network.options == model.options == contents["options"] == options
    assert model.trans1.conv1.out_channels == (12 + 2 * 6) // 2
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(fold.deploy(model)(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(expected, model(x)) and not torch.equal(model.train()(x), model(x))
    with torch.device("meta"):
        usual = densenet()
    assert usual.options == {} and figures.count_parameters(usual) == 1_059_298


@pytest.mark.parametrize("rate", [{"growthRate": 0}, {"dropRate": 1}, {"compressionRate": 0.5}])
def test_rates_that_make_no_network_are_an_error(rate):
    with pytest.raises(ValueError, match=next(iter(rate))):
        densenet(7, **rate)


class Endless(IterableDataset):
    def __iter__(self):
        yield from ((torch.randn(3, 32, 32), i % 10) for i in range(12))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(torch.randn(20, 3, 32, 32), torch.arange(20) % 10), 8),
        DataLoader(
            TensorDataset(torch.randn(20, 3, 32, 32), torch.arange(20) % 10),
            batch_size=8,
            shuffle=True,
            drop_last=True,
        ),
        DataLoader(Endless(), batch_size=4),
        [(torch.randn(4, 3, 32, 32), torch.arange(4))],
    ],
)
def test_train_and_test_take_any_loader(loader, capsys):
    model = resnet(depth=11)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = model.conv1.weight.clone()
    for script in (main, main_mask):
        assert 0 <= script.train(model, loader, optimizer, log_interval=1).prec1 <= 1
        assert 0 <= script.test(model, loader).prec1 <= 1
    assert not torch.equal(model.conv1.weight, before)
    assert "Train Epoch: 0 [" in capsys.readouterr().out


def test_gradients_of_zero_scaling_factors_are_zeroed_whatever_beta_is():
    model = resnet(depth=11)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    model.bn.weight.data[:2] = 0
    model.bn.bias.data[:2] = torch.tensor([0.0, 3.0])
    kept = model.bn.weight.grad[2:].clone()
    main_mask.BN_grad_zero(model)
    assert not model.bn.weight.grad[:2].any() and not model.bn.bias.grad[:2].any()
    assert torch.equal(model.bn.weight.grad[2:], kept) and model.bn.bias.grad[2:].all()


def test_save_checkpoint_writes_the_last_and_the_best(tmp_path):
    state = {"epoch": 1, "state_dict": resnet(depth=11).state_dict(), "best_prec1": 0.5}
    for script in (main, main_mask):
        script.save_checkpoint({**state, "optimizer": {"state": {}}}, False, tmp_path)
        assert not (tmp_path / "model_best.pth.tar").exists()
    main.save_checkpoint({**state, "optimizer": {"state": {}}}, True, filepath=str(tmp_path))
    assert checkpoint.read(tmp_path / "checkpoint.pth.tar")["optimizer"] == {"state": {}}
    assert checkpoint.read(tmp_path / "model_best.pth.tar")["optimizer"] is None


def prune_by_walking(model, share):
    """Masks of each BN, a new network of their sizes, and its weights copied module by module."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    ranked = torch.cat([bn.weight.data.abs() for bn in norms]).sort().values
    masks = [bn.weight.data.abs().gt(ranked[int(len(ranked) * share)]) for bn in norms]
    small = type(model)(depth=model.depth, cfg=[int(mask.sum()) for mask in masks])
    pairs = list(zip(model.modules(), small.modules(), strict=True))
    number, reads, writes, inner = 0, torch.ones(3) > 0, masks[0], 0
    for place, (old, new) in enumerate(pairs):
        if isinstance(old, nn.BatchNorm2d):
            reads, writes = masks[number], masks[min(number + 1, len(masks) - 1)]
            number, inner = number + 1, inner + 1
            whole = isinstance(pairs[place + 1][0], channel_selection)
            keep = torch.ones_like(reads) if whole else reads
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(new, name).data = getattr(old, name).data[keep].clone()
            if whole:
                select, inner = pairs[place + 1][1], 0
                select.indexes.data.zero_()
                select.indexes.data[reads.nonzero().flatten().tolist()] = 1.0
        elif isinstance(old, nn.Conv2d):
            weight = old.weight.data.clone()
            if isinstance(pairs[place - 1][0], nn.BatchNorm2d | channel_selection):
                weight = weight[:, reads]
                weight = weight[writes] if inner < 2 else weight
            new.weight.data = weight
        elif isinstance(old, nn.Linear):
            new.weight.data, new.bias.data = (
                old.weight.data[:, reads].clone(),
                old.bias.data.clone(),
            )
    return small.eval(), dict(zip(batch_norms(model), masks, strict=True))


def test_a_pruning_loop_that_walks_the_modules_gives_the_same_network():
    model = randomize(resnet(depth=20))
    walked, keep = prune_by_walking(model, 0.3)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(walked(x), keep_only(model, keep)(x))
    reference = zero_others(model, keep)(x)
    torch.testing.assert_close(walked(x), reference, rtol=1e-4, atol=1e-4)


def test_the_suite_is_imported_as_the_original():
    code = "from models import *; from models.vgg import defaultcfg\n"
    code += "print(vgg(depth=11).cfg == defaultcfg[11], channel_selection(3).indexes.tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True [1.0, 1.0, 1.0]\n"


@pytest.mark.parametrize("depth", models.vgg.defaultcfg)
def test_a_vgg_needs_no_depth_beside_a_cfg(depth):
    cfg = [3 if width != "M" else "M" for width in models.vgg.defaultcfg[depth]]
    assert vgg(dataset="cifar100", cfg=cfg).depth == depth


def test_momentum_of_the_original_fits():
    """It numbers the masks among its parameters, so its state has gaps."""
    model = resnet(depth=11)
    ours = [p for p in model.parameters() if p.requires_grad]
    places = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
    buffers = {i: torch.full_like(p, i) for i, p in zip(places, ours, strict=True)}
    saved = {"state": {i: {"momentum_buffer": buffer} for i, buffer in buffers.items()}}
    optimizer = make_optimizer(model, 0.1, 0.9, 0)
    assert load_momentum(optimizer, saved) and places[-1] > len(places) - 1
    for i, p in zip(places, ours, strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffers[i])


def test_a_switch_of_mode_sees_what_no_counter_does():
    select, x = channel_selection(3), torch.randn(1, 3, 2, 2)
    select(x)
    torch.from_dlpack(select.indexes.detach()).zero_()
    select.indexes.data[0] = 1
    assert torch.equal(select.eval()(x), x[:, :1])


def test_the_penalty_before_any_gradient_does_nothing():
    model = resnet(depth=11)
    model.bn.weight.data[0] = 0
    before = copy.deepcopy(model.state_dict())
    main.updateBN(model)
    main_mask.BN_grad_zero(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same(model.state_dict(), before)
    main_mask.BN_grad_zero(nn.Sequential(nn.BatchNorm2d(3, affine=False)))  # nothing to zero
