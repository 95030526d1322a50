"""Files for other programs compute what the network computes, or are not written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NARROW, SMALLEST, fails, save_network, succeed
from warm import ROOT

from models import NETWORKS
from slimming import slicing
from slimming.channels.scaling import zero_channels
from slimming.choosing.threshold import choose_channels
from slimming.commands.export import run
from slimming.commands.export.settings import ExportRun
from slimming.data import datasets
from slimming.data.batches import denormalize, normalize
from slimming.deploy import engines, onnx_file
from slimming.deploy.fold import deploy, forms_of
from slimming.deploy.formats import FORMATS
from slimming.deploy.forms import FORMS
from slimming.deploy.graph import Feed, traced
from slimming.deploy.quiet import interrupted_later
from slimming.errors import UserError
from slimming.measuring import figures
from slimming.settings import build
from slimming.slicing import kernels
from slimming.slicing.proof import prove_equal
from slimming.storage import architecture, checkpoint

for library in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(library, reason="pip install -r requirements-export.txt")

QUICK = "--dataset digits --no-cuda --batch 4 --threads 1"
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def answers(path, kind, images, precision="fp32"):
    """The logits of a file for normalised images."""
    return engines.ENGINES[kind](str(path), precision)(images.numpy())


def close(ours, theirs, tolerance=1e-4):
    return np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def hide_openvino():
    sys.modules["openvino"] = None


def save_slim(path, arch, percent=0.5, masked=False):
    """Write a slim network with random scaling factors, or the masked one; the slim network."""
    start = save_network(path, arch, SMALLEST[arch], cfg=NARROW.get(arch))
    model, network, _ = architecture.load(start)
    keep = choose_channels(model, percent).kept
    slim = slicing.without_dead_channels(zero_channels(model, keep))
    kept = architecture.replace(network, cfg=None if masked else slicing.cfg_of(slim))
    checkpoint.write(path, architecture.contents_of(model if masked else slim, kept, 1, 0.5))
    return slim.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("arch", ["resnet", "densenet"])
def test_a_file_computes_what_the_slim_network_computes(kind, arch, tmp_path):
    """Once with everything that is measured."""
    slim, short = save_slim(tmp_path / "pruned.pth.tar", arch), (arch, kind) != ("densenet", "onnx")
    command = f"export.py pruned.pth.tar {QUICK} --format {kind}"
    command += " --form zeros" if short else ""
    told = succeed(command, cwd=tmp_path, short=short)
    assert ("dense network: ms by form" in told) != short
    assert "realised" in told
    logits = answers(tmp_path / f"pruned{FORMATS[kind].suffix}", kind, IMAGES)
    assert close(logits, slim(IMAGES).detach().numpy())


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_file_runs_on_the_device(kind, precision, device, tmp_path):
    import onnxruntime

    on_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if kind == "onnx" and device.type == "cuda" and not on_gpu:
        pytest.skip("this package of onnxruntime is for CPUs: pip install onnxruntime-gpu")
    slim, target = save_slim(tmp_path / "pruned.pth.tar", "resnet"), FORMATS[kind]
    program = traced(deploy(slim, target.dtype(precision)), Feed())
    (path,) = target.write(program, tmp_path / f"slim{target.suffix}", precision, [], {})
    logits = engines.ENGINES[kind](str(path), precision, 1, str(device), tuned=True)(IMAGES.numpy())
    tolerance = 1e-2 if precision == "fp16" or device.type == "cuda" else 1e-4  # TF32
    assert close(logits, slim(IMAGES).detach().numpy(), tolerance)


@pytest.mark.slow
def test_a_masked_network_is_sliced_first(tmp_path):
    slim = save_slim(tmp_path / "masked.pth.tar", "resnet", masked=True)
    told = succeed(f"export.py masked.pth.tar {QUICK} --form zeros", cwd=tmp_path)
    assert "masked.pth.tar: slim resnet-11 for" in told
    assert close(answers(tmp_path / "masked.onnx", "onnx", IMAGES), slim(IMAGES).detach().numpy())
    whole = save_network(tmp_path / "whole.pth.tar", "resnet", 11)
    succeed(f"export.py {whole} {QUICK} --form folded", cwd=tmp_path)
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("masked", "whole")]
    assert sizes[0] < 0.8 * sizes[1]


@pytest.mark.slow
def test_kernel_pruned_networks_and_those_of_torchvision(tmp_path):
    path = save_network(tmp_path / "pruned.pth.tar", "mobilenet_v2", None)
    model, network, _ = architecture.load(path)
    kernels.zero_weights(model, kernels.kernel_masks(model, 0.5))
    checkpoint.write(path, architecture.contents_of(model, network, 1, 0.5))
    succeed(f"export.py pruned.pth.tar {QUICK} --form folded --layout nhwc", cwd=tmp_path)
    logits = answers(tmp_path / "pruned.onnx", "onnx", IMAGES.permute(0, 2, 3, 1))
    assert close(logits, model.eval()(IMAGES).detach().numpy())


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_lower_precisions_are_smaller_and_judged(kind, slim_digits, tmp_path):
    pytest.importorskip("nncf")
    command = f"export.py {slim_digits} {QUICK} --format {kind} --precision fp32,bf16,fp16,int8"
    more = "--form folded --max-drop 3 --calibration-images 64 --save"
    told = succeed(f"{command} {more}", tmp_path)
    lines = {line.split()[1]: line for line in told.splitlines() if line.startswith(f"{kind} ")}
    assert all("%" in lines[precision] for precision in ("bf16", "fp16", "int8"))
    suffix = ".bin" if kind == "openvino" else FORMATS[kind].suffix
    sizes = {file.name: file.stat().st_size for file in tmp_path.glob(f"*{suffix}")}
    limit = 0.9 if kind == "torch" else 0.65  # with its graph
    for precision in ("bf16", "fp16") if kind == "torch" else ("bf16", "fp16", "int8"):
        assert sizes[f"pruned-{precision}{suffix}"] < limit * sizes[f"pruned{suffix}"]


@pytest.mark.slow
def test_pixels_in_the_file_says_what_it_is(slim_digits, tmp_path):
    import onnxruntime

    folder = tmp_path / "new" / "files"
    command = f"export.py {slim_digits} {QUICK} --uint8 --layout nhwc --no-dynamic-batch --save"
    succeed(command, folder)
    session = onnxruntime.InferenceSession(str(folder / "pruned.onnx"))
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["input"] == "uint8 NHWC" and json.loads(facts["image_size"]) == 32
    assert json.loads(facts["classes"]) == [str(i) for i in range(10)]
    assert session.get_inputs()[0].shape == [4, 32, 32, 3]
    pixels = datasets.load("digits", tmp_path, "test").images[:4]
    logits = session.run(None, {"images": pixels.permute(0, 2, 3, 1).numpy()})[0]
    model, network, _ = architecture.load(slim_digits)
    assert close(logits, model.eval()(normalize(pixels)).detach().numpy())
    assert json.loads(facts["widths"]) == network.cfg
    assert sorted(path.name for path in folder.iterdir()) == ["pruned.onnx"]
    assert str(tmp_path).encode() not in (folder / "pruned.onnx").read_bytes()  # nor other paths
    assert b"site-packages" not in (folder / "pruned.onnx").read_bytes()


def test_pixels_come_back_from_what_networks_read():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(denormalize(normalize(pixels)), pixels)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SMALLEST)
def test_all_forms_of_a_graph_compute_the_same(arch, tmp_path):
    slim = save_slim(tmp_path / "pruned.pth.tar", arch)
    forms = forms_of(slim)
    assert len(forms) == (2 if arch == "vgg" else 6)
    for form in forms.values():
        deployed = deploy(slim, form=form)
        assert prove_equal(deployed, slim, IMAGES) <= 1e-4
        program = traced(deployed, Feed()).module()
        for count in (1, 3):  # another batch size than it was traced with
            torch.testing.assert_close(
                program(IMAGES[:count]), slim(IMAGES[:count]), rtol=1e-4, atol=1e-4
            )


def test_openvino_keeps_bounds_that_are_out_of_the_range_of_fp16(tmp_path):
    """β = −1 and γ = 1e-6 clamp at 1e6."""
    torch.manual_seed(0)
    model = NETWORKS["resnet"](depth=11, num_classes=10).eval()
    model.bn.weight.data[:200], model.bn.bias.data[:200] = 1e-6, -1.0
    model.fc.weight.data *= 100
    program = traced(deploy(model, form=FORMS["clamp"]), Feed())
    path, _ = FORMATS["openvino"].write(program, tmp_path / "slim.xml", "fp16", [], {})
    logits = answers(path, "openvino", IMAGES, "fp32")
    assert close(logits, model(IMAGES).detach().numpy(), 0.01)


def test_a_deployed_network_in_bf16_is_close(small):
    logits = small(IMAGES)
    low = deploy(small, torch.bfloat16)(IMAGES)
    assert low.dtype == torch.float32
    assert 0 < (low - logits).abs().max() <= 0.1 * logits.abs().max()


def test_fp16_survives_channels_with_almost_no_scale():
    torch.manual_seed(0)
    model = NETWORKS["resnet"](depth=11, num_classes=10).eval()
    model.bn.weight.data[:8] = 1e-9
    model.bn.bias.data.normal_()
    assert deploy(model, torch.float16)(IMAGES).isfinite().all()


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_written(tmp_path):
    path = tmp_path / "pruned.pth.tar"
    save_slim(path, "resnet")
    values = {"checkpoint": str(path), "dataset": "digits", "no_cuda": True, "form": "zeros"}
    network = run.load(build(ExportRun, values))
    network.logits = 1.01 * network.logits
    with pytest.raises(UserError, match="differs from PyTorch"):
        run.export(network, "onnx", "fp32")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_auto_is_the_fastest_form(tmp_path, monkeypatch):
    path = tmp_path / "pruned.pth.tar"
    save_slim(path, "vgg")
    values = {"checkpoint": str(path), "dataset": "digits", "no_cuda": True, "batch": 4}
    network = run.load(build(ExportRun, values))
    times = [5, 3, 4, 6]
    monkeypatch.setattr(figures, "in_turns", lambda tasks, *_: times[: len(tasks)])
    names = run.possible_forms(network.model, "onnx", "fp32")
    assert run.export(network, "onnx", "fp32").form == names[1]


BAD = {  # flags -> what the line says
    "--format tensorrt": "one or more of onnx,openvino,torch",
    "--precision fp8": "one or more of fp32,bf16,fp16,int8",
    "--form zeros": "--form zeros: in onnx fp32 this network has the forms plain, folded",
    "--image-size 64": "needs --dataset folder",
    "--save pruned.pth.tar": "is a file",
    "--save /proc/nowhere": "cannot write to /proc/nowhere",
    "--batch 65537": "at most 65536",
}


def test_a_compact_graph_keeps_omitted_inputs_omitted():
    """The name of an omitted input is empty."""
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    nodes = [
        make.make_node("Identity", ["images"], ["before"], name="first"),
        make.make_node("Clip", ["before", "", "most"], ["logits"], name="second"),
    ]
    ends = [make.make_tensor_value_info(name, 1, ["batch", 3]) for name in ("images", "logits")]
    most = make.make_tensor("most", 1, [], [6.0])
    graph = make.make_graph(nodes, "graph", ends[:1], ends[1:], [most])
    onnx_file.compact(graph)
    assert list(graph.node[1].input)[1] == "" and graph.initializer[0].name != "most"
    onnx.checker.check_model(make.make_model(graph), full_check=True)


@pytest.mark.parametrize("flags, says", BAD.items())
def test_a_mistake_is_one_line(flags, says, tmp_path):
    save_network(tmp_path / "pruned.pth.tar", "vgg", 11, cfg=NARROW["vgg"])
    fails(tmp_path, f"export.py pruned.pth.tar {QUICK} {flags}", says=says)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    save_network(tmp_path / "pruned.pth.tar", "vgg", 11, cfg=NARROW["vgg"])
    (tmp_path / "pruned.onnx").mkdir()
    fails(tmp_path, f"export.py pruned.pth.tar {QUICK} --form plain", says="pruned.onnx: Is a dir")


def test_deploy_names_the_precisions_that_it_knows(small):
    with pytest.raises(ValueError, match="must be one of torch"):
        deploy(small, torch.int8)


def test_an_impossible_form_is_told_before_any_file_is_written(tmp_path):
    save_slim(tmp_path / "pruned.pth.tar", "resnet")
    command = f"export.py pruned.pth.tar {QUICK} --form zeros-clamp --precision fp32,int8"
    fails(tmp_path, command, says="in onnx int8 this network has the forms gather, zeros")


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_is_one_line(kind, tmp_path, monkeypatch):
    path = tmp_path / "pruned.pth.tar"
    save_slim(path, "resnet")
    values = {"checkpoint": str(path), "dataset": "digits", "no_cuda": True, "form": "zeros"}
    network = run.load(build(ExportRun, values))

    def full(*_, **__):
        raise RuntimeError("iostream error") if kind == "openvino" else OSError(28, "No space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr("openvino.save_model", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: No space left"):
        run.export(network, kind, "fp32")
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_files_are_one_line(tmp_path):
    (tmp_path / "noise.pth.tar").write_bytes(bytes(range(256)) * 9)
    fails(tmp_path, "export.py noise.pth.tar", says="not a readable checkpoint")
    fails(tmp_path, "export.py nowhere.pth.tar", says="cannot read nowhere.pth.tar")
    fails(tmp_path, "export.py", says="CHECKPOINT is required")


def test_an_engine_that_is_not_installed_is_named(tmp_path):
    save_network(tmp_path / "pruned.pth.tar", "vgg", 11, cfg=NARROW["vgg"])
    command = f"export.py pruned.pth.tar {QUICK} --format openvino"
    says = ["needs openvino", "pip install -r requirements-export.txt"]
    fails(tmp_path, command, says=says, preexec_fn=hide_openvino)


@pytest.mark.slow
def test_a_file_that_loses_too_much_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "pruned.pth.tar"
    save_slim(path, "resnet")
    values = {"checkpoint": str(path), "dataset": "digits", "no_cuda": True, "form": "zeros"}
    network = run.load(build(ExportRun, {**values, "max_drop": 0.7}))
    network.top1 = 0.932
    monkeypatch.setattr(run, "accuracy", lambda *_: 0.924)  # 0.8 points less
    with pytest.raises(
        UserError, match=r"0\.80 points less than fp32 \(93\.20%; --max-drop 0\.7\)"
    ):
        run.export(network, "onnx", "bf16")
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(run, "accuracy", lambda *_: 0.925)  # as floats, 0.7000000000000006
    assert run.export(network, "onnx", "bf16").top1 == 0.925


@pytest.mark.slow
def test_openvino_and_nncf_send_no_usage_statistics():
    """In a process of its own: as part of pytest NNCF sends none anyway."""
    pytest.importorskip("nncf")
    program = """
from slimming.settings import build
from slimming.commands.export.settings import ExportRun
build(ExportRun, {"checkpoint": "x", "format": ("openvino",), "precision": ("int8",)})
from nncf.telemetry import telemetry
from openvino.tools.ovc.telemetry_utils import tm
print(type(telemetry).__name__, tm.__name__)
"""
    env = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    told = subprocess.run(
        [sys.executable, "-c", program],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    nncf, openvino = told.stdout.split()
    assert nncf != "NNCFTelemetry" and openvino == "openvino.tools.ovc.telemetry_stub"


def test_ctrl_c_waits_for_code_that_would_lose_it():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupted_later():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), interrupted_later():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of C++")


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupted_later():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_folder_means_the_result_of_its_workflow(tmp_path):
    for name in ("a_base.pth", "a_pruned.pth", "a_rebuilt.pth"):
        (tmp_path / name).touch()
        assert build(ExportRun, {"checkpoint": str(tmp_path)}).subject.path.name == name


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "pruned.pth.tar"
    save_slim(path, "resnet")
    values = {"checkpoint": str(path), "dataset": "digits", "no_cuda": True, "form": "zeros"}
    network = run.load(build(ExportRun, values))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: No space left"):
        run.export(network, "openvino", "fp32")
    assert list(tmp_path.iterdir()) == [path]
