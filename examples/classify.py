"""python examples/classify.py MODEL.onnx IMAGE...: the class of each picture, without PyTorch."""

import json
import sys
from fractions import Fraction
from functools import partial

try:
    import numpy as np
    import onnxruntime
    from PIL import Image, ImageOps

    if len(sys.argv) < 3:
        raise ValueError(f"no picture. Usage: {__doc__}")
    session = onnxruntime.InferenceSession(sys.argv[1])
    facts, batch = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0].shape[0]
    if missing := {"classes", "image_size", "input", "mean", "std"} - facts.keys():
        raise ValueError(f"{sys.argv[1]} lacks {', '.join(sorted(missing))}: use export.py")
    classes, size, mean, std = (json.loads(facts[k]) for k in "classes image_size mean std".split())
    how, _, crop = facts.get("crop", "whole").partition(" ")  # "center 7/8", "pad 2" or "whole"
    border, bleed = 2 * (how == "pad"), (1 - Fraction(crop)) / 2 if how == "center" else None
    filtered = Image.Resampling[facts.get("interpolation", "bilinear").upper()]
    resize = Image.Image.resize if bleed is None else partial(ImageOps.fit, bleed=float(bleed))
    for path in sys.argv[2:]:
        inner = resize(Image.open(path).convert("RGB"), (size - 2 * border,) * 2, filtered)
        pixels = np.asarray(ImageOps.expand(inner, border))[None]
        fed = np.float32((pixels / 255 - mean) / std) if "float32" in facts["input"] else pixels
        images = fed if facts["input"].endswith("NHWC") else fed.transpose(0, 3, 1, 2)
        images = images.repeat(batch if isinstance(batch, int) else 1, 0)  # it may be fixed
        logits = session.run(["logits"], {"images": images})[0][0]
        print(f"{path}: {classes[logits.argmax()]} {1 / np.exp(logits - logits.max()).sum():.1%}")
except Exception as error:  # Pillow and ONNX Runtime raise types of their own
    sys.exit(print("error:", " ".join(str(error).split()), file=sys.stderr) or 2)
