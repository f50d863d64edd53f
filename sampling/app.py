"""Serve a page in the browser on which a prior can be tried.   python sampling/app.py [--prior runs/stage2/NAME]

    Sample      class, number, seed, temperature, top-k, top-p, guidance, size -> images, and the command for them
    Complete    an image, paint over a part of it -> images with that part generated
    Grow        an image, pixels on each of its four sides -> larger images

Without --prior, there is a page for each run and for each trained model of this package, with links to the others. Only
this machine can reach them, unless --host says otherwise. Needs the extra `app`.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import Field, PositiveInt

from sampling.playground.tasks import Limits, Playground
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.config.value_types import Side
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.pretrained import pretrained_names, resolve_path
from stage2_prior.fast_linear import Precision
from stage2_prior.prior import DEFAULT, PRIOR_FILE, find_newest_run, list_runs, load_prior

MOST_RUNS = 20
"""Runs to choose from at most; `--prior` names any other."""


class AppConfig(CommandConfig):
    """Serve a page on which a prior samples, completes and grows images."""

    prior: str | None = None
    """Folder of a stage-two run, its prior.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME; null: the runs
    under runs/stage2, the newest first, and the trained models of this package, to choose from."""
    host: str = "127.0.0.1"
    """Address to listen on. With any other address than this machine's own (127.0.0.1), everybody who can reach it can
    use the page: there is no password."""
    port: int | None = Field(None, ge=1, le=65_535)
    """Port to listen on; null: the first free one from 7860 on."""
    precision: Precision = "float32"
    """Number format of a GPT's weights, as for generate.py."""
    pictures: PositiveInt = Field(16, le=1024)
    """Number of images that one request may ask for at most."""
    side: Side | None = None
    """Largest height and width in pixels that a request may ask for; null: twice the size of training."""
    queue: PositiveInt = Field(8, le=1024)
    """Number of requests that may wait while another one is computed; further ones are refused."""


def main() -> None:
    """Load the prior and serve the page until Ctrl-C."""
    config = parse_command_line(AppConfig)
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs Gradio, which is not installed; type: pip install 'tessera-images[app]'")
    first, *others = list_priors() if config.prior is None else [config.prior]
    playgrounds = {0: open_playground(config, first)}  # an error ends the command before Gradio is imported
    names = [playgrounds[0].name, *others]
    with tempfile.TemporaryDirectory(prefix="tessera-app-") as temporary:
        folder = Path(temporary).resolve()
        os.environ.update(
            # Set before Gradio is imported, which otherwise reports its use and looks for a newer version.
            GRADIO_ANALYTICS_ENABLED="False",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_OFFLINE="1",
            GRADIO_TEMP_DIR=str(folder),
        )
        # Gradio is optional, and takes seconds to import.
        from sampling.playground.choice import Choice, OpenedPage, page_root  # noqa: PLC0415
        from sampling.playground.guard import Guard, is_loopback  # noqa: PLC0415
        from sampling.playground.page import Page  # noqa: PLC0415
        from sampling.playground.server import listen, serve  # noqa: PLC0415

        server_socket = listen(config.host, config.port)
        address = f"[{config.host}]" if ":" in config.host else config.host

        def open_page(number: int) -> OpenedPage:
            if number not in playgrounds:
                playgrounds[number] = open_playground(config, names[number])
            page = Page(playgrounds[number], folder, config.queue, {name: page_root(k) for k, name in enumerate(names)})
            app = page.app()
            return OpenedPage(app, Guard(app, config.host, folder, page.functions(), page_root(number)))

        pages = Choice(open_page, len(names))
        if not is_loopback(config.host):
            print(f"warning: everybody who can reach {config.host} can use this page; there is no password")
        prior = playgrounds[0].prior
        url = f"http://{address}:{server_socket.getsockname()[1]}"
        print(f"{url}   {one_line(prior.source)} (step {prior.step}); Ctrl-C ends it", flush=True)
        serve(pages, server_socket, lambda: stop(playgrounds.values()))


def stop(playgrounds: Iterable[Playground]) -> None:
    """End the running tasks."""
    for playground in playgrounds:
        playground.stopping.set()


def list_priors() -> list[str]:
    """List the priors to choose from: runs, the newest first, then the models of the package, `DEFAULT` before others.

    Raises:
        ConfigError: there are none.
    """
    models = [str(name) for name in pretrained_names() if (resolve_path(str(name), "--prior") / PRIOR_FILE).is_file()]
    runs = [str(run) for run in list_runs()[:MOST_RUNS]]
    return [*runs, *sorted(models, key=lambda name: name != str(DEFAULT))] or [str(find_newest_run())]


def open_playground(config: AppConfig, prior: str) -> Playground:
    """Load a prior with the limits of the options."""
    loaded = load_prior(prior, "cuda" if torch.cuda.is_available() else "cpu")
    side = config.side or 2 * max(loaded.tokenizer.tokenizer.config.image_size)
    return Playground(loaded, config.precision, Limits(config.pictures, side))


if __name__ == "__main__":
    run_command(main)
