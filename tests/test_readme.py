"""README.md keeps its word: its flags exist, its commands parse, its program runs."""

import re
import shlex

import pytest
import torch
from conftest import save_network
from torch.distributed.run import get_args_parser
from warm import ROOT

import eval as evaluation
import flowprune
import resprune
import run
from benchmarks import inference, measures, reproduce, speed
from slimming.cli import flags

README = (ROOT / "README.md").read_text()
TOLD = README + (ROOT / "benchmarks" / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TOLD, re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
    if line.startswith("python ")
]

PARSERS = {
    **dict.fromkeys(("main.py", "main_mask.py"), flags.training_parser("")),
    **dict.fromkeys(("vggprune.py", "denseprune.py", "prune_mask.py"), flags.pruning_parser("")),
    "resprune.py": resprune.make_parser(),
    "flowprune.py": flowprune.make_parser(),
    "run.py": run.make_parser(),
    "eval.py": evaluation.make_parser(),
}
BENCHMARKS = {
    f"{b.__name__.rpartition('.')[2]}.py": b for b in (inference, measures, reproduce, speed)
}


@pytest.mark.parametrize("script", PARSERS)
def test_every_flag_is_in_a_table(script):
    for action in PARSERS[script]._actions:
        for name in action.option_strings:
            if name not in ("-h", "--help") and not name.startswith("--no-"):
                assert f"`{name}" in README, f"README.md does not tell about {name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_parses(command):
    _, script, *words = shlex.split(command)
    assert (ROOT / script).is_file()
    name = script.rpartition("/")[2]
    parser = BENCHMARKS[name].make_parser() if name in BENCHMARKS else PARSERS[name]
    parser.parse_args(words)


@pytest.mark.parametrize("script", ["main.py", "flowprune.py"])
def test_torchrun_leaves_every_flag_to_the_script(script):
    """But --s, which is --sparsity too."""
    for action in PARSERS[script]._actions:
        for name in action.option_strings:
            if name != "--s":
                words = [script, name, "0.5"]
                told = get_args_parser().parse_args(words)
                assert [told.training_script, *told.training_script_args] == words


def test_the_command_of_torchrun_needs_nothing_before_the_script():
    (command,) = re.findall(r"^torchrun (.*)$", README, re.MULTILINE)
    told = get_args_parser().parse_args(shlex.split(command))
    assert told.training_script == "main.py"
    args = PARSERS["main.py"].parse_args(told.training_script_args)
    assert args.sr and args.s == 1e-4 and args.resume == "auto"
    assert PARSERS["run.py"].parse_args(["--sparsity", "0.5"]).s == 0.5


def test_the_programs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program in [block for kind, block in BLOCKS if kind == "python"]:
        for path in re.findall(r'architecture.load\("(.*?)"\)', program):
            save_network(tmp_path / path, "vgg", 11)
        exec(program, {"torch": torch})
