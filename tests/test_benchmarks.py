"""The reproduction runs what is missing, and nothing twice; what benchmarks share."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_network
from torch import nn

import main
import vggprune
from benchmarks import measure, plain, reproduce

SCRIPTS = {"main.py": main, "vggprune.py": vggprune}


def write_results(script, *words):
    """What the script would write; its parser must take the words."""
    args = SCRIPTS[script].make_parser().parse_args(list(map(str, words)))
    Path(args.save).mkdir(parents=True, exist_ok=True)
    for name in ("model_best", "checkpoint") if script == "main.py" else ("pruned",):
        save_network(f"{args.save}/{name}.pth.tar", "vgg", 11)


@pytest.mark.slow
def test_a_reproduction_goes_on_where_it_was(tmp_path, monkeypatch):
    ran = []

    def run(script, *words):
        ran.append(script)
        write_results(script, *words)

    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    words = "reproduce.py --arch vgg --dataset digits --epochs 1 --amp --device cpu --work"
    monkeypatch.setattr(sys, "argv", [*words.split(), str(tmp_path / "work")])
    reproduce.main()
    assert ran == ["main.py", "main.py", "vggprune.py", "main.py"]
    reproduce.main()
    assert len(ran) == 4
    shutil.rmtree(tmp_path / "work" / "digits-1-amp" / "vgg-70" / "tuned")
    reproduce.main()
    assert ran[4:] == ["main.py"]
    table = (tmp_path / "results" / "reproduce-digits.md").read_text()
    assert "| vgg-19 at 70% | digits | 1 amp |" in table and table.count("20.04 -> 2.25") == 1


def test_a_task_may_measure_itself():
    tasks = {("a", 1): lambda: 7.0, ("b", 2): lambda: None}
    times = measure.in_turns(tasks, 3, torch.device("cpu"), "turns")
    assert times["a", 1] == [7.0] * 3
    assert len(times["b", 2]) == 3 and max(times["b", 2]) < 1


@pytest.mark.slow
def test_a_network_runs_in_a_process_of_its_own():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))
    with plain.process(network) as passes:
        run = passes(torch.zeros(2, 3, 32, 32))
        assert all(0 < run() < 1 for _ in range(2))


def test_a_script_that_is_interrupted_ends_its_child():
    program = "import time, sys; print('ready', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with pytest.raises(KeyboardInterrupt), measure.ended(child) as process:
        process.stdout.readline()
        raise KeyboardInterrupt
    assert child.returncode == -signal.SIGTERM
