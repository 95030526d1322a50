"""Files: written whole or not at all, and found in the folders where scripts put them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from slimming.errors import UserError


def write_bytes(path: str | Path, data: bytes, suffix: str = ".tmp") -> None:
    """Replace the file at ``path`` so that a reader sees the old file or the new one, never half.

    The bytes go to a file beside it (its name ends in ``suffix``; where several processes may
    write the same file, each needs its own), are flushed to disk, and take the name in one step.
    UserError if that fails (a full disk, no permission); an older file is then still there.
    """
    path = Path(path)
    beside = path.with_name(path.name + suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; what was there before is kept") from error


def find(path: Path, *patterns: str) -> Path:
    """A path to a file as it is; in a folder, the one file that matches the first pattern which
    matches any. UserError if none does, or several.

    ``best_acc`` is the folder in which another suite keeps its best model under a name of its own;
    where there is no checkpoint in it, the folder above is meant.
    """
    if path.name == "best_acc" and not path.is_file():
        own = ("*.pth.tar", "*.pth")
        held = any(next(path.glob(pattern), None) for pattern in own)
        path, patterns = (path, (*patterns, *own)) if held else (path.parent, patterns)
    if not path.is_dir():
        return path
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{path} holds {', '.join(f.name for f in found)}: name the file")
    raise UserError(f"{path} is a folder without {' or '.join(patterns)}: name the file")


@contextlib.contextmanager
def no_empty_folders(*folders: Path) -> Iterator[None]:
    """Where the block fails, remove those of the ``folders`` (inner ones first) that it made and
    left empty."""
    missing = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty, or never made
                folder.rmdir()
        raise


def _flush_folder(folder: Path) -> None:
    """The new name survives a power cut too, where the system can promise that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
