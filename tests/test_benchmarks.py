"""The reproduction runs what is missing, and nothing twice."""

import shutil
import sys
from pathlib import Path

from conftest import save_network

import main
import vggprune
from benchmarks import measure, reproduce

SCRIPTS = {"main.py": main, "vggprune.py": vggprune}


def write_results(script, *words):
    """What the script would write; its parser must take the words."""
    args = SCRIPTS[script].make_parser().parse_args(list(map(str, words)))
    Path(args.save).mkdir(parents=True, exist_ok=True)
    for name in ("model_best", "checkpoint") if script == "main.py" else ("pruned",):
        save_network(f"{args.save}/{name}.pth.tar", "vgg", 11)


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
