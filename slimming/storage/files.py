"""Files: written whole or not at all, found by pattern, and one run at a time in a folder."""

import contextlib
import errno
import hashlib
import json
import os
import socket
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


try:
    import fcntl
except ImportError:  # on Windows, where nothing is claimed
    fcntl = None  # type: ignore[assignment]

TAKEN = (errno.EAGAIN, errno.EACCES)
# by process, because one that is forked has none: to open a file again would lose its lock
_held: set[tuple[int, Path]] = set()


@contextlib.contextmanager
def claimed(folder: Path, name: str | None = None) -> Iterator[None]:
    """Claim ``folder`` for the block, and make it if it is missing: UserError, which names the
    process and its host, if another process has claimed it. Runs that give their files ``name``
    share a folder with runs that give them another one.

    A lock of the system on the file .lock (or .``name``.lock), which the block removes at its end.
    A process that is killed loses its lock, so that its run can be resumed at once. Network file
    systems pass these locks on to other hosts; where one has no locks, a live process on this host
    and any process on another are believed. Blocks of one process may be nested.
    """
    path = folder.resolve() / (f".{name}.lock" if name else ".lock")
    own = os.getpid(), path
    if fcntl is None or own in _held:
        yield
        return
    with no_empty_folders(folder, *folder.parents):
        handle = _lock(path, folder)
        _held.add(own)
        try:
            yield
        finally:
            _held.remove(own)
            with contextlib.suppress(OSError):  # removed by hand
                path.unlink()
            os.close(handle)


def _lock(path: Path, folder: Path) -> int:
    """The open, locked file at ``path``, in which this process is named."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                free = _try_to_lock(handle)
                if not free:
                    raise UserError(
                        f"{folder} is written by {_owner_text(handle)}: wait until it has ended, "
                        f"or use another folder (delete {path} if there is no such process)"
                    )
                if _is_at(handle, path):
                    break
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # its run has ended and removed it since: there is a new file, or none
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    owner = {"host": socket.gethostname(), "process": os.getpid()}
    with contextlib.suppress(OSError):  # a full disk: the run itself says so
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
    return handle


def _try_to_lock(handle: int) -> bool:
    """Lock the file unless another process has. A lock of POSIX, which NFS passes on and which
    processes that are forked do not share: their parent's ends with their parent."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in TAKEN and not _seems_alive(_owner(handle))
    return True


def _owner(handle: int) -> dict:
    """The host and the process that the file names, if any."""
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}  # it has just been made
    return owner if isinstance(owner, dict) else {}


def _owner_text(handle: int) -> str:
    owner = _owner(handle)
    return f"process {owner['process']} on {owner['host']}" if owner else "another process"


def _seems_alive(owner: dict) -> bool:
    if not owner or owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(owner["process"]), 0)
    except PermissionError:
        return True  # a process of another user
    except (OSError, ValueError, KeyError):
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
