"""Every network is fed as its weights expect, whichever command feeds it."""

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_images, save_network
from PIL import Image
from torchvision import models
from warm import ROOT

import flowprune
import main
import resprune
import run
import sweep
from slimming.cli import flags
from slimming.commands.experiment import run as experiment_run
from slimming.commands.experiment.run import config_of
from slimming.commands.experiment.settings import read_settings
from slimming.commands.export import run as export_run
from slimming.commands.export.settings import ExportRun
from slimming.data import batches, image_folder, loading
from slimming.data.batches import denormalize, normalize
from slimming.data.datasets import DataSettings
from slimming.data.image_folder import Stream
from slimming.deploy.graph import Feed, traced
from slimming.errors import UserError
from slimming.settings import build
from slimming.storage import architecture, checkpoint
from slimming.storage.architecture import Request
from slimming.storage.preprocessing import CIFAR, IMAGENET, Preprocessing

judge = importlib.import_module("eval")  # the name of a builtin
ODD = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (9, 10), "bicubic")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return make_images(folder, train=8, test=4, size=(90, 70))


def settings(words):
    return read_settings(flags.parse(run.make_parser(), words.split()))


@pytest.mark.parametrize(
    "name, weights, size",
    [
        ("mobilenet_v2", "IMAGENET1K_V1", 224),
        ("resnet50", "IMAGENET1K_V2", 224),  # of 232 pixels
        ("efficientnet_b1", "IMAGENET1K_V2", 240),
        ("efficientnet_b3", "DEFAULT", 300),  # bicubic
    ],
)
def test_pretrained_weights_get_the_images_of_torchvision(photos, name, weights, size):
    words = f"--dataset imagenet --data {photos} --model {name} --weights {weights}"
    network = settings(words).architecture(2)
    assert network.image_size == size
    data = DataSettings(data=str(photos), workers=0)
    images = loading.batches_for(network, "test", 2, torch.device("cpu"), data).first(3)
    preset = models.get_model_weights(name)[weights].transforms()
    _, samples, _ = image_folder.scan_folder(photos, "test")
    expected = torch.stack([preset(Image.open(path)) for path, _ in samples[:3]])
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)


def test_the_settings_say_how_a_network_without_checkpoint_is_fed():
    for words, size, preprocessing in (
        ("--dataset digits", 32, CIFAR),
        ("--dataset imagenet", 224, IMAGENET),
        ("--dataset folder", 32, CIFAR),
        ("--dataset digits --weights DEFAULT", 32, replace(IMAGENET, crop=(28, 29))),
        ("--dataset folder --weights IMAGENET1K_V1", 224, IMAGENET),
        ("--dataset folder --weights IMAGENET1K_V1 --image-size 96", 96, IMAGENET),
        ("--dataset imagenet --skip-base-training --model inception_v3", 299, None),
    ):
        words = words if "--model" in words else f"{words} --model resnet50"
        network = settings(words).architecture(2)
        assert network.image_size == size, words
        assert preprocessing in (None, network.preprocessing), words
    assert config_of(settings("--dataset imagenet --image-size 64"))["image_size"] == 64
    assert config_of(settings("--dataset folder"))["image_size"] is None


def test_a_checkpoint_says_how_its_network_is_fed(tmp_path):
    path = save_network(tmp_path / "net", "resnet", 11)
    contents = checkpoint.read(path)
    model, network, _ = architecture.load(path)
    assert network.preprocessing == CIFAR
    odd = replace(network, preprocessing=ODD, image_size=48)
    checkpoint.write(path, architecture.contents_of(model, odd, 1, 0.5))
    assert architecture.load(path)[1] == odd
    del contents["preprocessing"]  # a file of before
    asked = {"preprocessing": IMAGENET}
    assert architecture.rebuild(path, contents, Request(**asked))[1].preprocessing == CIFAR
    bare = {"state_dict": contents["state_dict"]}
    asked |= {"arch": "resnet", "depth": 11, "dataset": "digits"}
    assert architecture.rebuild(path, bare, Request(**asked))[1].preprocessing == IMAGENET
    stored = ODD.to_store()
    for wrong in (
        "odd",
        {"mean": [0, 0, 0]},
        stored | {"std": [1, 1]},
        stored | {"std": [1, 1, 0]},
        stored | {"mean": ["a", 0, 0]},
        stored | {"crop": [9, 8]},
        stored | {"crop": [0.5, 8]},
        stored | {"interpolation": "best"},
        stored | {"more": 1},
    ):
        with pytest.raises(UserError, match="is damaged: its preprocessing is"):
            architecture.rebuild(path, contents | {"preprocessing": wrong}, Request())


@pytest.fixture
def fed(monkeypatch):
    """The preprocessing of all images that this process feeds to networks."""
    found = []

    def normalized(images, preprocessing=CIFAR):
        found.append(preprocessing)
        return normalize(images, preprocessing)

    for module in (batches, image_folder):
        monkeypatch.setattr(module, "normalize", normalized)
    return found


@pytest.fixture
def odd(tmp_path):
    """The checkpoint of a network that is fed in its own way."""
    path = save_network(tmp_path / "odd.pth.tar", "resnet", 11)
    checkpoint.write(path, checkpoint.read(path) | {"preprocessing": ODD.to_store()})
    return path


TRAIN = "--epochs 1 --batch-size 25 --no-cuda --no-tensorboard"
BASE = "--dataset digits --model resnet --depth 11 --skip-base-training --no-cuda --no-fp16"
COMMANDS = {
    "main": (main, f"--refine {{odd}} {TRAIN} --save {{out}}"),
    "resprune": (resprune, "--model {odd} --save {out} --no-cuda --repair --repair-images 40"),
    "flowprune": (
        flowprune,
        "--model resnet --dataset digits --pretrained_path {odd} --bypass --imp_samples 25 "
        f"{TRAIN} --save {{out}}",
    ),
    "run": (run, f"{BASE} --model-path {{odd}} --finetune-epochs 1 --output-dir {{out}}"),
    "eval": (judge, "{odd} --no-cuda --test_acc True --train_acc True"),
    "sweep": (
        sweep,
        "{odd} --no-cuda --points 2 --held-back 10 --repair-images 40 --latency-batch 1 "
        "--save {out}",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_feeds_a_network_in_its_way(
    command, odd, fed, tmp_path, monkeypatch, quick, few_digits, capsys
):
    script, words = COMMANDS[command]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [command, *words.format(odd=odd, out=out).split()])
    script.main()
    assert fed and set(fed) == {ODD}
    for path in [*out.rglob("*.pth*")]:
        assert architecture.load(path)[1].preprocessing == ODD, path


def test_exported_graphs_normalise_in_its_way_and_say_how(odd, fed, few_digits, capsys):
    typed = {"checkpoint": str(odd), "no_cuda": True}
    ours = export_run.load(build(ExportRun, typed))
    facts = ours.metadata("fp32", "folded")
    said = {name: json.loads(facts[name]) for name in ("mean", "std")}
    assert said == {"mean": list(ODD.mean), "std": list(ODD.std)}
    assert (facts["crop"], facts["interpolation"]) == ("whole", "bicubic")
    assert len(ours.calibration) and ours.images.shape[1:] == (3, 32, 32) and set(fed) == {ODD}
    large = replace(ours, feed=replace(ours.feed, size=48))
    assert large.metadata("fp32", "folded")["crop"] == "center 9/10"

    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    images = normalize(pixels, ODD)
    assert torch.equal(denormalize(images, ODD), pixels)
    feed = Feed(uint8=True, preprocessing=ODD)
    logits = traced(ours.model, feed).module()(feed.of(images))
    torch.testing.assert_close(logits, ours.model(images), rtol=1e-4, atol=1e-4)


def test_torchvision_s_weights_are_saved_with_their_preprocessing(photos, tmp_path, monkeypatch):
    source = models.resnet18().state_dict()
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda *_, **__: source)
    words = f"--dataset folder --data {photos} --model resnet18 --output-dir {tmp_path}"
    path = experiment_run.find_base(settings(f"{words} --weights DEFAULT --no-cuda"))
    model, network, _ = architecture.load(path)
    assert network.preprocessing == IMAGENET and network.image_size == 224
    assert torch.equal(model.conv1.weight, source["conv1.weight"])


def test_a_stream_is_resized_and_cropped_as_the_network_says(photos):
    _, samples, classes = image_folder.scan_folder(photos, "test")
    cpu = torch.device("cpu")
    ours = Stream(samples, classes, 63, cpu, 0, 4, augment=False, preprocessing=ODD)
    with Image.open(samples[0][0]) as image:
        scaled = image.resize((90, 70), Image.Resampling.BICUBIC).crop((14, 4, 77, 67))
    expected = normalize(torch.from_numpy(np.array(scaled)).permute(2, 0, 1)[None], ODD)
    assert torch.equal(ours.first(1), expected)
    labels = torch.cat([labels for _, labels in ours])
    assert torch.equal(next(iter(ours))[0][:1], expected) and labels.tolist() == 4 * [0] + 4 * [1]
    augmented = Stream(samples, classes, 63, cpu, 0, 4, augment=True, preprocessing=ODD)
    assert torch.equal(augmented.without_augmentation().first(1), expected)
    assert torch.equal(
        ours.draw(8, 0)[0].sort(0).values, torch.cat([i for i, _ in ours]).sort(0)[0]
    )


JAVASCRIPT = """
import { readFileSync } from "node:fs";
import { prepare, readPixels } from "PIXELS";
const { width, height, rgba, facts } = JSON.parse(readFileSync(0, "utf8"));
globalThis.createImageBitmap = async () => ({ width, height, close() {} });
globalThis.OffscreenCanvas = class {
  getContext() {
    return { drawImage() {}, getImageData(left, top, wide, high) {
      const data = new Uint8ClampedArray(4 * wide * high);
      for (let y = 0; y < high; y++) {
        const from = 4 * ((top + y) * width + left);
        data.set(rgba.slice(from, from + 4 * wide), 4 * y * wide);
      }
      return { data };
    } };
  }
};
const pixels = await readPixels({ name: "picture" }, facts);
const { data } = prepare(pixels, facts);
console.log(JSON.stringify({ pixels: [...pixels], data: [...data] }));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="no node: install Node.js")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop, bleed", [("center 7/8", 1 / 16), ("center 9/10", 0.05)])
def test_the_page_resizes_and_crops_as_pillow_does(tmp_path, interpolation, crop, bleed):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8))
    rgba = np.asarray(picture.convert("RGBA")).ravel().tolist()
    facts = {"input": "float32 NHWC", "image_size": 30, "crop": crop}
    facts |= {"interpolation": interpolation, "mean": ODD.mean, "std": ODD.std}
    script = tmp_path / "read.mjs"
    script.write_text(JAVASCRIPT.replace("PIXELS", (ROOT / "examples" / "pixels.js").as_uri()))
    given = json.dumps({"width": 100, "height": 100, "rgba": rgba, "facts": facts})
    done = subprocess.run(
        ["node", script], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    side = round(100 * (1 - 2 * bleed))
    at = (100 - side) // 2
    part = picture.crop((at, at, at + side, at + side))
    resized = part.resize((30, 30), Image.Resampling[interpolation.upper()])
    expected = np.asarray(resized).astype(int).ravel()
    assert np.abs(np.array(answer["pixels"]) - expected).max() <= 1
    normal = (np.array(answer["pixels"]).reshape(-1, 3) / 255 - ODD.mean) / ODD.std
    np.testing.assert_allclose(answer["data"], normal.ravel(), rtol=1e-5, atol=1e-6)
