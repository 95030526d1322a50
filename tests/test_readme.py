"""README.md and docs/ keep their word: flags are told, commands parse, programs run."""

import importlib.util
import re
import shlex

import pytest
import torch
from conftest import save_network
from torch.distributed.run import get_args_parser
from warm import ROOT

import eval as evaluation
import flowprune
import main
import resprune
import run
import vggprune
from benchmarks import inference, measures, reproduce, speed

PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TOLD = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
FLAGS = importlib.util.spec_from_file_location("flags_page", ROOT / "docs" / "flags.py")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TOLD, re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
    if line.startswith("python ")
]

PARSERS = {
    **dict.fromkeys(("main.py", "main_mask.py"), main.make_parser()),
    **dict.fromkeys(("vggprune.py", "denseprune.py", "prune_mask.py"), vggprune.make_parser()),
    "resprune.py": resprune.make_parser(),
    "flowprune.py": flowprune.make_parser(),
    "run.py": run.make_parser(),
    "eval.py": evaluation.make_parser(),
}
BENCHMARKS = {
    f"{b.__name__.rpartition('.')[2]}.py": b for b in (inference, measures, reproduce, speed)
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


def test_the_programs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program in [block for kind, block in BLOCKS if kind == "python"]:
        for path in re.findall(r'architecture.load\("(.*?)"\)', program):
            save_network(tmp_path / path, "vgg", 11)
        exec(program, {"torch": torch})
