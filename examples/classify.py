"""python examples/classify.py MODEL.onnx IMAGE...: the class of each picture, without PyTorch."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

try:
    if len(sys.argv) < 3:
        raise ValueError(f"no picture. Usage: {__doc__}")
    session = onnxruntime.InferenceSession(sys.argv[1])
    facts, batch = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0].shape[0]
    if missing := {"classes", "image_size", "input", "mean", "std"} - facts.keys():
        raise ValueError(f"{sys.argv[1]} lacks {', '.join(sorted(missing))}: write it by export.py")
    classes, size, mean, std = (json.loads(facts[k]) for k in "classes image_size mean std".split())
    cropped = facts.get("crop") == "center 7/8"  # or the whole picture, whatever its shape
    resize = (lambda *how: ImageOps.fit(*how, bleed=1 / 16)) if cropped else Image.Image.resize
    for path in sys.argv[2:]:
        whole = Image.open(path).convert("RGB")
        pixels = np.asarray(resize(whole, (size, size), Image.Resampling.BILINEAR))[None]
        fed = np.float32((pixels / 255 - mean) / std) if "float32" in facts["input"] else pixels
        images = fed if facts["input"].endswith("NHWC") else fed.transpose(0, 3, 1, 2)
        images = images.repeat(batch if isinstance(batch, int) else 1, 0)  # it may be fixed
        logits = session.run(["logits"], {"images": images})[0][0]
        print(f"{path}: {classes[logits.argmax()]} {1 / np.exp(logits - logits.max()).sum():.1%}")
except Exception as error:  # Pillow and ONNX Runtime raise types of their own
    sys.exit(print("error:", " ".join(str(error).split()), file=sys.stderr) or 2)
