"""One run at a time in a folder: a live one is named, a dead one is in nobody's way."""

import contextlib
import errno
import importlib
import json
import multiprocessing
import os
import signal
import socket

import pytest
from conftest import save_network

from slimming.commands.experiment.run import config_of
from slimming.commands.experiment.settings import read_settings
from slimming.errors import UserError
from slimming.storage import files
from slimming.storage.files import claimed

FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def another_process(folder, name=None):
    """Another process, while it claims the folder."""
    ours, theirs = FORK.Pipe()

    def hold():
        with claimed(folder, name):
            theirs.send("ready")
            theirs.poll(60)

    process = FORK.Process(target=hold)
    process.start()
    assert ours.poll(20)
    try:
        yield process
    finally:
        ours.send("done")
        process.join(20)


def refused(folder, name=None):
    try:
        with claimed(folder, name):
            return None
    except UserError as error:
        return str(error)


def forked(function, *args):
    """What the function returns in a fork of this process."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=lambda: theirs.send(function(*args)))
    process.start()
    process.join(20)
    return ours.recv()


def test_a_folder_of_a_live_run_is_refused_and_free_when_it_ends(tmp_path):
    folder = tmp_path / "a" / "b"
    with another_process(folder) as process:
        told = refused(folder)
        assert f"{folder} is written by process {process.pid} on {socket.gethostname()}" in told
        assert refused(folder) and len(told.splitlines()) == 1  # a refusal frees nothing
        assert not refused(tmp_path) and not refused(folder, "other_name")
    assert not refused(folder) and list(folder.iterdir()) == []


def test_whoever_is_killed_is_in_nobodys_way(tmp_path):
    with another_process(tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert (tmp_path / ".lock").exists() and not refused(tmp_path)
    (tmp_path / ".lock").write_text("of another program")
    assert not refused(tmp_path) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_claim_ends_with_any_error_and_leaves_nothing(tmp_path, error):
    folder = tmp_path / "new" / "folder"
    with pytest.raises(error), claimed(folder):
        with claimed(folder):  # of the same run
            pass
        assert forked(refused, folder)  # the inner block did not end the outer one
        raise error
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_live_process_and_other_hosts_are_believed(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    process = FORK.Process(target=bool)
    process.start()
    process.join()
    monkeypatch.setattr(files.fcntl, "lockf", no_locks)
    here = socket.gethostname()
    for host, number, live in (
        (here, process.pid, False),
        (here, os.getppid(), True),
        ("elsewhere", process.pid, True),
    ):
        (tmp_path / ".lock").write_text(json.dumps({"host": host, "process": number}))
        assert bool(refused(tmp_path)) == live


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    assert f"cannot write to {tmp_path / 'file' / 'x'}" in refused(tmp_path / "file" / "x")


COMMANDS = {
    "main": "--arch resnet --depth 11 --dataset digits --epochs 1 --save FOLDER",
    "mask-impl.main_mask": "--arch resnet --depth 11 --dataset digits --epochs 1 --save FOLDER",
    "resprune": "--model NET --save FOLDER",
    "mask-impl.prune_mask": "--model NET --save FOLDER",
    "flowprune": "--model resnet --depth 11 --dataset digits --save FOLDER",
    "sweep": "NET --save FOLDER",
    "export": "NET --format torch --save FOLDER",
    "run": "--model resnet --depth 11 --dataset digits --resume --output-dir OUT",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_that_writes_a_folder_claims_it(tmp_path, monkeypatch, few_digits, script):
    net = save_network(tmp_path / "net.pth.tar", "resnet", 11)
    folder = tmp_path / "out" / "digits" / "resnet_channel_digits_20260101_000000"
    places = {"NET": net, "FOLDER": folder, "OUT": tmp_path / "out"}
    words = [str(places.get(word, word)) for word in COMMANDS[script].split()]
    if script == "run":
        settings = {"model": "resnet", "depth": 11, "dataset": "digits", "resume": True}
        config = config_of(read_settings({**settings, "output_dir": tmp_path / "out"}))
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.argv", [f"{script}.py", *words, "--no-cuda"])
    with another_process(folder) as process:
        before = sorted(folder.rglob("*"))
        with pytest.raises(UserError, match=f"is written by process {process.pid} on"):
            importlib.import_module(script).main()
        assert sorted(folder.rglob("*")) == before
