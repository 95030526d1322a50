"""Every command broken on purpose, as a process: one line, the right status, nothing written."""

import ast
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import UNREACHABLE, fails, make_images, save_network
from torch import nn
from warm import ROOT

from slimming.cli import entry
from slimming.errors import UserError
from slimming.runtime.device import compiled

PRUNERS = {
    "vggprune.py": "vgg",
    "resprune.py": "resnet",
    "denseprune.py": "densenet",
    "mask-impl/prune_mask.py": "resnet",
}
DEPTH = {"vgg": 11, "resnet": 11, "densenet": 7}
READERS = [
    ("main.py", "--refine"),
    ("main.py", "--resume"),
    ("mask-impl/main_mask.py", "--refine"),
    ("mask-impl/main_mask.py", "--resume"),
    *((script, "--model") for script in PRUNERS),
]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("code-ran",)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A good checkpoint of each network, and files that are none."""
    folder = tmp_path_factory.mktemp("files")
    for arch, depth in DEPTH.items():
        save_network(folder / arch, arch, depth)
    save_network(folder / "resnet20", "resnet", 20)
    save_network(folder / "cifar10", "resnet", 11, "cifar10")
    save_network(folder / "two", "resnet", 11, "folder", num_classes=2)
    save_network(folder / "three", "resnet", 11, "folder", num_classes=3)
    (folder / "empty").touch()
    (folder / "random").write_bytes(os.urandom(50_000))
    (folder / "cut").write_bytes((folder / "resnet").read_bytes()[:20_000])
    torch.save({"state_dict": {}, "cfg": Evil()}, folder / "evil")
    make_images(folder / "images", train=4, test=4)
    return folder


@pytest.mark.parametrize("script, flag", READERS)
@pytest.mark.parametrize(
    "broken, says",
    [
        ("missing", "No such file"),
        ("empty", "empty, truncated"),
        ("cut", "truncated"),
        ("random", "not a readable checkpoint"),
        ("evil", "run code"),
        ("images", "images"),
    ],
)
def test_a_broken_file(tmp_path, files, script, flag, broken, says):
    fails(tmp_path, script, flag, files / broken, "--dataset", "digits", says=says)


@pytest.mark.parametrize("script, arch", PRUNERS.items())
@pytest.mark.parametrize("percent", ["1", "1.5", "-0.1", "nan", "half"])
def test_a_percent_that_is_none(tmp_path, files, script, arch, percent):
    says = ["--percent", "less than 1", percent]
    fails(tmp_path, f"{script} --model {files / arch} --percent {percent}", says=says)


@pytest.mark.parametrize(
    "script, other",
    [("vggprune.py", "resnet"), ("resprune.py", "densenet"), ("denseprune.py", "vgg")],
)
def test_a_checkpoint_of_another_network(tmp_path, files, script, other):
    says = [f"has arch '{other}'", "was requested"]
    fails(tmp_path, f"{script} --model {files / other}", says=says)


@pytest.mark.parametrize(
    "script, flag", [READERS[0], READERS[1], READERS[3], READERS[5], READERS[7]]
)
def test_a_checkpoint_of_another_dataset_depth_or_class_count(tmp_path, files, script, flag):
    command, data = f"{script} {flag} {files / 'resnet'}", files / "images"
    fails(tmp_path, f"{command} --dataset cifar10", says=["'digits'", "'cifar10'"])
    fails(tmp_path, f"{command} --depth 20", says=["11", "20"])
    command = f"{script} {flag} {files / 'three'} --data {data}"
    fails(tmp_path, command, says=["3 classes", "has 2"])


def test_images_of_other_classes(tmp_path, files):
    """As many classes as the network tells apart, but not the same."""
    model = save_network(tmp_path / "model", "resnet", 11, "folder", 2, classes=["cat", "dog"])
    command = f"resprune.py --model {model} --data {files / 'images'}"
    fails(tmp_path, command, says=["'cat'", "'blue'"])


def test_weights_of_another_network(tmp_path, files):
    """A file that does not say what it holds, and flags that guess wrong."""
    contents = torch.load(files / "resnet20", weights_only=True)
    old = tmp_path / "old"
    torch.save({"state_dict": contents["state_dict"]}, old)
    for guess in ("resnet-29", "vgg-11"):
        arch, _, depth = guess.partition("-")
        script = {"resnet": "resprune.py", "vgg": "vggprune.py"}[arch]
        command = f"{script} --model {old} --dataset digits --depth {depth}"
        fails(tmp_path, command, says=f"does not contain a {guess}")


def test_bare_weights(tmp_path, files):
    """Of no run; what they are of is for flags to say; and nobody writes over them."""
    bare = tmp_path / "pruned.pth.tar"
    torch.save(torch.load(files / "resnet", weights_only=True)["state_dict"], bare)
    prune, other = f"resprune.py --model {bare}", tmp_path / "other"
    fails(tmp_path, prune, says="would be overwritten")
    contents = torch.load(files / "three", weights_only=True)["state_dict"]
    torch.save(contents, tmp_path / "three")
    command = f"resprune.py --model {tmp_path / 'three'} --save {other}"
    fails(tmp_path, command, says="does not record its dataset: add --dataset")
    resume = f"main.py --resume {bare} --arch resnet --depth 11 --dataset digits"
    fails(tmp_path, resume, says="train them with --refine")
    over = f"resprune.py --model {files / 'resnet'} --save {tmp_path}"
    fails(tmp_path, over, says="would be overwritten")


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--epochs 0", "--epochs"),
        ("--epochs ten", "--epochs"),
        ("--lr -1", "--lr"),
        ("--lr inf", "--lr"),
        ("--s nan", "--s"),
        ("--momentum 1", "--momentum"),
        ("--batch-size 0", "--batch-size"),
        ("--arch alexnet", "alexnet"),
        ("--arch vgg --depth 18", "11, 13, 16, 19"),
        ("--depth 20.5", "--depth"),
        ("--arch preact_res21", "9n+2"),
        ("--arch densenet --depth 41", "3n+4"),
        ("--arch preact_res20 --depth 56", "contradict"),
        ("--seed -1", "--seed"),
        ("--dataset imagenet", "imagenet"),
        ("--device gpu9", "--device cpu"),
        ("--device cuda:99", "--device cpu"),
        ("--colour", "--colour"),
        ("--filename a/b", "--filename"),
        ("--tag ..", "--tag"),
    ],
)
def test_wrong_flags(tmp_path, flags, says):
    fails(tmp_path, f"main.py --dataset digits {flags}", says=says)


def test_flags_that_contradict_each_other(tmp_path):
    fails(tmp_path, "resprune.py --save a --save_dir b --model x", says=["--save", "--save_dir"])
    both = "run.py --model resnet18 --skip-base-training --weights DEFAULT --model-path x.pth"
    fails(tmp_path, both, says=["--weights", "--model-path"])
    fails(tmp_path, "vggprune.py --model x --repair-images 100", says="needs --repair")


def test_a_model_that_is_not_named(tmp_path):
    fails(tmp_path, "vggprune.py", says="--model FILE is required")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn", "mnist", "fashionmnist"])
def test_a_dataset_that_cannot_be_downloaded(tmp_path, dataset):
    (tmp_path / "mine").mkdir()  # an empty folder stays, and so do files
    says = [f"download {dataset}", "--dataset digits"]
    for place in ("", "--data mine", "--data mine/a/b"):
        command = f"main.py --dataset {dataset} {place}"
        fails(tmp_path, command, says=says, env=UNREACHABLE)


def test_image_folders_that_cannot_be_used(tmp_path, files):
    command = "main.py --dataset folder --arch resnet --depth 11"
    fails(tmp_path, command, says=["there is no folder data.folder", "set --data to"])
    fails(tmp_path, f"{command} --data {files / 'random'}", says="there is no folder")
    broken = shutil.copytree(files / "images", tmp_path / "broken")
    shutil.rmtree(broken / "test" / "red")
    fails(tmp_path, f"{command} --data {broken}", says="no images of class red")


def test_results_that_cannot_be_written(tmp_path, files):
    (tmp_path / "file").touch()
    prune = f"resprune.py --model {files / 'two'} --data {files / 'images'}"
    fails(tmp_path, f"{prune} --save file/x", says="cannot write")
    copy = shutil.copy(files / "resnet", tmp_path / "pruned.pth.tar")
    fails(tmp_path, f"resprune.py --model {copy}", says="would be overwritten")
    shutil.copy(files / "resnet", tmp_path / "run.pth.tar")  # a checkpoint of a training run
    fails(tmp_path, f"{prune} --save {tmp_path} --filename run", says="would be overwritten")


def small_files_only():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk(tmp_path, files):
    """The limit on the size of a file stands for the disk."""
    (tmp_path / "out").mkdir()
    says, images = "cannot write out/", shutil.copytree(files / "images", tmp_path / "images")
    train = f"main.py --dataset folder --data {images} --arch vgg --depth 11 --epochs 1"
    for command, file in (
        (f"resprune.py --model {files / 'two'} --data {images} --save out", "pruned.pth.tar"),
        (f"{train} --no-tensorboard --save out", "model_best.pth.tar"),
    ):
        fails(tmp_path, command, says=says + file, preexec_fn=small_files_only)


def test_a_run_that_diverges(tmp_path, files):
    command = (
        f"main.py --dataset folder --data {files / 'images'} --arch resnet --depth 11 --lr 1e30 "
        "--epochs 3 --batch-size 2 --save . --no-tensorboard"
    )
    fails(tmp_path, command, status=1, says=["diverged", "--lr"])


def test_an_operation_without_a_deterministic_kernel(monkeypatch, capsys):
    """`put_` has none on any device."""
    monkeypatch.setattr(sys, "argv", ["main.py"])

    def put():
        torch.use_deterministic_algorithms(True)
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    try:
        with pytest.raises(SystemExit) as error:
            entry.run(put)
    finally:
        torch.use_deterministic_algorithms(False)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "main.py: error: put_ has no deterministic CUDA kernel: omit --deterministic"


def test_the_traceback_of_an_explained_error_is_there_for_who_asks(monkeypatch, capsys):
    def lose_a_file():
        Path("/nowhere/missing").read_bytes()

    monkeypatch.setattr(sys, "argv", ["main.py"])
    for debug, lines in (("", 1), ("1", 2)):
        monkeypatch.setenv("SLIMMING_DEBUG", debug)
        with pytest.raises(SystemExit) as error:
            entry.run(lose_a_file)
        told = capsys.readouterr().err
        assert error.value.code == 2 and "SLIMMING_DEBUG=1" in told.splitlines()[-1]
        assert ("lose_a_file" in told) == ("Traceback" in told) == (lines > 1)
        assert (len(told.splitlines()) == 1) == (lines == 1)


@pytest.mark.parametrize("missing, says", [("triton", "pip install triton"), ("gcc", "C compiler")])
def test_compile_on_cuda_without_what_it_needs(monkeypatch, missing, says):
    triton = None if missing == "triton" else ModuleType("triton")
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=says):
        compiled(nn.Linear(1, 1), torch.device("cuda"))


@pytest.mark.slow
def test_importing_a_script_runs_nothing(tmp_path):
    scripts = [p for folder in (ROOT, ROOT / "mask-impl") for p in folder.glob("*.py")]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in scripts]
    code = f"import importlib\nfor n in {names}: importlib.import_module(n)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_ctrl_c_in_a_destructor_is_not_lost():
    program = """
import time
from slimming.cli import entry

class Last:
    def __del__(self):
        raise KeyboardInterrupt

def main():
    last = Last()
    del last
    time.sleep(30)

entry.run(main)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=25, check=False
    )
    assert done.returncode == 130 and len(done.stderr.splitlines()) == 1, done.stderr


FLAG = re.compile(
    r"(?:^|[\s(\"'])-(?:-(?!shm-size)[a-z]|[a-z]{2})"
)  # those of pip and docker are theirs
TYPED = {"START_FLAGS", "how_to_continue", "STYLE"}  # a command that was typed; a style sheet


def messages(path):
    """The strings in a file that are no docstrings, and neither fields of settings nor `TYPED`."""
    left = [ast.parse(path.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        names = {getattr(node, "name", None), getattr(getattr(node, "func", None), "id", None)}
        names |= {getattr(target, "id", None) for target in getattr(node, "targets", ())}
        if names & (TYPED | {"setting", "switch"}):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        left += ast.iter_child_nodes(node)


ROOMS = sorted({p.relative_to(ROOT / "slimming").parts[0] for p in ROOT.glob("slimming/**/*.py")})


@pytest.mark.parametrize("room", ROOMS)
def test_the_library_names_arguments_and_the_scripts_flags(room):
    place = ROOT / "slimming" / room
    paths = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    found = [(path, text) for path in paths for text in messages(path) if FLAG.search(text)]
    assert bool(found) == (room in ("cli", "commands", "__main__.py")), found
