// From a picture to the numbers that the network reads, as the suite computes them in training.

/**
 * The picture in `file` as RGB pixels (size, size, 3) in a Uint8Array: whole, cropped, or with a
 * black border, as the network's metadata says. An Error if the file is not a picture.
 */
export async function readPixels(file, { image_size: size, crop, interpolation }) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${file.name} is not a picture that this browser can read.`);
  }
  let { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height).getContext("2d");
  canvas.drawImage(bitmap, 0, 0);
  bitmap.close();
  let left = 0, top = 0;
  const center = /^center (\d+)\/(\d+)$/.exec(crop);
  if (center) { // a part of the largest square
    const side = Math.max(1, Math.round((Math.min(width, height) * center[1]) / center[2]));
    [left, top] = [(width - side) >> 1, (height - side) >> 1];
    width = height = side;
  }
  const border = crop === "pad 2" ? 2 : 0, rgba = canvas.getImageData(left, top, width, height);
  const resized = resize(rgba.data, width, height, size - 2 * border, interpolation);
  return framed(resized, size, border);
}

/** `pixels` with a black border: (size, size, 3). */
function framed(pixels, size, border) {
  const whole = new Uint8Array(3 * size * size), row = 3 * (size - 2 * border);
  for (let at = 0, y = border; at < pixels.length; at += row, y++) {
    whole.set(pixels.subarray(at, at + row), 3 * (y * size + border));
  }
  return whole;
}

/** The network's input from `pixels` (size, size, 3), of the kind that its metadata says. */
export function prepare(pixels, { input, image_size: size, mean, std }) {
  const [type, layout] = input.split(" "), area = size * size, last = layout === "NHWC";
  const data = type === "uint8" ? new Uint8Array(3 * area) : new Float32Array(3 * area);
  for (let channel = 0; channel < 3; channel++) {
    for (let i = 0; i < area; i++) {
      const value = pixels[3 * i + channel];
      data[last ? 3 * i + channel : channel * area + i] =
        type === "uint8" ? value : (value / 255 - mean[channel]) / std[channel];
    }
  }
  return { type, data, dims: last ? [1, size, size, 3] : [1, 3, size, size] };
}

// The weight of a pixel at a distance, up to the largest one that counts: those of Pillow.
const FILTERS = {
  bilinear: { reach: 1, weight: (x) => Math.max(0, 1 - x) },
  bicubic: {
    reach: 2,
    weight: (x) => {
      if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
      return x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
    },
  },
};

/**
 * RGBA pixels (height, width, 4) as RGB (size, size, 3), by bilinear or bicubic interpolation as in
 * Pillow: a pixel is a mean over all that it covers, where drawImage would read only its neighbours.
 */
function resize(rgba, width, height, size, interpolation) {
  const filter = FILTERS[interpolation ?? "bilinear"];
  const rows = new Uint8ClampedArray(height * size * 3); // which rounds
  taps(width, size, filter).forEach(({ first, weights }, x) => {
    for (let y = 0; y < height; y++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) {
          sum += weights[i] * rgba[4 * (y * width + first + i) + channel];
        }
        rows[3 * (y * size + x) + channel] = sum;
      }
    }
  });
  const pixels = new Uint8ClampedArray(size * size * 3), stride = 3 * size;
  taps(height, size, filter).forEach(({ first, weights }, y) => {
    for (let at = 0; at < stride; at++) {
      let sum = 0;
      for (let i = 0; i < weights.length; i++) sum += weights[i] * rows[(first + i) * stride + at];
      pixels[y * stride + at] = sum;
    }
  });
  return new Uint8Array(pixels.buffer);
}

/** For each of `to` pixels, the first of `from` pixels that it reads, and the weights from there. */
function taps(from, to, filter) {
  const scale = from / to, wide = Math.max(1, scale); // to larger pictures: from the neighbours
  const reach = filter.reach * wide;
  return Array.from({ length: to }, (_, at) => {
    const center = (at + 0.5) * scale;
    const first = Math.max(0, Math.floor(center - reach + 0.5));
    const last = Math.min(from, Math.floor(center + reach + 0.5));
    const weights = [];
    for (let i = first; i < last; i++) {
      weights.push(filter.weight(Math.abs(i + 0.5 - center) / wide));
    }
    const sum = weights.reduce((a, b) => a + b);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}
