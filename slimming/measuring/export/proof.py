"""Run an exported file where nothing of the network is known but the file."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from slimming.errors import UserError
from slimming.measuring.export import engines


def run_alone(
    kind: str, path: Path, precision: str, images: np.ndarray, threads: int = 1, alone: bool = False
) -> np.ndarray:
    """The logits of the file at ``path`` for ``images`` (as they are fed) and, with ``alone``,
    then for the first image alone, computed by its engine in a fresh process. UserError if it fails
    there."""
    with tempfile.TemporaryDirectory() as folder:
        fed, logits = (str(Path(folder, name)) for name in ("images.npy", "logits.npy"))
        np.save(fed, images)
        # as text: this suite is not on the path of the process
        program = Path(engines.__file__).read_text(encoding="utf-8")
        words = ["-c", program, kind, str(path.resolve()), precision, fed, logits, str(threads)]
        words.append(str(int(alone)))
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise UserError(f"{kind} cannot run the {precision} file that was exported: {reason}")
        return np.load(logits)
