"""Batches are what torchvision's transforms would give; image folders are decoded once."""

import os
import struct
import warnings

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image

from slimming.data import datasets, image_folder, loading
from slimming.data.batches import MEAN, STD, Batches, Split, crop, denormalize, flip, normalize
from slimming.errors import UserError

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n"


def test_normalisation_equals_torchvision():
    from torchvision import transforms

    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    expected = plain(pixels[0].permute(1, 2, 0).numpy())
    torch.testing.assert_close(normalize(pixels)[0], expected, rtol=1e-5, atol=1e-6)


def test_crop_and_flip_equal_pil():
    """Black padding before normalisation, then the window, then the mirror image."""
    from torchvision.transforms import functional

    pixels = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    shift = torch.randint(9, (20, 2))
    mirrored = torch.arange(20) % 2 == 0
    got = flip(crop(pixels, shift), mirrored)
    for i in range(20):
        image = functional.pad(Image.fromarray(pixels[i].permute(1, 2, 0).numpy()), 4)
        image = functional.crop(image, int(shift[i, 0]), int(shift[i, 1]), 32, 32)
        image = functional.hflip(image) if mirrored[i] else image
        assert torch.equal(got[i], functional.pil_to_tensor(image))


def batches(count=100, **settings):
    images = torch.arange(count * 3 * 32 * 32).view(count, 3, 32, 32) % 256
    split = Split(images.byte(), torch.arange(count), ["a"])
    return Batches(split, 32, augment=True, **settings)


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    def epoch(loader, number):
        loader.epoch = number
        images, labels = zip(*loader, strict=True)
        return torch.cat(images), torch.cat(labels)

    first, second = batches(seed=1), batches(seed=1)
    epoch(first, 0), epoch(first, 1)
    torch.rand(17)  # other draws do not matter
    for a, b in zip(epoch(first, 5), epoch(second, 5), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(epoch(first, 6)[1], epoch(second, 5)[1])
    assert not torch.equal(epoch(batches(seed=2), 5)[1], epoch(second, 5)[1])


def drawn(**settings):
    """Labels, crops and flips of an epoch of 1000 images, read off their pixels: each one tells
    its row and its column, counted from 1."""
    row, column = torch.arange(1, 33).view(32, 1).expand(2, 32, 32).byte().clone()
    split = Split(
        torch.stack([row, column.T, row * 0]).expand(1000, 3, 32, 32), torch.arange(1000), ["a"]
    )
    images, labels = zip(*Batches(split, 32, augment=True, **settings), strict=True)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    pixels = ((torch.cat(images) * std + mean) * 255).round().int()
    middle = pixels[:, :2, 15, 15:17]  # what is padded elsewhere is an image here
    shift = middle.amin(2) - 12
    return torch.cat(labels), shift, middle[:, 1, 0] > middle[:, 1, 1]


def test_every_image_comes_once_an_epoch_and_every_crop_is_drawn():
    labels, shift, mirrored = drawn()
    assert labels.sort().values.tolist() == list(range(1000)) and len(batches(1000)) == 32
    assert all(side.unique().tolist() == list(range(9)) for side in shift.T)
    assert 400 < mirrored.sum() < 600
    assert not drawn(mirror=False)[2].any()


def unequal(count=60):
    """Batches of images that show their number, in three classes: 30, 20 and 10 of 60."""
    numbers = torch.arange(count)
    images = numbers.byte().view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    split = Split(images, (numbers % 6 > 2).long() + (numbers % 6 > 4).long(), ["a", "b", "c"])
    return Batches(split, 16, augment=True, mirror=False)


def numbers_of(images):
    """The numbers that images of `unequal` show, in the middle, where no padding is."""
    return denormalize(images)[:, 0, 16, 16].tolist()


def test_a_draw_takes_classes_in_turns_and_depends_on_the_seed_alone():
    loader = unequal()
    images, labels = loader.draw(12, seed=3)
    assert labels.bincount().tolist() == [4, 4, 4] and len(set(numbers_of(images))) == 12
    assert loader.split.labels[numbers_of(images)].equal(labels)
    assert numbers_of(loader.draw(12, seed=3)[0]) == numbers_of(images)
    assert numbers_of(loader.draw(12, seed=4)[0]) != numbers_of(images)
    assert loader.draw(40, seed=3)[1].bincount().tolist() == [15, 15, 10]  # no more of the third
    assert sorted(numbers_of(loader.draw(99, seed=3)[0])) == list(range(60))


def test_samples_are_shuffled_training_images_and_differ_from_those_of_training():
    def sampled(count, number, **how):
        images, labels = zip(*loading.samples(unequal(), count, number, **how), strict=True)
        found = numbers_of(torch.cat(images))
        assert unequal().split.labels[found].equal(torch.cat(labels))
        return found, torch.cat(labels)

    found, _ = sampled(20, 0)
    assert len(set(found)) == 20 and found == sampled(20, 0)[0] and found != sampled(20, 1)[0]
    trained = unequal()
    images, _ = zip(*trained, strict=True)
    assert found != numbers_of(torch.cat(images))[:20]
    _, labels = sampled(30, 0, balanced=True)
    assert labels.bincount().tolist() == [10, 10, 10]
    _, labels = sampled(36, 0, balanced=True)
    assert labels.bincount().tolist() == [12, 12, 10], "all of the class that has too few"
    shared = unequal()
    shared.rank, shared.ranks = 1, 2
    images, _ = zip(*loading.samples(shared, 20, 0), strict=True)
    assert numbers_of(torch.cat(images)) == found, "the same in every process"


def test_digits_are_always_split_the_same_way():
    train = datasets.load("digits", None, "train")
    test = datasets.load("digits", None, "test")
    assert train.images.shape == (1437, 3, 32, 32) and test.images.shape == (360, 3, 32, 32)
    assert train.images.max() == 255 and len(test.classes) == 10
    assert test.labels.bincount().min() >= 34
    assert test.labels[:8].tolist() == datasets.load("digits", None, "test").labels[:8].tolist()


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def test_mnist_is_padded_to_three_equal_channels(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    grey = np.random.default_rng(0).integers(1, 255, (6, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", grey)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(6, dtype=np.uint8))
    images, labels, classes = datasets.load("mnist", tmp_path, "train")
    assert images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8
    assert all(np.array_equal(images[:, c, 2:30, 2:30], grey) for c in range(3))
    assert images[:, :, :2].sum() == 0 and images[..., 30:].sum() == 0
    assert labels.tolist() == [0, 1, 2, 3, 4, 5] and len(classes) == 10


@pytest.mark.parametrize(
    "name, kind",
    [
        ("cifar10", "CIFAR10"),
        ("cifar100", "CIFAR100"),
        ("svhn", "SVHN"),
        ("fashionmnist", "FashionMNIST"),
    ],
)
def test_torchvision_s_layouts_are_understood(name, kind, monkeypatch, tmp_path):
    """Up to the download: the class is replaced by one that holds what it would have read."""
    import torchvision

    pixels = np.random.default_rng(0).integers(0, 255, (5, 3, 32, 32), dtype=np.uint8)

    class Fake:
        def __init__(self, root, download, train=True, split="train"):
            assert root == str(tmp_path) and download
            self.data = {
                "svhn": pixels,
                "fashionmnist": torch.from_numpy(pixels[:, 0, :28, :28]),
            }.get(name, pixels.transpose(0, 2, 3, 1))
            self.labels = self.targets = [4, 3, 2, 1, 0]

    monkeypatch.setattr(torchvision.datasets, kind, Fake)
    images, labels, _ = datasets.load(name, tmp_path, "test")
    if name == "fashionmnist":
        assert np.array_equal(images[:, 2, 2:30, 2:30], pixels[:, 0, :28, :28])
    else:
        assert np.array_equal(images, pixels)
    assert labels.dtype == torch.int64 and labels.tolist() == [4, 3, 2, 1, 0]


def test_a_folder_is_read_as_torchvision_reads_it(images):
    from torchvision.datasets import ImageFolder

    expected = ImageFolder(str(images / "train"))
    split = datasets.load("folder", images, "train", workers=2)
    assert split.classes == expected.classes and split.labels.tolist() == expected.targets
    for i in (0, 25, 47):
        assert np.array_equal(split.images[i].permute(1, 2, 0), np.asarray(expected[i][0]))


@pytest.mark.parametrize("ending", [".png", ".jpg", ".bmp", ".gif", ".webp", ".tiff", ".ppm"])
def test_other_formats_sizes_and_a_val_folder(tmp_path, ending):
    folder = make_images(tmp_path, train=2, test=2, size=(50, 40), ending=ending)
    (folder / "test").rename(folder / "val")
    assert datasets.load("folder", folder, "test").images.shape == (4, 3, 32, 32)


def test_grey_and_transparent_images_become_rgb(images):
    grey = Image.fromarray(np.full((32, 32), 77, dtype=np.uint8))
    grey.save(images / "train" / "blue" / "0.png")
    Image.new("RGBA", (32, 32), (1, 2, 3, 0)).save(images / "train" / "blue" / "1.png")
    split = datasets.load("folder", images, "train")
    assert (split.images[0] == 77).all()
    assert split.images[1, :, 0, 0].tolist() == [1, 2, 3]


RAMP = np.arange(32 * 32).reshape(32, 32)  # 0 to 1023


@pytest.mark.parametrize(
    "name, pixels, expected",
    [
        ("16.png", (RAMP * 64).astype(np.uint16), RAMP // 4),
        ("16.tiff", (RAMP * 64).astype(np.uint16), RAMP // 4),
        ("16.pgm", (RAMP * 64).astype(np.uint16), RAMP // 4),
        ("dark.png", (RAMP // 8).astype(np.uint16), 0 * RAMP),  # the file says that it has 16 bits
        ("dark.pgm", (RAMP // 8).astype(np.uint16), 0 * RAMP),
        ("32.tiff", (RAMP * 64).astype(np.int32), RAMP // 4),  # 16 of the 32 bits are used
    ],
)
def test_deep_grey_keeps_its_upper_bits(tmp_path, name, pixels, expected):
    path = tmp_path / name
    Image.fromarray(pixels).save(path)
    assert (np.asarray(image_folder.read_image(path)) == expected[..., None]).all()


def test_grey_of_32_bits_with_the_values_of_8_does_not_turn_black(images):
    path = images / "train" / "blue" / "0.tiff"
    Image.fromarray((RAMP // 4).astype(np.int32)).save(path)
    assert np.array_equal(datasets.load("folder", images, "train").images[1, 2], RAMP // 4)


def test_grey_of_12_bits_keeps_its_upper_bits(tmp_path):
    """Pillow does not write these: 12 bits a pixel, two pixels in three bytes."""
    row = RAMP[:2].ravel() * 64  # 64 pixels, 0 to 4032
    first, second = row[::2], row[1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    data = packed.astype(np.uint8).tobytes()
    tags = [(256, 64), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1)]
    tags += [(279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    table = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path = tmp_path / "12.tiff"
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + table)
    assert np.asarray(image_folder.read_image(path))[0, :, 0].tolist() == (row >> 4).tolist()


@pytest.mark.parametrize(
    "pixels, says",
    [
        (np.ones((32, 32), dtype=np.float32), "floats"),
        (np.full((32, 32), 2**24, dtype=np.int32), "integers"),
        (np.full((32, 32), -1, dtype=np.int32), "integers"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path, pixels, says):
    Image.fromarray(pixels).save(tmp_path / "1.tiff")
    with pytest.raises(UserError, match=rf"1\.tiff.*{says} of unknown range"):
        image_folder.read_image(tmp_path / "1.tiff")


def saved(path, image, **how):
    image.save(path, **how)
    return np.asarray(image_folder.read_image(path))


def test_pictures_of_every_mode_are_read_as_torchvision_reads_them(tmp_path):
    """Transparency and the orientation of a photo are ignored; CMYK becomes RGB."""
    from torchvision.datasets.folder import default_loader

    rgb = Image.effect_mandelbrot((32, 24), (-2, -1, 1, 1), 50).convert("RGB")
    rgb = Image.merge("RGB", [rgb.getchannel(0), rgb.getchannel(1).rotate(180), rgb.getchannel(2)])
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    warnings.simplefilter("ignore")  # torchvision's reader warns of transparency
    kinds = {
        "bits.png": (rgb.convert("1"), {}),
        "grey-alpha.png": (rgb.convert("LA"), {}),
        "palette.png": (rgb.quantize(16), {"transparency": 3}),
        "palette-bytes.png": (rgb.quantize(16), {"transparency": bytes(range(16))}),
        "palette.gif": (rgb.quantize(16), {"transparency": 3}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "cmyk.tiff": (rgb.convert("CMYK"), {}),
        "turned.jpg": (rgb, {"exif": turned}),
    }
    for name, (image, how) in kinds.items():
        got = saved(tmp_path / name, image, **how)
        assert np.array_equal(got, np.asarray(default_loader(tmp_path / name))), name
        assert got.shape == (24, 32, 3) and got.std() > 20, name
    assert np.abs(saved(tmp_path / "a.tiff", rgb.convert("CMYK")).astype(int) - rgb).max() <= 2


def test_pictures_that_were_decoded_otherwise_are_decoded_again(images, monkeypatch):
    datasets.load("folder", images, "train")
    monkeypatch.setattr(image_folder, "DECODING", -1)
    monkeypatch.setattr(image_folder, "read_image", lambda path: Image.new("RGB", (32, 32)))
    assert not datasets.load("folder", images, "train").images.any()


def test_the_cache_is_used_until_a_file_changes(images):
    before, changed = datasets.load("folder", images, "train"), images / "train" / "blue" / "0.png"
    stat = changed.stat()
    changed.write_bytes(bytes(stat.st_size))  # a second decoding would fail
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(datasets.load("folder", images, "train").images, before.images)
    Image.new("RGB", (32, 32), (9, 9, 9)).save(changed)
    after = datasets.load("folder", images, "train")
    assert (after.images[0] == 9).all() and torch.equal(after.images[1:], before.images[1:])
    cache = images / ".network-slimming-train.pt"
    cache.write_bytes(cache.read_bytes()[:100])
    assert torch.equal(datasets.load("folder", images, "train").images, after.images)


def test_a_picture_of_the_same_size_at_another_time_is_decoded_again(images):
    datasets.load("folder", images, "train")
    changed = images / "train" / "blue" / "0.png"
    size, when = changed.stat().st_size, changed.stat().st_mtime_ns
    Image.new("RGB", (32, 32), (9, 9, 9)).save(changed)
    changed.write_bytes(changed.read_bytes().ljust(size, b"\0"))  # a PNG ends before that
    os.utime(changed, ns=(when, when + 10**9))
    assert changed.stat().st_size == size
    assert (datasets.load("folder", images, "train").images[0] == 9).all()


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda d: (d / "train").rename(d / "trains"), "no train/ folder"),
        (lambda d: (d / "test").rename(d / "tests"), "no test/ or val/ folder"),
        (lambda d: (d / "test" / "red").rename(d / "red"), "no images of class red"),
        (lambda d: (d / "train" / "red").rename(d / "red"), "no images of class red"),
        (lambda d: (d / "test" / "green").mkdir(), "no images of class green"),
        (lambda d: (d / "test" / "red" / "3.png").write_bytes(b"no image"), "red/3.png"),
        (lambda d: (d / "test" / "red" / "3.png").write_bytes(POSTSCRIPT), "red/3.png"),
        (lambda d: (d / "test" / "red" / "3.eps").write_bytes(POSTSCRIPT), None),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(images, harm, message):
    harm(images)
    if message is None:  # not a picture but a program: left alone
        assert len(datasets.load("folder", images, "test").images) == 16
        return
    with pytest.raises(UserError, match=message):
        for split in ("train", "test"):
            datasets.load("folder", images, split)


def test_a_read_only_folder_is_decoded_without_a_cache(images, monkeypatch, capsys):
    def refuse(path, data, suffix):
        raise UserError("cannot write")

    monkeypatch.setattr(image_folder.files, "write_bytes", refuse)
    assert len(datasets.load("folder", images, "train").images) == 48
    assert "not cached" in capsys.readouterr().out
