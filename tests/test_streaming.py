"""Images from DataLoader workers are the same whatever the number of workers."""

import numpy as np
import pytest
import torch
from conftest import make_images, succeed
from PIL import Image

from slimming.data import image_folder
from slimming.data.pixels import normalize
from slimming.data.stream import Stream
from slimming.errors import UserError
from slimming.storage import checkpoint


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("large"), train=20, test=6, size=(80, 60))


def stream(folder, part, workers=0, **settings):
    _, samples, classes = image_folder.scan_folder(folder, part)
    settings = {"batch_size": 16, "augment": part == "train", "seed": 1, **settings}
    return Stream(samples, classes, 48, torch.device("cpu"), workers, **settings)


def epoch(loader, number):
    loader.epoch = number
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_an_epoch_does_not_depend_on_the_number_of_workers(large):
    alone, helped = stream(large, "train"), stream(large, "train", workers=2)
    epoch(helped, 0)
    for number in (1, 0):
        for a, b in zip(epoch(alone, number), epoch(helped, number), strict=True):
            assert torch.equal(a, b)
    images, labels = epoch(alone, 1)
    assert images.shape == (40, 3, 48, 48) and labels.bincount().tolist() == [20, 20]
    assert not torch.equal(labels, epoch(alone, 2)[1])


def test_the_test_is_the_centre_and_shares_are_disjoint(large):
    whole, labels = epoch(stream(large, "test"), 0)
    with Image.open(large / "test" / "blue" / "0.png") as image:
        scaled = image.resize((72, 54), Image.Resampling.BILINEAR).crop((12, 3, 60, 51))
    expected = normalize(torch.from_numpy(np.array(scaled)).permute(2, 0, 1)[None])
    torch.testing.assert_close(whole[:1], expected, rtol=0, atol=0.05)
    parts = [epoch(stream(large, "test", rank=rank, ranks=2), 0)[1] for rank in range(2)]
    assert torch.equal(torch.cat(parts).sort().values, labels.sort().values)
    assert torch.equal(stream(large, "test").first(3), whole[:3])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(tmp_path, workers):
    folder = make_images(tmp_path, train=2, test=2)
    (folder / "test" / "red" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^cannot read the image .*red/1\.png") as error:
        epoch(stream(folder, "test", workers), 0)
    assert "Traceback" not in str(error.value)


def test_the_workflow_at_another_size(large, tmp_path):
    data = f"--data {large} --workers 1"
    train = f"main.py -sr --dataset folder {data} --arch resnet --depth 11 --epochs 1"
    succeed(f"{train} --image-size 48 --save {tmp_path}")
    assert checkpoint.read(tmp_path / "checkpoint.pth.tar")["image_size"] == 48
    assert "slim equals masked" in succeed(f"resprune.py --model {tmp_path} {data}")
    pruned = tmp_path / "pruned.pth.tar"
    succeed(f"main.py --refine {pruned} {data} --epochs 1 --save {tmp_path / 'fine'}")
