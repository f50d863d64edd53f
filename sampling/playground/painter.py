"""The part of the page on which a picture is painted over, and how what was painted arrives."""

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
    <img src="{{value}}" alt="The picture to complete">
    <canvas tabindex="0" role="application" aria-describedby="painter-said"
      aria-label="Paint over what is to be made anew: arrows move the brush, space paints or erases"></canvas>
    <div class="brush" hidden></div>
  </div>
  <div class="tools">
    <label><input type="radio" name="painter-tool" value="paint" checked> Paint</label>
    <label><input type="radio" name="painter-tool" value="erase"> Erase</label>
    <label>Brush <input type="range" min="1" max="16" value="5" aria-label="Size of the brush"></label>
  </div>
  <div class="tools">
    <span>Half:</span>
    <button type="button" data-area="top" aria-label="Paint over the top half">top</button>
    <button type="button" data-area="bottom" aria-label="Paint over the bottom half">bottom</button>
    <button type="button" data-area="left" aria-label="Paint over the left half">left</button>
    <button type="button" data-area="right" aria-label="Paint over the right half">right</button>
  </div>
  <div class="tools">
    <output id="painter-said" aria-live="polite"></output>
    <button type="button" data-area="none">clear all</button>
  </div>
</div>
{{else}}
<p class="hint">Choose a picture, then paint over what is to be made anew.</p>
{{/if}}
"""
READ = "(chosen, mask, ...rest) => [chosen, document.querySelector('.painter canvas')?.mask() ?? '', ...rest]"
"""What the browser does to a request's values before it sends them: the second one becomes the mask."""


def data_url(picture: ImageArray) -> str:
    """A picture (H, W, C) as an address that holds it."""
    file = BytesIO()
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def painted(text: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """What `painter.js` says is painted, of a picture of this size: (H, W).

    Raises:
        ConfigError: it is none, or of a picture of another size.
    """
    pixels = size[0] * size[1]
    if text in ("", None):
        return np.zeros(size, dtype=np.bool_)
    try:
        bits = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (binascii.Error, TypeError, ValueError):
        raise ConfigError("what was painted cannot be read; choose the picture again") from None
    if len(bits) != -(-pixels // 8):
        raise ConfigError("what was painted does not have the picture's size; choose the picture again")
    return np.unpackbits(bits, count=pixels).reshape(size).astype(np.bool_)
