"""Each penalty takes the step of its formula, in any precision; runs resume with it bit by bit."""

import copy

import pytest
import torch
from conftest import fails, same, succeed
from torch import nn

from slimming.errors import UserError
from slimming.training.penalties import PENALTIES, Factors, L1Penalty

S, LR, MOMENTUM = 0.05, 0.1, 0.9


def norms(dtype=torch.float32):
    """Three layers; the γ of the first two scale the same four channels."""
    torch.manual_seed(0)
    made = [nn.BatchNorm2d(count).to(dtype) for count in (4, 4, 5)]
    for norm in made:
        nn.init.normal_(norm.weight, std=0.1)
        norm.weight.grad = torch.zeros_like(norm.weight)
    return made


PAIRS = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 0, 5, 6, 7, 8])  # the first of the third stays


def flat(made, part="weight"):
    return torch.cat([getattr(norm, part) for norm in made]).double()


def of_pairs(gamma):
    pairs = torch.stack([gamma[:4], gamma[4:8]]).norm(dim=0) / 2**0.5
    return pairs.sum() + gamma[9:].abs().sum()


def polarized(gamma):
    return 1.4 * gamma[9:].abs().sum() - (gamma[9:] - gamma[9:].mean()).abs().sum()


FORMULAS = {
    "group": (of_pairs, PAIRS),
    "l1": (lambda gamma: gamma[9:].abs().sum(), torch.where(torch.arange(13) > 8, PAIRS, 0)),
    "polar": (polarized, torch.where(torch.arange(13) > 8, PAIRS, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_subgradient_is_that_of_the_formula(name, dtype):
    formula, units = FORMULAS[name]
    made = norms(dtype)
    gamma = flat(made).detach().requires_grad_()
    (expected,) = torch.autograd.grad(S * formula(gamma), gamma)
    PENALTIES[name](Factors(made, units), S).on_gradients()
    found = torch.cat([norm.weight.grad for norm in made]).double()
    tolerance = 1e-3 if dtype == torch.bfloat16 else 1e-7
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
def test_the_proximal_step_is_that_of_the_formula(momentum):
    made = norms()
    optimizer = torch.optim.SGD([n.weight for n in made], lr=LR, momentum=momentum)
    for norm in made:
        norm.weight.grad.fill_(0.01)
    optimizer.step()
    gamma = flat(made).detach()
    PENALTIES["prox"](Factors(made, PAIRS), S).after_step(optimizer)
    shrink = LR * S / (1 - momentum)
    pairs = torch.stack([gamma[:4], gamma[4:8]])
    size = pairs.norm(dim=0)
    pairs = pairs * (1 - shrink / 2**0.5 / size).clamp(min=0)
    alone = gamma[9:].sign() * (gamma[9:].abs() - shrink).clamp(min=0)
    expected = torch.cat([pairs.flatten(), gamma[8:9], alone])
    torch.testing.assert_close(flat(made), expected, atol=1e-7, rtol=1e-6)
    assert not momentum or (flat(made) == 0).any(), "the test has γ that become zero"
    for norm in made if momentum else []:
        buffer = optimizer.state[norm.weight]["momentum_buffer"]
        assert torch.equal(buffer == 0, norm.weight == 0)


def test_polarized_factors_stay_between_0_and_1():
    made = norms()
    made[2].weight.data[1:4] = torch.tensor([-0.2, 0.4, 1.3])
    made[2].weight.data[0] = -3  # is left alone
    PENALTIES["polar"](Factors(made, FORMULAS["polar"][1]), S).after_step()
    assert torch.equal(made[2].weight.data[:4], torch.tensor([-3.0, 0.0, 0.4, 1.0]))


def test_where_each_factor_is_a_unit_it_is_the_l1_penalty_to_the_bit():
    made, others = norms(), norms()
    PENALTIES["l1"](Factors(made), S).on_gradients()
    L1Penalty(nn.ModuleList(others), S).on_gradients()
    for ours, theirs in zip(made, others, strict=True):
        assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_frozen_factors_are_left_alone_and_prox_needs_the_optimizer():
    made = norms()
    made[0].weight.requires_grad_(False)
    before = copy.deepcopy(made[0].weight)
    optimizer = torch.optim.SGD([n.weight for n in made[1:]], lr=LR)
    PENALTIES["prox"](Factors(made), S).after_step(optimizer)
    assert torch.equal(made[0].weight, before)
    with pytest.raises(UserError, match="trains no scaling factor"):
        PENALTIES["prox"](Factors(made[:1]), S).after_step(optimizer)
    with pytest.raises(UserError, match="needs the optimizer"):
        PENALTIES["prox"](Factors(made), S).after_step()


TRAIN = "main.py -sr --s 0.09 --dataset digits --arch resnet --depth 11 --batch-size 256 --no-cuda"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prox", "polar", "group"])
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    words = f"{TRAIN} --penalty {name}".split()
    out = succeed(*words, "--epochs", 2, "--save", tmp_path / "whole")
    assert f"sparsity s = 0.09 ({name})" in out
    succeed(*words, "--epochs", 1, "--save", tmp_path / "half", "--lr", 0.1)
    more = ["--resume", tmp_path / "half" / "checkpoint.pth.tar", "--epochs", 2]
    succeed("main.py", "--no-cuda", *more)
    whole, half = (
        torch.load(tmp_path / part / "checkpoint.pth.tar", weights_only=True)
        for part in ("whole", "half")
    )
    assert same(whole["state_dict"], half["state_dict"])
    if name == "prox":
        weights = whole["state_dict"]
        gammas = [w for n, w in weights.items() if n.endswith("weight") and w.dim() == 1]
        assert (torch.cat(gammas) == 0).any(), "exact zeros"


@pytest.mark.slow
def test_a_penalty_without_sr_is_told(tmp_path):
    fails(tmp_path, "main.py --penalty prox --dataset digits", says="needs -sr")
