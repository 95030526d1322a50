"""Engines run a batch in micro-batches where that is faster, with the same logits."""

import numpy as np
import pytest
import torch
from conftest import save_network

from slimming.data.batches import denormalize, normalize
from slimming.deploy import engines
from slimming.deploy.engines import ENGINES, Engine
from slimming.deploy.fold import deploy
from slimming.deploy.formats import FORMATS
from slimming.deploy.graph import Feed, traced
from slimming.storage import architecture

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Clock:
    """Advances only when it is told to, or, if it speeds up, by ever less."""

    def __init__(self, step=0.0):
        self.seconds, self.step = 0.0, step

    def perf_counter(self):
        self.step *= 0.9
        self.seconds += self.step
        return self.seconds


@pytest.mark.parametrize(
    "seconds, best",
    [
        ({8: 4, 4: 3, 2: 2, 1: 5}, 2),
        ({8: 4, 4: 5, 2: 1, 1: 1}, 8),  # the search ends where they are slower
        ({8: 4.0, 4: 4.1, 2: 3, 1: 9}, 2),  # which takes more than noise
        ({8: 9, 4: 4, 2: 2, 1: 1}, 1),
    ],
)
def test_the_fastest_micro_batches_are_kept(seconds, best, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(engines, "time", clock)

    def build(shape, size):
        def run(images):
            clock.seconds += seconds[size]
            return images + size

        return run

    engine = Engine(build)
    assert engine.micro_batch(8) == 8
    assert (engine(np.zeros((8, 2))) == best).all()
    assert engine.micro_batch(8) == best
    assert (engine(np.zeros((1, 2))) == 1).all()
    assert (Engine(build, tuned=False)(np.zeros((8, 2))) == 8).all()


@pytest.mark.parametrize(
    "count, parallel, sizes",
    [
        (64, 1, [64, 32, 16, 8, 4, 2, 1]),
        (64, 2, [64, 32, 16, 8, 4, 2, 1]),
        (64, 6, [64, 11, 6, 3, 2, 1]),
        (50, 8, [50, 7, 4, 2, 1]),
        (8, 16, [8, 1]),
    ],
)
def test_each_core_gets_a_micro_batch(count, parallel, sizes, monkeypatch):
    monkeypatch.setattr(engines, "time", Clock())  # all are equally fast
    tried = []

    def build(shape, size):
        tried.append(size)
        return lambda images: images

    Engine(build, parallel)(np.zeros((count, 2)))
    assert tried == sizes


@pytest.fixture
def slim(tmp_path):
    for library in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(library, reason="pip install -r requirements-export.txt")
    path = save_network(tmp_path / "pruned.pth.tar", "resnet", 11)
    return architecture.load(path)[0].eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("feed", [Feed(), Feed(uint8=True, nhwc=True)], ids=str)
def test_micro_batches_have_the_logits_of_the_batch(kind, feed, slim, tmp_path, monkeypatch):
    path = tmp_path / f"slim{FORMATS[kind].suffix}"
    FORMATS[kind].write(traced(deploy(slim), feed), path, "fp32", [], {})
    engine = ENGINES[kind](str(path), "fp32", 3, tuned=True)
    monkeypatch.setattr(engines, "time", Clock(step=1.0))  # smaller ones are always faster
    images = normalize(denormalize(IMAGES))  # such as pixels give
    expected = slim(images).detach().numpy()
    monkeypatch.setattr(Engine, "sizes", lambda self, count: iter([count, 3]))
    for order in (range(8), range(7, -1, -1), range(4), [5]):  # the last one is not full
        rows = list(order)
        logits = engine(feed.of(images[rows]).numpy())
        np.testing.assert_allclose(logits, expected[rows], rtol=1e-3, atol=1e-4)
    assert engine.micro_batch(8) == 3 and engine.micro_batch(1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_for_one_number_of_images_runs_them_at_once(kind, slim, tmp_path):
    path = tmp_path / f"slim{FORMATS[kind].suffix}"
    FORMATS[kind].write(traced(deploy(slim), Feed(batch=8)), path, "fp32", [], {})
    engine = ENGINES[kind](str(path), "fp32", 2, tuned=True)
    logits = engine(IMAGES.numpy())
    assert not engine.tuned and engine.micro_batch(8) == 8
    np.testing.assert_allclose(logits, slim(IMAGES).detach().numpy(), rtol=1e-4, atol=1e-4)
