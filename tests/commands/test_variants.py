"""What users of other suites type: that of preact_res20, and that of Lubana and Dick."""

import shlex
from pathlib import Path

import pytest
import torch
from conftest import UNREACHABLE, fails, keep_only, randomize, save_network, succeed
from warm import run

import main
import models
import resprune
from slimming.channels.scaling import alive_channels
from slimming.choosing.threshold import Choice
from slimming.commands.prune import report
from slimming.commands.prune.run import Job, print_next_step
from slimming.commands.prune.settings import PrunedOutputSettings, PruningRun
from slimming.errors import UserError
from slimming.storage import checkpoint, files
from slimming.training import penalties
from slimming.training.settings import RunFolder

# as the suite of preact_res20 printed it
PRINTED = """\
Loading checkpoint from ckpts/preact_res20_sr/best_acc/ckpt_24696_acc90.960_loss0.2836.pth.pth.tar
BN layer name: layer1.0.bn1	pruned 43.75%(7/16)
BN layer name: layer1.0.bn2	pruned 18.75%(3/16)
BN layer name: layer1.0.bn3	pruned 0.00%(0/16)
BN layer name: layer1.1.bn1	pruned 89.06%(57/64)
BN layer name: layer1.1.bn2	pruned 37.50%(6/16)
BN layer name: layer1.1.bn3	pruned 0.00%(0/16)
BN layer name: layer2.0.bn1	pruned 43.75%(28/64)
BN layer name: layer2.0.bn2	pruned 0.00%(0/32)
BN layer name: layer2.0.bn3	pruned 0.00%(0/32)
BN layer name: layer2.1.bn1	pruned 87.50%(112/128)
BN layer name: layer2.1.bn2	pruned 0.00%(0/32)
BN layer name: layer2.1.bn3	pruned 0.00%(0/32)
BN layer name: layer3.0.bn1	pruned 19.53%(25/128)
BN layer name: layer3.0.bn2	pruned 0.00%(0/64)
BN layer name: layer3.0.bn3	pruned 0.00%(0/64)
BN layer name: layer3.1.bn1	pruned 51.17%(131/256)
BN layer name: layer3.1.bn2	pruned 0.00%(0/64)
BN layer name: layer3.1.bn3	pruned 0.00%(0/64)
BN layer name: bn	pruned 68.75%(176/256)
cfg 19: [9, 13, 16, 7, 10, 16, 36, 32, 32, 16, 32, 32, 103, 64, 64, 125, 64, 64, 80]
Pruned model save to: ./ckpts/pruned/preact_res20_pruned.pth.tar
Pruned rate: 0.4
Model acc:90.960 loss: 0.284 time: 1.526s
Pruned model acc:17.660 loss: 7.252 time: 1.398s
Time reduce: 8.3854% (1.53s -> 1.40s)
Model params reduce: 8.4535% (220394.00 -> 201763.00)
Model size reduce: 53.4249% (1.72mb->0.80mb)
"""
CFG = [9, 13, 16, 7, 10, 16, 36, 32, 32, 16, 32, 32, 103, 64, 64, 125, 64, 64, 80]


def test_second_names():
    assert models.ChannelSelection is models.channel_selection
    assert main.update_bn is penalties.update_bn is penalties.updateBN


@pytest.mark.parametrize(
    "words, data",
    [
        ("main.py --arch preact_res20", "cifar10"),
        ("main.py --arch preact_res20 --dataset cifar100", "cifar100"),
        ("main.py --arch resnet --depth 20", "cifar100"),
        ("main.py --arch preact_res20 --refine recorded", "cifar100"),
        ("main.py --arch preact_res20 --refine bare", "cifar100"),
        ("resprune.py --arch preact_res20 --model bare", "cifar100"),
        ("mask-impl/main_mask.py --arch preact_res20", "cifar10"),
    ],
)
def test_preact_res_means_cifar10_where_neither_flag_nor_weights_say(tmp_path, words, data):
    contents = checkpoint.read(save_network(tmp_path / "recorded", "resnet", 20, "cifar100", 100))
    torch.save({"state_dict": contents["state_dict"]}, tmp_path / "bare")
    done = run(words, cwd=tmp_path, env=UNREACHABLE)
    assert done.returncode == 2 and f"download {data} into" in done.stderr, done.stderr


def test_best_acc_is_found_whether_or_not_such_a_folder_was_made(tmp_path):
    run, best = tmp_path / "preact_res20_sr", tmp_path / "preact_res20_sr" / "best_acc"
    run.mkdir()
    ours = run / "model_best.pth.tar"
    ours.touch()
    assert files.find(best, ours.name) == ours, "no such folder"
    best.mkdir()
    (best / "events.out").touch()
    assert files.find(best, ours.name) == ours, "no checkpoint in it"
    theirs = best / "ckpt_24696_acc90.960_loss0.2836.pth.pth.tar"
    theirs.touch()
    assert files.find(best, ours.name) == theirs
    (best / "ckpt_25000_acc91.000_loss0.2801.pth.pth.tar").touch()
    with pytest.raises(UserError, match="give the path of"):
        files.find(best, ours.name)
    (best / ours.name).touch()
    assert files.find(best, ours.name) == best / ours.name
    named = tmp_path / "other" / "best_acc"
    named.parent.mkdir()
    named.touch()
    assert files.find(named, ours.name) == named, "a file of that name"


def test_best_acc_is_there_for_who_opens_it_by_hand(tmp_path):
    folder = RunFolder(tmp_path / "ckpts" / "preact_res20")
    folder.path.mkdir(parents=True)
    folder.best.write_text("best")
    for _ in range(2):
        folder.after_epoch(0)
    (linked,) = (folder.path / "best_acc").iterdir()
    assert linked.read_text() == "best"
    assert files.find(folder.path / "best_acc", folder.best.name) == folder.best
    RunFolder(tmp_path / "logs").after_epoch(0)
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def type_in(monkeypatch, capsys, tmp_path, few_digits, quick):
    """Type a command in an empty folder; what it prints."""
    monkeypatch.chdir(tmp_path)

    def type_in(command):
        words = shlex.split(command)
        monkeypatch.setattr("sys.argv", words)
        {"main.py": main, "resprune.py": resprune}[words[0]].main()
        return capsys.readouterr().out

    return type_in


@pytest.mark.slow
def test_the_sequence_of_preact_res20_as_it_stands(type_in, tmp_path):
    """But for the data, and for epochs to wait for."""
    short = " --epochs 1 --no-tensorboard --no-cuda"
    type_in("main.py -sr --s 0.0001 --arch=preact_res20 --dataset digits" + short)
    printed = type_in("resprune.py --ckpt_dir=./ckpts/preact_res20_sr/best_acc --arch=preact_res20")
    pruned = checkpoint.read(tmp_path / "ckpts" / "pruned" / "preact_res20_pruned.pth.tar")
    assert {path.name for path in (tmp_path / "ckpts" / "pruned").iterdir()} == {
        f"preact_res20_pruned.{ending}" for ending in ("pth.tar", "txt", "png")
    }
    assert "40% of 1360 channels" in printed and "slim equals masked" in printed
    lines = printed.splitlines()
    for line in (
        "Loading checkpoint from ckpts/preact_res20_sr/model_best.pth.tar",
        f"BN layer name: layer1.0.bn1\tpruned {1 - pruned['cfg'][0] / 16:.2%}"
        f"({16 - pruned['cfg'][0]}/16)",
        f"cfg 19: {pruned['cfg']}",
        "Pruned model save to: ./ckpts/pruned/preact_res20_pruned.pth.tar",
        "Pruned rate: 0.4",
    ):
        assert line in lines
    assert "(220394.00 -> " in printed and "Time reduce: " in printed
    refine = "--refine=./ckpts/pruned/preact_res20_pruned.pth.tar"
    type_in(f"main.py {refine} --arch=preact_res20 --tag=fine_tune_pruned" + short)
    tuned = tmp_path / "ckpts" / "preact_res20_fine_tune_pruned" / "model_best.pth.tar"
    assert checkpoint.read(tuned)["cfg"] == pruned["cfg"]


def test_defaults_of_ckpt_dir_give_way_to_flags(type_in, tmp_path):
    for depth in (11, 20):
        save_network(tmp_path / f"res{depth}", "resnet", depth)
        printed = type_in(f"resprune.py --ckpt_dir res{depth}")
    assert "Pruned rate: 0.4" in printed
    both = {path.name for path in (tmp_path / "ckpts" / "pruned").glob("*.tar")}
    assert both == {"preact_res11_pruned.pth.tar", "preact_res20_pruned.pth.tar"}
    assert "Pruned rate: 0.3" in type_in("resprune.py --percent 0.3 --ckpt_dir res11 --save_dir a")
    type_in("resprune.py --ckpt_dir res11 --filename b")
    printed = type_in("resprune.py --model res11 --save c")
    assert "50% of" in printed and "Pruned rate" not in printed
    for path in ("a/pruned", "a/prune", "ckpts/pruned/b", "c/pruned"):
        assert list(tmp_path.glob(f"{path}.*"))
    fails(tmp_path, "resprune.py --ckpt_dir res11 --model res20", says="both give the checkpoint")


def test_the_only_pruned_network_of_a_folder_is_found(type_in, tmp_path):
    save_network(tmp_path / "res11", "resnet", 11)
    type_in("resprune.py --ckpt_dir res11")
    type_in("main.py --refine ckpts/pruned --epochs 1 --no-tensorboard --no-cuda")
    type_in("resprune.py --model ckpts/pruned --save a")
    assert "compression" in succeed("eval.py ckpts/pruned --compression", cwd=tmp_path)


def test_the_summary_of_preact_res20_to_the_letter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [line.rpartition(" ")[2] for line in PRINTED.splitlines() if ".pth.tar" in line]
    paths = [Path(word) for word in words]
    for path, size in zip(paths, (1_800_000, 1_800_000 * (1 - 0.534249)), strict=True):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(round(size)))
    model = randomize(models.resnet(depth=20))
    alive = alive_channels(model)
    keep = {n: torch.arange(len(a)) < w for (n, a), w in zip(alive.items(), CFG, strict=True)}
    choice = Choice(0.4, 0.1, alive, keep, [])
    dense = Job(PruningRun(), *paths, model, None, {}, None)
    before = {"top-1": 0.9096, "loss": 0.284, "seconds": 1.526}
    after = {"top-1": 0.1766, "loss": 7.252, "seconds": 1.526 * (1 - 0.083854)}
    text = report.text(dense, keep_only(model, keep), choice, before, after)
    assert text.splitlines() == PRINTED.splitlines()


@pytest.mark.parametrize(
    "words, says",
    [
        (
            "--model=resnet-56 --pruning_type=mag_based --prune_percent=75 --n_rounds=25",
            "--model, --pruning_type, --prune_percent, --n_rounds are flags of flowprune.py: "
            "python flowprune.py --model=resnet-56 --pruning_type=mag_based --prune_percent=75 "
            "--n_rounds=25",
        ),
        (
            "--thresholds '[10, 50, 80]' --seed 1",
            "--thresholds is a flag of flowprune.py: "
            "python flowprune.py --thresholds '[10, 50, 80]' --seed 1",
        ),
        (
            "--dataset imagenet --model resnet18 --pruning-ratio 0.5 --resume",  # errors of main.py
            "--model, --pruning-ratio are flags of run.py: "
            "python run.py --dataset imagenet --model resnet18 --pruning-ratio 0.5 --resume",
        ),
        ("--model resnet18", "--model is a flag of run.py: python run.py --model resnet18"),
        (
            "--model vgg",
            "--model is a flag of flowprune.py and of run.py: "
            "python flowprune.py --model vgg, or python run.py --model vgg",
        ),
        (
            "-sr --prune_percent 75",  # neither script takes both
            "--prune_percent is a flag of flowprune.py: python flowprune.py -sr --prune_percent 75",
        ),
        ("--colour --model vgg", "unrecognized arguments: --colour --model vgg (--help"),
        ("--lr -1", "argument --lr: must be a number of at least 0, not '-1' (--help"),
    ],
)
def test_main_says_which_script_takes_the_flags(tmp_path, words, says):
    line = fails(tmp_path, f"main.py {words}", says=says)
    assert line.startswith(f"main.py: error: {says}") and line.count("error") == 1


def test_each_pruned_network_is_fine_tuned_in_a_folder_of_its_own(capsys):
    for filename, folder in ((None, "pruned/refined"), ("b", "pruned/b_refined")):
        run = PruningRun(output=PrunedOutputSettings(filename=filename))
        dense = Job(run, Path("dense.pth.tar"), Path("pruned/b.pth.tar"), None, None, {}, None)
        print_next_step(dense, 0.9, 0.1, "main.py")
        assert capsys.readouterr().out.endswith(f" --save {folder}\n")
