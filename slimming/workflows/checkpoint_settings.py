"""The checkpoint that a script is about, as its first argument."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slimming.errors import UserError
from slimming.settings import setting
from slimming.storage import files
from slimming.workflows.before_after import TO_PRUNE
from slimming.workflows.settings import NetworkSettings


@dataclass(frozen=True)
class CheckpointSettings(NetworkSettings):
    """The checkpoint and, if the file does not record it, its network."""

    in_folder: ClassVar[tuple[str, ...]] = (*TO_PRUNE, "*_base.pth", "*_rebuilt.pth")  # first match

    checkpoint: str | None = setting(
        None, "checkpoint of a network, or its folder", kind="positional", metavar="CHECKPOINT"
    )

    @property
    def path(self) -> Path:
        """The checkpoint file. UserError if none is given."""
        if not self.checkpoint:
            raise UserError("CHECKPOINT is required: the file of a network, or its folder")
        return files.find(Path(self.checkpoint), *self.in_folder)
