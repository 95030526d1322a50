"""Run an exported file: a program of its own, which imports nothing else of this suite.

python engines.py FORMAT FILE PRECISION IMAGES.npy LOGITS.npy THREADS ALONE

Writes the logits of all images and, if ALONE is 1, then those of the first image alone.
"""

import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

CUDA = "CUDAExecutionProvider"
HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}
SLOWER = 1.05  # micro-batches that take longer than this, relative to the best, end the search
ROUNDS, SECONDS = 3, 1.0  # of measuring a micro-batch, at most

Run = Callable[[Any], Any]  # images as they are fed -> logits (N, classes)
Shape = tuple[int, ...]


class Engine:
    """Runs batches of images, each whole or, if ``tuned``, in the micro-batches that are fastest.

    On a CPU micro-batches may be faster: their activations stay in its caches, and those that run
    side by side wait less for each other than the threads of one layer. For each shape of a batch
    ever smaller ones are measured, until they are slower. ``build(shape, size)``: what runs batches
    of this shape in micro-batches of ``size`` images, of which ``parallel`` run at a time.
    """

    def __init__(self, build: Callable[[Shape, int], Run], parallel: int = 1, tuned: bool = True):
        self.build, self.parallel, self.tuned = build, parallel, tuned
        self.chosen: dict[Shape, tuple[Run, int]] = {}

    def __call__(self, images: Any) -> Any:
        shape = tuple(images.shape)
        if shape not in self.chosen:
            self.chosen[shape] = self._choose(images, shape)
        return self.chosen[shape][0](images)

    def micro_batch(self, count: int) -> int:
        """How many of ``count`` images it runs at a time, after it has run such a batch."""
        return next((size for shape, (_, size) in self.chosen.items() if shape[0] == count), count)

    def _choose(self, images: Any, shape: Shape) -> tuple[Run, int]:
        count = shape[0]
        chosen, best = (self.build(shape, count), count), float("inf")
        if not self.tuned or count < 2:
            return chosen
        for size in self.sizes(count):
            run = chosen[0] if size == count else self.build(shape, size)
            seconds = _seconds(run, images)
            if seconds > SLOWER * best:
                break
            if seconds < best:
                chosen, best = (run, size), seconds
        return chosen

    def sizes(self, count: int) -> Iterator[int]:
        """The whole batch, one micro-batch for each that runs at a time, and then by halves."""
        yield count
        size = -(-count // max(2, self.parallel))
        yield size
        while size > 1:
            size = -(-size // 2)
            yield size


def _seconds(run: Run, images: Any) -> float:
    """Median seconds of a run, after one of warm-up."""
    run(images)
    times: list[float] = []
    while len(times) < ROUNDS and sum(times) < SECONDS:
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _micro_batches(images: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(images, range(size, len(images), size))


def onnx(
    path: str, precision: str, threads: int = 1, device: str = "cpu", *, tuned: bool = False
) -> Engine:
    """ONNX Runtime."""
    import onnxruntime

    providers: list[Any] = ["CPUExecutionProvider"]
    if device != "cpu":
        providers.insert(0, (CUDA, {"device_id": device.partition(":")[2] or "0"}))

    def session(threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # idle threads would otherwise spin, and slow down whatever runs next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return onnxruntime.InferenceSession(path, options, providers=providers)

    def logits(session: Any, images: np.ndarray) -> np.ndarray:
        return session.run(["logits"], {"images": images})[0]

    @functools.cache
    def side_by_side() -> Callable[..., Iterator[np.ndarray]]:
        return functools.partial(
            ThreadPoolExecutor(threads).map, functools.partial(logits, session(1))
        )

    def build(shape: Shape, size: int) -> Run:
        if size == shape[0]:
            return functools.partial(logits, whole)
        return lambda images: np.concatenate([*side_by_side()(_micro_batches(images, size))])

    whole = session(threads)
    fixed = isinstance(whole.get_inputs()[0].shape[0], int)
    return Engine(build, threads, tuned and device == "cpu" and not fixed)


def openvino(
    path: str, precision: str, threads: int = 1, device: str = "cpu", *, tuned: bool = False
) -> Engine:
    """OpenVINO, on the CPU, compiled for any batch size or, if ``tuned``, for the one that is fed:
    ResNet-164 is then 1.2 times as fast with 64 images, 1.5 times with one."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    tuned = tuned and model.is_dynamic()
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    settings["INFERENCE_PRECISION_HINT"] = HINTS[precision]

    @functools.cache
    def whole(shape: Shape | None) -> Run:
        if shape:
            model.reshape(shape)
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda images: request.infer([images])[0].copy()

    def build(shape: Shape, size: int) -> Run:
        if size == shape[0]:
            return whole(shape if tuned else None)
        model.reshape((size, *shape[1:]))
        streams = settings | {"NUM_STREAMS": threads}
        queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", streams))
        logits: dict[int, np.ndarray] = {}
        queue.set_callback(
            lambda request, start: logits.update({start: request.get_output_tensor(0).data.copy()})
        )

        def run(images: np.ndarray) -> np.ndarray:
            rows = np.arange(-(-len(images) // size) * size) % len(images)  # the last one is full
            for start in range(0, len(rows), size):
                few = images[start : start + size]
                few = few if len(few) == size else images[rows[start : start + size]]
                queue.start_async([few], start)
            queue.wait_all()
            return np.concatenate([logits[start] for start in sorted(logits)])[: len(images)]

        return run

    return Engine(build, threads, tuned)


def torch(
    path: str, precision: str, threads: int = 1, device: str = "cpu", *, tuned: bool = False
) -> Engine:
    """PyTorch."""
    import torch

    if precision == "int8":
        import torch.ao.quantization.fx._decomposed  # registers its operators
    torch.set_num_threads(threads)
    program = torch.export.load(path)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module = program.module()

    @torch.no_grad()
    def logits(images: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(images).to(device)).cpu().numpy()

    def build(shape: Shape, size: int) -> Run:
        return lambda images: np.concatenate([*map(logits, _micro_batches(images, size))])

    dynamic = bool(program.range_constraints)
    return Engine(build, 1, tuned and device == "cpu" and precision != "int8" and dynamic)


ENGINES = {"onnx": onnx, "openvino": openvino, "torch": torch}


def device_of(kind: str, device: str) -> str:
    """Where the engine of a format runs on a machine with this ``device``: there or on "cpu"."""
    if kind == "openvino":
        return "cpu"
    if kind == "onnx" and device != "cpu" and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        return device if CUDA in onnxruntime.get_available_providers() else "cpu"
    return device


def main(
    kind: str, path: str, precision: str, images: str, logits: str, threads: str, alone: str
) -> None:
    run, fed = ENGINES[kind](path, precision, int(threads)), np.load(images)
    answers = [run(fed), *([run(fed[:1])] if alone == "1" else [])]
    np.save(logits, np.concatenate(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
