"""Rounds remove equally many filters; a stopped run ends as if it had not been stopped."""

import functools
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALLEST, fails, make_images, same, save_network, succeed
from warm import start

import flowprune
from models import NETWORKS, cifar_resnet
from slimming.channels.groups import count_filters
from slimming.choosing.importance import MEASURES
from slimming.cli import flags
from slimming.commands.pruning import RepairSettings
from slimming.commands.rounds import run as steps
from slimming.commands.rounds.run import Rounds, flow_run, prepare
from slimming.commands.rounds.settings import FlowRun, RoundsSettings
from slimming.commands.settings import split_data_path
from slimming.errors import UserError
from slimming.settings import build, kept
from slimming.slicing.prune import groups
from slimming.storage import architecture, checkpoint
from slimming.training.trainer import Trainer

FLAGS = "--batch-size 8 --imp_samples 8 --no-tensorboard --device cpu".split()
TWO = "--epochs 4 --bypass --warmup_epochs 1 --n_rounds 2".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("few") / "images", train=8, test=4)


@pytest.fixture
def shallow(monkeypatch):
    """In this process resnet-56, the default, has 8 layers: coupled as they are in 56."""
    monkeypatch.setitem(NETWORKS, "resnet-56", functools.partial(cifar_resnet, 8))


@pytest.fixture
def flow(images, monkeypatch, tmp_path, quick, shallow):
    """Run flowprune.py in this process; the checkpoint that it leaves."""

    def start(*words, folder="out"):
        words = ["flowprune.py", "--data_path", images, *FLAGS, "--save", tmp_path / folder, *words]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        flowprune.main()
        return checkpoint.read(tmp_path / folder / "checkpoint.pth.tar")

    return start


@pytest.fixture
def built(images, tmp_path, shallow):
    """The trainer and the rounds of flags, not yet started."""

    def start(*words):
        words = ["--data_path", images, *FLAGS, "--save", tmp_path, *words]
        run, start = flow_run(parsed(*words))
        trainer = prepare(run, start)
        return trainer, Rounds(run, trainer)

    return start


def parsed(*words):
    return flags.parse(flowprune.make_parser(), list(map(str, words)))


def test_each_round_removes_equally_many_of_the_original_filters():
    """And of what is left it is the share p / (r p + n (1 - p)), with r rounds to go."""
    removed = RoundsSettings(n_rounds=25, prune_percent=75.0).removed
    p, n = 0.75, 25
    for done in range(n):
        before, after = (1 - (removed(k) if k else 0) for k in (done, done + 1))
        assert before - after == pytest.approx(p / n)
        assert 1 - after / before == pytest.approx(p / ((n - done) * p + n * (1 - p)))
    steps = build(RoundsSettings, parsed("--thresholds", "[10, 50, 80]"))
    assert [steps.removed(k) for k in (1, 2, 3)] == [0.1, 0.5, 0.8] and steps.epochs == range(3)


def test_the_learning_rate_of_rounds_is_lr_prune(built):
    words = "--epochs 20 --warmup_epochs 2 --n_rounds 3 --lr_prune 0.05"
    trainer, _ = built(*words.split())
    rates = [0.1] * 2 + [0.05] * 3 + [0.1] * 5 + [0.01] * 5 + [0.001] * 5
    assert [trainer.schedule(e) for e in range(20)] == pytest.approx(rates)


def test_filters_left_and_the_record_of_a_run(flow, tmp_path):
    """As spelled in the original: `--track_stats True`, `--use_l2=False`."""
    words = ["--bypass", "True", "--track_stats", "True", "--use_l2=False", "--epochs", 4]
    saved = flow(*words, "--warmup_epochs", 1, "--thresholds", "[20,60]", "--amp")
    told = saved["flow"]
    largest = max(int(g.filters.max()) for g in groups(*_full("resnet-56")))
    for done, gone in zip(told["rounds"], (0.2, 0.6), strict=True):
        assert 0 <= done["filters"] - told["dense"]["filters"] * (1 - gone) < largest
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    for part in ("train", "test"):
        epochs = {phase: [e["epoch"] for e in told] for phase, told in stats[part].items()}
        assert epochs == {"warmup": [0], "pruning": [1, 2], "final": [3]}
    assert stats["rounds"] == told["rounds"] and (tmp_path / "out" / "flow.png").stat().st_size
    model, network, _ = architecture.load(tmp_path / "out" / "checkpoint.pth.tar")
    images = torch.rand(1, 3, 32, 32)
    left = count_filters(groups(model, images))
    assert network.num_classes == 2 and left == told["rounds"][-1]["filters"]


def _full(arch):
    model = architecture.Architecture(arch, None, "folder", 2).build()
    return model, torch.rand(1, 3, 32, 32)


@pytest.mark.parametrize(
    "words, tracked, batches",
    [
        ("", False, 20),
        ("--track_batches True", True, 20),
        ("--track_batches=False", False, 20),
        ("--track_batches 7", False, 7),
        ("--track_importance --track_batches 7", True, 7),
        ("--track_batches true --track_batches 7", True, 7),
        ("--track_batches 7 --track_batches True", True, 7),
        ("--track_importance True --track_batches False", False, 20),
        ("--track_batches False --track_importance", True, 20),
        ("--track_batches 7 --track_importance", True, 7),
    ],
)
def test_track_batches_is_a_switch_and_a_number(words, tracked, batches):
    """As in the original, whose README has it twice."""
    settings = build(FlowRun, parsed(*words.split())).importance
    assert (settings.track_importance, settings.track_batches) == (tracked, batches)
    assert type(settings.track_batches) is int


KEPT = {
    **{"model": "resnet-56", "pruning_type": "mag_based", "prune_percent": 75.0, "n_rounds": 1},
    **{"thresholds": "", "warmup_epochs": 0, "bypass": False, "T": 5.0, "grasp_T": 200.0},
    **{"imp_samples": 2560, "track_importance": False, "track_batches": 20, "alpha": 0.8},
    **{"use_l2": False, "use_init": False, "epochs": 160, "lr_prune": 0.1, "moment": 0.9},
    **{"preserve_moment": False, "batch_size": 128, "weight_decay": 1e-4, "seed": 0},
    **{"amp": False, "deterministic": False, "track_stats": False},
}


def test_what_checkpoints_keep_is_what_they_always_kept():
    """So that a run of an earlier version goes on; --thresholds say how many rounds there are."""
    later = kept(RepairSettings())
    assert kept(FlowRun()) == KEPT | later
    run = build(FlowRun, parsed("--thresholds", "[20,60]", "--bypass", "--depth", 20))
    more = {"thresholds": "[20,60]", "n_rounds": 2, "prune_percent": 60.0, "bypass": True}
    assert kept(run) == KEPT | later | more
    assert run.folder.path == Path("pruned_nets/resnet-56_mag_based_60")


@pytest.mark.parametrize(
    "words, network",
    [
        ("--model vgg", "vgg-13"),
        ("--model vgg --depth 11", "vgg-11"),
        ("--model resnet --depth 11", "resnet-11"),
        ("--model densenet --depth 7", "densenet-7"),
        ("--model densenet", "densenet-40"),
    ],
)
def test_the_networks_of_the_paper_have_a_depth(built, words, network):
    trainer, _ = built(*words.split())
    assert trainer.architecture.name == network


def test_a_pretrained_network_says_its_depth(built, images, capsys, tmp_path):
    """And nothing is said of fine-tuning: the network is pruned."""
    start = save_network(tmp_path / "start", "vgg", 11, "folder", 2, classes=["blue", "red"])
    words = ["--model", "vgg", "--pretrained_path", start]
    trainer, _ = built(*words)
    assert trainer.architecture.name == "vgg-11"
    assert same(trainer.model.state_dict(), checkpoint.read(start)["state_dict"])
    assert "is not pruned" not in capsys.readouterr().out
    with pytest.raises(UserError, match="has depth 11, but 13 was requested"):
        built(*words, "--depth", 13)


@pytest.mark.parametrize(
    "given, read",
    [
        ((None, "digits", "here"), ("digits", "here")),
        (("CIFAR10", None, "here"), ("cifar10", "here")),
        (("cifar100", "cifar100", None), ("cifar100", None)),
        (("photos", "folder", None), ("folder", "photos")),
        (("photos", None, "photos"), (None, "photos")),
    ],
)
def test_a_data_path_is_a_data_set_or_a_folder(given, read):
    assert split_data_path(*given) == read


def test_track_batches_true_tracks(built):
    trainer, rounds = built("--track_batches", True, "--warmup_epochs", 1)
    rounds.before_epoch(0)
    steps = len(trainer.train_loader)
    assert rounds.scores.tracker.start == max(0, steps - 20)


@pytest.mark.slow
def test_num_classes_beyond_those_of_the_data(flow, images, tmp_path):
    """Built, trained, pruned, resumed, pruned again, evaluated and fine-tuned."""
    words = ["--bypass", "--prune_percent", 50, *"--model resnet --depth 11".split()]

    def outputs(path):
        model, network, contents = architecture.load(path)
        assert contents["classes"] == ["blue", "red"]
        return {network.num_classes, model.fc.out_features, len(contents["state_dict"]["fc.bias"])}

    last, again, tuned = (tmp_path / f / "checkpoint.pth.tar" for f in ("out", "again", "tuned"))
    flow(*words, "--num_classes", 5, "--epochs", 1)
    assert outputs(last) == {5}
    flow("--resume", last, "--epochs", 2)
    assert outputs(last) == {5} and checkpoint.read(last)["epoch"] == 2
    flow(*words, "--epochs", 1, "--pretrained_path", last, folder=again.parent)
    assert outputs(again) == {5}
    succeed("eval.py", last, "--data_path", images, "--test_acc")
    short = ["--epochs", 1, "--no-tensorboard", "--batch-size", 8, "--save", tuned.parent]
    succeed("main.py", "--refine", last, "--data", images, *short)
    assert outputs(tuned) == {5}


def test_spare_outputs_are_no_licence_for_other_data(images, tmp_path, tmp_path_factory):
    folder, classes = tmp_path_factory.mktemp("images"), ["blue", "red"]
    net = save_network(tmp_path / "net", "resnet", 11, "folder", 5, classes=classes)
    words = ["eval.py", net, "--test_acc", "--data_path"]
    said = "has num classes 5, but 4 was requested"
    fails(tmp_path, *words, images, "--num_classes", 4, says=said)
    others = make_images(folder / "others", classes=("blue", "green"), train=1, test=1)
    fails(tmp_path, *words, others, says=["'red'", "'green'"])
    fewer = make_images(folder / "fewer", classes=("blue",), train=1, test=1)
    for more in ([], ["--num_classes", 5]):
        fails(tmp_path, *words, fewer, *more, says="has 5 classes, but the data has 1")


def test_a_file_that_records_no_classes_needs_num_classes(images, tmp_path):
    """As the original writes it, whose default is 100 for any data."""
    save_network(tmp_path / "net", "resnet", 11, "folder", 100)
    words = ["eval.py", tmp_path / "net", "--data_path", images, "--test_acc"]
    fails(tmp_path, *words, says="has 100 classes, but the data has 2")
    succeed(*words, "--num_classes", 100)


@pytest.mark.slow
@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_prunes(flow, measure):
    saved = flow("--epochs", 1, "--pruning_type", measure, "--prune_percent", 50)
    told = saved["flow"]
    assert told["rounds"][0]["filters"] / told["dense"]["filters"] == pytest.approx(0.5, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet", "densenet"])
@pytest.mark.parametrize("measure", ["mag_based", "bn", "biased_loss_tracked"])
def test_networks_that_select_channels(flow, tmp_path, arch, measure):
    """Round after round; momentum and initial values go where their channels go."""
    words = ["--model", arch, "--depth", SMALLEST[arch], "--prune_percent", 60, "--preserve_moment"]
    told = flow(*TWO, *words, "--pruning_type", measure, "--use_init")["flow"]
    for done, gone in zip(told["rounds"], (0.3, 0.6), strict=True):
        assert 0 <= done["filters"] - told["dense"]["filters"] * (1 - gone) <= 1
        assert done["difference"] <= 1e-4 and done["liveness"] > 0
    model, network, _ = architecture.load(tmp_path / "out" / "checkpoint.pth.tar")
    assert count_filters(groups(model, torch.rand(1, 3, 32, 32))) == told["rounds"][-1]["filters"]
    assert network.cfg == model.cfg and sum(model.cfg) == told["rounds"][-1]["filters"]
    for name, p in model.named_parameters():
        assert not p.requires_grad or told["initial"][name].shape == p.shape


MORE = {
    "moment": "--preserve_moment --track_stats",
    "tracked": "--pruning_type biased_loss_tracked",
    "second order": "--pruning_type grad_preserve --track_importance --track_batches 2",
    "average": "--track_importance True --pruning_type fisher --track_batches 3",
    "init": "--use_init --pruning_type biased_loss --track_stats",
}
NETWORK = dict.fromkeys(("average", "init"), "--model resnet --depth 11")


@pytest.mark.slow
@pytest.mark.parametrize("more", MORE)
def test_a_stopped_run_ends_as_one_that_was_not(flow, monkeypatch, tmp_path, more):
    """Stopped before the first round and before the second; with `--resume auto`."""
    words = [*TWO, *MORE[more].split(), *NETWORK.get(more, "").split(), "--prune_percent", 50]
    whole = flow(*words, folder="whole")
    end_epoch = Trainer.end_epoch
    for stop in (1, 2):

        def stopped(self, epoch, *scores, stop=stop):
            if epoch == stop:
                raise KeyError("killed")
            end_epoch(self, epoch, *scores)

        monkeypatch.setattr(Trainer, "end_epoch", stopped)
        with pytest.raises(KeyError, match="killed"):
            flow(*words, "--resume", "auto")
    monkeypatch.setattr(Trainer, "end_epoch", end_epoch)
    assert same(flow(*words, "--resume", "auto"), whole)
    if "--track_stats" in words:
        texts = [(tmp_path / f / "stats.json").read_text() for f in ("whole", "out")]
        assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_killed_process_goes_on(images, tmp_path):
    words = ["--data_path", images, *FLAGS, *TWO, "--prune_percent", "50", "--preserve_moment"]
    words += "--model resnet --depth 11".split()
    succeed("flowprune.py", *words, "--save", tmp_path / "whole")
    last = tmp_path / "out" / "checkpoint.pth.tar"
    process = start("flowprune.py", *words, "--save", tmp_path / "out")
    while not last.exists() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    succeed("flowprune.py", "--resume", last, "--data_path", images, "--no-tensorboard")
    assert same(checkpoint.read(last), checkpoint.read(tmp_path / "whole" / last.name))
    tuned = tmp_path / "tuned" / "checkpoint.pth.tar"
    refine = f"main.py --refine {last} --data {images} --epochs 1 --no-tensorboard"
    printed = succeed(f"{refine} --save {tuned.parent}")
    assert "slim resnet-11" in printed and "before: the full network" in printed
    assert checkpoint.read(tuned)["cfg"] == checkpoint.read(last)["cfg"]
    says = ["has dataset 'folder'", "'cifar10' was requested"]
    fails(tmp_path, f"flowprune.py --resume {last} --data_path CIFAR10", says=says)
    command = f"flowprune.py --resume {tuned} --data_path {images} --model resnet --depth 11"
    fails(tmp_path, command, says="has no state of pruning rounds")


def test_resume_reads_the_checkpoint_before_it_judges_the_flags(flow, tmp_path, capsys):
    """It holds --bypass; and what it may not hold is said before the folder is touched."""
    flow("--epochs", 2, "--bypass", "--warmup_epochs", 1, "--track_importance")
    last = tmp_path / "out" / "checkpoint.pth.tar"
    capsys.readouterr()
    run, _ = flow_run(parsed("--resume", last, "--warmup_epochs", 2, "--epochs", 3))
    said = f"note: --warmup_epochs is 2 now, it was 1 in {last}"
    assert said in capsys.readouterr().out
    assert run.rounds.bypass and run.rounds.epochs == range(2, 3) and run.folder.last == last
    contents = checkpoint.read(last)
    checkpoint.write(last, contents | {"settings": contents["settings"] | {"pruning_type": "no"}})
    with pytest.raises(UserError, match="damaged: its --pruning_type must be one of mag_based"):
        flow("--resume", last)
    del contents["flow"]
    checkpoint.write(last, contents)
    with pytest.raises(UserError, match="has no state of pruning rounds"):
        flow("--resume", last, "--epochs", 3, folder="elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("keep", [True, False])
def test_momentum_follows_its_channels(built, monkeypatch, keep):
    trainer, rounds = built("--preserve_moment", keep, "--prune_percent", 50)
    slims, apply = [], steps.apply
    monkeypatch.setattr(steps, "apply", lambda *a: slims.append(apply(*a)) or slims[0])
    dense, state = trainer.model, trainer.optimizer.state
    before = {}
    for name, p in dense.named_parameters():
        before[name] = state[p]["momentum_buffer"] = torch.randn_like(p)
    rounds.before_epoch(0)
    for name, p in trainer.model.named_parameters():
        layer, _, part = name.rpartition(".")
        kept, expected = slims[0].kept.get(layer, {}), before[name]
        if "out" in kept:
            expected = expected[kept["out"]]
        if "in" in kept and part == "weight":
            expected = expected[:, kept["in"]]
        expected = expected if keep else torch.zeros_like(p)
        assert torch.equal(trainer.optimizer.state[p]["momentum_buffer"], expected), name


@pytest.mark.slow
def test_two_processes_end_with_one_network(images, tmp_path):
    words = ["--data_path", images, *FLAGS, "--epochs", 2, "--pruning_type", "biased_loss"]
    words += ["--model", "resnet", "--depth", 11]
    words += ["--prune_percent", 50, "--track_stats", "--save", tmp_path / "out"]
    env = {"OWN": str(tmp_path)}
    printed = succeed("tests/two_flows.py", *words, processes=2, env=env)
    assert printed.count("round 1 of 1") == printed.count("stats.json") == 1, "one voice"
    last = tmp_path / "out" / "checkpoint.pth.tar"
    architecture.load(last)
    for epoch in range(2):
        assert same(*(torch.load(tmp_path / f"{epoch}-{rank}.pth") for rank in range(2)))


@pytest.mark.parametrize(
    "words, says",
    [
        ("--prune_percent 96", "--prune_percent must be at most 95"),
        ("--warmup_epochs 80", "--warmup_epochs"),
        ("--thresholds [50,10]", "increasing percentages"),
        ("--thresholds []", "increasing percentages"),
        ("--use_l2 --use_init", "contradict"),
        ("--use_l2 maybe", "True or False"),
        ("--track_batches maybe", "--track_batches: must be an integer of at least 1"),
        ("--data_path CIFAR10", "--download True"),
        ("--data_path CIFAR10 --resume auto", "--download True"),
        ("--thresholds [10,50] --n_rounds 5", "--n_rounds 5 and --thresholds [10,50] contradict"),
        ("--thresholds [10,50] --prune_percent 9", "--prune_percent 9 and --thresholds [10,50]"),
        ("--data_path nowhere", "there is no folder nowhere: --data_path is"),
        ("--data_path CIFAR10 --dataset digits", "--dataset digits and --data_path cifar10"),
        ("--data_path cifar100 --dataset cifar10", "--dataset cifar10 and --data_path cifar100"),
        ("--data_path CIFAR100 --dataset folder", "--dataset folder and --data_path cifar100"),
        ("--data_path here --data there", "--data there and --data_path here contradict"),
        ("--pretrained_path none.pth.tar", "none.pth.tar"),
        ("--num_classes 1", "--num_classes must be at least 2, the classes of the data"),
    ],
)
def test_what_cannot_be_is_one_line(images, tmp_path, words, says):
    words = words.split()
    data = [] if "--data_path" in words else ["--data_path", images]
    fails(tmp_path, "flowprune.py", *data, *FLAGS, *words, says=says)
