"""Run an exported file: a program of its own, which imports nothing else of this suite.

python engines.py FORMAT FILE PRECISION IMAGES.npy LOGITS.npy THREADS ALONE

Writes the logits of all images and, if ALONE is 1, then those of the first image alone.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

CUDA = "CUDAExecutionProvider"
# images as they are fed -> logits (N, classes); ``fixed``: the engine may prepare for each N
Engine = Callable[[np.ndarray], np.ndarray]
HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}


def onnx(path: str, precision: str, threads: int, device: str, fixed: bool) -> Engine:
    """ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # idle threads would otherwise wait actively, and slow down whatever runs next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = [CUDA, "CPUExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    return lambda images: session.run(["logits"], {"images": images})[0]


def openvino(path: str, precision: str, threads: int, device: str, fixed: bool) -> Engine:
    """OpenVINO, on the CPU. Between an open and a ``fixed`` number of images, ResNet-164 runs 1.2
    times as fast with 64 images, 1.5 times with one."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    settings["INFERENCE_PRECISION_HINT"] = HINTS[precision]

    @functools.cache
    def request(shape: tuple[int, ...]) -> Any:
        if fixed:
            model.reshape(shape)
        return core.compile_model(model, "CPU", settings).create_infer_request()

    return lambda images: request(images.shape if fixed else ()).infer([images])[0].copy()


def torch(path: str, precision: str, threads: int, device: str, fixed: bool) -> Engine:
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

    return run


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
