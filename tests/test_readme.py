"""README.md and docs/ keep their word: flags are told, commands parse, programs run."""

import importlib.util
import re
import shlex

import pytest
import torch
from conftest import NARROW, SMALLEST, save_network, succeed
from torch.distributed.run import get_args_parser
from warm import ROOT

import eval as evaluation
import export
import flowprune
import main
import resprune
import run
import sweep
import vggprune
from benchmarks import (
    defaults,
    exports,
    finetune,
    gpu,
    inference,
    layers,
    measures,
    precisions,
    pretrained,
    quantization,
    repair,
    reproduce,
    rounding,
    speed,
    zoo,
)
from slimming import __main__ as module

PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TOLD = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
FLAGS = importlib.util.spec_from_file_location("flags_page", ROOT / "docs" / "flags.py")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TOLD, re.DOTALL)


def commands(text):
    """The command lines of a page."""
    bash = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in bash for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ") and " -m " not in line]


COMMANDS = commands(TOLD)

PARSERS = {
    **dict.fromkeys(("main.py", "main_mask.py"), main.make_parser()),
    **dict.fromkeys(("vggprune.py", "denseprune.py", "prune_mask.py"), vggprune.make_parser()),
    "resprune.py": resprune.make_parser(),
    "flowprune.py": flowprune.make_parser(),
    "run.py": run.make_parser(),
    "eval.py": evaluation.make_parser(),
    "export.py": export.make_parser(),
    "sweep.py": sweep.make_parser(),
}
MODULES = (
    defaults,
    exports,
    finetune,
    gpu,
    inference,
    layers,
    measures,
    precisions,
    quantization,
    repair,
)
BENCHMARKS = {
    f"{b.__name__.rpartition('.')[2]}.py": b
    for b in (*MODULES, pretrained, reproduce, rounding, speed, zoo)
}


def test_the_page_of_flags_is_what_the_settings_say():
    page = importlib.util.module_from_spec(FLAGS)
    FLAGS.loader.exec_module(page)
    told = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert told == page.text(), "python docs/flags.py writes it anew"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_parses(command):
    _, script, *words = shlex.split(command)
    assert (ROOT / script).is_file()
    name = script.rpartition("/")[2]
    parser = BENCHMARKS[name].make_parser() if name in BENCHMARKS else PARSERS[name]
    parser.parse_args(words)


def test_the_module_s_command_line_parses():
    lines = re.findall(r"^python -m slimming (.*)$", TOLD, re.MULTILINE)
    assert lines
    for line in lines:
        assert module.make_parser().parse_args(shlex.split(line)).command == "inspect"


@pytest.mark.parametrize("script", ["main.py", "flowprune.py"])
def test_torchrun_leaves_every_flag_to_the_script(script):
    """But --s, which is --sparsity too."""
    for name in PARSERS[script].flags() - {"--s"}:
        words = [script, name, "0.5"]
        told = get_args_parser().parse_args(words)
        assert [told.training_script, *told.training_script_args] == words


def test_the_command_of_torchrun_needs_nothing_before_the_script():
    (command,) = re.findall(r"^torchrun (.*)$", TOLD, re.MULTILINE)
    told = get_args_parser().parse_args(shlex.split(command))
    assert told.training_script == "main.py"
    args = PARSERS["main.py"].parse_args(told.training_script_args)
    assert args.sr and args.s == 1e-4 and args.resume == "auto"
    assert PARSERS["run.py"].parse_args(["--sparsity", "0.5"]).s == 0.5


@pytest.mark.slow
def test_the_programs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program in [block for kind, block in BLOCKS if kind == "python"]:
        for path in re.findall(r'architecture.load\("(.*?)"\)', program):
            save_network(tmp_path / path, "vgg", 11)
        exec(program, {"torch": torch})


SMALL = {  # what makes a command quick, whatever it says before
    "main.py": "--dataset folder --epochs 1 --batch-size 16 --no-tensorboard",
    "flowprune.py": "--n_rounds 1 --epochs 6 --warmup_epochs 1 --imp_samples 16 --batch-size 16 "
    "--model resnet --depth 11 --dataset folder",
    "run.py": "--dataset folder --base-train-epochs 1 --finetune-epochs 1 --batch-size 16 "
    "--model resnet --depth 11",
}
SMALL["sweep.py"] = "--points 1 --allocation global"
SMALL["export.py"] = "--batch 4 --max-drop 100 --calibration-images 16"
SMALL["main_mask.py"] = SMALL["main.py"]


def quick(command, images):
    """The command, with words behind it that make it quick."""
    _, script, *words = shlex.split(command)
    more = f"{SMALL.get(script.rpartition('/')[2], '')} --data {images} --no-cuda".split()
    arch = words[words.index("--arch") + 1] if "--arch" in words else None
    more += ["--depth", str(SMALLEST[arch])] if arch in SMALLEST else []
    more += ["--image-size", "40", "--workers", "1"] if "--image-size" in words else []
    more += ["--ms", "10000"] if "--ms" in words else []  # warm.shorten makes up 64 for a batch
    return [script, *words, *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name != "benchmarks"], ids=lambda p: p.stem
)
def test_the_commands_run_in_order(page, images, tmp_path):
    """Where they are typed: a folder without the scripts, on 48 images."""
    if page.stem != "README":  # they start from what that one writes
        for name in ("vgg/model_best", "res/model_best", "vgg-pruned/pruned"):
            arch = "resnet" if name.startswith("res") else "vgg"
            network = (arch, SMALLEST[arch], "folder", 2, NARROW.get(arch))
            save_network(tmp_path / f"logs/{name}.pth.tar", *network)
    for command in commands(page.read_text(encoding="utf-8")):
        if " benchmarks/" in command:
            continue  # minutes, or a GPU: test_gpu.py has a dry run
        script, *words = quick(command, images)
        words = [newest(tmp_path, word) for word in words]
        succeed(script, *words, cwd=tmp_path)


def newest(folder, word):
    """A path with a time in it -> that of the newest folder of this kind."""
    pattern = re.sub(r"_\d{8}_\d{6}", "_*", word)
    return (
        word
        if pattern == word
        else max(folder.glob(pattern.replace("cifar10", "folder").replace("resnet18", "resnet")))
    )
