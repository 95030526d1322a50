"""Run an exported file: a program of its own, which imports nothing else of this suite.

python engines.py FORMAT FILE PRECISION IMAGES.npy LOGITS.npy THREADS ALONE

Writes the logits of all images and, if ALONE is 1, then those of the first image alone.
"""

import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

CUDA = "CUDAExecutionProvider"
HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}
SLOWER = 1.05  # pieces that take longer than this, relative to the best, end the search
ROUNDS = 3

Engine = Callable[[Any], Any]  # images as they are fed -> logits (N, classes)
# what makes it: (path, precision, threads, device, tuned); ``tuned`` to the number of images, which
# a file for one number only cannot be


class InPieces:
    """Runs a batch whole or in pieces, whichever is faster on this CPU: the activations of fewer
    images stay in its caches, and pieces that run side by side wait less for each other than the
    threads of one layer.

    ``way(shape, size)``: runs batches of this shape in pieces of ``size`` images, of which
    ``parallel`` run at a time. ``pieces``: for a number of images, the size that was chosen.
    """

    def __init__(self, way: Callable[[tuple[int, ...], int], Engine], parallel: int = 1):
        self.way, self.parallel = way, parallel
        self.pieces: dict[int, int] = {}
        self.chosen: dict[tuple[int, ...], Engine] = {}

    def __call__(self, images: Any) -> Any:
        shape = tuple(images.shape)
        if shape not in self.chosen:
            self._choose(images, shape)
        return self.chosen[shape](images)

    def _choose(self, images: Any, shape: tuple[int, ...]) -> None:
        """Measure ever smaller pieces until they are slower."""
        best, size = float("inf"), len(images)
        while size and len(images) % size == 0:
            run = self.way(shape, size)
            seconds = _seconds(run, images) if len(images) > 1 else 0.0
            if seconds > SLOWER * best:
                break
            if seconds < best:
                best, self.chosen[shape], self.pieces[len(images)] = seconds, run, size
            size //= 2 if size < len(images) else max(2, self.parallel)


def piece_of(run: Engine, count: int) -> int:
    """How many of ``count`` images it runs at a time, after it has run them once."""
    return run.pieces.get(count, count) if isinstance(run, InPieces) else count


def _seconds(run: Engine, images: Any) -> float:
    """Median seconds of a run, after one of warm-up."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _split(images: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(images, range(size, len(images), size))


def onnx(path: str, precision: str, threads: int, device: str, tuned: bool) -> Engine:
    """ONNX Runtime."""
    import onnxruntime

    providers = [CUDA, "CPUExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]

    @functools.cache
    def session(threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # idle threads would otherwise wait actively, and slow down whatever runs next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return onnxruntime.InferenceSession(path, options, providers=providers)

    def whole(images: np.ndarray, threads: int = threads) -> np.ndarray:
        return session(threads).run(["logits"], {"images": images})[0]

    def way(shape: tuple[int, ...], size: int) -> Engine:
        if size == shape[0]:
            return whole
        alone = functools.partial(whole, threads=1)
        return lambda images: np.concatenate([*pool.map(alone, _split(images, size))])

    pool = ThreadPoolExecutor(threads)
    (fed,) = session(threads).get_inputs()  # an error in the file shows here
    divisible = device == "cpu" and not isinstance(fed.shape[0], int)
    return InPieces(way, threads) if tuned and divisible else whole


def openvino(path: str, precision: str, threads: int, device: str, tuned: bool) -> Engine:
    """OpenVINO, on the CPU. It is compiled for any number of images, or ``tuned`` to that which is
    fed: ResNet-164 is then 1.2 times as fast with 64 images, 1.5 times with one."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    settings["INFERENCE_PRECISION_HINT"] = HINTS[precision]

    def whole() -> Engine:
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda images: request.infer([images])[0].copy()

    def way(shape: tuple[int, ...], size: int) -> Engine:
        model.reshape((size, *shape[1:]))
        if size == shape[0]:
            return whole()
        streams = {"NUM_STREAMS": threads}
        queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", settings | streams))
        logits: dict[int, np.ndarray] = {}
        queue.set_callback(
            lambda request, place: logits.update({place: request.get_output_tensor(0).data.copy()})
        )

        def run(images: np.ndarray) -> np.ndarray:
            for place, few in enumerate(_split(images, size)):
                queue.start_async([few], place)
            queue.wait_all()
            return np.concatenate([logits[place] for place in sorted(logits)])

        return run

    return InPieces(way, threads) if tuned and model.is_dynamic() else whole()


def torch(path: str, precision: str, threads: int, device: str, tuned: bool) -> Engine:
    """PyTorch."""
    import torch

    if precision == "int8":
        import torch.ao.quantization.fx._decomposed  # registers its operators
    torch.set_num_threads(threads)
    program = torch.export.load(path)
    if device == "cuda":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module = program.module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images).to(device)).cpu().numpy()

    def way(shape: tuple[int, ...], size: int) -> Engine:
        return lambda images: np.concatenate([run(few) for few in _split(images, size)])

    divisible = device == "cpu" and precision != "int8" and program.range_constraints
    return InPieces(way) if tuned and divisible else run


ENGINES = {"onnx": onnx, "openvino": openvino, "torch": torch}


def device_of(kind: str, device: str) -> str:
    """Where the engine of a format runs on a machine with this device: "cuda" or "cpu"."""
    if device != "cuda" or kind == "openvino":
        return "cpu"
    if kind == "onnx" and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        return "cuda" if CUDA in onnxruntime.get_available_providers() else "cpu"
    return "cuda"


def main(
    kind: str, path: str, precision: str, images: str, logits: str, threads: str, alone: str
) -> None:
    run, fed = ENGINES[kind](path, precision, int(threads), "cpu", False), np.load(images)
    answers = [run(fed), *([run(fed[:1])] if alone == "1" else [])]
    np.save(logits, np.concatenate(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
