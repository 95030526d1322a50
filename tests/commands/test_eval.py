"""eval.py tells what a checkpoint holds: its numbers are those of a plain computation."""

import copy
import importlib
import json
import shutil

import pytest
import torch
from conftest import (
    SMALLEST,
    UNREACHABLE,
    fails,
    keep_only,
    make_images,
    randomize,
    save_network,
    succeed,
    zero_others,
)

from models import NETWORKS, widths, zoo
from slimming import slicing
from slimming.choosing import importance
from slimming.choosing.threshold import choose_channels
from slimming.cli import entry
from slimming.data import loading
from slimming.data.datasets import DataSettings
from slimming.measuring import figures
from slimming.storage import architecture, checkpoint
from slimming.storage.architecture import Architecture
from slimming.training import loop

judge = importlib.import_module("eval")  # the name of a builtin


@pytest.fixture
def told(monkeypatch, capsys, few_digits):
    """The object that `eval.py --json` prints for these flags; latency is not waited for, and the
    data sets are short."""
    monkeypatch.setattr(figures, "latencies", lambda models, images: [len(images) / 1e3, 4.0])

    def call(*words):
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, words), "--no-cuda", "--json"])
        judge.main()
        return json.loads(capsys.readouterr().out)

    return call


def save(path, model, network):
    checkpoint.write(path, architecture.contents_of(model, network, 3, 0.25))
    return path


def plain_score(model, dataset="digits", part="test"):
    settings = DataSettings(workers=1)
    loader = loading.batches(dataset, part, 256, torch.device("cpu"), 32, settings)
    loader.augment = False
    return loop.test(model, loader)._asdict()


def check(found, model, dense, path):
    """``found`` is what is true of ``model``, which ``path`` holds."""
    for told, network in ((found, model), (found["dense"], dense)):
        assert told["parameters"] == figures.count_parameters(network)
        assert told["FLOPs"] == figures.count_flops(network)
        assert told["bytes"] == figures.count_bytes(network)
    for name, ratio in found["compression"].items():
        assert ratio == found["dense"][name] / found[name]
    assert found["test"] == pytest.approx(plain_score(model), rel=1e-5)
    assert found["file_bytes"] == path.stat().st_size
    assert (found["latency_1_ms"], found["latency_64_ms"]) == (1, 64)
    assert found["speed_up"] == {"1": 4000, "64": 62.5}


def pruned_by_magnitude(arch, make):
    torch.manual_seed(0)
    dense = randomize(make())
    scores = importance.MEASURES["l1"](importance.Evidence(dense, []))
    slim = slicing.prune(dense, scores, 0.5, torch.randn(2, 3, 32, 32)).model
    return dense, slim, Architecture(arch, None, "digits", 10, slicing.cfg_of(slim))


@pytest.mark.slow
@pytest.mark.parametrize("arch", SMALLEST)
def test_a_dense_network_and_its_slim_one(tmp_path, told, arch):
    path = save_network(tmp_path / "model_best.pth.tar", arch, SMALLEST[arch])
    dense, network, _ = architecture.load(path)
    found = told(tmp_path)
    check(found, dense, dense, path)
    assert not found["pruned"] and set(found["compression"].values()) == {1}
    assert (found["arch"], found["epoch"], found["best_prec1"]) == (arch, 1, 0.5)
    choice = choose_channels(dense, 0.4)
    slim = keep_only(dense, choice.kept)
    path = save(tmp_path / "slim", slim, Architecture(arch, network.depth, "digits", 10, slim.cfg))
    found = told("--model_path", path, "--model", arch, "--pruned", "True")
    assert told(path, "--pruned", "False") == found  # the original's default claims nothing
    check(found, slim, dense, path)
    assert (found["epoch"], found["best_prec1"]) == (3, 0.25)
    for name, keep in choice.kept.items():
        assert found["layers"][name] == [int(keep.sum()), len(keep)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, make",
    [
        ("resnet-56", NETWORKS["resnet-56"]),
        ("mobilenet_v2", lambda: zoo.classifier("mobilenet_v2")),
    ],
)
def test_networks_pruned_by_their_structure(tmp_path, told, arch, make):
    dense, slim, network = pruned_by_magnitude(arch, make)
    path = save(tmp_path / "slim", slim, network)
    found = told(path, "--pruned")
    check(found, slim, dense, path)
    for name, shape in widths(slim).items():
        assert found["layers"][name] == [shape[-1], widths(dense)[name][-1]]
    if arch == "resnet-56":  # the flags of the original: a family of networks
        assert told(path, "--model", "resnet", "--flops") == {
            name: found[name] for name in ("FLOPs", "effective_FLOPs")
        }


@pytest.mark.slow
@pytest.mark.parametrize("arch", SMALLEST)
def test_a_masked_network_counts_as_the_slim_one(tmp_path, told, arch):
    dense = architecture.load(save_network(tmp_path / "dense", arch, SMALLEST[arch]))[0]
    keep = choose_channels(dense, 0.5).kept
    masked = importlib.import_module("mask-impl.models").NETWORKS[arch](
        depth=SMALLEST[arch], num_classes=10
    )
    own = zero_others(dense, keep).state_dict()
    masked.load_state_dict({name: own[name] for name in masked.state_dict()})
    path = save(tmp_path / "masked", masked, Architecture(arch, SMALLEST[arch], "digits", 10))
    found, slim = told(path, "--pruned", "true"), keep_only(dense, keep)
    check(found, slim, dense, path)
    assert found["compression"]["parameters"] > 1


def test_weights_that_are_zero_are_told_apart(tmp_path, told):
    path = save_network(tmp_path / "dense", "resnet", 11)
    model, network, _ = architecture.load(path)
    model.layer1[0].conv2.weight.data.zero_()
    gone = model.layer1[0].conv2.weight.numel()
    found = told(save(tmp_path / "zeros", model, network), "--pruned")
    assert found["effective_parameters"] == found["parameters"] - gone
    assert found["effective_FLOPs"] == found["FLOPs"] - 2 * gone * 32 * 32
    assert found["compression"]["parameters"] == 1


@pytest.mark.slow
def test_networks_without_bn_or_a_record_of_training(tmp_path, told):
    model = zoo.classifier("vgg11").eval()
    path = tmp_path / "foreign"
    torch.save({"state_dict": model.state_dict(), "best_prec1": torch.tensor(0.5)}, path)
    found = told(path, "--model", "vgg11", "--dataset", "digits")
    check(found, model, copy.deepcopy(model), path)
    assert (found["epoch"], found["best_prec1"]) == (None, 0.5) and not found["pruned"]


def test_a_bare_state_dict_is_what_the_flags_say(tmp_path, told):
    whole = save_network(tmp_path / "whole", "resnet", 11)
    torch.save(architecture.load(whole)[0].state_dict(), tmp_path / "bare")
    flags = ("--model", "resnet", "--depth", 11, "--dataset", "digits")
    found, expected = told(tmp_path / "bare", *flags), told(whole)
    assert told(tmp_path / "bare", "--dataset", "digits") == found  # its weights say the rest
    assert (found["epoch"], found["best_prec1"]) == (None, None)
    of_the_file = ("checkpoint", "file_bytes", "epoch", "best_prec1")
    assert all(found[name] == expected[name] for name in expected if name not in of_the_file)


def test_a_loss_that_is_no_number_is_null(tmp_path, told):
    model, network, _ = architecture.load(save_network(tmp_path / "dense", "resnet", 11))
    model.fc.weight.data.fill_(torch.nan)
    assert told(save(tmp_path / "nan", model, network), "--test_acc")["test"]["loss"] is None


def test_flags_select_what_is_told(tmp_path, told):
    path = save_network(tmp_path / "net", "resnet", 11)
    assert told("--flops", path).keys() == {"FLOPs", "effective_FLOPs"}
    assert told(path, "--compression=True", "--flops", "false").keys() == {"compression"}
    found = told("--train_acc", path, "--test_acc")
    model = architecture.load(path)[0]
    assert found == {
        part: pytest.approx(plain_score(model, part=part), rel=1e-5) for part in ("test", "train")
    }
    assert "dense" in told(path, "--test_acc", "False")


@pytest.mark.parametrize("pixels", [32, 48])
def test_training_images_are_not_augmented(tmp_path, told, images, pixels):
    """With the same images in both parts both score the same, in memory and streamed."""
    shutil.rmtree(images / "train")
    shutil.copytree(images / "test", images / "train")
    network = Architecture("resnet", 11, "folder", 2, image_size=pixels)
    path = save(tmp_path / "net", randomize(network.build()), network)
    found = told(path, "--data_path", images, "--train_acc", "--test_acc", "--workers", "1")
    assert found["train"] == found["test"]


def test_the_command(tmp_path):
    """Latency is measured, stdout is one object of JSON, and a person reads the same."""
    path = save_network(tmp_path / "net", "resnet", 11)
    found = json.loads(succeed("eval.py", path, "--json"))
    assert 0 < found["latency_1_ms"] < found["latency_64_ms"]
    assert found["test"] == pytest.approx(plain_score(architecture.load(path)[0]), rel=1e-5)
    text = judge.as_text(found)
    assert "resnet-11 for digits" in text and "layer3.0.conv1" in text and "latency_64_ms" in text
    assert f"top-1 {found['test']['prec1']:.2%}" in text and f"{found['FLOPs']:,}" in text
    chosen = ("FLOPs", "effective_FLOPs", "compression", "test")
    text = judge.as_text({name: found[name] for name in chosen})
    assert "parameters 1.00x" in text and len(text.splitlines()) == 3


WRONG = [
    ("good --model vgg", "'resnet' 'vgg'"),
    ("good --model preact_res20", "11 20"),
    ("good --model_path good", "one checkpoint"),
    ("", "one checkpoint"),
    ("good --pruned True", "contains a dense network, --pruned True"),
    ("good --num_classes 7", "10, 7"),
    ("good --data_path CIFAR100", "'digits', 'cifar100'"),
    ("good --data_path CIFAR10 --dataset digits", "digits cifar10"),
    ("cifar --data_path CIFAR100 --dataset cifar10", "--dataset cifar10, --data_path cifar100"),
    ("good --data_path here --data there", "--data there, --data_path here"),
    ("good --test_acc --flops maybe", "maybe"),
    ("bare --model resnet --depth 20 --dataset digits", "does not contain a resnet-20"),
    ("cut", "truncated"),
    ("missing", "No such file"),
    ("folder", "a folder without"),
    ("cifar", "cifar10 is not in data.cifar10: --download"),
    ("three --data_path images", "3 classes has 2"),
    ("three --test_acc", "there is no folder"),
]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    save_network(folder / "good", "resnet", 11)
    torch.save(architecture.load(folder / "good")[0].state_dict(), folder / "bare")
    save_network(folder / "cifar", "resnet", 11, "cifar10")
    save_network(folder / "three", "resnet", 11, "folder", num_classes=3)
    (folder / "cut").write_bytes((folder / "good").read_bytes()[:20_000])
    (folder / "folder").mkdir()
    make_images(folder / "images", train=2, test=2)
    return folder


@pytest.mark.parametrize("words, says", WRONG)
def test_what_is_wrong_is_one_line(wrong, monkeypatch, capsys, words, says):
    monkeypatch.chdir(wrong)
    monkeypatch.setattr("sys.argv", ["eval.py", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        entry.run(judge.main)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out
    assert len(printed.err.splitlines()) == 1
    assert all(word in printed.err for word in says.replace(",", " ").split())


def test_data_that_cannot_be_had(tmp_path):
    path = save_network(tmp_path / "cifar", "resnet", 11, "cifar10")
    assert "FLOPs" in succeed("eval.py", "--flops", path, cwd=tmp_path)
    says = ["cannot load or download cifar10", "--dataset digits"]
    (tmp_path / "data.cifar10").mkdir()
    fails(tmp_path, "eval.py", path, "--download", env=UNREACHABLE, says=says)
