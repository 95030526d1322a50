"""--round-to auto: each layer keeps the multiple of channels that is fastest, by any clock."""

import math
import re
from functools import partial

import pytest
import torch
from conftest import NARROW, SMALLEST, fails, keep_only, save_network, succeed
from torch import nn

from models import constructor
from slimming import slicing
from slimming.channels.groups import declared
from slimming.choosing import importance, ranking
from slimming.choosing.importance import Evidence
from slimming.choosing.threshold import choose_channels
from slimming.errors import UserError
from slimming.measuring import figures, latency
from slimming.measuring.latency import MULTIPLES, LayerShape
from slimming.slicing.prune import groups
from slimming.storage import architecture

SHAPE = (3, 32, 32)
CPU = torch.device("cpu")
PRUNERS = {"vgg": "vggprune.py", "resnet": "resprune.py", "densenet": "denseprune.py"}
LINE = r"--round-to auto: \d+ layers? keeps? a multiple of \d+.*: \d+ channels? more than without"


def by_shape(one):
    """The cost of shapes, from the seconds of one."""
    return lambda shapes: {shape: one(shape) for shape in shapes}


def in_blocks(size):
    """Seconds on a device that computes so many channels at a time."""
    return lambda s: math.ceil(s.reads / size) * math.ceil(s.writes / size)


def aligned(s):
    """Seconds with kernels that are fast if both sides are a multiple of 16."""
    return s.reads * s.writes * (10 if s.reads % 16 or s.writes % 16 else 1)


def slim(model, round_to):
    return choose_channels(model, 0.6, round_to=round_to)


def fastest(model, one):
    """The multiples by the seconds of ``one`` shape."""
    choices = {m: slim(model, m) for m in MULTIPLES}
    layers, coupled = latency.calls(model, SHAPE), declared(model)

    def whole(several):
        return [seconds_of(model, multiples, one, coupled) for multiples in several]

    return latency.fastest(coupled, choices, layers, by_shape(one), whole)


def seconds_of(model, round_to, one, coupled):
    """What the layers of the slim network take."""
    layers = latency.calls(keep_only(model, slim(model, round_to).kept, coupled), SHAPE)
    return sum(one(shape) for _, shape in layers)


def widths(choice):
    return {name: int(mask.sum()) for name, mask in choice.kept.items()}


def of_two_layers(one, multiples=MULTIPLES, around=lambda m: 0, **more):
    """The multiples of two convolutions, of which each keeps 9 of 64 filters; the network with the
    multiples m takes ``around(m)`` seconds more than its layers."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 10)]
    model = nn.Sequential(*layers)
    coupled, scores = groups(model, torch.zeros(1, 3, 8, 8)), importance.l1(Evidence(model, []))

    def choose(m):
        return ranking.choose(coupled, scores, 0.86, local=True, round_to=m)

    def whole(several):
        kept = [slicing.kept_channels(coupled, choose(m).kept) for m in several]
        calls = [latency.calls(slicing.sliced(model, k), (3, 8, 8))[:2] for k in kept]
        inside = [sum(one(shape) for _, shape in layers) for layers in calls]
        return [time + around(m) for time, m in zip(inside, several, strict=True)]

    choices = {m: choose(m) for m in multiples}
    assert widths(choices[1]) == {"0": 9, "1": 9}
    calls = latency.calls(model, (3, 8, 8))[:2]
    return list(latency.fastest(coupled, choices, calls, by_shape(one), whole, **more).values())


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 16])
def test_blocks_of_channels_are_filled(small, size):
    """Whole blocks, and no further one: the rest of a block takes no time."""
    found = fastest(small, in_blocks(size))
    assert widths(slim(small, found)) == widths(slim(small, size))
    for name, count in widths(slim(small, found)).items():
        assert count % found[name] == 0 or slim(small, 1).alive[name].sum() == count


@pytest.mark.slow
def test_no_channel_is_kept_that_takes_time(small):
    found = fastest(small, lambda s: 1.1 ** (s.reads + s.writes))
    assert slim(small, found).spared == 0


def test_each_layer_has_its_own_multiple():
    assert of_two_layers(lambda s: in_blocks(16)(s) if s.reads == 3 else 1.1**s.writes) == [16, 1]


@pytest.mark.parametrize("slower, multiple", [(0.98, 4), (1.009, 4), (1.02, 1)])
def test_of_equal_times_the_larger_number_of_channels_stays(slower, multiple):
    """Equal up to noise; unless FLOPs or parameters are limited."""

    def one(s):
        return {9: 1.0, 10: 1.5, 12: slower}.get(s.writes, 2.0) if s.reads == 3 else 0.0

    assert of_two_layers(one)[0] == multiple
    assert of_two_layers(one, fewest=True)[0] == (4 if slower < 0.99 else 1)


def test_with_a_budget_no_group_more_than_doubles():
    """Though more would be faster: the budget could not be met any more."""
    assert of_two_layers(lambda s: 1 / (s.reads + s.writes)) == [32, 32]
    assert of_two_layers(lambda s: 1 / (s.reads + s.writes), limited=True) == [8, 8]


@pytest.mark.slow
@pytest.mark.parametrize("one", [in_blocks(8), aligned, lambda s: s.reads * s.writes])
def test_no_single_multiple_is_faster(small, one):
    """With kernels that need both sides aligned, no layer alone would leave the unaligned ones."""
    coupled = declared(small)
    times = [seconds_of(small, m, one, coupled) for m in MULTIPLES]
    found = seconds_of(small, fastest(small, one), one, coupled)
    assert found <= (1 + 2 * latency.NOISE) * min(times)


def test_changes_that_are_slower_together_are_not_made():
    """The second layer is fast if one of its sides has 16 channels, slow if both have."""

    def one(s):
        return {(9, 9): 10, (16, 9): 5, (9, 16): 5}.get((s.reads, s.writes), 20 * (s.reads > 3))

    assert of_two_layers(one, (1, 8)) == [1, 1]


def are_measured(model, coupled, choose):
    """Whether the layers are measured that slim networks have if one group keeps a multiple of 8,
    those of some groups at least."""
    seen = []

    def cost(shapes):
        seen.extend(shapes)
        return dict.fromkeys(seen, 1.0)

    choices, layers = {m: choose(m) for m in (1, 8)}, latency.calls(model, SHAPE)
    latency.fastest(coupled, choices, layers, cost, lambda several: range(len(several)))
    rounded = [{}, *({group.name: 8} for group in coupled[:: len(coupled) // 3])]
    kept = [slicing.kept_channels(coupled, choose(multiples).kept) for multiples in rounded]
    networks = [slicing.sliced(model, each) for each in kept]
    names = {member.layer for group in coupled for member in group.members}
    return all(
        shape in seen
        for network in networks
        for name, shape in latency.calls(network, SHAPE)
        if name in names
    )


def test_time_outside_of_layers_counts():
    """Each channel takes time in its layers, but unless both have multiples of 4, much more."""

    def around(multiples):
        return 0 if set(multiples.values()) == {4} else 100

    assert of_two_layers(lambda s: s.reads + s.writes, around=around) == [4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "resnext50_32x4d", "squeezenet1_1"])
def test_what_is_measured_are_the_layers_of_the_slim_networks(arch):
    torch.manual_seed(0)
    model = constructor(arch)(num_classes=10).eval()
    coupled = groups(model, torch.zeros(1, *SHAPE))
    scores = importance.lamp(Evidence(model, []))
    assert are_measured(model, coupled, lambda m: ranking.choose(coupled, scores, 0.5, round_to=m))


@pytest.mark.slow
def test_selections_count_as_narrower_layers(small):
    assert are_measured(small, declared(small), partial(slim, small))
    again = keep_only(small, slim(small, 1).kept)
    assert are_measured(again, declared(again), partial(slim, again))


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "vgg"])
def test_shapes_account_for_all_flops(arch):
    model = constructor(arch)(num_classes=10)
    total = 0
    for _, s in latency.calls(model, SHAPE):
        places = math.prod(s.size)
        if s.kernel:
            places = math.prod(
                (n + 2 * p - d * (k - 1) - 1) // step + 1
                for n, p, d, k, step in zip(
                    s.size, s.padding, s.dilation, s.kernel, s.stride, strict=True
                )
            )
        total += 2 * places * math.prod(s.weight_shape)
    assert total == figures.count_flops(model)


def test_shapes_take_turns_and_equal_ones_are_measured_once():
    """A round of warm-up, then medians."""
    conv = LayerShape(3, 4, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
    linear = LayerShape(5, 6, (1,))
    durations = iter([100, 100, 1, 10, 50, 20, 3, 30])
    ticks = (t for duration in durations for t in (0.0, float(duration)))
    found = latency.seconds([conv, linear, conv], 2, CPU, lambda: next(ticks), rounds=3)
    assert found == {conv: 3, linear: 20}
    assert next(ticks, None) is None


def test_the_real_clock_measures_layers_of_every_kind():
    shapes = [s for _, s in latency.calls(constructor("mobilenet_v3_small")(), SHAPE)]
    found = latency.seconds(shapes, 1, CPU, rounds=1)
    assert found.keys() == set(shapes) and all(value > 0 for value in found.values())
    assert latency.seconds([], 1, CPU) == {}


def test_multiples_of_groups_without_an_entry_are_one(small):
    name = list(slim(small, 1).kept)[1]
    plain, rounded = (widths(slim(small, m)) for m in (1, 8))
    assert widths(slim(small, {name: 8})) == {**plain, name: rounded[name]}
    coupled, scores = declared(small), importance.bn(Evidence(small, []))
    plain, rounded, mixed = (
        widths(ranking.choose(coupled, scores, 0.6, round_to=m)) for m in (1, 8, {name: 8})
    )
    assert mixed == {**plain, name: rounded[name]}
    with pytest.raises(UserError, match="at least 1"):
        ranking.choose(coupled, scores, 0.6, round_to={name: 0})


@pytest.mark.slow
@pytest.mark.parametrize("arch", PRUNERS)
def test_the_pruning_scripts_measure(arch, images, tmp_path):
    path = tmp_path / "dense.pth.tar"
    save_network(path, arch, SMALLEST[arch], "folder", 2, NARROW.get(arch))
    command = f"--model {path} --data {images} --no-cuda --latency-batch 1 --round-to auto"
    printed = succeed(f"{PRUNERS[arch]} {command} --percent 0.4 --save {tmp_path}/slim")
    assert re.search(LINE, printed) and "slim equals masked" in printed
    kept = architecture.load(tmp_path / "slim" / "pruned.pth.tar")[1].cfg
    numbers = re.search("auto: (.*):", printed)[1]
    layers = [int(n) for n in re.findall(r"(\d+) (?:layers? |of )", numbers)]
    assert sum(layers) == len([width for width in kept if width != "M"])
    printed = succeed(f"mask-impl/prune_mask.py {command} --percent 0.4 --save {tmp_path}/mask")
    assert re.search(LINE, printed)


@pytest.mark.slow
def test_a_budget_holds_for_the_rounded_network(images, tmp_path):
    path = save_network(tmp_path / "dense.pth.tar", "vgg", 11, "folder", 2, NARROW["vgg"])
    command = f"vggprune.py --model {path} --data {images} --no-cuda --latency-batch 1"
    printed = succeed(f"{command} --flops 0.5 --round-to auto --save {tmp_path}/slim")
    found = re.findall(r"^(budget.*?|--round-to auto): ", printed, re.MULTILINE)
    assert found == ["budget, without rounding", "--round-to auto", "budget"]
    networks = [architecture.load(file)[0] for file in (path, tmp_path / "slim" / "pruned.pth.tar")]
    before, after = map(figures.count_flops, networks)
    assert after <= 0.5 * before


@pytest.mark.slow
def test_run_py_measures(images, tmp_path):
    command = f"run.py --dataset folder --data {images} --model resnet --depth 11 --no-cuda "
    command += f"--batch-size 16 --base-train-epochs 1 --finetune-epochs 0 --output-dir {tmp_path} "
    command += "--latency-batch 1 --round-to auto"
    for more in ("", "--pruning-method slimming --allocation global --flops 0.6"):
        printed = succeed(f"{command} {more}")
        assert re.search(LINE, printed) and "slim equals masked" in printed
    assert "budget, without rounding: " in printed
    (config, *_) = tmp_path.rglob("config.json")
    assert '"round_to": "auto"' in config.read_text()
    says = "--round-to needs --pruning-method channel or slimming"
    fails(tmp_path, f"{command} --pruning-method kernel", says=says)


@pytest.mark.parametrize("value", ["0", "fast", "1.5", "AUTO"])
def test_another_word_is_refused(value, tmp_path):
    says = f"--round-to: must be auto or an integer of at least 1, not '{value}'"
    fails(tmp_path, f"vggprune.py --round-to {value}", says=says)
    fails(tmp_path, "sweep.py x --round-to auto", says="must be an integer")
