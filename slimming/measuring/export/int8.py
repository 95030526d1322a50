"""Post-training static quantization with NNCF: int8 weights per channel and int8 activations."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any


def quantized(model: Any, batches: Sequence[Any]) -> Any:
    """``model`` (of ONNX, OpenVINO or torch.fx) in int8, calibrated on ``batches`` of its inputs.

    Ranges of activations are means over the batches of their least and largest values; biases are
    corrected for the mean error of quantization.
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    with quietly():
        return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the progress and the warnings of exporters."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
