"""python examples/classify.py MODEL.onnx IMAGE...: the class of each picture, without PyTorch."""

import json
import sys

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
    cropped, padded = (facts.get("crop") == how for how in ("center 7/8", "pad 2"))  # or whole
    resize = (lambda *how: ImageOps.fit(*how, bleed=1 / 16)) if cropped else Image.Image.resize
    for path in sys.argv[2:]:
        inner = resize(Image.open(path).convert("RGB"), (size - 4 * padded,) * 2, Image.BILINEAR)
        pixels = np.asarray(ImageOps.expand(inner, 2 * padded))[None]
        fed = np.float32((pixels / 255 - mean) / std) if "float32" in facts["input"] else pixels
        images = fed if facts["input"].endswith("NHWC") else fed.transpose(0, 3, 1, 2)
        images = images.repeat(batch if isinstance(batch, int) else 1, 0)  # it may be fixed
        logits = session.run(["logits"], {"images": images})[0][0]
        print(f"{path}: {classes[logits.argmax()]} {1 / np.exp(logits - logits.max()).sum():.1%}")
except Exception as error:  # Pillow and ONNX Runtime raise types of their own
    sys.exit(print("error:", " ".join(str(error).split()), file=sys.stderr) or 2)
