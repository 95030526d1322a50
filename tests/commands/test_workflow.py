"""The paper's workflow as people type it: sparsify, prune, fine-tune, and the same once more."""

import pytest
from conftest import SMALLEST, save_network, succeed

from slimming.storage import architecture, checkpoint

PRUNER = {"vgg": "vggprune.py", "resnet": "resprune.py", "densenet": "denseprune.py"}
TELLS = "liveness: the outputs vary from image to image"


@pytest.mark.slow
@pytest.mark.parametrize("arch", PRUNER)
def test_two_passes(arch, images, tmp_path):
    data, depth, out = f"--dataset folder --data {images}", SMALLEST[arch], tmp_path / "out"
    train = f"main.py {data} --arch {arch} --depth {depth} --epochs 1 --batch-size 32"
    printed = succeed(f"{train} -sr --s 0.001 --save {out}")
    assert "Train Epoch: 0" in printed and "Test set: Average loss" in printed
    assert "channels have |γ| <" in printed
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((out / "tensorboard").glob("events*"))

    prune = f"{PRUNER[arch]} --data {images} --percent 0.5"
    best = out / "model_best.pth.tar"
    printed = succeed(f"{prune} --dataset folder --depth {depth} --model {best} --save {out}")
    for words in (
        "BN layer",
        "slim equals masked",
        "top-1",
        "parameters",
        "MFLOPs",
        "latency",
        TELLS,
    ):
        assert words in printed
    first = checkpoint.read(out / "pruned.pth.tar")
    _check_summary(out / "prune.txt", first)
    assert (out / "prune.png").read_bytes()[:4] == b"\x89PNG"

    succeed(f"{train} -sr --refine {out}/pruned.pth.tar --save {out}/fine")
    tuned = checkpoint.read(out / "fine" / "model_best.pth.tar")
    assert tuned["cfg"] == first["cfg"] and tuned["optimizer"] is None
    succeed(f"{prune} --model {out}/fine")
    second = checkpoint.read(out / "fine" / "pruned.pth.tar")
    assert sum(w for w in second["cfg"] if w != "M") < sum(w for w in tuned["cfg"] if w != "M")
    refine = f"main.py --refine {out}/fine/pruned.pth.tar --data {images}"
    succeed(f"{refine} --epochs 1 --save {out}/last --no-tensorboard")


@pytest.mark.parametrize("script", ["resprune.py", "mask-impl/prune_mask.py"])
def test_a_multiple_that_undoes_the_pruning_is_a_warning(images, tmp_path, script):
    path = save_network(tmp_path / "resnet", "resnet", 11, "folder", 2)
    command = f"{script} --model {path} --data {images} --percent 0.3 --round-to 4096"
    printed = succeed(f"{command} --no-cuda")
    assert "warning: --round-to keeps 207 of the 207 channels" in printed


@pytest.mark.slow
@pytest.mark.parametrize("arch, percent", [("vgg", 0.5), ("resnet", 0.97), ("densenet", 0.97)])
def test_the_mask_implementation(arch, percent, images, tmp_path):
    network = f"--arch {arch} --depth {SMALLEST[arch]} --data {images}"
    train = f"mask-impl/main_mask.py -sr --dataset folder {network} --epochs 1 --batch-size 32"
    succeed(f"{train} --no-tensorboard --save {tmp_path}", cwd=tmp_path)
    prune = f"mask-impl/prune_mask.py {network} --percent {percent}"
    best = tmp_path / "model_best.pth.tar"
    printed = succeed(f"{prune} --model {best} --save {tmp_path}/pruned")
    assert "MFLOPs" in printed and "the equivalent slim network" in printed
    masked = tmp_path / "pruned" / "pruned.pth.tar"
    succeed(f"{train} --no-tensorboard --refine {masked} --save {tmp_path}/fine")
    pruned = checkpoint.read(masked)["state_dict"]
    tuned = checkpoint.read(tmp_path / "fine" / "checkpoint.pth.tar")["state_dict"]
    zero = 0
    for name, before in pruned.items():
        if before.dim() == 1 and name.endswith(("weight", "bias")):  # γ and β of every BN
            zero += int((before == 0).sum())
            assert (tuned[name][before == 0] == 0).all()
    assert zero > 0
    assert not any("indexes" in name for name in tuned)
    # Slicing the mask away gives the slim network of the main suite.
    succeed(f"{PRUNER[arch]} --model {tmp_path}/fine --data {images} --percent 0")


def _check_summary(path, contents):
    """The lines of the original, in its order, then the count that it would have given."""
    model, _ = architecture.rebuild(path, contents)
    weights, masks = [], []
    for name, parameter in model.named_parameters():
        (masks if name.endswith("indexes") else weights).append(parameter.numel())
    told = path.read_text().splitlines()
    assert told[:2] == ["Configuration:", str(contents["cfg"])]
    assert told[2:4] == ["Number of parameters:", f"{sum(weights)}"]
    assert told[4:6] == ["Test accuracy:", f"{contents['best_prec1']}"]
    assert "with the masks" in told[6] and told[7:] == [str(sum(weights + masks))]


@pytest.mark.slow
def test_names_of_the_other_implementations(images, tmp_path):
    """Seed folders, tags, file names and flags as people remember them."""
    data = f"--dataset folder --data {images} --epochs 1 --batch-size 32"
    succeed(f"main.py -sr --arch=preact_res11 --tag=first {data}", cwd=tmp_path)
    run = tmp_path / "ckpts" / "preact_res11_sr_first"
    assert (run / "model_best.pth.tar").exists()
    prune = f"resprune.py --ckpt_dir={run}/best_acc --arch=preact_res11"
    succeed(f"{prune} --save_dir={tmp_path}/slim --data {images}")
    pruned = tmp_path / "slim" / "pruned.pth.tar"
    succeed(f"main.py -amp_loss --refine {pruned} --filename fine {data}", cwd=tmp_path)
    assert {"fine.pth.tar", "fine_best.pth.tar", "fine_curves.png"} <= {
        path.name for path in (tmp_path / "logs").iterdir()
    }
    succeed(f"resprune.py --model {tmp_path}/logs --filename again --data {images}")
    assert (tmp_path / "logs" / "again.pth.tar").exists()


def test_a_path_with_folders_without_a_run_has_the_seed_s_default(images, tmp_path):
    network = "--arch resnet --depth 11 --dataset folder"
    succeed(f"main.py {network} --data {images} --epochs 1 --no-tensorboard", cwd=tmp_path)
    assert (tmp_path / "logs" / "checkpoint.pth.tar").exists()
