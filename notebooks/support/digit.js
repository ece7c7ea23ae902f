// A pad on which one draws a digit, and a network that reads it. The site's page calls digitPad with network(WEIGHTS),
// which computes in the browser; JupyterLab calls render, at the end, where the kernel's model answers.

const SIDE = 280, PEN = 22; // of the pad and of a stroke on it; ten are one pixel of an image

function paint(context, strokes) {
  context.clearRect(0, 0, SIDE, SIDE);
  Object.assign(context, { lineWidth: PEN, lineCap: "round", lineJoin: "round", strokeStyle: "#000" });
  for (const stroke of strokes) {
    context.beginPath();
    context.moveTo(...stroke[0]);
    context.lineTo(stroke[0][0] + 0.01, stroke[0][1]); // a tap: by the standard, a line without length is not drawn
    for (const point of stroke) context.lineTo(...point);
    context.stroke();
  }
}

// 28 x 28 numbers from 0 (paper) to 255 (ink): each the mean of ten by ten pixels of what is painted.
const scratch = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
scratch.canvas.width = scratch.canvas.height = SIDE;
function average(strokes) {
  paint(scratch, strokes);
  const ink = scratch.getImageData(0, 0, SIDE, SIDE).data, image = new Float32Array(784);
  for (let i = 0; i < SIDE * SIDE; i++)
    image[28 * Math.floor(i / SIDE / 10) + Math.floor((i % SIDE) / 10)] += ink[4 * i + 3] / 100;
  return Uint8ClampedArray.from(image);
}

// The image of a drawing. As MNIST was made: it fills a box of 20 x 20 pixels, its proportions kept, and its centre of
// mass is in the middle of 28 x 28. Strokes are scaled, not pixels, so that the pen is as wide in a small drawing.
function toImage(strokes, centred) {
  if (!centred) return average(strokes);
  const [xs, ys] = [0, 1].map((k) => strokes.flat().map((point) => point[k]).sort((a, b) => a - b));
  const scale = (200 - PEN) / Math.max(xs.at(-1) - xs[0], ys.at(-1) - ys[0], PEN); // a dot stays one
  const place = (right, down) => strokes.map((stroke) => stroke.map(([x, y]) =>
    [PEN / 2 + (x - xs[0]) * scale + right, PEN / 2 + (y - ys[0]) * scale + down]));
  let mass = 0, x = 0, y = 0;
  average(place(0, 0)).forEach((ink, i) => {
    mass += ink;
    x += ink * ((i % 28) - 13.5);
    y += ink * (Math.floor(i / 28) - 13.5);
  });
  return average(place((-10 * x) / mass, (-10 * y) / mass));
}

// The Net of mnist.py, without dropout. weights: its parameters and buffers by their names, float32 in base64.
function network(weights) {
  const floats = (name) => new Float32Array(Uint8Array.from(atob(weights[name]), (c) => c.charCodeAt(0)).buffer);
  const layer = (name) => [floats(`${name}.weight`), floats(`${name}.bias`)];
  const [conv1, conv2, fc1, fc2] = ["conv1", "conv2", "fc1", "fc2"].map(layer);
  const [mean, std] = [floats("mean")[0], floats("std")[0]];
  // Convolution by kernels of 5 x 5, the largest of each 2 x 2 answers, and ReLU: 0 in place of what is negative.
  function convolve(input, side, [weight, bias]) {
    const channels = input.length / side ** 2, wide = side - 4, half = wide / 2;
    const map = new Float32Array(wide * wide), result = new Float32Array(bias.length * half * half);
    for (let k = 0; k < bias.length; k++) {
      map.fill(bias[k]);
      for (let c = 0; c < channels; c++)
        for (let i = 0; i < 5; i++)
          for (let j = 0; j < 5; j++) {
            const w = weight[((k * channels + c) * 5 + i) * 5 + j];
            for (let y = 0; y < wide; y++)
              for (let x = 0; x < wide; x++) map[y * wide + x] += w * input[(c * side + y + i) * side + x + j];
          }
      for (let y = 0; y < half; y++)
        for (let x = 0; x < half; x++) {
          const m = 2 * (y * wide + x);
          result[(k * half + y) * half + x] = Math.max(0, map[m], map[m + 1], map[m + wide], map[m + wide + 1]);
        }
    }
    return result;
  }
  const connect = (input, [weight, bias]) =>
    bias.map((b, k) => input.reduce((sum, value, i) => sum + value * weight[k * input.length + i], b));

  return (image) => {
    const maps = convolve(Float32Array.from(image, (value) => (value / 255 - mean) / std), 28, conv1);
    const hidden = connect(convolve(maps, 12, conv2), fc1).map((value) => Math.max(0, value));
    return { logits: Array.from(connect(hidden, fc2)), maps };
  };
}

// Show pictures of side x side values, eight in a row; grey tells how light a value is, from 0 to 255.
function show(canvas, values, side, grey) {
  const size = side ** 2, columns = Math.min(values.length / size, 8), step = side + 1;
  canvas.width = columns * step - 1;
  canvas.height = Math.ceil(values.length / size / columns) * step - 1;
  const picture = canvas.getContext("2d").createImageData(canvas.width, canvas.height);
  values.forEach((value, i) => {
    const number = Math.floor(i / size), x = (number % columns) * step + (i % side);
    const y = Math.floor(number / columns) * step + Math.floor((i % size) / side), g = grey(value);
    picture.data.set([g, g, g, 255], 4 * (y * canvas.width + x));
  });
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

// Build the pad in an element. read(image), of 784 numbers from 0 to 255, returns {logits, maps} or promises it: ten
// numbers, and 12 x 12 for each feature map. samples: test images to try, a list of [label, pixels].
function digitPad(element, read, samples) {
  element.innerHTML = `
    <style>
      .digit, .digit .row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
      .digit .row { width: 100%; gap: 6px; align-items: center; }
      .digit canvas { box-sizing: border-box; width: 100%; border: 1px solid #767676; image-rendering: pixelated; }
      .digit .pad { background: #fff; touch-action: none; user-select: none; cursor: crosshair; }
      .digit .answer { flex: 1 1 240px; display: grid; grid-template-columns: auto 1fr 4em; gap: 3px 8px; }
      .digit .answer span { text-align: right; }
      .digit .answer div { background: #0072b2; min-width: 1px; }
      .digit button, .digit label { min-width: 44px; min-height: 44px; cursor: pointer; }
      .digit button { font: inherit; color: inherit; background: none; border: 1px solid #767676; border-radius: 6px; }
      .digit button canvas { display: block; width: 40px; border: none; }
    </style>
    <div class="digit">
      <div style="flex: 0 1 280px"><canvas class="pad" width="${SIDE}" height="${SIDE}" tabindex="0" role="application"
          aria-label="Pad to draw a digit on, also with arrow keys and space bar"></canvas>
        <div class="row"><button type="button">Clear</button><output></output></div>
        <small>By keyboard: arrow keys move the pen, the space bar lowers and lifts it, Escape clears.</small></div>
      <div class="answer" role="group" aria-label="Probability of each digit"></div>
      <div class="row"><label class="row"><input type="checkbox" checked>Centre and scale as MNIST was made</label>
        <small>Off, it is only shrunk to 28 × 28 pixels, unlike MNIST (<i>training/serving skew</i>).</small></div>
      <figure style="margin: 0; width: 140px"><canvas class="seen" role="img" aria-label="Image of 28 x 28"></canvas>
        <figcaption><small>What the network sees</small></figcaption></figure>
      <figure style="margin: 0; flex: 1 1 240px"><canvas class="maps" role="img" aria-label="The feature maps"></canvas>
        <figcaption><small>The feature maps of its first layer, dark where a kernel fits</small></figcaption></figure>
      <div class="row" role="group" aria-label="Test images"><small>Test images to try:</small></div>
    </div>`;
  const find = (selector) => element.querySelector(selector);
  const pad = find(".pad"), context = pad.getContext("2d"), answer = find(".answer"), output = find("output");
  for (let digit = 0; digit < 10; digit++) answer.innerHTML += `<b>${digit}</b><div></div><span></span>`;

  let strokes = []; // lists of points (x, y) in the pad's pixels
  let sample = null; // the test image that is shown in their place: its pixels, and a canvas with it
  let pointer = null, drawn = null; // the mouse, finger or pen that draws, and its stroke
  let cursor = [SIDE / 2, SIDE / 2], typed = null; // where the keyboard's pen is, and its stroke while it is down
  let asked = null, again = false; // the image that is being read, and whether another waits

  function redraw() {
    paint(context, strokes);
    if (sample) context.drawImage(sample.canvas, 0, 0, SIDE, SIDE);
    context.fillStyle = typed ? "#0072b2" : "#d55e00";
    if (pad.matches(":focus-visible")) context.fillRect(cursor[0] - 5, cursor[1] - 5, 10, 10);
  }
  async function ask() {
    redraw();
    again = asked !== null && (sample !== null || strokes.length > 0);
    if (again) return; // one image at a time, as a kernel may be slow, and then the newest
    const image = sample?.pixels ?? (strokes.length ? toImage(strokes, find("input").checked) : null);
    asked = image;
    const { logits, maps } = image ? await read(image) : { logits: [], maps: new Float32Array(16 * 144) };
    if (asked !== image) return; // the pad was cleared meanwhile
    asked = null;
    const top = Math.max(...logits), powers = logits.map((logit) => Math.exp(logit - top));
    for (let digit = 0; digit < 10; digit++) {
      const percent = (100 * powers[digit]) / powers.reduce((sum, power) => sum + power, 0);
      answer.children[3 * digit + 1].style.width = image ? `${percent}%` : 0;
      answer.children[3 * digit + 2].textContent = image ? `${percent.toFixed(1)} %` : "";
    }
    const text = image ? `It reads a ${logits.indexOf(top)}.` : "Draw a digit from 0 to 9.";
    if (output.textContent !== text) output.textContent = text; // screen readers say it when it changes
    const most = maps.reduce((a, b) => Math.max(a, b)) || 1;
    show(find(".seen"), image ?? new Float32Array(784), 28, (value) => value);
    show(find(".maps"), maps, 12, (value) => 255 - (255 * value) / most);
    if (again) ask();
  }
  function begin(chosen = null) {
    [strokes, sample, pointer, typed] = [[], chosen, null, null];
    ask();
  }

  const inside = (value) => Math.min(Math.max(value, 0), SIDE);
  const place = ({ clientX, clientY }) => {
    const box = pad.getBoundingClientRect(), scale = SIDE / box.width;
    return [inside((clientX - box.left) * scale), inside((clientY - box.top) * scale)];
  };
  pad.addEventListener("pointerdown", (event) => {
    if (event.button || pointer !== null) return; // another button, or a second finger
    if (sample) begin();
    pad.setPointerCapture(event.pointerId); // a stroke may leave the pad and come back
    pointer = event.pointerId;
    strokes.push((drawn = [place(event)]));
    ask();
  });
  pad.addEventListener("pointermove", (event) => {
    if (event.pointerId !== pointer) return;
    drawn.push(...(event.getCoalescedEvents?.() ?? []).map(place), place(event)); // all places since the last frame
    ask();
  });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"])
    pad.addEventListener(end, (event) => { if (event.pointerId === pointer) pointer = null; });
  pad.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (![...Object.keys(moves), " ", "Escape"].includes(event.key)) return;
    event.preventDefault(); // the page must not scroll
    if (event.key === "Escape" || sample) begin();
    if (event.key === " " && !event.repeat) typed = typed ? null : strokes[strokes.push([cursor]) - 1];
    cursor = cursor.map((value, k) => inside(value + 10 * (moves[event.key]?.[k] ?? 0)));
    typed?.push(cursor);
    ask();
  });
  for (const change of ["focus", "blur"]) pad.addEventListener(change, redraw);
  find("input").addEventListener("change", ask);
  find("button").addEventListener("click", () => begin());
  for (const [label, pixels] of samples) {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    [button.type, button.title] = ["button", `Test image of a ${label}`];
    show(canvas, pixels, 28, (value) => 255 - value);
    button.append(canvas);
    button.addEventListener("click", () => begin({ pixels, canvas }));
    find(".digit > :last-child").append(button);
  }
  begin();
}

// What JupyterLab calls (anywidget): the kernel's model reads, and repeats the number of the question in its answer.
function render({ model, el }) {
  let number = Math.random(), hear; // a number of its own, as each place where the pad is shown gets all answers
  model.on("msg:custom", (answer) => answer.number === number && hear(answer));
  const read = (image) => new Promise((resolve) => {
    hear = resolve;
    model.send({ number: ++number, image: Array.from(image) });
  });
  // JupyterLab has commands of single keys: "d" twice deletes the cell.
  el.addEventListener("keydown", (event) => { if (!event.ctrlKey && !event.metaKey) event.stopPropagation(); });
  digitPad(el, read, model.get("samples"));
}
