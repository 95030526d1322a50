"""run.py: one experiment from base training to its report."""

import json
import os
import signal
import time

import pytest
import torch
from conftest import SMALLEST, fails, make_images, same, save_network, succeed
from warm import start

import run
from models import NETWORKS
from run import make_parser
from slimming.channels.scaling import present_channels, selections
from slimming.cli import flags
from slimming.commands.experiment import run as experiment_run
from slimming.commands.experiment.run import config_of, same_settings
from slimming.commands.experiment.settings import read_settings
from slimming.commands.pruning import BudgetSettings, RepairSettings
from slimming.errors import UserError
from slimming.settings import flat
from slimming.storage import architecture, checkpoint

METHODS = {  # each by one of the two rankings
    "channel": "--global-pruning",
    "kernel": "",
    "intra-kernel": "--global-pruning",
    "slimming": "",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("run") / "images", train=8, test=4)


SMALL = "resnet --depth 11"


def short(photos, out, model=SMALL):
    """A short experiment on ``photos``, with results in ``out``."""
    epochs = "--base-train-epochs 1 --finetune-epochs 1 --batch-size 32"
    data = f"--dataset folder --data {photos} --no-cuda"
    return f"run.py {data} --model {model} --output-dir {out} {epochs} --learning-rate 0.01"


def settings(words=""):
    return read_settings(flags.parse(make_parser(), words.split()))


def experiment(out):
    (folder,) = (out / "folder").iterdir()
    return folder, json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method(photos, tmp_path, method):
    """Of a network that is traced; the first one with all pictures and latencies."""
    words = f"--pruning-method {method} --pruning-ratio 0.5 {METHODS[method]} --no-fp16"
    whole = method == "channel"
    succeed(f"{short(photos, tmp_path, 'mobilenet')} {words}", short=not whole)
    folder, metrics = experiment(tmp_path)
    base, pruned, tuned = metrics["stages"]
    kept = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.json", "log.txt", "report.html", "weights.png"} <= kept
    assert not list(folder.glob("*/*.pth.tar")) and "mobilenet_base.pth" not in kept
    assert pruned["effective parameters"] == tuned["effective parameters"]
    assert pruned["parameters"] == tuned["parameters"] <= base["parameters"]
    assert [len(stage["history"]) for stage in metrics["stages"]] == [1, 0, 1]
    assert ("weights that are not zero" in metrics["layers"]) == ("kernel" in method)
    assert metrics["liveness"] > 0
    if method in ("channel", "slimming"):
        assert metrics["difference"] < 1e-4 and tuned["parameters"] < 0.7 * base["parameters"]
    else:
        assert tuned["effective parameters"] < base["parameters"]
    if whole:
        assert len({stage["latency"]["64"] for stage in (base, pruned, tuned)}) == 3
        assert (folder / "weights.png").stat().st_size > 10_000
    model, _, contents = architecture.load(folder / "mobilenet_rebuilt.pth")
    assert contents["holds_zeros"] == ("kernel" in method)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet", "densenet"])
@pytest.mark.parametrize("method", ["channel", "kernel", "slimming"])
def test_the_networks_of_the_paper(photos, tmp_path, monkeypatch, quick, arch, method):
    words = f"--pruning-method {method} --pruning-ratio 0.5 {METHODS[method]} --no-fp16"
    words += " --importance taylor_group" if method == "channel" else ""
    command = f"{short(photos, tmp_path, arch)} {words} --depth {SMALLEST[arch]}"
    monkeypatch.setattr("sys.argv", command.split())
    run.main()
    folder, metrics = experiment(tmp_path)
    base, pruned, _ = metrics["stages"]
    assert metrics["difference"] <= 1e-4 and pruned["effective FLOPs"] < 0.8 * base["FLOPs"]
    model, network, _ = architecture.load(folder / f"{arch}_rebuilt.pth")
    counts = metrics["layers"].get("filters", [])
    assert (method == "kernel" or network.cfg == model.cfg) and type(model) is NETWORKS[arch]
    selected = {name: after for name, _, after in counts if name.endswith("select")}
    for name, mask in present_channels(model).items():
        selection = selections(model).get(name)
        assert selected.get(selection, len(mask)) == mask.sum()


@pytest.mark.slow
def test_the_three_workflows(photos, tmp_path):
    command = f"{short(photos, tmp_path)} --pruning-ratio 0.5"
    succeed(f"{command} --save-model --pruning-method channel")
    (first,) = (tmp_path / "folder").iterdir()
    printed = succeed(f"{command} --skip-base-training --pruning-method kernel")
    assert f"the base network is {first / 'resnet_base.pth'}" in printed
    told = json.loads((first / "metrics.json").read_text())["stages"][-1]
    path = first / "resnet_rebuilt.pth"
    printed = succeed(f"{short(photos, tmp_path)} --eval-only --model-path {path}")
    assert f"top-1 {told['top-1']:.2%}" in printed and f"{told['parameters']:,}" in printed


@pytest.mark.slow
def test_no_fine_tuning_no_pruning_and_what_falls_short(photos, tmp_path):
    words = "--base-train-epochs 3 --learning-rate 0 --num-workers 0 --skip-pruning"
    printed = succeed(f"{short(photos, tmp_path / 'all')} {words}")
    folder, metrics = experiment(tmp_path / "all")
    assert len(metrics["stages"][0]["history"]) == 3, "not those up to the best epoch alone"
    assert "pruned" not in (folder / "report.html").read_text() + printed
    assert "resnet-11" in succeed(f"eval.py {folder} --data {photos} --no-cuda")
    words = "--pruning-method intra-kernel --finetune-epochs 0"
    printed = succeed(f"{short(photos, tmp_path / 'none')} {words}")
    assert "warning: intra-kernel removed" in printed
    folder, metrics = experiment(tmp_path / "none")
    assert [stage["name"] for stage in metrics["stages"]] == ["base", "pruned"]
    architecture.load(folder / "resnet_pruned.pth")


@pytest.mark.slow
def test_a_multiple_that_undoes_the_pruning_is_a_warning(photos, tmp_path):
    words = "--round-to 4096 --finetune-epochs 0 --global-pruning"
    printed = succeed(f"{short(photos, tmp_path)} {words}")
    folder, _ = experiment(tmp_path)
    assert "warning: --round-to keeps" in printed
    assert "--round-to keeps" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_killed_experiment_ends_as_if_it_had_not_been(photos, tmp_path):
    words = "--pruning-method kernel --save-model --finetune-epochs 3"
    whole, killed = (f"{short(photos, tmp_path / n, SMALL)} {words}" for n in ("whole", "killed"))
    succeed(whole)
    process = start(killed)
    pattern = "folder/*/finetune/checkpoint.pth.tar"
    while process.is_alive() and not list((tmp_path / "killed").glob(pattern)):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
    succeed(f"{killed} --resume")
    files = [experiment(tmp_path / name)[0] / "finetune" for name in ("whole", "killed")]
    last = [checkpoint.read(folder / "checkpoint.pth.tar") for folder in files]
    assert same(*last)


BEFORE_DEPTH = {  # the config.json of `run.py --dataset digits`, before run.py had --depth
    "model": "resnet18",
    "weights": None,
    "output_dir": "experiments",
    "base_train_epochs": 100,
    "learning_rate": 0.05,
    "batch_size": 128,
    "weight_decay": 0.0005,
    "patience": 0,
    "s": 0.0001,
    "seed": 1,
    "pruning_method": "channel",
    "pruning_ratio": 0.5,
    "global_pruning": False,
    "importance": "l1",
    "round_to": 1,
    "ignore": [],
    "finetune_epochs": 20,
    "finetune_lr": 0.01,
    "no_fp16": False,
    "resume": False,
    "skip_base_training": False,
    "skip_pruning": False,
    "eval_only": False,
    "save_model": False,
    "model_path": None,
    "dataset": "digits",
    "data": None,
    "image_size": None,
    "test_batch_size": 256,
    "workers": 2,
    "threads": None,
    "device": None,
    "no_cuda": False,
    "command": "python run.py --dataset digits",
}


def test_an_experiment_of_an_earlier_version_goes_on(tmp_path):
    config, words = tmp_path / "config.json", "--dataset digits --workers 2"
    config.write_text(json.dumps(BEFORE_DEPTH))
    assert same_settings(config, settings(f"{words} --resume"))
    assert not same_settings(config, settings(f"{words} --ignore layer1"))
    assert not same_settings(config, settings(f"{words} --depth 20"))
    ours = config_of(settings(words))
    later = {"depth", "allocation", "least", *flat(BudgetSettings()), *flat(RepairSettings())}
    assert [name for name in ours if name not in later] == list(BEFORE_DEPTH)
    ours = {name: value for name, value in ours.items() if name not in later}
    assert {**ours, "command": BEFORE_DEPTH["command"]} == BEFORE_DEPTH
    assert not same_settings(config, settings(f"{words} --repair"))
    over_layers = {**BEFORE_DEPTH, "global_pruning": True, "importance": "lamp"}
    config.write_text(json.dumps(over_layers))  # where the least number of channels shows
    assert same_settings(config, settings(f"{words} --global-pruning --least 0"))
    assert not same_settings(config, settings(f"{words} --global-pruning"))


def test_what_follows_from_other_settings():
    config = config_of(settings("--dataset imagenet --global-pruning --num-workers 0"))
    follows = {"dataset": "imagenet", "data": "./data.imagenet", "image_size": 224}
    assert config.items() >= {**follows, "importance": "lamp", "workers": 1}.items()
    given = settings("--dataset imagenet --data here --image-size 64")
    assert (given.data.source.dataset, given.data.source.data) == ("folder", "here")
    assert given.data.source.image_size == 64
    assert config_of(settings("--ignore a --ignore b.c"))["ignore"] == ["a", "b.c"]
    assert config_of(settings())["dataset"] == "cifar10"


def test_a_base_network_of_other_settings_or_a_broken_file_is_passed_over(tmp_path, capsys):
    words = "--model resnet --depth 11 --dataset digits --skip-base-training"
    words += f" --output-dir {tmp_path}"
    paths = {}
    for number, more in enumerate(("--seed 2", "--learning-rate 0.1", "--seed 3")):
        folder = tmp_path / "digits" / f"resnet_channel_digits_{number}"
        paths[more] = save_network(folder / "resnet_base.pth", "resnet", 11)
        (folder / "config.json").write_text(json.dumps(config_of(settings(f"{words} {more}"))))
        os.utime(paths[more], (number, number))
    paths["--seed 3"].write_bytes(b"broken")
    for more in ("--seed 2", "--learning-rate 0.1"):
        assert (
            experiment_run.find_base(settings(f"{words} {more} --pruning-ratio 0.3")) == paths[more]
        )
    assert "resnet_base.pth is not a readable checkpoint" in capsys.readouterr().out
    for other in ("", " --seed 2 --pruning-method slimming"):  # which trains with a penalty
        with pytest.raises(UserError, match="not from torchvision"):
            experiment_run.find_base(settings(words + other))
    assert "trained with other settings: --model-path takes it" in capsys.readouterr().out


@pytest.mark.slow
def test_a_network_of_another_depth_is_another_network(photos, tmp_path):
    command = short(photos, tmp_path, "resnet")
    succeed(f"{command} --skip-pruning --save-model --depth 11")
    folder, metrics = experiment(tmp_path)
    assert metrics["network"].startswith("resnet-11 ")
    assert json.loads((folder / "config.json").read_text())["depth"] == 11
    again = f"{command} --skip-base-training --skip-pruning --save-model --depth"
    assert f"the base network is {folder / 'resnet_base.pth'}" in succeed(f"{again} 11")
    fails(tmp_path, f"{again} 20", says="because it is not from torchvision")
    judge = f"{command} --eval-only --model-path {folder / 'resnet_base.pth'}"
    fails(tmp_path, f"{judge} --depth 20", says="has depth 11, but 20")


def test_patience_ends_a_training_that_gets_no_better(photos, tmp_path):
    words = "--base-train-epochs 30 --learning-rate 0 --patience 1 --skip-pruning"
    printed = succeed(f"{short(photos, tmp_path, SMALL)} {words}")
    _, metrics = experiment(tmp_path)
    scores = [record["test_prec1"] for record in metrics["stages"][0]["history"]]
    assert f"top-1 has not improved for 1 epochs: training stops after {len(scores)}\n" in printed
    assert len(scores) < 30 and scores[-1] <= max(scores[:-1])


@pytest.mark.parametrize(
    "words, says",
    [
        ("--model nonsense", "unknown network"),
        ("--eval-only", "--model-path"),
        ("--model-path x.pth", "--skip-base-training"),
        ("--model vgg16 --pruning-method slimming", "BatchNorm"),
        ("--ignore nothing", "no layer called nothing"),
        ("--pruning-ratio 1", "less than 1"),
        ("--data nowhere", "nowhere"),
        ("--pruning-method intra-kernel --ignore nothing", "no layer called nothing"),
        ("--pruning-method kernel --round-to 8", "--round-to"),
        ("--importance biased_loss_tracked", "invalid choice"),
        ("--depth 20", "mobilenet has only one depth"),
        ("--model preact_res20 --depth 20", "omit --depth"),
    ],
)
def test_what_cannot_work_is_said_at_once(photos, tmp_path, words, says):
    fails(tmp_path, f"{short(photos, 'out', 'mobilenet')} {words}", says=says)


def test_torchrun_is_refused(photos, tmp_path):
    fails(tmp_path, short(photos, "out"), says="torchrun", env={"WORLD_SIZE": "2"})
    assert not list(tmp_path.iterdir())
