"""A training trick is a file of its own, outside of this suite too."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import NARROW, SMALLEST, same

import main
from slimming.cli import flags
from slimming.commands.train import run as train_run
from slimming.data.batches import Batches, Split
from slimming.errors import Interrupted
from slimming.storage import checkpoint
from slimming.storage.architecture import Architecture
from slimming.training.callbacks import EarlyStopping
from slimming.training.penalties import GradientMask, L1Penalty
from slimming.training.settings import TrainSettings
from slimming.training.trainer import RECORD, Trainer


class Average:
    """The average of the weights over all steps, and how the trainer calls a trick."""

    name = "average"

    def __init__(self, model, stop_before=None):
        self.model, self.stop_before, self.calls, self.steps = model, stop_before, [], 0
        self.weights = {n: torch.zeros_like(p) for n, p in model.named_parameters()}

    def before_epoch(self, epoch):
        self.calls.append(f"before {epoch}")
        if epoch == self.stop_before:
            raise KeyboardInterrupt

    def on_gradients(self, batch):
        images, labels = batch
        assert images.shape == (len(labels), 3, 32, 32)
        assert all(p.grad is not None for p in self.model.parameters() if p.requires_grad)
        self.steps += 1
        for name, parameter in self.model.named_parameters():
            self.weights[name] += (parameter.detach() - self.weights[name]) / self.steps

    def after_epoch(self, epoch):
        self.calls.append(f"after {epoch}")

    def close(self):
        self.calls.append("close")

    def state_dict(self):
        return {"weights": self.weights, "steps": self.steps}

    def load_state_dict(self, state):
        self.weights, self.steps = state["weights"], state["steps"]


def train(folder, images, *more, stop_before=None):
    """What `main.main` does, with one line more."""
    words = f"-sr --dataset folder --data {images} --arch resnet --depth {SMALLEST['resnet']} "
    words += f"--epochs 3 --batch-size 16 --no-cuda --no-tensorboard --save {folder}"
    run, start = train_run.main_run(flags.parse(main.make_parser(), [*words.split(), *more]))
    trainer = train_run.prepare(run, start)
    average = Average(trainer.model, stop_before)
    penalty = L1Penalty(trainer.model, run.train.s)
    train_run.run_epochs(
        trainer, [penalty, average], run.folder("resnet"), run.data, tensorboard=False
    )
    return average


class Renewal:
    """Continues with a copy of the network, as pruning during training does."""

    def __init__(self, trainer):
        self.trainer = trainer

    def before_epoch(self, epoch):
        self.trainer.replace(copy.deepcopy(self.trainer.model), self.trainer.architecture)


@pytest.mark.parametrize("renewed", [False, True])
def test_the_penalty_and_the_mask_follow_a_network_that_is_replaced(renewed, tmp_path):
    network = Architecture("vgg", 11, "cifar10", 2, NARROW["vgg"])
    model = network.build()
    bn = model.get_submodule("feature.1")
    bn.weight.data[0] = bn.bias.data[0] = 0
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = Split(images, torch.arange(32) % 2, ["a", "b"])
    loaders = [Batches(data, 8, augment) for augment in (True, False)]
    trainer = Trainer(model, network, *loaders, TrainSettings(epochs=4, lr=0.05))
    edits = L1Penalty(model, 0.3), GradientMask(model, trainer.optimizer)
    trainer.add(*edits, *([Renewal(trainer)] if renewed else []))
    trainer.fit()
    gamma = trainer.model.get_submodule("feature.1").weight
    assert gamma[0] == 0 and 0 < gamma[1:].abs().mean() < 0.25  # from 0.5
    assert (trainer.model is not model) == renewed


@pytest.mark.slow
def test_a_trick_that_the_file_does_not_know_starts_anew(images, tmp_path, capsys):
    last = tmp_path / "checkpoint.pth.tar"
    with pytest.raises(Interrupted):
        train(tmp_path, images, stop_before=1)
    contents = checkpoint.read(last)
    del contents["average"]
    checkpoint.write(last, contents)
    resumed = train(tmp_path, images, "--resume", str(last))
    assert resumed.steps == 6 and resumed.calls[0] == "before 1"
    assert "note: the resumed run has no state of 'average'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "scores, stops",
    [((0.5, 0.5), True), ((0.5, 0.6), False), ((0.5,), False), ((0.6, 0.5, 0.7), False)],
)
def test_early_stopping_ends_a_run_whose_last_epoch_is_no_better(scores, stops):
    run = SimpleNamespace(history=[{"test_prec1": top} for top in scores], stopped=False)
    EarlyStopping(run, 0).before_epoch(len(scores))
    assert not run.stopped, "0 disables it"
    EarlyStopping(run, 1).before_epoch(len(scores))
    assert run.stopped == stops


def small_trainer(**settings):
    network = Architecture("vgg", 11, "cifar10", 2, NARROW["vgg"])
    data = Split(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8) % 2, ["a", "b"])
    loaders = [Batches(data, 8, augment) for augment in (True, False)]
    return Trainer(network.build(), network, *loaders, TrainSettings(**settings))


def test_the_best_network_is_one_that_the_run_still_trains(tmp_path):
    """After the network was replaced, the first epoch is the best, whatever its top-1 is."""
    trainer, paths = small_trainer(), (tmp_path / "last", tmp_path / "best")

    def best_after(epoch, top1):
        trainer.history.append({"epoch": epoch, "test_prec1": top1})
        trainer.save(*paths)
        return checkpoint.read(paths[1])

    assert best_after(0, 0.9)["epoch"] == 1
    assert best_after(1, 0.8)["epoch"] == 1
    trainer.replace(copy.deepcopy(trainer.model), trainer.architecture)
    best = best_after(2, 0.0)
    assert (best["epoch"], best["best_prec1"]) == (3, 0.0)
    assert best_after(3, 0.4)["epoch"] == 4 and best_after(4, 0.35)["epoch"] == 4


def test_a_run_that_goes_back_to_an_epoch_forgets_those_after_it():
    record = dict.fromkeys(RECORD, 0.5)
    history = [{**record, "epoch": epoch} for epoch in range(4)]
    contents = {"epoch": 4, "best_prec1": 0.5, "history": history}
    for start, left in ((None, [0, 1, 2, 3]), (2, [0, 1])):
        trainer = small_trainer(start_epoch=start)
        trainer.from_contents("file", contents)
        assert [known["epoch"] for known in trainer.history] == left
        assert trainer.epoch == len(left)


def test_early_stopping_counts_the_epochs_of_a_run_that_did_not_start_at_0(capsys):
    run = SimpleNamespace(history=[{"test_prec1": top} for top in (0.5, 0.4)], stopped=False)
    EarlyStopping(run, 1).before_epoch(7)
    assert run.stopped and "training stops after 7" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trick_from_outside_is_called_saved_and_resumed(images, tmp_path):
    whole = train(tmp_path / "whole", images)
    per_epoch = [f"{when} {epoch}" for epoch in range(3) for when in ("before", "after")]
    assert whole.calls == [*per_epoch, "close"] and whole.steps == 9

    with pytest.raises(Interrupted):
        train(tmp_path / "parts", images, stop_before=2)
    last = tmp_path / "parts" / "checkpoint.pth.tar"
    assert checkpoint.read(last)["average"]["steps"] == 6
    resumed = train(tmp_path / "parts", images, "--resume", str(last))
    assert resumed.calls == ["before 2", "after 2", "close"]
    assert same(resumed.state_dict(), whole.state_dict())
