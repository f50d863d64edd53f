"""The canvas of the page on which a part of an image is painted over, and the mask that it sends."""

import base64
import binascii
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stage1_tokenizer.data.base import ImageArray
from stage1_tokenizer.engine.errors import ConfigError

SCRIPT = Path(__file__).with_name("painter.js").read_text(encoding="utf-8")
TEMPLATE = """
{{#if value}}
<div class="painter">
  <div class="canvas">
    <img src="{{value}}" alt="The image to complete">
    <canvas tabindex="0" role="application" aria-describedby="painter-status"
      aria-label="Paint over the part to generate: arrow keys move the brush, space paints or erases"></canvas>
    <div class="brush" hidden></div>
  </div>
  <div class="tools">
    <label><input type="radio" name="painter-tool" value="paint" checked> Paint</label>
    <label><input type="radio" name="painter-tool" value="erase"> Erase</label>
    <label>Brush <input type="range" min="1" max="16" value="5" aria-label="Size of the brush"></label>
  </div>
  <div class="tools">
    <span>Paint half:</span>
    <button type="button" data-area="top" aria-label="Paint over the top half">top</button>
    <button type="button" data-area="bottom" aria-label="Paint over the bottom half">bottom</button>
    <button type="button" data-area="left" aria-label="Paint over the left half">left</button>
    <button type="button" data-area="right" aria-label="Paint over the right half">right</button>
  </div>
  <div class="tools">
    <output id="painter-status" aria-live="polite"></output>
    <button type="button" data-area="none">clear all</button>
  </div>
</div>
{{else}}
<p class="hint">Choose or upload an image, then paint over the part that the prior should generate.</p>
{{/if}}
"""
SEND_MASK = "(chosen, mask, ...rest) => [chosen, document.querySelector('.painter canvas')?.mask() ?? '', ...rest]"
"""Script for the browser: replaces the second value of a request by the painted mask."""


def data_url(image: ImageArray) -> str:
    """Return an image (H, W, C) as a data URL."""
    file = BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def decode_mask(text: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Convert the text that `painter.js` sends to the mask (H, W): True for painted pixels; empty: none is painted.

    Raises:
        ConfigError: the text is not a mask, or a mask of another size.
    """
    pixels = size[0] * size[1]
    if text in ("", None):
        return np.zeros(size, dtype=np.bool_)
    try:
        bits = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (binascii.Error, TypeError, ValueError):
        raise ConfigError("the painted mask cannot be read; choose the image again") from None
    if len(bits) != -(-pixels // 8):
        raise ConfigError("the painted mask does not have the image's size; choose the image again")
    return np.unpackbits(bits, count=pixels).reshape(size).astype(np.bool_)
