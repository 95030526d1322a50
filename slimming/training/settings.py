"""How a network is trained."""

from dataclasses import dataclass
from typing import ClassVar

from slimming.settings import count, count_from_zero, not_negative, seed, setting, share


@dataclass(frozen=True)
class TrainSettings:
    """One training run, as in the paper unless said otherwise. Fields that are ``kept`` come from
    the checkpoint when a run is resumed."""

    title: ClassVar[str] = "training"
    sr: bool = setting(
        False,
        "train with the L1 penalty on the scaling factors",
        *("-sr", "--sparsity-regularization"),
        kind="on/off",
        kept=True,
    )
    s: float = setting(
        1e-4,
        "strength of the penalty",
        *("--s", "--sparsity"),  # torchrun takes --s for one of its own flags
        metavar="S",
        parse=not_negative,
        kept=True,
    )
    batch_size: int = setting(64, "images a step", metavar="N", parse=count, kept=True)
    epochs: int = setting(160, "epochs to train", metavar="N", parse=count, kept=True)
    start_epoch: int | None = setting(
        None, "first epoch, counted from 0", metavar="N", parse=count_from_zero
    )
    lr: float = setting(
        0.1, "learning rate, / 10 at 1/2 and at 3/4", metavar="R", parse=not_negative, kept=True
    )
    momentum: float = setting(0.9, "momentum of SGD", metavar="M", parse=share, kept=True)
    weight_decay: float = setting(
        1e-4,
        "weight decay",
        "--weight-decay",
        "--wd",
        metavar="W",
        parse=not_negative,
        kept=True,
    )
    seed: int = setting(
        1, "seed of the weights, the order, the augmentation", metavar="N", parse=seed, kept=True
    )
    log_interval: int = setting(100, "batches between two printed lines", metavar="N", parse=count)
    amp: bool = setting(
        False,
        "mixed precision: bf16, or fp16 on older GPUs",
        *("--amp", "-amp_loss"),
        kind="on/off",
        kept=True,
    )
    deterministic: bool = setting(
        False, "repeatable CUDA kernels (the CPU repeats anyway)", kind="on/off", kept=True
    )
    compile: bool = setting(
        False,
        "compile the network with torch.compile, on CUDA into CUDA graphs",
        kind="switch",
    )
    sync_bn: bool = setting(
        False, "batch statistics over all processes (CUDA, torchrun)", kind="switch"
    )
