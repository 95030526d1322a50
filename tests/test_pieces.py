"""Engines run a batch in pieces where that is faster, with the same logits."""

import numpy as np
import pytest
import torch
from conftest import save_network

from slimming.measuring.deploy import deploy
from slimming.measuring.export import engines
from slimming.measuring.export.engines import ENGINES, InPieces, piece_of
from slimming.measuring.export.formats import FORMATS
from slimming.measuring.export.graph import Feed, traced
from slimming.storage import architecture

for library in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(library, reason="pip install -r requirements-export.txt")

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
        ({8: 4, 4: 5, 2: 1, 1: 1}, 8),  # the search ends where pieces are slower
        ({8: 4.0, 4: 4.1, 2: 3, 1: 9}, 2),  # which takes more than noise
        ({8: 9, 4: 4, 2: 2, 1: 1}, 1),
    ],
)
def test_the_fastest_pieces_are_kept(seconds, best, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(engines, "time", clock)

    def way(shape, size):
        def run(images):
            clock.seconds += seconds[size]
            return images + size

        return run

    engine = InPieces(way)
    assert piece_of(engine, 8) == 8
    assert (engine(np.zeros((8, 2))) == best).all()
    assert engine.pieces == {8: best} and piece_of(engine, 8) == best
    assert (engine(np.zeros((1, 2))) == 1).all(), "one image has no pieces"


def test_pieces_are_as_many_as_run_at_a_time():
    tried = []

    def way(shape, size):
        tried.append(size)
        return lambda images: images

    InPieces(way, parallel=16)(np.zeros((64, 2)))
    assert tried[:2] == [64, 4]
    tried.clear()
    InPieces(way, parallel=16)(np.zeros((8, 2)))
    assert tried == [8], "fewer images than threads"


@pytest.fixture
def slim(tmp_path):
    path = save_network(tmp_path / "pruned.pth.tar", "resnet", 11)
    return architecture.load(path)[0].eval()


@pytest.mark.parametrize("kind", FORMATS)
def test_pieces_have_the_logits_of_the_batch(kind, slim, tmp_path, monkeypatch):
    path = tmp_path / f"slim{FORMATS[kind].suffix}"
    FORMATS[kind].write(traced(deploy(slim), Feed()), path, "fp32", [], {})
    engine = ENGINES[kind](str(path), "fp32", 2, "cpu", True)
    monkeypatch.setattr(engines, "time", Clock(step=1.0))  # smaller pieces are always faster
    logits = engine(IMAGES.numpy())
    assert engine.pieces == {8: 1}
    expected = slim(IMAGES).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    turned = engine(IMAGES.flip(0).contiguous().numpy())  # another batch, in its order
    np.testing.assert_allclose(turned, expected[::-1], rtol=1e-4, atol=1e-4)
    few = engine(IMAGES[:3].numpy())  # another number, which two does not divide
    np.testing.assert_allclose(few, expected[:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_for_one_number_of_images_runs_them_at_once(kind, slim, tmp_path):
    path = tmp_path / f"slim{FORMATS[kind].suffix}"
    FORMATS[kind].write(traced(deploy(slim), Feed(batch=8)), path, "fp32", [], {})
    engine = ENGINES[kind](str(path), "fp32", 2, "cpu", True)
    logits = engine(IMAGES.numpy())
    assert piece_of(engine, 8) == 8 and not isinstance(engine, InPieces)
    np.testing.assert_allclose(logits, slim(IMAGES).detach().numpy(), rtol=1e-4, atol=1e-4)
