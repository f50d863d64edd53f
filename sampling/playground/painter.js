// The canvas that a picture is painted on. Runs when the page is loaded, with Gradio's `element` (around it) and `watch`.
// One pixel of the canvas is one pixel of the picture. `canvas.mask()` is what the Complete button sends: a bit for
// each pixel, row by row, 1 where it is painted, in base64.

const COLOUR = "#ff2d87";

function begin() {
  const image = element.querySelector("img");
  const canvas = element.querySelector("canvas");
  if (!image || !canvas) return; // no picture is chosen
  const size = element.querySelector("input[type=range]");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let erasing = false;
  let last = null;
  const brush = element.querySelector(".brush"); // where the arrow keys have moved it: [x, y] in pixels
  let place = [0, 0];

  function prepare() {
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    size.max = Math.max(2, Math.round(Math.max(canvas.width, canvas.height) / 2));
    size.value = Math.max(1, Math.round(canvas.width / 6));
    place = [Math.floor(canvas.width / 2) + 0.5, Math.floor(canvas.height / 2) + 0.5];
    say();
  }

  function painted() {
    const alpha = context.getImageData(0, 0, canvas.width, canvas.height).data;
    return Array.from({ length: alpha.length / 4 }, (_, pixel) => alpha[4 * pixel + 3] > 0);
  }

  function say() {
    const pixels = painted();
    const count = pixels.filter(Boolean).length.toLocaleString("en");
    element.querySelector("output").value = `${count} of ${pixels.length.toLocaleString("en")} pixels painted`;
  }

  function showBrush() {
    brush.style.left = `${(100 * place[0]) / canvas.width}%`;
    brush.style.top = `${(100 * place[1]) / canvas.height}%`;
    brush.style.width = `${(100 * size.value) / canvas.width}%`;
    brush.hidden = false;
  }

  function takeTool() {
    erasing = element.querySelector("[name=painter-tool]:checked").value === "erase";
  }

  function box(left, top, width, height) {
    if (erasing) {
      context.clearRect(left, top, width, height);
    } else {
      context.fillStyle = COLOUR;
      context.fillRect(left, top, width, height);
    }
  }

  // All pixels whose centre lies within the brush; no pixel is painted in part.
  function dab(x, y) {
    const radius = Number(size.value) / 2;
    for (let row = Math.floor(y - radius); row <= y + radius; row++) {
      for (let column = Math.floor(x - radius); column <= x + radius; column++) {
        if ((column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2 <= radius * radius) box(column, row, 1, 1);
      }
    }
    box(Math.floor(x), Math.floor(y), 1, 1);
  }

  function stroke(event) {
    const shown = canvas.getBoundingClientRect();
    const x = ((event.clientX - shown.left) / shown.width) * canvas.width;
    const y = ((event.clientY - shown.top) / shown.height) * canvas.height;
    const from = last ?? [x, y];
    const steps = Math.max(1, Math.ceil(Math.hypot(x - from[0], y - from[1]) * 2));
    for (let step = 1; step <= steps; step++) {
      dab(from[0] + ((x - from[0]) * step) / steps, from[1] + ((y - from[1]) * step) / steps);
    }
    last = [x, y];
  }

  canvas.onpointerdown = (event) => {
    takeTool();
    brush.hidden = true;
    canvas.setPointerCapture(event.pointerId);
    stroke(event);
  };
  canvas.onpointermove = (event) => last && stroke(event);
  canvas.onpointerup = canvas.onpointercancel = () => { last = null; say(); };

  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.onkeydown = (event) => {
    const arrow = arrows[event.key];
    if (!arrow && event.key !== " ") return;
    event.preventDefault(); // the page would scroll
    if (arrow) {
      place[0] = Math.min(canvas.width - 0.5, Math.max(0.5, place[0] + arrow[0]));
      place[1] = Math.min(canvas.height - 0.5, Math.max(0.5, place[1] + arrow[1]));
    } else {
      takeTool();
      dab(...place);
      say();
    }
    showBrush();
  };
  canvas.onfocus = () => canvas.matches(":focus-visible") && showBrush();
  canvas.onblur = () => { brush.hidden = true; };

  const halves = {
    top: () => box(0, 0, canvas.width, canvas.height >> 1),
    bottom: () => box(0, canvas.height >> 1, canvas.width, canvas.height),
    left: () => box(0, 0, canvas.width >> 1, canvas.height),
    none: () => box(0, 0, canvas.width, canvas.height),
    right: () => box(canvas.width >> 1, 0, canvas.width, canvas.height),
  };
  for (const button of element.querySelectorAll("button[data-area]")) {
    button.onclick = () => {
      erasing = button.dataset.area === "none";
      halves[button.dataset.area]();
      say();
    };
  }

  canvas.mask = () => {
    const pixels = painted();
    const bits = new Uint8Array(Math.ceil(pixels.length / 8));
    pixels.forEach((one, pixel) => { if (one) bits[pixel >> 3] |= 128 >> (pixel & 7); });
    let text = "";
    for (const byte of bits) text += String.fromCharCode(byte);
    return btoa(text);
  };

  image.onload = prepare;
  if (image.complete) prepare();
}

begin();
watch("value", begin);
