// The canvas on which a part of an image is painted over. Gradio runs this script when the page is loaded, and provides
// `element` (around the canvas) and `watch`. One pixel of the canvas is one pixel of the image. `canvas.mask()` returns
// the value that the Complete button sends: one bit per pixel, row by row, 1 if it is painted, in base64.

const COLOUR = "#ff2d87";

function begin() {
  const image = element.querySelector("img");
  const canvas = element.querySelector("canvas");
  if (!image || !canvas) return; // no image is chosen
  const size = element.querySelector("input[type=range]");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let erasing = false;
  let last = null;
  const brush = element.querySelector(".brush");
  let position = [0, 0]; // of the brush that the arrow keys move: [x, y] in pixels

  function prepare() {
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    size.max = Math.max(2, Math.round(Math.max(canvas.width, canvas.height) / 2));
    size.value = Math.max(1, Math.round(canvas.width / 6));
    position = [Math.floor(canvas.width / 2) + 0.5, Math.floor(canvas.height / 2) + 0.5];
    showCount();
  }

  function painted() {
    const alpha = context.getImageData(0, 0, canvas.width, canvas.height).data;
    return Array.from({ length: alpha.length / 4 }, (_, pixel) => alpha[4 * pixel + 3] > 0);
  }

  function showCount() {
    const pixels = painted();
    const count = pixels.filter(Boolean).length.toLocaleString("en");
    element.querySelector("output").value = `${count} of ${pixels.length.toLocaleString("en")} pixels painted`;
  }

  function showBrush() {
    brush.style.left = `${(100 * position[0]) / canvas.width}%`;
    brush.style.top = `${(100 * position[1]) / canvas.height}%`;
    brush.style.width = `${(100 * size.value) / canvas.width}%`;
    brush.hidden = false;
  }

  function readTool() {
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

  // Paints or erases all pixels whose centre lies within the brush; a pixel is never painted in part.
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
    readTool();
    brush.hidden = true;
    canvas.setPointerCapture(event.pointerId);
    stroke(event);
  };
  canvas.onpointermove = (event) => last && stroke(event);
  canvas.onpointerup = canvas.onpointercancel = () => { last = null; showCount(); };

  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.onkeydown = (event) => {
    const arrow = arrows[event.key];
    if (!arrow && event.key !== " ") return;
    event.preventDefault(); // the page would scroll
    if (arrow) {
      position[0] = Math.min(canvas.width - 0.5, Math.max(0.5, position[0] + arrow[0]));
      position[1] = Math.min(canvas.height - 0.5, Math.max(0.5, position[1] + arrow[1]));
    } else {
      readTool();
      dab(...position);
      showCount();
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
      showCount();
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
