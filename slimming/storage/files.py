"""Write files atomically, and find them in the folders of the scripts."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from slimming.errors import UserError


def write_bytes(path: str | Path, data: bytes, suffix: str = ".tmp") -> None:
    """Replace the file at ``path`` atomically: a reader sees the old file or the new one.

    The bytes go to a temporary file beside it (its name ends in ``suffix``; several processes that
    write the same file need different ones), are flushed to disk, and the file is renamed.
    UserError if that fails (a full disk, no permission); an existing file is then kept.
    """
    path = Path(path)
    beside = path.with_name(path.name + suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
        move(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        kept = "; the file that is there was kept" if path.exists() else ""
        raise UserError(f"cannot write {path}: {reason}{kept}") from error


def move(beside: Path, path: Path) -> None:
    """Replace the file at ``path`` atomically by another one on the same disk, which is flushed
    first. OSError if that fails."""
    with open(beside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
    _flush_folder(path.parent)


def find(path: Path, *patterns: str) -> Path:
    """``path`` itself if it is no folder; in a folder, the file that matches the first pattern
    with a match. UserError if no file matches, or several do.

    ``best_acc`` is the folder in which another suite stores its best model, under any name; if it
    contains no checkpoint, its parent folder is searched.
    """
    if path.name == "best_acc" and not path.is_file():
        own = ("*.pth.tar", "*.pth")
        held = [file for pattern in own for file in path.glob(pattern) if not file.is_symlink()]
        path, patterns = (path, (*patterns, *own)) if held else (path.parent, patterns)
    if not path.is_dir():
        return path
    for pattern in patterns:
        matches = sorted(path.glob(pattern))
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = ", ".join(file.name for file in matches)
            raise UserError(f"{path} contains several files ({names}): give the path of one")
    raise UserError(f"{path} is a folder without {' or '.join(patterns)}: give the path of a file")


@contextlib.contextmanager
def no_empty_folders(*folders: Path) -> Iterator[None]:
    """If the block fails, remove the ``folders`` (inner ones first) that it created and left
    empty."""
    missing = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty, or never made
                folder.rmdir()
        raise


def _flush_folder(folder: Path) -> None:
    """Make the rename survive a power failure, if the system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
