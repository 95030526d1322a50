"""benchmarks/gpu.py: every step runs, on the CPU; failed steps and data."""

import contextlib
import shlex
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_images, succeed
from warm import ROOT, run

from benchmarks import gpu, inference, measure, reproduce, speed
from benchmarks.on_gpu import accuracy, images, processes, profiled, running
from benchmarks.on_gpu.record import Record
from benchmarks.on_gpu.steps import STEPS, Setup, Step
from slimming.errors import UserError

PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
ABOUT = {"device": "a GPU", "torch": "2", "command": "python"}


@pytest.mark.slow
def test_every_step_runs(monkeypatch, capsys):
    """As forks, which start in milliseconds; one of two steps that are the same in a dry run."""
    status = {}

    def forked(command, log, seconds, results):
        script, *words = shlex.split(command)
        log.touch()
        if script.endswith("accuracy.py"):  # in this process: it starts others
            with monkeypatch.context() as patch:
                patch.setattr("sys.argv", [script, *words])
                patch.setattr(measure, "RESULTS", results)
                accuracy.main()
            return 0
        if command not in status:
            done = run(command, env={measure.FOLDER: str(results)})
            log.write_text(done.stdout + done.stderr)
            status[command] = done.returncode
        return status[command]

    monkeypatch.setattr(running, "_run", forked)
    monkeypatch.setattr(reproduce, "run", lambda script, *words: succeed(script, *words))
    monkeypatch.setattr(gpu, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    monkeypatch.setattr("sys.argv", ["gpu.py", "--dry-run"])
    gpu.main()
    printed = capsys.readouterr().out
    for step in STEPS:
        assert f"{step.name}: done after" in printed


def test_the_list_names_every_step_with_its_time():
    lines = succeed("benchmarks/gpu.py --list").splitlines()
    for step, line in zip(STEPS, lines[2:], strict=True):
        assert line.startswith(step.name) and step.what in line
        assert f" {step.minutes:g} min " in line if step.minutes else " the rest " in line
        assert f"| `{step.name}` | {step.minutes or 'the rest'}" in PAGE
    least = sum(60 * step.minutes if step.minutes else step.least for step in STEPS)
    assert least <= 60 * gpu.make_parser().parse_args([]).minutes


@pytest.mark.parametrize("script", [accuracy, inference, processes, profiled, speed])
def test_the_commands_of_the_steps_parse(script):
    """Those for a GPU, which the dry run does not use."""
    setup = Setup("cuda", Path("a folder"), Path("work"), seconds=100)
    commands = [shlex.split(step.command(setup)) for step in STEPS]
    name = f"/{script.__name__.rpartition('.')[2]}.py"
    own = [words[1:] for words in commands if words[0].endswith(name)]
    assert own
    for words in own:
        assert script.make_parser().parse_args(words).device == "cuda"


def test_the_results_of_a_gpu_have_its_name(tmp_path, monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(gpu, "choose_device", torch.device)
    monkeypatch.setattr(measure, "machine", lambda device: ABOUT)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    record, setup = gpu.begin(gpu.make_parser().parse_args([]), contextlib.ExitStack())
    assert record.file == tmp_path / "gpu-nvidia-h100" / "gpu.json"
    assert (setup.data / "train" / "red").is_dir()
    assert setup.device == "cuda" and not setup.dry


def test_accuracy_takes_the_epochs_for_which_there_is_time(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "seconds_of_step", lambda *_: 1.0)
    data = images.generate(tmp_path / "images", train=1, test=1)
    flags = f"--data {data} --work {tmp_path} --seconds"

    def epochs(seconds):
        args = accuracy.make_parser().parse_args([*flags.split(), str(seconds)])
        return accuracy.choose_epochs({"vgg": 19}, args)

    assert epochs(3 * accuracy.START + 10 * 2 * accuracy.SLACK + 0.1) == 10
    assert epochs(10**6) == 10, "as an interrupted call has chosen"
    (tmp_path / "epochs").unlink()
    assert epochs(10**6) == accuracy.MOST
    (tmp_path / "epochs").unlink()
    assert epochs(1) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_is_possible():
    done = run("benchmarks/gpu.py")
    assert done.returncode == 2 and "--dry-run" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def step_of(name, code, minutes=1.0):
    return Step(name, minutes, "", lambda setup: f'-c "{code}"')


WRITES = """
from benchmarks import measure
measure.write('speed', {'torch': '3', 'command': 'python'}, ['a'], [{'a': 1}])
"""


@pytest.fixture
def setup(tmp_path):
    return Setup("cpu", tmp_path, tmp_path / "work")


@pytest.mark.slow
def test_a_failed_step_is_recorded_and_the_next_one_runs(setup, tmp_path):
    record = Record(tmp_path / "results", ABOUT)
    steps = [
        step_of("writes", WRITES),
        step_of("fails", f"{WRITES}raise SystemExit('no such kernel')"),
        step_of("hangs", "import time; time.sleep(60)", 0.005),
    ]
    assert not gpu.run_steps(steps, setup, record, float("inf"))
    again = Record(tmp_path / "results", ABOUT)
    assert [again.is_done(s.name) for s in steps] == [True, False, False]
    assert [again.has_failed(s.name) for s in steps] == [False, True, False]
    assert again.steps["hangs"]["state"] == "out of time"
    assert again.steps["fails"]["error"][-1] == "no such kernel"
    assert again.steps["fails"]["tables"]["speed"]["rows"] == [{"a": 1}], "what it had written"
    text = again.text.read_text()
    assert "no such kernel" in text and "## writes: speed" in text and "- torch: 3" in text
    assert "- torch: 2" in text and "command" not in text


def test_steps_without_time_are_left(setup, tmp_path):
    steps = [step_of("one", "pass"), step_of("two", "pass")]
    record = Record(tmp_path / "results", ABOUT)
    assert gpu.run_steps(steps, setup, record, deadline=0) == ["one", "two"]
    assert not record.steps


def test_ctrl_c_ends_the_step_and_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    record, words = Record(tmp_path / "results", ABOUT), ["gpu.py", "--data", "a folder"]
    monkeypatch.setattr(gpu, "begin", lambda *_: (record, None))
    monkeypatch.setattr(gpu, "run_steps", interrupt)
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UserError, match=r"go on with: python gpu.py --data 'a folder'") as error:
        gpu.main()
    assert error.value.status == 130


def test_done_steps_are_skipped_unless_they_are_named(tmp_path, monkeypatch, capsys):
    record, ran = Record(tmp_path / "results", ABOUT), []
    result = {"state": "done", "seconds": 1, "date": "today", "summary": "", "tables": {}}
    record.add(STEPS[0].name, result)
    monkeypatch.setattr(gpu, "begin", lambda *_: (record, None))
    monkeypatch.setattr(gpu, "run_steps", lambda steps, *_: ran.append([s.name for s in steps]))
    for words in ("gpu.py", f"gpu.py --only {STEPS[0].name}"):
        monkeypatch.setattr("sys.argv", words.split())
        gpu.main()
    names = [step.name for step in STEPS]
    assert ran == [names[1:], names[:1]]
    assert f"{names[0]}: done before" in capsys.readouterr().out


def test_images_come_from_a_folder_or_a_tar(tmp_path):
    folder = make_images(tmp_path / "deep" / "images")
    assert images.folder(folder, tmp_path / "work") == folder
    with tarfile.open(tmp_path / "images.tar.xz", "w:xz") as archive:
        archive.add(folder, "images")
    unpacked = images.folder(tmp_path / "images.tar.xz", tmp_path / "work")
    assert sorted(p.name for p in (unpacked / "train").iterdir()) == ["blue", "red"]
    assert images.folder(tmp_path / "images.tar.xz", tmp_path / "work") == unpacked


def test_a_tar_cannot_write_outside_of_its_folder(tmp_path):
    (tmp_path / "evil").touch()
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.add(tmp_path / "evil", "../../outside")
    with pytest.raises(UserError, match="cannot unpack"):
        images.folder(tmp_path / "bad.tar", tmp_path / "work")
    assert not list(tmp_path.rglob("outside")) and not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("data", ["missing", "empty", "text.tar"])
def test_data_that_is_none_is_one_line(tmp_path, data):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("not a tar")
    with pytest.raises(UserError, match=data):
        images.folder(tmp_path / data, tmp_path / "work")


def test_generated_images_have_a_colour(tmp_path):
    folder = images.generate(tmp_path / "images", train=2, test=1)
    assert len(list(folder.rglob("*.png"))) == 3 * len(images.CLASSES)


def test_the_name_of_a_gpu_is_a_file_name():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
