"""The penalty is autograd's gradient of s · Σ|γ|; pruned channels stay pruned."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import resnet
from slimming.channels.scaling import batch_norms
from slimming.errors import UserError
from slimming.slicing import kernels
from slimming.training.penalties import GradientMask, L1Penalty
from slimming.training.trainer import make_optimizer

S = 0.01


def gradients(model, precision_dtype, scale, penalty_in_loss):
    """Gradients of every γ; the penalty is either part of the loss or added by `L1Penalty`."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = make_optimizer(model, 0.1, 0.9, 1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
    with torch.autocast("cpu", precision_dtype, enabled=precision_dtype is not None):
        loss = F.cross_entropy(model(images), labels)
    if penalty_in_loss:
        loss = loss + S * sum(bn.weight.abs().sum() for bn in batch_norms(model).values())
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    if not penalty_in_loss:
        L1Penalty(model, S).on_gradients()
    return torch.cat([bn.weight.grad for bn in batch_norms(model).values()])


@pytest.mark.parametrize(
    "dtype, scale", [(None, 1), (torch.bfloat16, 1), (None, 1024), (torch.float16, 1024)]
)
def test_the_penalty_is_the_gradient_of_the_l1_norm(dtype, scale):
    torch.manual_seed(0)
    model = resnet(depth=11)
    for bn in batch_norms(model).values():
        bn.weight.data.normal_(0, 0.5)
    added = gradients(model, dtype, scale, penalty_in_loss=False)
    model.zero_grad()
    for bn in batch_norms(model).values():
        bn.reset_running_stats()
    by_autograd = gradients(model, dtype, scale, penalty_in_loss=True)
    torch.testing.assert_close(added, by_autograd, rtol=1e-5, atol=1e-6)


def test_a_scaling_factor_of_zero_is_not_moved_by_the_penalty():
    bn = torch.nn.BatchNorm2d(3)
    bn.weight.data.copy_(torch.tensor([-2.0, 0.0, 3.0]))
    bn.weight.grad = torch.zeros(3)
    L1Penalty(bn, 0.5).on_gradients()
    assert bn.weight.grad.tolist() == [-0.5, 0.0, 0.5]


def test_masked_channels_stay_zero_through_momentum_weight_decay_and_penalty():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3)
    )
    optimizer = make_optimizer(model, 0.1, 0.9, 0.01)
    images = torch.randn(4, 3, 8, 8)

    def step(edits):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        for edit in edits:
            edit.on_gradients()
        optimizer.step()

    step([])  # every channel has momentum now
    bn = model[1]
    bn.weight.data[:3] = bn.bias.data[:3] = 0
    unmasked = copy.deepcopy((model, optimizer))
    edits = [L1Penalty(model, 0.1), GradientMask(model, optimizer)]
    for _ in range(5):
        step(edits)
    assert (bn.weight[:3] == 0).all() and (bn.bias[:3] == 0).all()
    assert (bn.weight[3:] != 0).all()
    model, optimizer = unmasked
    step([])
    assert (model[1].weight[:3] != 0).any(), "without the mask the channels come back to life"


def test_the_classic_names_are_where_people_look_for_them():
    import importlib

    import main

    main_mask = importlib.import_module("mask-impl.main_mask")
    model = resnet(depth=11)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    before = model.bn.weight.grad.clone()
    main.updateBN(model, 0.25)
    assert torch.equal(model.bn.weight.grad, before + 0.25)
    model.bn.weight.data[0] = model.bn.bias.data[0] = 0
    main_mask.BN_grad_zero(model)
    assert model.bn.weight.grad[0] == 0 and model.bn.bias.grad[0] == 0
    assert main.train is main_mask.train and main.test is main_mask.test


def test_the_penalty_is_on_scaling_factors_that_learn():
    model = nn.Sequential(*(nn.BatchNorm2d(3, affine=i != 0) for i in range(4)))
    model[1].requires_grad_(False)
    (model[2](model[0](torch.randn(2, 3, 4, 4))) * 0).sum().backward()  # the last has no part in it
    L1Penalty(model, 0.5).on_gradients()
    assert torch.equal(model[2].weight.grad, torch.full((3,), 0.5))
    assert model[1].weight.grad is None and model[3].weight.grad is None


@pytest.mark.parametrize("dimensions, norm", [(1, nn.BatchNorm1d), (3, nn.BatchNorm3d)])
def test_batch_norms_of_every_dimension_have_scaling_factors(dimensions, norm):
    model = nn.Sequential(norm(3), norm(3, affine=False))
    model[0].weight.data[0] = 0
    model(torch.randn(4, 3, *(2,) * dimensions)).square().sum().backward()
    before = model[0].weight.grad.clone()
    L1Penalty(model, 0.5).on_gradients()
    assert torch.equal(model[0].weight.grad, before + torch.tensor([0, 0.5, 0.5]))
    GradientMask(model).on_gradients()
    assert model[0].weight.grad[0] == model[0].bias.grad[0] == 0 and model[0].weight.grad[1:].all()


def test_a_network_without_scaling_factors_has_no_penalty():
    for model in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)):
        with pytest.raises(UserError, match="no BatchNorm with trainable scaling factors"):
            L1Penalty(model, 0.5)
        GradientMask(model).on_gradients()  # nothing to mask


def test_the_penalty_and_the_mask_find_weights_that_were_replaced():
    """As programs do that prune a network in place."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    edits = [L1Penalty(model, 0.5), GradientMask(model)]
    model[0].weight, model[0].bias = nn.Parameter(torch.tensor([0.0, 1.0])), None
    model[0].bias = nn.Parameter(torch.ones(2))
    for parameter in model.parameters():
        parameter.grad = torch.ones(2)
    for edit in edits:
        edit.on_gradients()
    assert model[0].weight.grad.tolist() == [0, 1.5] and model[0].bias.grad.tolist() == [0, 1]


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "1.weight"])
def test_each_mask_meets_its_own_gradient_where_a_parameter_is_frozen(frozen):
    """Also where the shapes of all gradients are equal, so that no error tells."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].weight.data[0] = model[1].weight.data[2] = 0
    model.get_parameter(frozen).requires_grad_(False)
    optimizer = make_optimizer(model, 0.1, 0.9, 0)
    edit = GradientMask(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones(3) if parameter.requires_grad else None
    edit.on_gradients()
    expected = {"0": [0, 1, 1], "1": [1, 1, 0]}
    for name, parameter in model.named_parameters():
        if name != frozen:
            assert parameter.grad.tolist() == expected[name[0]], name
    optimizer.state_dict()  # holds no parameter that is not the optimizer's


def test_a_channel_whose_beta_is_not_zero_is_held_as_in_the_original():
    """γ = 0 stays so through momentum of before; β is not trained, and only decays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = make_optimizer(model, 0.1, 0.9, 0.01)
    for state in optimizer.state.values():
        state["momentum_buffer"].fill_(1)
    bn = model[1]
    bn.weight.data[:2], bn.bias.data[:2] = 0, torch.tensor([0.0, 2.0])
    edit = GradientMask(model, optimizer)
    assert edit.summary() == "2 channels with γ = 0 are not trained"
    beta, momentum = 2.0, 1.0
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        edit.on_gradients()
        optimizer.step()
        momentum = 0.9 * momentum + 0.01 * beta
        beta -= 0.1 * momentum
    assert not bn.weight[:2].any() and bn.bias[0] == 0
    assert bn.bias[1].item() == pytest.approx(beta, rel=1e-5)


def test_masks_of_weights_are_found_again_in_another_network():
    first, second = (nn.Conv2d(2, 2, 1) for _ in range(2))
    first.weight.data[0] = second.weight.data[1] = 0
    for conv in (first, second):
        conv.weight.grad = torch.ones_like(conv.weight)
    edit = GradientMask(first, keep=kernels.zero_masks)
    assert edit.summary() == "2 pruned weights stay zero"
    edit.on_replace(second)
    edit.on_gradients()
    assert second.weight.grad.flatten().tolist() == [1, 1, 0, 0] and first.weight.grad.all()
    with pytest.raises(UserError, match="pass a function"):
        GradientMask(first, keep=kernels.zero_masks(first)).on_replace(second)
