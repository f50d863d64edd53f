"""A page to try a prior on, in the browser.   python sampling/app.py [--prior runs/stage2/NAME]

    Sample      class, number, seed, temperature, top-k, top-p, guidance, size -> pictures, and the command for them
    Complete    a picture, paint over a part of it -> that part made anew
    Grow        a picture, pixels on each of its four sides -> a larger one

Only this machine can reach it, unless --host says otherwise. Needs the extra `app`.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from pydantic import Field, PositiveInt

from sampling.playground.tasks import Limits, Playground
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.config.value_types import Side
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.errors import ConfigError
from stage2_prior.fast_linear import Precision
from stage2_prior.prior import load_prior


class AppConfig(CommandConfig):
    """Serve a page on which a prior samples, completes pictures and grows them."""

    prior: str | None = None
    """A stage-two run's folder, or its prior.safetensors; null: the newest run under runs/stage2."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own lets everybody in who can reach it: there is no password."""
    port: int | None = Field(None, ge=1, le=65_535)
    """null: the first free one from 7860 on."""
    precision: Precision = "float32"
    """Of a GPT's weights, as for generate.py."""
    pictures: PositiveInt = Field(16, le=1024)
    """The most pictures that one request may ask for."""
    side: Side | None = None
    """The most pixels a side that they may have; null: twice the size of training."""
    queue: PositiveInt = Field(8, le=1024)
    """The most requests that may wait while another is worked on; further ones are refused."""


def main() -> None:
    config = parse_command_line(AppConfig)
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("app: needs the extra app: pip install 'tessera-images[app]'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prior = load_prior(config.prior, device)
    side = config.side or 2 * max(prior.tokenizer.tokenizer.config.image_size)
    playground = Playground(prior, config.precision, Limits(config.pictures, side))
    with tempfile.TemporaryDirectory(prefix="tessera-app-") as name:
        folder = Path(name).resolve()
        os.environ.update(
            # Before it is imported. It would ask for its newest version, and say who uses it.
            GRADIO_ANALYTICS_ENABLED="False",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_OFFLINE="1",
            GRADIO_TEMP_DIR=str(folder),
        )
        # Slow to import, and optional.
        from sampling.playground.guard import Guard, is_loopback  # noqa: PLC0415
        from sampling.playground.page import Page  # noqa: PLC0415
        from sampling.playground.server import listen, serve  # noqa: PLC0415

        bound = listen(config.host, config.port)
        address = f"[{config.host}]" if ":" in config.host else config.host
        page = Page(playground, folder, config.queue)
        guarded = Guard(page.app(), config.host, folder, page.functions())
        if not is_loopback(config.host):
            print(f"warning: everybody who can reach {config.host} can use this page; there is no password")
        named = one_line(str(prior.path))
        print(f"http://{address}:{bound.getsockname()[1]}   {named} (step {prior.step}); Ctrl-C ends it", flush=True)
        serve(guarded, bound, playground.stopping.set)


if __name__ == "__main__":
    run_command(main)
