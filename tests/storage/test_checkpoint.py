"""Checkpoints: data only, whole or not at all, and enough to rebuild the network."""

import pickle
import resource

import pytest
import torch
from conftest import SMALLEST, keep_only, randomize, same, save_network
from warm import ROOT

from models import NETWORKS, resnet, zoo
from slimming.choosing.threshold import choose_channels
from slimming.errors import UserError
from slimming.storage import architecture, checkpoint, files
from slimming.storage.architecture import Architecture, Request


class Evil:
    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path("code-ran"),)


@pytest.fixture
def saved(tmp_path):
    return save_network(tmp_path / "model.pth.tar", "resnet", 11)


def test_whoever_holds_a_checkpoint_rebuilds_its_network_without_flags(small, tmp_path):
    arch = type(small).__name__
    slim = keep_only(small, choose_channels(small, 0.4).kept)
    network = Architecture(arch, SMALLEST[arch], "digits", 10, slim.cfg)
    checkpoint.write(tmp_path / "slim", architecture.contents_of(slim, network, 3, 0.5))
    model, found, contents = architecture.load(tmp_path / "slim")
    assert found == network and contents["epoch"] == 3 and contents["best_prec1"] == 0.5
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), slim(images))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, depth, classes, dataset",
    [
        *((arch, depth, 10, "cifar10") for arch, depth in SMALLEST.items()),
        *(("vgg", 13, 100, "cifar100"), ("resnet", 20, 100, "cifar100")),
        ("densenet", 10, 100, "cifar100"),
    ],
)
def test_a_file_of_the_original_suite_loads_without_flags(
    tmp_path, capsys, arch, depth, classes, dataset
):
    """It has no arch, depth, dataset or class count, and old ones count no batches."""
    dense = randomize(NETWORKS[arch](depth=depth, num_classes=classes))
    slim = keep_only(dense, choose_channels(dense, 0.4).kept)
    for model, cfg in ((dense, None), (slim, slim.cfg)):
        state = {n: v for n, v in model.state_dict().items() if "num_batches" not in n}
        path = tmp_path / f"old-{bool(cfg)}"
        torch.save({"state_dict": state} | ({"cfg": cfg} if cfg else {}), path)
        loaded, network, _ = architecture.load(path)
        assert network == Architecture(arch, depth, dataset, classes, cfg)
        assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in state)
        (note,) = capsys.readouterr().out.splitlines()
        told = f"arch {arch}, depth {depth}, dataset {dataset}; if it was trained on other data"
        assert f"{path} does not record its network" in note and told in note
        architecture.load(path, Request(arch=arch))  # as the pruning scripts do
        assert f"of depth {depth}, dataset {dataset};" in capsys.readouterr().out
        assert architecture.load(path, Request(dataset="digits"))[1].dataset == "digits"
        given = {"arch": arch, "depth": depth, "dataset": "digits", "num_classes": classes}
        capsys.readouterr()
        architecture.load(path, Request(**given))
        assert not capsys.readouterr().out
        with pytest.raises(UserError, match="does not contain"):
            architecture.load(path, Request(**{**given, "num_classes": 7}))


def test_weights_of_another_program_are_not_guessed(tmp_path):
    for number, model in enumerate((NETWORKS["resnet-56"](), zoo.classifier("resnet50"))):
        torch.save(model.state_dict(), tmp_path / f"{number}")
        with pytest.raises(UserError, match="does not record its arch and"):
            architecture.load(tmp_path / f"{number}")


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "DataParallel"])
@pytest.mark.parametrize("arch", [*SMALLEST, "mobilenet", "resnet-56", "squeezenet1_1"])
def test_a_bare_state_dict_loads_with_the_flags_values(tmp_path, arch, prefix):
    """The number of classes follows from the weights."""
    network = Architecture(arch, SMALLEST.get(arch), "folder", 7)
    state = network.build().state_dict()
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "bare")
    with pytest.raises(UserError, match=r"does not record .*: add .*`dataset`"):
        architecture.load(tmp_path / "bare")
    given = {"arch": arch, "depth": network.depth, "dataset": "folder"}
    model, found, _ = architecture.load(tmp_path / "bare", Request(**given))
    assert found == network
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_names_of_data_parallel_are_those_of_the_network(saved, tmp_path):
    contents = checkpoint.read(saved)
    wrapped = torch.nn.DataParallel(architecture.load(saved)[0]).state_dict()
    torch.save({**contents, "state_dict": wrapped}, tmp_path / "wrapped")
    assert checkpoint.read(tmp_path / "wrapped")["state_dict"].keys() == {
        name.removeprefix("module.") for name in wrapped
    }
    assert architecture.load(tmp_path / "wrapped")[1] == architecture.load(saved)[1]


@pytest.mark.parametrize(
    "flag, value", [("arch", "vgg"), ("depth", 20), ("dataset", "cifar10"), ("num_classes", 100)]
)
def test_a_flag_that_contradicts_is_an_error_that_names_both(saved, flag, value):
    stored = checkpoint.read(saved)[flag]
    with pytest.raises(UserError) as error:
        architecture.load(saved, Request(**{flag: value}))
    assert repr(stored) in str(error.value) and repr(value) in str(error.value)


def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "cfg": Evil()}, "zip.pth.tar")
    torch.save({"state_dict": Evil()}, "legacy.pth.tar", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth.tar").write_bytes(pickle.dumps(Evil()))
    for name in ("zip", "legacy", "bare"):
        with pytest.raises(UserError):
            checkpoint.read(f"{name}.pth.tar")
    assert not (tmp_path / "code-ran").exists()


def test_a_file_cut_at_any_place_is_one_clear_error(saved, tmp_path):
    whole = saved.read_bytes()
    cut = tmp_path / "cut"
    for length in [0, 1, 100, *range(1000, len(whole), len(whole) // 20)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut"):
            checkpoint.read(cut)


def test_a_damaged_byte_is_found_or_harmless(saved, tmp_path):
    """Whatever a flipped byte does, the reader gets a UserError, or the very same weights: most of
    a file is weights, so most flips are found."""
    whole, found = saved.read_bytes(), 0
    intact = checkpoint.read(saved)["state_dict"]
    for place in range(0, len(whole), len(whole) // 25):
        (tmp_path / "flipped").write_bytes(
            whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
        )
        try:
            state = checkpoint.read(tmp_path / "flipped")["state_dict"]
        except UserError as error:
            assert "flipped" in str(error)
            found += 1
        else:
            assert same(dict(state), dict(intact))
    assert found >= 20


@pytest.mark.parametrize(
    "contents",
    [
        [1, 2],
        {},
        {"no": "state_dict"},
        {"state_dict": [1]},
        {"state_dict": {"a": 1}},
        {"state_dict": {1: torch.zeros(1)}},
        {"state_dict": {}, "arch": 7},
        {"state_dict": {}, "cfg": "M"},
        {"state_dict": {}, "depth": 1.5},
    ],
)
def test_other_data_is_one_clear_error(tmp_path, contents):
    torch.save(contents, tmp_path / "other")
    with pytest.raises(UserError, match="other"):
        architecture.load(tmp_path / "other", Request("vgg", 11, "cifar10"))


def test_masks_that_contradict_the_widths_are_an_error(saved):
    contents = checkpoint.read(saved)
    contents["state_dict"]["layer1.0.select.indexes"][3] = 0
    checkpoint.write(saved, contents)
    with pytest.raises(UserError, match="masks and widths"):
        architecture.load(saved)


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(saved):
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a full disk
    try:
        with pytest.raises(UserError, match="cannot write"):
            checkpoint.write(saved, {"state_dict": {"a": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_folder_means_the_best_model_in_it(tmp_path):
    patterns = ("model_best.pth.tar", "*_best.pth.tar")
    assert files.find(tmp_path / "x.pth.tar", *patterns) == tmp_path / "x.pth.tar"
    with pytest.raises(UserError, match="a folder without"):
        files.find(tmp_path, *patterns)
    (tmp_path / "a_best.pth.tar").touch()
    assert files.find(tmp_path, *patterns).name == "a_best.pth.tar"
    (tmp_path / "b_best.pth.tar").touch()
    with pytest.raises(UserError, match="give the path of"):
        files.find(tmp_path, *patterns)
    (tmp_path / "model_best.pth.tar").touch()
    assert files.find(tmp_path, *patterns).name == "model_best.pth.tar"
    assert files.find(tmp_path / "best_acc", *patterns).name == "model_best.pth.tar"


def test_weights_with_and_without_selection_load_into_each_other():
    import importlib

    masked = importlib.import_module("mask-impl.models").NETWORKS
    network = Architecture("resnet", 11, "digits", 10)
    model = randomize(resnet(depth=11))
    bare = architecture.load_network("x", {"state_dict": model.state_dict()}, network, masked)
    back = architecture.load_network("x", {"state_dict": bare.state_dict()}, network)
    assert all(torch.equal(v, back.state_dict()[n]) for n, v in model.state_dict().items())
    model.select.indexes.data[0] = 0
    with pytest.raises(UserError, match="not with mask-impl"):
        architecture.load_network("x", {"state_dict": model.state_dict()}, network, masked)


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "checkpoints").iterdir(), key=str))
def test_files_of_earlier_versions_load_and_compute_the_same(path):
    """Written on 2026-11-21, each with the logits of two images."""
    model, _, contents = architecture.load(path)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in contents["state_dict"].items())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # equal to the bit where they were written; other processors round
        torch.testing.assert_close(model.eval()(images), contents["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("contents", [torch.ones(3), [1], "text", {}])
def test_a_file_of_something_else_is_one_line(tmp_path, contents):
    torch.save(contents, tmp_path / "file")
    with pytest.raises(UserError, match="not a checkpoint of this suite"):
        checkpoint.read(tmp_path / "file")


def test_options_are_compared_one_by_one(tmp_path):
    stored = {"arch": "densenet", "options": {"growthRate": 6, "dropRate": 0.1}}
    same = architecture.describe("file", stored, Request(options={"growthRate": 6}))
    assert same.options == stored["options"]
    with pytest.raises(UserError, match="has growthRate 6, but 7 was requested"):
        architecture.describe("file", stored, Request(options={"growthRate": 7}))


def test_a_damaged_weight_is_found(tmp_path):
    path = tmp_path / "model.pth.tar"
    checkpoint.write(path, {"state_dict": {"weight": torch.full((1000,), 1.5)}})
    data = bytearray(path.read_bytes())
    place = data.index(torch.full((4,), 1.5).numpy().tobytes()) + 400
    data[place : place + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not as it was written"):
        checkpoint.read(path)
