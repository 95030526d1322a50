"""classify.py and the lines of docs/deployment.md: PyTorch's answers where no PyTorch is; programs
that slim trained networks, here with random weights."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import KINDS, agree
from PIL import Image
from warm import ROOT

from slimming.data import datasets
from slimming.data.batches import normalize
from slimming.deploy import torch_file
from slimming.deploy.graph import Feed, traced
from slimming.storage import architecture

pytestmark = pytest.mark.slow  # train, export, and start programs
EXAMPLES = ROOT / "examples"
DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
PROGRAMS = [  # by the library that each needs
    (re.findall(r"^import (\w+)$", program, re.MULTILINE)[-1], program)
    for program in re.findall(r"```py\n(.*?)```", DEPLOYMENT, re.DOTALL)
]


def test_the_docs_have_a_program_for_each_library():
    assert [library for library, _ in PROGRAMS] == ["onnxruntime", "openvino", "torch"]


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    """Run classify.py where PyTorch cannot be imported."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "torch.py").write_text("raise ImportError('PyTorch is not here')\n")

    def run(*words):
        command = [sys.executable, EXAMPLES / "classify.py", *words]
        env = {**os.environ, "PYTHONPATH": str(hidden)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    hides = "import sys; sys.path.insert(0, sys.argv[1]); import torch"
    failed = subprocess.run([sys.executable, "-c", hides, hidden], capture_output=True, check=False)
    assert b"PyTorch is not here" in failed.stderr
    return run


@pytest.mark.parametrize(
    "kind, batch", [*((kind, None) for kind in KINDS), (KINDS[-1], 1), (KINDS[0], 4)]
)
def test_a_program_without_pytorch_gives_its_answers(
    classify, digits_onnx, pictures, answers, kind, batch
):
    done = classify(digits_onnx(kind, batch), *pictures)
    assert done.returncode == 0, done.stderr
    names, told = zip(*(line.split(": ") for line in done.stdout.splitlines()), strict=True)
    assert list(names) == list(map(str, pictures))
    assert agree([words.split() for words in told], answers)


def test_pictures_get_the_border_of_mnist(classify, bordered, pictures, answers):
    path, expected = bordered
    told = [line.split(": ")[1].split() for line in classify(path, *pictures).stdout.splitlines()]
    assert agree(told, expected) and expected != answers


def test_a_library_that_is_not_installed_is_one_line(tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('no onnxruntime')\n")
    command = [sys.executable, EXAMPLES / "classify.py", "a.onnx", "b.png"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: no onnxruntime\n")


def test_the_program_needs_three_libraries():
    text = (EXAMPLES / "classify.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}


def test_mistakes_of_the_user_are_one_line_each(classify, digits_onnx, pictures, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = digits_onnx()
    bare = onnx.load(model)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    (tmp_path / "text.onnx").write_text("no network\n" * 9)
    for words, says in (
        ([], "Usage: python examples/classify.py MODEL.onnx IMAGE..."),
        ([model], "no picture"),
        ([tmp_path / "missing.onnx", pictures[0]], "missing.onnx"),
        ([tmp_path / "text.onnx", pictures[0]], "text.onnx"),
        ([tmp_path / "bare.onnx", pictures[0]], "bare.onnx lacks classes, image_size, input"),
        ([model, tmp_path / "missing.png"], "missing.png"),
        ([model, tmp_path / "text.onnx"], "text.onnx"),
    ):
        done = classify(*words)
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr


@pytest.mark.parametrize("library, program", PROGRAMS)
def test_the_programs_of_the_docs_run(
    library, program, slim_digits, digits_onnx, tmp_path, monkeypatch
):
    pytest.importorskip(library)
    shutil.copy(digits_onnx(), tmp_path / "slim.onnx")
    model, _, _ = architecture.load(slim_digits)
    model.eval()
    torch_file.write(traced(model, Feed()), tmp_path / "slim.pt2", "fp32", [], {"input": "NCHW"})
    monkeypatch.chdir(tmp_path)
    images = normalize(datasets.load("digits", tmp_path, "test").images[:20])
    names = {"images": images if library == "torch" else images.numpy()}
    exec(program, names)
    with torch.inference_mode():
        expected = model(images)
    torch.testing.assert_close(torch.as_tensor(names["logits"]), expected, rtol=1e-3, atol=1e-3)
    assert library != "torch" or json.loads(names["facts"]["metadata.json"]) == {"input": "NCHW"}


def test_the_extra_and_the_requirements_are_the_same():
    lines = (ROOT / "requirements-export.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.partition("#")[0].strip() for line in lines]
    extra = re.search(r"^export = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert json.loads(extra[1]) == [line for line in listed if line]


def example(name, *words):
    """Run a program of examples/ that uses the suite."""
    command = [sys.executable, EXAMPLES / name, *map(str, words)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_mobilenet_is_slimmed_repaired_saved_and_loaded(tmp_path):
    draw = np.random.default_rng(0)
    for i in range(48):
        picture = Image.fromarray(draw.integers(256, size=(40, 50, 3), dtype=np.uint8))
        picture.save(tmp_path / f"{i}.jpg")
    given = ["--images", tmp_path, "--save", tmp_path / "slim.pth", "--size", 32]
    done = example("slim_mobilenet.py", *given, "--weights", "none")
    assert done.returncode == 0, done.stderr
    assert "MFLOPs" in done.stdout and "it gives the same answers" in done.stdout
    (tmp_path / "0.jpg").unlink()
    done = example("slim_mobilenet.py", *given, "--weights", "none")
    told = f"{tmp_path} has 47 jpg files: at least 48 are needed"
    assert (done.returncode, done.stderr.strip()) == (1, told)


def test_a_text_detector_is_slimmed_repaired_and_deployed(tmp_path):
    pytest.importorskip("easyocr")
    given = ["--weights", "none", "--size", 32, "--save", tmp_path / "slim.pth"]
    done = example("slim_text_detector.py", *given)
    assert done.returncode == 0, done.stderr
    assert "CRAFT: " in done.stdout and "found again" in done.stdout
    assert (tmp_path / "slim.pth").exists()


def test_without_easyocr_the_text_detector_is_one_line(tmp_path):
    (tmp_path / "easyocr.py").write_text("raise ImportError('no easyocr')\n")
    command = [sys.executable, EXAMPLES / "slim_text_detector.py", "--weights", "none"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "no easyocr: pip install easyocr\n")
