"""Settings of training."""

from dataclasses import dataclass
from typing import ClassVar

from slimming.settings import count, count_from_zero, fraction, not_negative, seed, setting


@dataclass(frozen=True)
class TrainSettings:
    """One training run; the defaults are those of the paper. Fields that are ``kept`` are restored
    from the checkpoint when a run is resumed."""

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
        *("--s", "--sparsity"),  # torchrun reads --s as an abbreviation of its own flags
        metavar="S",
        parse=not_negative,
        kept=True,
    )
    batch_size: int = setting(
        64, "batch size of all processes", metavar="N", parse=count, kept=True
    )
    epochs: int = setting(160, "number of epochs", metavar="N", parse=count, kept=True)
    start_epoch: int | None = setting(
        None, "first epoch, counted from 0", metavar="N", parse=count_from_zero
    )
    lr: float = setting(
        0.1,
        "learning rate, divided by 10 after 1/2 and 3/4 of the epochs",
        metavar="R",
        parse=not_negative,
        kept=True,
    )
    momentum: float = setting(0.9, "momentum of SGD", metavar="M", parse=fraction, kept=True)
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
        1,
        "random seed of weights, shuffling and augmentation",
        metavar="N",
        parse=seed,
        kept=True,
    )
    log_interval: int = setting(100, "print a line every N batches", metavar="N", parse=count)
    amp: bool = setting(
        False,
        "mixed precision: bf16, or fp16 on older GPUs",
        *("--amp", "-amp_loss"),
        kind="on/off",
        kept=True,
    )
    deterministic: bool = setting(
        False, "deterministic CUDA kernels (the CPU always is)", kind="on/off", kept=True
    )
    compile: bool = setting(
        False,
        "compile the network with torch.compile, with CUDA graphs on CUDA",
        kind="switch",
    )
    sync_bn: bool = setting(
        False, "synchronise BatchNorm over all processes (CUDA, torchrun)", kind="switch"
    )
