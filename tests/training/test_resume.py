"""A run that is killed and resumed ends bit-identical to one that was not."""

import copy
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import fails, make_images, same, save_network, succeed
from warm import ROOT, run, start

import main
from slimming.data.batches import Batches, Split
from slimming.errors import Interrupted
from slimming.runtime.device import AUGMENTATION, DROPOUT, epoch_generator
from slimming.storage import architecture, checkpoint
from slimming.storage.architecture import Architecture
from slimming.training.settings import RunFolder, TrainSettings
from slimming.training.trainer import Trainer

EPOCHS = 12
RESNET = "main.py --dataset folder --arch resnet --depth 11 --no-tensorboard"
FLAGS = f"-sr --s 0.001 --epochs {EPOCHS} --batch-size 16 --seed 3"


def small_run(images, folder):
    """One epoch of a small network on ``images``, with results in ``folder``."""
    return f"{RESNET} --epochs 1 --data {images} --save {folder}"


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "--amp"], ids=["fp32", "amp"])
def test_killed_three_times_and_resumed(tmp_path, extra):
    images = make_images(tmp_path / "images", train=60)
    command = f"{RESNET} {FLAGS} --data {images} {extra} --save {tmp_path}"
    succeed(f"{command}/whole")
    last = tmp_path / "killed" / "checkpoint.pth.tar"
    rng = random.Random(os.getpid())
    for kill in range(3):
        resume = f"--resume {last}" if last.exists() else ""
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = start(f"{command}/killed {resume}")
        while process.is_alive() and not (last.exists() and last.stat().st_mtime_ns != before):
            time.sleep(0.005)  # at least one epoch further each time, so that every kill counts
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
        architecture.load(last)  # always loadable
        print(f"kill {kill}: after epoch {checkpoint.read(last)['epoch']}")
    succeed(f"{command}/killed --resume {last}")
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        whole, resumed = (checkpoint.read(tmp_path / run / name) for run in ("whole", "killed"))
        assert same(whole, resumed), name
    final = checkpoint.read(last)
    assert final["epoch"] == len(final["history"]) == EPOCHS


def test_resume_needs_no_other_flag_and_says_what_changed(images, tmp_path):
    last = tmp_path / "out" / "checkpoint.pth.tar"
    succeed(f"{small_run(images, last.parent)} -sr --s 0.01 --batch-size 32")
    resume = f"main.py --resume {last} --data {images} --no-tensorboard"
    printed = succeed(f"{resume} --epochs 2 --device cpu")
    assert "--epochs is 2 now, it was 1" in printed and "sparsity s = 0.01" in printed
    contents = checkpoint.read(last)
    assert contents["epoch"] == 2 and contents["settings"]["batch_size"] == 32
    assert "all 2 epochs are done" in succeed(resume)


@pytest.mark.parametrize("script", ["main.py", "mask-impl/main_mask.py"])
def test_refine_beside_a_named_resume_is_an_error(tmp_path, script):
    """Whether there are such files or not."""
    says = ["--refine and --resume contradict", "omit --refine", "--resume auto"]
    command = f"{script} --refine pruned.pth.tar --resume=checkpoint.pth.tar"
    fails(tmp_path, command, says=says)


def test_a_command_with_refine_can_be_started_again(images, tmp_path):
    """With `--resume auto`: it begins with --refine, and goes on with the last checkpoint."""
    pruned = save_network(tmp_path / "pruned", "resnet", 11, "folder", 2)
    command = f"{small_run(images, tmp_path / 'out')} --refine {pruned} --resume auto"
    assert "is not pruned" in succeed(f"{command} --lr 0")
    last = tmp_path / "out" / "checkpoint.pth.tar"
    start, first = (checkpoint.read(path)["state_dict"] for path in (pruned, last))
    assert same(start["fc.weight"], first["fc.weight"])
    assert "epochs 1 to 2" in succeed(f"{command} --epochs 2")


@pytest.mark.parametrize("script", ["main.py", "mask-impl/main_mask.py"])
def test_a_folder_named_after_the_refined_network_is_found_again(script, images, tmp_path):
    """Without --arch, which the file says: a job that is started again and again must end."""
    pruned = save_network(tmp_path / "pruned", "resnet", 11, "folder", 2)
    command = f"{script} --refine {pruned} --tag t --resume auto --dataset folder --data {images}"
    command += " --no-tensorboard --batch-size 48 --epochs"
    for epochs in (1, 2):
        printed = succeed(f"{command} {epochs}", cwd=tmp_path)
        assert f"epochs {epochs - 1} to {epochs}, results in ckpts/resnet_t/" in printed
    assert [path.name for path in (tmp_path / "ckpts").iterdir()] == ["resnet_t"]
    assert "all 2 epochs are done" in succeed(f"{command} 2", cwd=tmp_path)
    assert not list(tmp_path.rglob("previous-1"))


def test_how_to_continue_names_one_file(tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pth.tar").touch()
    command = "main.py --refine a --refine=b --resume auto --lr 1"
    monkeypatch.setattr(sys, "argv", command.split())
    told = RunFolder(tmp_path).how_to_continue()
    assert told.endswith(f": python main.py --lr 1 --resume {tmp_path}/checkpoint.pth.tar")


def test_each_purpose_has_random_numbers_of_its_own():
    """The shuffle of an epoch, dropout in the first process, the crop of the first image."""
    first = [
        epoch_generator(3, 5),
        epoch_generator(3, 5, 0, purpose=DROPOUT),
        epoch_generator(3, 5, 0, purpose=AUGMENTATION),
        epoch_generator(3, 5, 1, purpose=DROPOUT),
    ]
    assert len({generator.initial_seed() for generator in first}) == 4
    assert epoch_generator(3, 5).initial_seed() == 9791734468858838757 >> 1, "as it always was"


def test_a_run_is_resumed_with_its_own_random_numbers():
    """Dropout included. The file of before does not say which: dropout had those of the shuffle."""
    network = Architecture("densenet", 7, "cifar10", 2, options={"dropRate": 0.5})
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = Split(images, torch.arange(16) % 2, ["a", "b"])

    def trained(epochs, contents=None, streams=2):
        torch.manual_seed(0)
        loaders = [Batches(data, 8, augment) for augment in (True, False)]
        # momentum and dropout matter, the schedule does not
        trainer = Trainer(
            network.build(), network, *loaders, TrainSettings(epochs=epochs), schedule=lambda _: 0.1
        )
        trainer.streams = streams
        if contents:
            trainer.model.load_state_dict(contents["state_dict"])
            trainer.from_contents("file", contents)
        trainer.fit()
        return copy.deepcopy(trainer.to_contents())

    for streams in (1, 2):
        whole, part = trained(2, streams=streams), trained(1, streams=streams)
        assert part["streams"] == streams
        if streams == 1:
            del part["streams"]
        resumed = trained(2, part)
        assert same(resumed["state_dict"], whole["state_dict"])
        assert resumed["streams"] == streams


@pytest.mark.slow
@pytest.mark.parametrize("request_to_end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_continue(request_to_end, images, tmp_path):
    last = tmp_path / "out" / "checkpoint.pth.tar"
    command = [sys.executable, *f"{RESNET} --data {images} --save {last.parent}".split()]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # a shell's background jobs, and what they start, ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(last, process)
    process.send_signal(request_to_end)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(stderr.splitlines()) == 1 and f"--resume {last}" in stderr
    architecture.load(last)


def test_another_run_in_the_same_folder_is_moved_not_overwritten(images, tmp_path):
    command = small_run(images, tmp_path / "out")
    succeed(command)
    before = (tmp_path / "out" / "checkpoint.pth.tar").read_bytes()
    assert "previous-1" in succeed(f"{command} --seed 2")
    assert (tmp_path / "out" / "previous-1" / "checkpoint.pth.tar").read_bytes() == before


@pytest.mark.slow
def test_a_run_that_stopped_before_its_first_checkpoint_was_none(images, tmp_path, monkeypatch):
    """Nothing is moved aside for it: its events are empty."""
    words = f"{small_run(images, tmp_path / 'out')} --no-cuda".split()
    words.remove("--no-tensorboard")
    monkeypatch.setattr(sys, "argv", words)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="start again"):
        patch.setattr(main, "train", interrupt)
        main.main()
    main.main()
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"checkpoint.pth.tar", "model_best.pth.tar", "curves.png", "tensorboard"}
    main.main()
    aside = tmp_path / "out" / "previous-1"
    assert {path.name for path in aside.iterdir()} == left, "a run with its events"


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_momentum_of_the_original_suite_is_no_obstacle(images, tmp_path):
    """There the masks have a gradient, and momentum counts them."""
    command = small_run(images, tmp_path / "out")
    succeed(command)
    last = tmp_path / "out" / "checkpoint.pth.tar"
    contents = checkpoint.read(last)
    contents["optimizer"]["state"][500] = {"momentum_buffer": torch.zeros(3)}
    old = {k: contents[k] for k in ("epoch", "state_dict", "best_prec1", "optimizer")}
    checkpoint.write(last, old)
    done = run(f"{command} --resume {last} --epochs 2")
    assert done.returncode == 0 and "continues without" in done.stdout, done.stderr
