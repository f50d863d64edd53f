"""The page: three tabs, each with its controls on the left, and what they lead to on the right."""

import html
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray

from sampling.choose import Filter
from sampling.option_facts import facts_of
from sampling.playground.controls import (
    NAMES,
    Settings,
    as_given,
    filter_control,
    index_of,
    number,
    result_gallery,
    slider,
    upload_button,
)
from sampling.playground.guard import LARGEST_UPLOAD, is_inside
from sampling.playground.painter import READ, SCRIPT, TEMPLATE, data_url, painted
from sampling.playground.tasks import Chosen, Playground, said
from sampling.sampler import SamplingConfig
from sampling.saved_images import save_png
from stage1_tokenizer.data.base import ImageArray
from stage1_tokenizer.engine.errors import ConfigError, UserError

KEPT_RESULTS = 32
"""Requests whose pictures can still be fetched; older ones are removed."""
STYLE = Path(__file__).with_name("style.css")
NEW_SEED = "() => Math.floor(Math.random() * 2 ** 31)"
PREVIEW = """{{#if value}}<img src="{{value}}" alt="The picture to grow">{{else}}<p>Choose a picture.</p>{{/if}}"""


class Page:
    """The page of a playground; its files lie in a folder of its own."""

    def __init__(self, playground: Playground, folder: Path, queue: int) -> None:
        """queue: requests that may wait."""
        self._playground, self._folder = playground, folder
        self._results: deque[Path] = deque()
        try:
            self._offered, self._missing = playground.offered(), ""
        except UserError as error:
            self._offered, self._missing = [], said(error)
        prior = playground.prior
        height, width = playground.size
        about = f"{html.escape(str(prior.path.parent))}, step {prior.step}, pictures of {height}x{width}"
        with gr.Blocks(analytics_enabled=False, title="Tessera", delete_cache=(600, 3600)) as self.blocks:
            gr.HTML(f"<h1>Tessera</h1><p>{about}</p>", elem_classes="head")
            with gr.Tabs():
                with gr.Tab("Sample"):
                    self._sample_tab()
                with gr.Tab("Complete"):
                    self._complete_tab()
                if playground.can_be_larger:
                    with gr.Tab("Grow"):
                        self._grow_tab()
            self.blocks.load(None, None, None, js=NAMES, api_visibility="private")
        self.blocks.queue(max_size=queue, default_concurrency_limit=1, api_open=False)

    def app(self) -> FastAPI:
        """What a server serves."""
        fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # none is fetched
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        mounted: FastAPI = gr.mount_gradio_app(
            app,
            self.blocks,
            path="/",
            footer_links=[],
            run_history=False,
            show_error=False,  # ours are shown all the same
            allowed_paths=[],
            max_file_size=LARGEST_UPLOAD,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=gr.themes.Default(primary_hue="indigo", font=fonts[0], font_mono=fonts[1]),
            css_paths=STYLE,
        )
        # Before an app has launched, Gradio lets it use all files; one that is mounted never does.
        self.blocks.has_launched = True
        return mounted

    def functions(self) -> dict[int, int]:
        """The number of inputs of each function that the page calls, by the number it is called by."""
        return {number: len(each.inputs) for number, each in self.blocks.fns.items() if each.fn is not None}

    def _sample_tab(self) -> None:
        playground = self._playground
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                own: dict[str, gr.components.Component] = {"class": self._class_choice("in turn")}
                with gr.Row(elem_classes="sizes"):
                    own["n"] = number("Number", min(8, playground.limits.pictures), 1, playground.limits.pictures)
                    if playground.can_be_larger:
                        side = {"step": playground.factor, "low": playground.factor, "high": playground.limits.side}
                        own["height"] = number(f"Height (≤ {side['high']})", playground.size[0], **side)
                        own["width"] = number(f"Width (≤ {side['high']})", playground.size[1], **side)
                common = self._common_settings()
                run = gr.Button("Sample", variant="primary")
            with gr.Column(scale=2, min_width=320):
                shown = result_gallery("Samples", "samples")
                command = gr.Textbox(
                    label="The same pictures by a command", interactive=False, buttons=["copy"], elem_id="command"
                )
        settings = Settings(own | common)

        def sample(*given: Any, progress: gr.Progress = gr.Progress()) -> tuple[list[tuple[str, str]], str]:  # noqa: B008
            values = settings.values(given)
            trained = dict(zip(("height", "width"), playground.size, strict=True))
            sides = [values.pop(name, side) for name, side in trained.items()]
            # What the prior would do anyway need not stand in the command.
            values["size"] = None if tuple(sides) == playground.size else sides
            if values.get("guidance") == playground.guidance:
                del values["guidance"]
            made = playground.sample(values, progress)
            captions = made.classes or [""] * len(made.pictures)
            return self._files(made.pictures, captions), made.command

        self._on(run, sample, list(settings.named.values()), [shown, command])

    def _complete_tab(self) -> None:
        playground = self._playground
        chosen: gr.State = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                offered, upload = self._choice()
                painter = gr.HTML(
                    "", html_template=TEMPLATE, js_on_load=SCRIPT, container=True, padding=True, elem_id="painter"
                )
                mask = as_given(gr.Textbox(visible=False))
                own: dict[str, gr.components.Component] = {"class": self._class_choice("the picture's own, or none")}
                own["variants"] = number(
                    "Completions", min(4, playground.limits.pictures), 1, playground.limits.pictures
                )
                own["paste"] = as_given(gr.Checkbox(True, label="Leave all other pixels as they are"))
                settings = Settings(own | self._common_settings())
                run = gr.Button("Complete", variant="primary")
            with gr.Column(scale=2, min_width=320):
                shown = result_gallery("Original, what is kept, completions", "completions")

        def complete(
            picture: Chosen | None,
            mask: Any,
            *given: Any,
            progress: gr.Progress = gr.Progress(),  # noqa: B008
        ) -> list[tuple[str, str]]:
            values = settings.values(given)
            kept, made = playground.complete(picture, painted(mask, playground.size), values, progress)
            assert picture is not None
            captions = ["original", "kept", *(f"completion {place}" for place in range(1, len(made) + 1))]
            return self._files([picture.picture, kept, *made], captions)

        self._on(run, complete, [chosen, mask, *settings.named.values()], [shown], js=READ)
        self._on_choice(offered, upload, chosen, painter)

    def _grow_tab(self) -> None:
        playground = self._playground
        chosen: gr.State = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                offered, upload = self._choice()
                preview = gr.HTML("", html_template=PREVIEW, elem_classes="preview", container=True, padding=True)
                own: dict[str, gr.components.Component] = {}
                most = playground.limits.side - min(playground.size)
                gr.HTML(f"<p>Pixels to add on each side, in multiples of {playground.factor}:</p>", padding=False)
                with gr.Row():
                    for name in ("up", "down", "left", "right"):
                        start = playground.factor * 2 if name == "right" else 0
                        own[name] = number(name.capitalize(), min(start, most), 0, most, playground.factor)
                own["class"] = self._class_choice("the picture's own, or none")
                own["variants"] = number("Results", min(2, playground.limits.pictures), 1, playground.limits.pictures)
                own["paste"] = as_given(gr.Checkbox(True, label="Leave the picture's own pixels as they are"))
                settings = Settings(own | self._common_settings())
                run = gr.Button("Grow", variant="primary")
            with gr.Column(scale=2, min_width=320):
                shown = result_gallery("Original, and grown", "grown")

        def grow(picture: Chosen | None, *given: Any, progress: gr.Progress = gr.Progress()) -> list[tuple[str, str]]:  # noqa: B008
            values = settings.values(given)
            values["grow"] = {name: values.pop(name) for name in ("up", "down", "left", "right") if name in values}
            placed, made = playground.grow(picture, values, progress)
            captions = ["original in its place", *(f"grown {place}" for place in range(1, len(made) + 1))]
            return self._files([placed, *made], captions)

        self._on(run, grow, [chosen, *settings.named.values()], [shown])
        self._on_choice(offered, upload, chosen, preview)

    def _common_settings(self) -> dict[str, gr.components.Component]:
        """The seed, and how codes are chosen."""
        found: dict[str, gr.components.Component] = {}
        with gr.Row(elem_classes="seed"):
            found["seed"] = number("Seed", 0, -(2**53), 2**53)
            again = gr.Button("New seed", min_width=100)
        again.click(None, None, found["seed"], js=NEW_SEED, api_visibility="private")
        with gr.Accordion("How codes are drawn", open=False):
            found["temperature"] = slider("Temperature", 1.0, 2.0, 0.05)
            if self._playground.can_guide:
                found["guidance"] = slider("Guidance", self._playground.guidance, 10.0, 0.25)
            for name in facts_of(SamplingConfig, Filter):
                codes = self._playground.prior.model.shape.V
                found[name] = filter_control(name, SamplingConfig.model_fields[name], codes)
        return found

    def _class_choice(self, otherwise: str) -> gr.components.Component:
        """The prior's classes, the first choice being none of them."""
        names = self._playground.prior.classes
        choices = [(otherwise, ""), *((name, name) for name in names)]
        return as_given(gr.Dropdown(choices, value="", label="Class", visible=bool(names), filterable=len(names) > 12))

    def _choice(self) -> tuple[gr.Gallery, gr.UploadButton]:
        """Validation pictures to click on, and a button for a picture of one's own."""
        pictures = [each.picture for each in self._offered]
        shown = gr.Gallery(
            self._files(pictures, [self._name(each) for each in self._offered], lasting=True),
            label="Validation pictures: choose one",
            columns=6,
            height="auto",
            allow_preview=False,
            object_fit="contain",
            buttons=[],
            interactive=False,
            visible=bool(pictures),
            elem_classes="pixels choice",
        )
        if self._missing:
            gr.HTML(f"<p>Its validation pictures are not here: {html.escape(self._missing)}</p>")
        return shown, upload_button()

    def _name(self, chosen: Chosen) -> str:
        """What a picture is called by who cannot see it."""
        return chosen.name if chosen.label is None else f"{chosen.name}, {self._playground.prior.classes[chosen.label]}"

    def _on_choice(
        self, offered: gr.Gallery, upload: gr.UploadButton, chosen: gr.State, shown: gr.components.Component
    ) -> None:
        def pick(event: gr.EventData) -> tuple[Chosen, str]:
            index = index_of(event)
            if not isinstance(index, int) or not 0 <= index < len(self._offered):
                raise ConfigError("there is no such validation picture")
            return self._offered[index], data_url(self._offered[index].picture)

        def take(path: Any) -> tuple[Chosen, str]:
            if not is_inside(path, self._folder) or not Path(path).is_file():
                raise ConfigError("nothing was uploaded")
            given = self._playground.uploaded(Path(path), Path(path).name)
            return given, data_url(given.picture)

        self._on(offered, pick, None, [chosen, shown], "select")
        self._on(upload, take, [upload], [chosen, shown], "upload")

    def _on(
        self,
        component: Any,
        function: Callable[..., Any],
        inputs: list[Any] | None,
        outputs: list[Any],
        event: str = "click",
        js: str | None = None,
    ) -> None:
        """Call a function, one at a time on the whole page; its UserErrors are shown as messages."""

        @wraps(function)
        def guarded(*given: Any, **named: Any) -> Any:
            try:
                return function(*given, **named)
            except UserError as error:
                raise gr.Error(html.escape(said(error)), print_exception=False) from None

        getattr(component, event)(
            guarded, inputs, outputs, js=js, concurrency_limit=1, concurrency_id="model", api_visibility="private"
        )

    def _files(
        self, pictures: Sequence[ImageArray] | NDArray[np.uint8], captions: Sequence[str], lasting: bool = False
    ) -> list[tuple[str, str]]:
        """The pictures as PNG files that the page may show, each with its caption. Those of old requests go."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        if not lasting:
            self._results.append(folder)
            while len(self._results) > KEPT_RESULTS:
                shutil.rmtree(self._results.popleft(), ignore_errors=True)
        found = []
        for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            path = folder / f"{index:06d}.png"
            save_png(path, picture)
            found.append((str(path), caption))
        return found
