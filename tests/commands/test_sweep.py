"""sweep.py: what it says of a percentage is what pruning there gives."""

import json
import os
import re
import shlex
import signal
import time

import pytest
import torch
from conftest import NARROW, SMALLEST, fails, same, save_network, succeed
from warm import start

from models import NETWORKS
from slimming import slicing
from slimming.channels.groups import declared
from slimming.choosing import moments
from slimming.choosing.budget import front, knee
from slimming.choosing.threshold import choose_channels
from slimming.measuring import figures
from slimming.repair import streaming
from slimming.repair.layer_by_layer import divergence
from slimming.repair.one_pass import OnePass
from slimming.storage import architecture

ACCURACIES = ("pruned", "repaired")


@pytest.fixture
def resnet(tmp_path):
    return save_network(tmp_path / "dense.pth.tar", "resnet", 11, "folder", 2)


def swept(path, images, folder, more="", short=True):
    """The record of a sweep, and what was printed."""
    command = f"sweep.py {path} --data {images} --no-cuda --save {folder} {more}"
    printed = succeed(command, short=short)
    return json.loads((folder / "sweep.json").read_text()), printed


@pytest.mark.slow
def test_a_point_costs_what_its_command_gives(resnet, images, tmp_path):
    more = "--points 2 --allocation global,uniform,lamp,search --candidates 2"
    record, printed = swept(resnet, images, tmp_path / "sweep", more, short=False)
    assert len({point["ms"] for point in record["points"]}) == 8, "measured"
    assert len(record["points"]) == 8 and (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000
    for point in record["points"]:
        if point["ratio"] > 0.5:
            continue
        target = tmp_path / point["id"]
        words = shlex.split(point["command"])[1:]
        assert words[-1].startswith(f"{tmp_path}/sweep/{point['allocation']}-")
        succeed(shlex.join(words), "--save", target)
        slim, _, _ = architecture.load(target / "pruned.pth.tar")
        assert figures.count_parameters(slim) == point["parameters"]
        assert figures.count_flops(slim) == point["FLOPs"]
        assert point["flops"] == point["FLOPs"] / record["dense"]["FLOPs"]
        assert slicing.cfg_of(slim) == [after for _, _, after in point["layers"]]
    chosen = next(p for p in record["points"] if p["id"] == record["chosen"]["id"])
    assert printed.count(chosen["command"]) == 1 and "the knee of the front" in printed
    assert record["chosen"]["difference"] < 1e-4
    assert all(point["liveness"] > 0 for point in record["points"])
    assert all(
        after >= 0.1 * before or point["ratio"] > 0.9
        for point in record["points"]
        for _, before, after in point["layers"]
    )
    assert record["chosen"]["test"].keys() == {"dense", "pruned", "repaired"}


@pytest.mark.slow
def test_accuracy_is_of_training_images_and_test_images_are_used_once(resnet, images, tmp_path):
    """Without any class in the test images to tell apart, all but the last table is the same."""
    first, _ = swept(resnet, images, tmp_path / "a", "--points 2")
    for path in (images / "test" / "red").iterdir():  # wrong labels for all of them
        path.rename(images / "test" / "blue" / f"red-{path.name}")
    save = images / "test" / "red" / "0.png"
    save.write_bytes((images / "test" / "blue" / "0.png").read_bytes())
    second, _ = swept(resnet, images, tmp_path / "b", "--points 2")
    for a, b in zip(first["points"], second["points"], strict=True):
        assert all(a[name] == b[name] for name in ACCURACIES)
    assert first["chosen"]["test"] != second["chosen"]["test"]


@pytest.mark.slow
def test_ctrl_c_keeps_the_points_and_the_same_command_continues(resnet, images, tmp_path):
    folder = tmp_path / "sweep"
    command = f"sweep.py {resnet} --data {images} --no-cuda --save {folder} --points 6"
    files = [tmp_path / "stdout", tmp_path / "stderr"]
    process, record = start(command, files=files, short=False), folder / "sweep.json"
    while not (record.exists() and json.loads(record.read_text())["points"]):
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    (line,) = files[1].read_text().splitlines()
    before = json.loads(record.read_text())["points"]
    assert f"{record} has {len(before)} of the points; run the same command" in line
    assert 0 < len(before) < 18 and not (folder / "sweep.html").exists()
    printed = succeed(command)
    after = json.loads(record.read_text())["points"]
    assert len(after) == 18 and same(after[: len(before)], before)
    assert f"{len(before)} of 18 points are in {record} already" in printed
    again = succeed(command)  # all is known: nothing is measured
    assert "allocation   " not in again and "prune there, and" in again


@pytest.mark.slow
def test_budgets_of_a_sweep(resnet, images, tmp_path):
    more = "--points 2 --flops 0.5 --params 0.6 --allocation global,uniform,lamp,search"
    more += " --candidates 2"
    record, printed = swept(resnet, images, tmp_path / "sweep", more)
    assert len(record["points"]) == 3 * 2 + 5 and "the best within the budget" in printed
    chosen = next(p for p in record["points"] if p["id"] == record["chosen"]["id"])
    assert chosen["flops"] <= 0.5 and chosen["params"] <= 0.6
    fitted = record["points"][-5:]
    for point in fitted:
        assert point["flops"] <= 0.5 and point["params"] <= 0.6
        assert max(point["flops"] / 0.5, point["params"] / 0.6) > 0.97
    inside = [p for p in record["points"] if p["flops"] <= 0.5 and p["params"] <= 0.6]
    assert chosen["repaired"] == max(point["repaired"] for point in inside)
    assert "budget, uniform: " not in succeed(  # found once
        f"sweep.py {resnet} --data {images} --no-cuda --save {tmp_path}/sweep {more}"
    )


@pytest.mark.slow
def test_exact_repairs_the_front_layer_by_layer(resnet, images, tmp_path):
    folder = tmp_path / "sweep"
    swept(resnet, images, folder, "--points 3")
    record, printed = swept(resnet, images, folder, "--points 3 --exact")
    exact = {p["id"] for p in record["points"] if "exact" in p}
    assert exact and "layer by layer:" in printed
    assert record["chosen"]["exact"] and "repaired layer by layer" in printed
    places = [(p["flops"], p["repaired"]) for p in record["points"]]
    assert exact == {record["points"][i]["id"] for i in front(places)}


@pytest.mark.slow
def test_any_network_can_be_swept(images, tmp_path):
    train = f"run.py --dataset folder --data {images} --model mobilenet --no-cuda --save-model "
    train += f"--batch-size 16 --base-train-epochs 1 --skip-pruning --output-dir {tmp_path}/out"
    succeed(train)
    (base,) = (tmp_path / "out").rglob("mobilenet_base.pth")
    record, _ = swept(base, images, tmp_path / "sweep", "--points 1 --allocation uniform")
    (point,) = record["points"]
    command = shlex.split(point["command"])[1:]
    printed = succeed(shlex.join(command), "--output-dir", tmp_path / "slim")
    assert re.search(rf"pruned: .*{point['parameters']:,} parameters", printed)


@pytest.mark.slow
def test_without_batchnorm_there_is_no_global_threshold_to_try(images, tmp_path):
    path = save_network(tmp_path / "dense.pth.tar", "squeezenet1_1", None, "folder", 2)
    record, printed = swept(path, images, tmp_path / "sweep", "--points 1")
    assert {p["allocation"] for p in record["points"]} == {"uniform", "lamp"}
    assert "no BatchNorm" in printed
    command = f"sweep.py {path} --data {images} --no-cuda --save {tmp_path}/sweep"
    fails(tmp_path, f"{command} --allocation global", says="no allocation is left")


def test_bad_input_of_a_sweep_is_one_line(resnet, images, tmp_path):
    command = f"sweep.py {resnet} --data {images} --no-cuda --save {tmp_path}/sweep"
    fails(tmp_path, "sweep.py", says="CHECKPOINT is required")
    fails(tmp_path, f"sweep.py {tmp_path}/none.pth.tar", says="none.pth.tar")
    for wrong in ("--points 0", "--held-back 0", "--candidates 0", "--cost time"):
        fails(tmp_path, f"{command} {wrong}", says=wrong.split()[0])
    fails(tmp_path, f"{command} --allocation global,best", says="not 'global,best'")
    fails(tmp_path, f"{command} --candidates 5", says="--candidates needs --allocation search")
    succeed(f"{command} --points 1")
    fails(tmp_path, f"{command} --points 1 --mflops 1e-6", says="cannot be met")
    known = (tmp_path / "sweep" / "sweep.json").read_bytes()
    says = "is of a sweep with --round-to 1, not 4: use another --save"
    fails(tmp_path, f"{command} --points 1 --round-to 4", says=says)
    assert (tmp_path / "sweep" / "sweep.json").read_bytes() == known
    damaged = json.loads(known)
    del damaged["points"][0]["repaired"]
    for text in ("[]", "{", json.dumps(damaged)):
        (tmp_path / "sweep" / "sweep.json").write_text(text)
        fails(tmp_path, f"{command} --points 1", says="is damaged or not of a sweep")


@pytest.mark.slow
@pytest.mark.parametrize("arch", SMALLEST)
def test_one_pass_changes_nothing_without_a_loss_and_helps_with_one(arch):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(96, 3, 32, 32, generator=generator)
    torch.manual_seed(0)
    dense = NETWORKS[arch](depth=SMALLEST[arch], num_classes=10, cfg=NARROW.get(arch))
    for module in dense.modules():
        if hasattr(module, "running_mean"):
            torch.nn.init.uniform_(module.weight, 0.2, 1, generator)
            torch.nn.init.normal_(module.bias, 0, 0.3, generator)
            module.momentum = None
    with torch.no_grad():
        dense.train()(images)
    dense.eval()
    once = OnePass(dense, images)
    unchanged = once.repaired(slicing.sliced(dense, {}), {}).state_dict()
    assert all(torch.allclose(value, unchanged[n]) for n, value in dense.state_dict().items())
    choice = choose_channels(dense, 0.3)
    kept = slicing.kept_channels(declared(dense), choice.kept)
    slim = slicing.sliced(dense, kept)
    repaired = once.repaired(slim, kept)
    assert divergence(repaired, dense, images) < 0.7 * divergence(slim, dense, images)


def test_of_large_images_one_pass_uses_fewer(monkeypatch):
    dense, images = NETWORKS["vgg"](depth=11, cfg=NARROW["vgg"]).eval(), torch.rand(64, 3, 32, 32)
    assert len(OnePass(dense, images).images) == 64
    monkeypatch.setattr(moments, "ELEMENTS", 10 * images[0].numel())
    assert len(OnePass(dense, images).images) == streaming.FEWEST


def test_the_knee_is_where_accuracy_begins_to_fall():
    points = [(i / 10, min(0.9, 0.1 + 2 * i / 10)) for i in range(1, 10)]
    assert points[knee(points, (1.0, 0.9))][0] == 0.4
    worse = [(cost + 0.05, accuracy - 0.3) for cost, accuracy in points]
    assert points[knee([*points, *worse], (1.0, 0.9))][0] == 0.4
    assert knee([(0.5, 0.9)], (1.0, 0.9)) == 0
    assert knee([(0.3, 0.9), (0.95, 0.905)], (1.0, 0.9)) == 0  # the cheapest is as good
    assert knee([(0.3, 0.895), (0.95, 0.91)], (1.0, 0.9)) == 0
    assert knee([(0.1, 0.1), (0.3, 0.88), (0.95, 0.95)], (1.0, 0.9)) == 1
