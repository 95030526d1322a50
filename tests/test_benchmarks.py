"""The reproduction runs what is missing, and nothing twice."""

import shutil
import sys

from benchmarks import measure, reproduce


def test_a_reproduction_goes_on_where_it_was(tmp_path, images, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "CASES", {"vgg": ("vggprune.py", 11, 1e-4, (0.5,))})
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = "reproduce.py --arch vgg --dataset folder --data-name colours --epochs 1 --device cpu"
    words = [*words.split(), "--data", str(images), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", words)

    def commands():
        reproduce.main()
        printed = capsys.readouterr().out
        return [line.split()[2] for line in printed.splitlines() if line.startswith("$")]

    assert commands() == ["main.py", "main.py", "vggprune.py", "main.py"]
    assert commands() == []
    shutil.rmtree(tmp_path / "work" / "folder-1" / "vgg-50" / "tuned")
    assert commands() == ["main.py"]
    table = (tmp_path / "results" / "reproduce-folder.md").read_text()
    assert "| vgg-11 at 50% | colours | 1 |" in table and table.count("->") == 1
