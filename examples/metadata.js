// What export.py wrote into an ONNX file: ONNX Runtime has no call for it in a browser.

const INPUTS = ["float32 NCHW", "float32 NHWC", "uint8 NCHW", "uint8 NHWC"];
const NEEDED = ["classes", "image_size", "input", "mean", "std"];
// numbers of fields in onnx.proto
const MODEL = { irVersion: 1, graph: 7, metadata: 14 }; // ModelProto
const ENTRY = { key: 1, value: 2 }; // StringStringEntryProto

/**
 * The fields of a protobuf message, in order: [number, value].
 *
 * Each is a varint, number << 3 | type, and a value by its type: 0 a varint, 1 eight bytes, 2 a
 * varint of the length and so many bytes (a string or another message), 5 four bytes. Bytes are
 * not copied: the graph with all its weights is passed over by its length. RangeError if `bytes`
 * are no such message.
 */
function* fields(bytes) {
  let at = 0;
  const varint = () => { // 7 bits a byte, the lowest first; the top bit says that more follow
    for (let value = 0, scale = 1; scale < 2 ** 70; scale *= 128) {
      if (at >= bytes.length) break;
      const byte = bytes[at++];
      value += (byte & 127) * scale; // not <<, which has 32 bits
      if (byte < 128) return value;
    }
    throw new RangeError("no varint");
  };
  const take = (length) => {
    if (at + length > bytes.length) throw new RangeError("a field longer than the message");
    at += length;
    return bytes.subarray(at - length, at);
  };
  while (at < bytes.length) {
    const tag = varint(), number = Math.floor(tag / 8), type = tag % 8;
    if (number === 0) throw new RangeError("no field has number 0");
    if (type === 0) yield [number, varint()];
    else if (type === 1) yield [number, take(8)];
    else if (type === 2) yield [number, take(varint())];
    else if (type === 5) yield [number, take(4)];
    else throw new RangeError(`unknown type ${type}`);
  }
}

/** metadata_props of an ONNX file as an object of strings. RangeError if it is no ONNX file. */
function properties(bytes) {
  const found = {}, seen = new Set(), text = new TextDecoder();
  for (const [number, value] of fields(bytes)) {
    seen.add(number);
    if (number !== MODEL.metadata) continue;
    const entry = new Map(fields(value));
    found[text.decode(entry.get(ENTRY.key))] = text.decode(entry.get(ENTRY.value));
  }
  if (!seen.has(MODEL.irVersion) || !seen.has(MODEL.graph)) throw new RangeError("no model");
  return found;
}

/**
 * What the ONNX file `bytes` (a Uint8Array) says of itself: all its properties as strings, but
 * classes, mean and std as arrays and image_size as a number. An Error whose message says what is
 * wrong with the file `name`.
 */
export function metadata(bytes, name) {
  let found;
  try {
    found = properties(bytes);
  } catch {
    throw new Error(`${name} is not an ONNX file, or it is damaged.`);
  }
  const missing = NEEDED.filter((key) => !(key in found));
  if (missing.length) {
    throw new Error(`${name} lacks the metadata ${missing.join(", ")}: export it with export.py.`);
  }
  try {
    for (const key of ["classes", "image_size", "mean", "std"]) found[key] = JSON.parse(found[key]);
  } catch {
    throw new Error(`The metadata of ${name} cannot be read: export it with export.py.`);
  }
  if (!INPUTS.includes(found.input)) {
    throw new Error(`${name} reads ${found.input}: this page knows ${INPUTS.join(", ")}.`);
  }
  return found;
}
