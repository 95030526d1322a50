"""The recipes of examples/, in small: each ends with a table of four networks, and a file.

`make recipes` installs the newest release of each library and runs them; a library that is not
installed skips its recipe.
"""

import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
from PIL import Image
from warm import ROOT

SECONDS = 180  # in the size of this test, on two cores
STAGES = ["dense", "pruned", "repaired", "fine-tuned"]
YOLO = "--images 40 --size 64 --epochs 1 --tune 1 --folder runs"
RECIPES = {  # script -> library, words, the file that it writes
    "slim_crnn": ("sklearn", "--lines 100 --epochs 1 --tune 1", "slim-crnn.pth"),
    "slim_lightning": ("lightning", "--epochs 1 --tune 1", "slim-lightning.pth"),
    "slim_timm": (
        "timm",
        "--data photos --random --model resnet10t --size 32 --epochs 1 --tune 1",
        "slim-timm.pth",
    ),
    "slim_unet": (
        "segmentation_models_pytorch",
        "--encoder timm-mobilenetv3_small_minimal_100 --images 50 --size 32 --epochs 1 --tune 1",
        "slim-unet.pth",
    ),
    "slim_volume": ("monai", "--volumes 50 --size 16 --epochs 1 --tune 1", "slim-volume.pth"),
    "slim_yolo": ("ultralytics", YOLO, "runs/tuned/weights/last.onnx"),
    "slim_yolo 11": (
        "ultralytics",
        f"--model yolo11n.yaml {YOLO}",
        "runs/tuned/weights/last.onnx",
    ),
}
PACKAGES = {"sklearn": "scikit-learn"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_with_the_release_that_is_installed(recipe, tmp_path):
    library, words, written = RECIPES[recipe]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: make recipes")
    for number in range(60):
        (tmp_path / "photos" / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        color = (80 * (number % 3), 2 * number, 99)
        Image.new("RGB", (40, 40), color).save(tmp_path / "photos" / f"{number % 3}/{number}.png")
    script = ROOT / "examples" / f"{recipe.split()[0]}.py"
    env = {**os.environ, "YOLO_OFFLINE": "1", "YOLO_CONFIG_DIR": str(tmp_path / "config")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, *words.split()],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    release = f"{library} {metadata.version(PACKAGES.get(library, library.replace('_', '-')))}"
    print(f"{recipe} with {release}")
    assert done.returncode == 0, f"{recipe} fails with {release}:\n{done.stderr[-3000:]}"
    table = done.stdout[done.stdout.index("\nnetwork ") + 1 :].splitlines()
    rows = {row.split()[0]: row.split() for row in table[2:6]}
    assert list(rows) == STAGES and len(table[0].split()) == 5, table
    flops = {name: int(row[2].replace(",", "")) for name, row in rows.items()}
    assert flops["pruned"] == flops["repaired"] == flops["fine-tuned"] <= 0.5 * flops["dense"]
    assert all(re.fullmatch(r"[01]\.\d{4}", row[4]) for row in rows.values()), table
    assert (tmp_path / written).stat().st_size


def test_each_recipe_is_tested_and_says_what_to_install():
    programs = {path.stem for path in (ROOT / "examples").glob("slim_*.py")}
    programs -= {"slim_mobilenet", "slim_text_detector"}  # tests/test_examples.py
    assert programs == {recipe.split()[0] for recipe in RECIPES}
    needed = (ROOT / "examples" / "requirements.txt").read_text()
    for library, _, _ in RECIPES.values():
        assert library.replace("_", "-") in needed or library == "sklearn"
