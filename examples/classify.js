// The page classify.html: files in, classes and milliseconds out.

import { metadata } from "./metadata.js";
import { prepare, readPixels } from "./pixels.js";

const SHOWN = 5; // classes of each picture
const $ = (id) => document.getElementById(id);
let ort = null; // ONNX Runtime, once it is needed
let network = null; // { session, facts }
let pictures = []; // files, in the order in which they came
let waiting = Promise.resolve();

$("blocked").remove(); // it says that this line was not reached

/** Run `job` after those before it: a session computes one picture at a time. */
function enqueue(job) {
  waiting = waiting.then(job).catch((error) => fail(error.message));
}

function fail(message) {
  $("errors").append(element("p", { className: "card wrong" }, message));
  $("status").textContent = "";
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

async function runtime() {
  try {
    ort ??= await import("./vendor/ort.wasm.bundle.min.mjs");
  } catch {
    throw new Error("ONNX Runtime is not there: run `make web` in the folder of the suite.");
  }
  ort.env.wasm.numThreads = 1; // several need headers that http.server does not send
  return ort;
}

async function loadNetwork(file) {
  $("status").textContent = `Loading ${file.name} …`;
  const bytes = new Uint8Array(await file.arrayBuffer());
  const facts = metadata(bytes, file.name);
  const { InferenceSession } = await runtime();
  const loaded = { facts };
  try {
    loaded.session = await InferenceSession.create(bytes);
    // the first run is slower than those that follow
    await compute(loaded, new Uint8Array(3 * facts.image_size ** 2));
  } catch (error) {
    await loaded.session?.release();
    throw new Error(`ONNX Runtime cannot run ${file.name}: ${error.message ?? error}`);
  }
  await network?.session.release();
  network = loaded;
  showFacts(file, facts);
  $("results").replaceChildren();
  pictures = await classifyAll(pictures);
  showStatus();
}

function showFacts(file, facts) {
  const shown = {
    file: file.name, network: facts.network, precision: facts.precision, form: facts.form,
    classes: facts.classes.length, pixels: `${facts.image_size} × ${facts.image_size}`,
    input: facts.input, size: `${(file.size / 1e6).toFixed(2)} MB`, source: facts.source,
  };
  const known = Object.entries(shown).filter(([, value]) => value);
  $("facts").replaceChildren(...known.map(([name, value]) =>
    element("div", {}, element("span", {}, name), String(value))));
  $("facts").hidden = false;
}

/** Logits of `pixels` (size, size, 3), and the milliseconds that the network took. */
async function compute({ session, facts }, pixels) {
  const { type, data, dims } = prepare(pixels, facts);
  const images = new ort.Tensor(type, data, dims);
  const start = performance.now();
  const { logits } = await session.run({ images });
  return { logits: logits.data, ms: performance.now() - start };
}

async function classify(file) {
  const start = performance.now();
  const pixels = await readPixels(file, network.facts);
  const decoding = performance.now() - start;
  const { logits, ms } = await compute(network, pixels);
  $("results").append(card(file, ranked(logits), ms, decoding));
}

/** Show the classes of all `files` that are pictures, an error for each that is not; return
 * those that are. */
async function classifyAll(files) {
  const done = [];
  for (const file of files) {
    try {
      await classify(file);
      done.push(file);
    } catch (error) {
      fail(error.message);
    }
  }
  return done;
}

/** [name, probability] of the likeliest classes, the likeliest first. */
function ranked(logits) {
  const values = Array.from(logits, Number), most = Math.max(...values);
  const odds = values.map((value) => Math.exp(value - most));
  const sum = odds.reduce((a, b) => a + b);
  return odds.map((odd, i) => [network.facts.classes[i] ?? String(i), odd / sum])
    .sort((a, b) => b[1] - a[1]).slice(0, SHOWN);
}

function card(file, classes, ms, decoding) {
  const image = element("img", { src: URL.createObjectURL(file), alt: "" });
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  const rows = classes.map(([name, share]) => {
    const bar = element("b");
    bar.style.width = `${100 * share}%`;
    return element("li", {}, element("span", { className: "name" }, name),
      element("span", { className: "share" }, `${(100 * share).toFixed(1)} %`),
      element("div", { className: "bar" }, bar));
  });
  return element("article", { className: "card result" }, image, element("div", {},
    element("h2", {}, file.name),
    element("ol", {}, ...rows),
    element("p", { className: "soft" },
      `${ms.toFixed(1)} ms in the network, ${decoding.toFixed(1)} ms to decode and resize`)));
}

function showStatus() {
  const count = $("results").children.length;
  $("clear").hidden = !pictures.length;
  if (!network) $("status").textContent = pictures.length ? "Now choose a network." : "";
  else if (!count) $("status").textContent = "Now choose pictures.";
  else $("status").textContent = `${count} picture${count > 1 ? "s" : ""} classified.`;
}

async function addPictures(files) {
  pictures.push(...(network ? await classifyAll(files) : files));
  showStatus();
}

/** Let `input` show the names of `files` as if they had been chosen there, and take them. */
function put(input, files) {
  const list = new DataTransfer();
  for (const file of files) list.items.add(file);
  input.files = list.files;
  input.dispatchEvent(new Event("change"));
}

/** Dropped files: networks before pictures, whatever their order. */
function take(files) {
  const isNetwork = (file) => file.name.toLowerCase().endsWith(".onnx");
  const networks = files.filter(isNetwork), rest = files.filter((file) => !isNetwork(file));
  if (networks.length) put($("network"), networks.slice(-1));
  if (rest.length) put($("pictures"), rest);
}

function onChosen(input, receive) {
  input.addEventListener("click", () => { input.value = ""; }); // the same file may be chosen again
  input.addEventListener("change", () => {
    const files = [...input.files];
    $("errors").replaceChildren(); // those of the files before
    if (files.length) enqueue(() => receive(files));
  });
}

onChosen($("network"), ([file]) => loadNetwork(file));
onChosen($("pictures"), addPictures);
$("clear").addEventListener("click", () => enqueue(() => {
  pictures = [];
  $("pictures").value = "";
  $("results").replaceChildren();
  showStatus();
  $("pictures").focus();
}));
addEventListener("dragover", (event) => {
  event.preventDefault(); // else the browser would open the file instead of this page
  document.body.classList.add("dragged");
});
addEventListener("dragleave", () => document.body.classList.remove("dragged"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragged");
  take([...event.dataTransfer.files]);
});
