"""What users of other suites type: that of preact_res20, and that of Lubana and Dick."""

import pytest
import torch
from conftest import save_network
from test_errors import UNREACHABLE
from warm import run

import main
import models
from slimming import checkpoint, sparsity


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
