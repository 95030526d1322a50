"""`slimming.Sparsity` and its neighbours, in training loops of one's own."""

import copy

import pytest
import torch
from torch import nn

import slimming
from models import constructor
from slimming.errors import UserError

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Two branches are summed, so that two γ scale each channel of the sum; `alone` scales its own;
    the last one writes the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.bn_a = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.bn_b = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.alone = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.bn_last = nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)
        for norm in (self.bn_a, self.bn_b, self.alone, self.bn_last):
            nn.init.normal_(norm.weight)

    def forward(self, x):
        summed = (self.bn_a(self.a(x)) + self.bn_b(self.b(x))).relu()
        return self.bn_last(self.last(self.alone(self.inner(summed)).relu())).mean((2, 3))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 144, 4),
    )  # fmt: skip


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def zero_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def test_the_penalty_is_the_gradient_of_its_formula():
    model = Residual()
    zero_gradients(model)
    slimming.Sparsity(model, IMAGES, s=0.3).on_gradients()
    ours, gammas = gradients(model), [n.weight for n in (model.bn_a, model.bn_b, model.alone)]
    pairs = torch.stack([gammas[0], gammas[1]]).norm(dim=0) / 2**0.5
    expected = torch.autograd.grad(0.3 * (pairs.sum() + gammas[2].abs().sum()), gammas)
    for name, gradient in zip(("bn_a", "bn_b", "alone"), expected, strict=True):
        torch.testing.assert_close(ours[f"{name}.weight"], gradient)
    others = [g for n, g in ours.items() if n.split(".")[0] not in ("bn_a", "bn_b", "alone")]
    assert all(not g.any() for g in others), "the outputs' γ cannot go; weights and β are no γ"
    assert not ours["bn_a.bias"].any()


def test_on_a_plain_network_it_is_the_penalty_of_the_paper():
    model = constructor("vgg")(depth=11, cfg=[8, "M", 8, "M", 8, 8, "M", 8, 8, "M", 8, 8])
    other = copy.deepcopy(model)
    for network in (model, other):
        zero_gradients(network)
    slimming.Sparsity(model, torch.rand(2, 3, 32, 32), s=0.1).on_gradients()
    slimming.L1Penalty(other, 0.1).on_gradients()
    ours, theirs = gradients(model), gradients(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_channels_of_a_layer_that_stay_are_left_alone():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.bn, self.more = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            a = self.a(x)
            return a, self.more(self.bn(torch.cat([a, self.b(x)], 1)))  # a is an output

    model = Joined()
    zero_gradients(model)
    slimming.Sparsity(model, IMAGES, s=0.3).on_gradients()
    assert model.bn.weight.grad.tolist() == pytest.approx([0] * 4 + [0.3] * 4)


def test_a_gamma_of_zero_gets_no_gradient():
    model = Residual()
    zero_gradients(model)
    nn.init.zeros_(model.alone.weight)
    nn.init.zeros_(model.bn_a.weight)
    nn.init.zeros_(model.bn_b.weight)
    slimming.Sparsity(model, IMAGES, s=0.3).on_gradients()
    assert all(not g.any() for g in gradients(model).values())


@pytest.mark.parametrize(
    ("schedule", "steps", "shares"),
    [("constant", None, [1, 1, 1, 1, 1]), ("linear", 4, [1, 0.775, 0.55, 0.325, 0.1]),
     ("half", 4, [1, 1, 0, 0, 0])],
)  # fmt: skip
def test_schedules_and_their_state(schedule, steps, shares):
    model = Residual()
    sparsity = slimming.Sparsity(model, IMAGES, s=0.5, schedule=schedule, steps=steps)
    for step, share in enumerate(shares):
        if step == 2:  # a run that is resumed
            state = sparsity.state_dict()
            sparsity = slimming.Sparsity(model, IMAGES, s=0.5, schedule=schedule, steps=steps)
            sparsity.load_state_dict(state)
        zero_gradients(model)
        sparsity.on_gradients()
        assert model.alone.weight.grad.abs().max() == pytest.approx(0.5 * share)
        sparsity.after_step()


def test_with_a_grad_scaler_the_penalty_is_not_scaled():
    model, scaler = Residual(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsity = slimming.Sparsity(model, IMAGES, s=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IMAGES).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    before = model.alone.weight.grad.clone()
    sparsity.on_gradients()
    torch.testing.assert_close(model.alone.weight.grad - before, 0.3 * model.alone.weight.sign())
    scaler.step(optimizer)


@pytest.mark.parametrize("scaled", [False, True])
def test_attached_to_an_optimizer_each_step_is_that_of_a_loop(scaled):
    """A fused optimizer unscales in its step: the penalty is scaled like the gradients."""
    results = []
    for attach in (False, True):
        model = Residual()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=scaled)
        sparsity = slimming.Sparsity(model, IMAGES, s=0.3, schedule="linear", steps=3)
        handles = sparsity.attach(optimizer) if attach else []
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(IMAGES).square().mean()).backward()
            if not attach:
                scaler.unscale_(optimizer)
                sparsity.on_gradients()
            scaler.step(optimizer)
            scaler.update()
            if not attach:
                sparsity.after_step()
        assert sparsity.step == 3
        for handle in handles:
            handle.remove()
        optimizer.step()
        assert sparsity.step == 3
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


def test_frozen_layers_and_parameters_that_are_replaced():
    model = Residual()
    sparsity = slimming.Sparsity(model, IMAGES, s=0.3)
    model.bn_a.weight.requires_grad_(False)
    model.alone.weight = nn.Parameter(-torch.ones(8))
    zero_gradients(model)
    sparsity.on_gradients()
    assert not model.bn_a.weight.grad.any() and model.bn_b.weight.grad.any()
    torch.testing.assert_close(model.alone.weight.grad, torch.full((8,), -0.3))
    model.alone.weight.grad = None
    sparsity.on_gradients()
    assert model.alone.weight.grad is None


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_wrapped_networks(wrap):
    model = Residual()
    assert slimming.Sparsity(wrap(model), IMAGES).model is not None
    assert set(slimming.Sparsity(wrap(model), IMAGES).norms) == {"bn_a", "bn_b", "alone"}


def test_an_average_is_read_instead():
    model = Residual()
    sparsity = slimming.Sparsity(model, IMAGES)
    average = torch.optim.swa_utils.AveragedModel(model)
    nn.init.zeros_(average.module.alone.weight)
    assert sparsity.near_zero()["alone"] < 0.5 and sparsity.of(average).near_zero()["alone"] == 1


def test_without_batchnorm_the_weights_of_a_unit_are_one_group():
    model = plain()
    zero_gradients(model)
    slimming.Sparsity(model, IMAGES, s=0.3).on_gradients()
    first, second, last = model[0].weight, model[2].weight, model[5].weight
    squares = first.square().sum((1, 2, 3)) + second.square().sum((0, 2, 3))
    others = second.square().sum((1, 2, 3)) + last.view(4, 6, 144).square().sum((0, 2))
    loss = 0.3 * (squares.sqrt().sum() + others.sqrt().sum())
    for ours, expected in zip(
        (first, second, last), torch.autograd.grad(loss, (first, second, last)), strict=True
    ):
        torch.testing.assert_close(ours.grad, expected)


def test_the_summary_tells_layers_and_costs():
    model = Residual()
    nn.init.constant_(model.alone.weight, 1e-3)
    told = slimming.Sparsity(model, IMAGES).summary()
    assert "alone" in told and "100.0%" in told and "bn_last" not in told
    assert told.count("of the FLOPs are left") == 3
    assert "layer" not in slimming.Sparsity(plain(), IMAGES).summary()


@pytest.mark.parametrize(
    ("more", "words"),
    [({"s": -1}, "at least 0"), ({"schedule": "cosine"}, "constant, linear, half"),
     ({"schedule": "linear"}, "number of `steps`"), ({"ignore": ["nothing"]}, "no layer called")],
)  # fmt: skip
def test_mistakes_are_told(more, words):
    with pytest.raises(UserError, match=words):
        slimming.Sparsity(Residual(), IMAGES, **more)


def test_the_state_of_an_optimizer_follows_its_channels():
    for make in (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, 0.01),
    ):
        model = Residual().train()
        optimizer = make(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model(IMAGES).square().mean().backward()
            optimizer.step()
        slim = slimming.prune(model, IMAGES, ratio=0.4)
        new = make(slim.model.parameters())
        new.load_state_dict(slimming.optimizer_state(slim, optimizer))
        stays = slim.map["alone"]["out"]
        for key, value in optimizer.state[model.alone.weight].items():
            kept = new.state[slim.model.alone.weight][key]
            assert torch.equal(kept, value[stays] if value.dim() else value)
        slim.model.train()(IMAGES).square().mean().backward()
        new.step()
    factored = torch.optim.Adafactor(model.parameters())
    model(IMAGES).square().mean().backward()
    factored.step()
    with pytest.raises(UserError, match="not one number for each weight"):
        slimming.optimizer_state(slim, factored)
    del factored
    stranger = torch.optim.SGD(Residual().parameters(), 0.1)
    with pytest.raises(UserError, match="not of the dense network"):
        slimming.optimizer_state(slim, stranger)
    del model, optimizer
    with pytest.raises(UserError, match="does not exist any more"):
        slimming.optimizer_state(slim, stranger)


def test_rounds_end_at_the_budget_and_continue_with_what_was_trained():
    model, kept = Residual(), []
    full = slimming.prune(model, IMAGES, ratio=0).figures.flops
    for slim in slimming.rounds(model, IMAGES, to=0.5, steps=3):
        kept.append(slim.figures.flops / full)
        nn.init.constant_(slim.model.last.bias, 7.0)  # training
    assert kept == sorted(kept, reverse=True) and 0.3 < kept[-1] <= 0.5
    assert len(kept) == 3 and kept[0] <= 0.5 ** (1 / 3) and (slim.model.last.bias == 7).all()
    with pytest.raises(UserError, match="to must be between"):
        next(slimming.rounds(model, IMAGES, to=1.5))


def test_distillation_of_logits_and_of_other_outputs():
    dense, slim = Residual().eval(), Residual().eval()
    nn.init.zeros_(slim.alone.weight)
    loss = slimming.distill(slim, dense, temperature=2.0)(IMAGES)
    p, q = ((m(IMAGES) / 2).softmax(1) for m in (dense, slim))
    torch.testing.assert_close(loss, 4 * (p * (p / q).log()).sum(1).mean())
    loss.backward()
    assert slim.last.bias.grad.any() and dense.last.weight.grad is None

    class Two(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x):
            return {"a": x * self.scale, "b": [x * self.scale * 3]}

    class Modes(Two):  # as detectors
        def forward(self, x):
            return [x * self.scale] * (2 if self.training else 1)

    modes = slimming.distill(Modes(2.0).train(), Modes(1.0).eval())
    assert float(modes(IMAGES).detach()) == pytest.approx(1.0)
    frozen = nn.Sequential(nn.BatchNorm2d(3))
    slimming.distill(nn.Identity().train(), frozen)(IMAGES)
    assert not frozen[0].running_mean.any(), "the statistics of the dense network stay"

    two = slimming.distill(Two(2.0), Two(1.0))
    assert float(two(IMAGES).detach()) == pytest.approx(1.0)
    with pytest.raises(UserError, match="other shapes"):
        two(IMAGES, IMAGES)


def test_under_torch_compile_the_penalty_is_the_same():
    model, other = Residual(), Residual()
    compiled = torch.compile(other, backend="aot_eager")
    for network, sparsity in (
        (model, slimming.Sparsity(model, IMAGES, s=0.3)),
        (compiled, slimming.Sparsity(compiled, IMAGES, s=0.3)),
    ):
        network(IMAGES).square().mean().backward()
        sparsity.on_gradients()
    ours, theirs = gradients(model), gradients(other)
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], gradient)


def _of_two(rank, folder):
    """One of two processes: half of the batch, then the penalty, then a step."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(Residual().eval())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slimming.Sparsity(model, IMAGES, s=0.3).attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGES[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
    torch.save(model.module.state_dict(), folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_over_two_processes_it_is_the_penalty_of_one(tmp_path):
    torch.multiprocessing.spawn(_of_two, (tmp_path,), nprocs=2)
    model = Residual().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slimming.Sparsity(model, IMAGES, s=0.3).attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
    found = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[0][name], value)
        assert torch.equal(found[0][name], found[1][name])


def test_a_slim_network_copies_compiles_and_goes_through_ddp():
    model = Residual()
    slim = slimming.prune(model, IMAGES, flops=0.6)
    outputs = slim.model(IMAGES)
    for other in (copy.deepcopy(slim.model), torch.compile(slim.model, backend="aot_eager")):
        torch.testing.assert_close(other(IMAGES), outputs)
    assert type(slim.model) is Residual
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(slim.model)
        wrapped(IMAGES).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in slim.model.parameters())


def test_distillation_leaves_the_modes_of_the_dense_network():
    dense = Residual().eval()
    dense.alone.train()
    slim = slimming.prune(dense, IMAGES).model.train()
    slimming.distill(slim, dense)(IMAGES)
    assert [n for n, m in dense.named_modules() if m.training] == ["alone"]
