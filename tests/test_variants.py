"""What users of other suites type: that of preact_res20, and that of Lubana and Dick."""

import pytest
import torch
from conftest import save_network
from test_errors import UNREACHABLE
from warm import run

import main
import models
from slimming import checkpoint, files, sparsity
from slimming.errors import UserError


def test_second_names():
    assert models.ChannelSelection is models.channel_selection
    assert main.update_bn is sparsity.update_bn is sparsity.updateBN


@pytest.mark.parametrize(
    "words, data",
    [
        ("main.py --arch preact_res20", "cifar10"),
        ("main.py --arch preact_res20 --dataset cifar100", "cifar100"),
        ("main.py --arch resnet --depth 20", "cifar100"),
        ("main.py --arch preact_res20 --refine recorded", "cifar100"),
        ("main.py --arch preact_res20 --refine bare", "cifar10"),
        ("resprune.py --arch preact_res20 --model bare", "cifar10"),
        ("mask-impl/main_mask.py --arch preact_res20", "cifar10"),
    ],
)
def test_preact_res_means_cifar10_where_neither_flag_nor_checkpoint_says(tmp_path, words, data):
    contents = checkpoint.read(save_network(tmp_path / "recorded", "resnet", 20, "cifar100", 100))
    torch.save({"state_dict": contents["state_dict"]}, tmp_path / "bare")
    done = run(*words.split(), cwd=tmp_path, env=UNREACHABLE)
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
    with pytest.raises(UserError, match="name the file"):
        files.find(best, ours.name)
    (best / ours.name).touch()
    assert files.find(best, ours.name) == best / ours.name
    named = tmp_path / "other" / "best_acc"
    named.parent.mkdir()
    named.touch()
    assert files.find(named, ours.name) == named, "a file of that name"
