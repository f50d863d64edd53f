"""The page in the browser: three tabs, each with its controls on the left and its results on the right."""

import html
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray

from sampling.choose import Filter
from sampling.option_facts import facts_of_kind
from sampling.playground.controls import (
    ADD_LABELS,
    COMMAND_LABEL,
    Settings,
    filter_control,
    index_of,
    number,
    result_gallery,
    slider,
    upload_button,
    without_checks,
)
from sampling.playground.guard import LARGEST_UPLOAD, is_inside
from sampling.playground.painter import SCRIPT, SEND_MASK, TEMPLATE, data_url, decode_mask
from sampling.playground.tasks import Chosen, Playground, one_line_message
from sampling.sampler import SamplingConfig
from sampling.saved_images import save_png
from stage1_tokenizer.data.base import ImageArray
from stage1_tokenizer.engine.errors import ConfigError, UserError

ONE_AT_A_TIME = threading.Lock()
"""Lock of the function that is running; the pages of several priors have it together."""
KEPT_RESULTS = 32
"""Number of requests whose images are kept; those of older requests are deleted."""
STYLE = Path(__file__).with_name("style.css")
NEW_SEED = "() => Math.floor(Math.random() * 2 ** 31)"
PREVIEW = '{{#if value}}<img src="{{value}}" alt="The image to grow">{{else}}<p>Choose or upload an image.</p>{{/if}}'


class Page:
    """The page of a playground. Its images are PNG files in a folder of its own."""

    def __init__(self, playground: Playground, folder: Path, queue: int, links: Mapping[str, str]) -> None:
        """Build the page.

        Args:
            playground: the prior.
            folder: folder for the images.
            queue: number of requests that may wait.
            links: the beginning of the paths of the page of each prior, by the prior's name; its own is among them.
        """
        self._playground, self._folder, self._root = playground, folder, links[playground.name]
        self._results: deque[Path] = deque()
        try:
            self._offered, self._problem = playground.offered(), ""
        except UserError as error:
            self._offered, self._problem = [], one_line_message(error)
        prior = playground.prior
        height, width = playground.size
        about = f"{html.escape(playground.name)}, step {prior.step}, images of {height}x{width} pixels"
        with gr.Blocks(analytics_enabled=False, title="Tessera", delete_cache=(600, 3600)) as self.blocks:
            gr.HTML(f"<h1>Tessera</h1><p>{about}</p>{self._other_pages(links)}", elem_classes="head")
            with gr.Tabs():
                with gr.Tab("Sample"):
                    gr.HTML("<p>Generate new images.</p>", padding=False)
                    self._sample_tab()
                with gr.Tab("Complete"):
                    gr.HTML("<p>Paint over a part of an image, and generate this part again.</p>", padding=False)
                    self._complete_tab()
                if playground.can_be_larger:
                    with gr.Tab("Grow"):
                        gr.HTML("<p>Generate pixels around an image.</p>", padding=False)
                        self._grow_tab()
            self.blocks.load(None, None, None, js=ADD_LABELS, api_visibility="private")
        self.blocks.queue(max_size=queue, default_concurrency_limit=1, api_open=False)

    def app(self) -> FastAPI:
        """Return the web app to serve."""
        fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # none is downloaded
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        mounted: FastAPI = gr.mount_gradio_app(
            app,
            self.blocks,
            path="/",
            root_path=self._root or None,
            footer_links=[],
            run_history=False,
            show_error=False,  # only the errors that the page raises itself are shown
            allowed_paths=[],
            max_file_size=LARGEST_UPLOAD,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=gr.themes.Default(primary_hue="indigo", font=fonts[0], font_mono=fonts[1]),
            css_paths=STYLE,
        )
        # Gradio lets an app read all files until it is launched, and a mounted app is never launched.
        self.blocks.has_launched = True
        return mounted

    def _other_pages(self, links: Mapping[str, str]) -> str:
        """Return links to the pages of the other priors as HTML; empty if there are none."""
        others = [
            f'<a href="{root}/">{html.escape(name)}</a>'
            for name, root in links.items()
            if name != self._playground.name
        ]
        return f'<nav aria-label="Other priors">Other priors: {" ".join(others)}</nav>' if others else ""

    def functions(self) -> dict[int, int]:
        """Return the number of inputs of each function of the page, by the function's number."""
        return {key: len(function.inputs) for key, function in self.blocks.fns.items() if function.fn is not None}

    def _sample_tab(self) -> None:
        playground = self._playground
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                own: dict[str, gr.components.Component] = {"class": self._class_choice("all classes in turn")}
                with gr.Row(elem_classes="sizes"):
                    own["n"] = self._image_count("Number", 8)
                    if playground.can_be_larger:
                        side = {"step": playground.factor, "low": playground.factor, "high": playground.limits.side}
                        own["height"] = number(f"Height (≤ {side['high']})", playground.size[0], **side)
                        own["width"] = number(f"Width (≤ {side['high']})", playground.size[1], **side)
                common = self._common_settings()
                run = gr.Button("Sample", variant="primary")
            with gr.Column(scale=2, min_width=320):
                shown = result_gallery("Samples", "samples")
                command = gr.Textbox(label=COMMAND_LABEL, interactive=False, buttons=["copy"], elem_id="command")
        settings = Settings(own | common)

        def sample(*given: Any, progress: gr.Progress = gr.Progress()) -> tuple[list[tuple[str, str]], str]:  # noqa: B008
            values = settings.values(given)
            trained = dict(zip(("height", "width"), playground.size, strict=True))
            sides = [values.pop(name, side) for name, side in trained.items()]
            values["size"] = None if tuple(sides) == playground.size else sides
            sampled = playground.sample(values, progress)
            captions = sampled.classes or [""] * len(sampled.images)
            return self._files(sampled.images, captions), sampled.command

        self._on(run, sample, list(settings.controls.values()), [shown, command])

    def _complete_tab(self) -> None:
        playground = self._playground
        chosen: gr.State = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                offered, upload = self._image_choice()
                painter = gr.HTML(
                    "", html_template=TEMPLATE, js_on_load=SCRIPT, container=True, padding=True, elem_id="painter"
                )
                mask = without_checks(gr.Textbox(visible=False))
                own: dict[str, gr.components.Component] = {"class": self._class_choice("the image's own, or none")}
                own["variants"] = self._image_count("Completions", 4)
                own["paste"] = without_checks(gr.Checkbox(True, label="Keep unpainted pixels exactly as they are"))
                settings = Settings(own | self._common_settings())
                run = gr.Button("Complete", variant="primary")
            with gr.Column(scale=2, min_width=320):
                shown = result_gallery("Original, kept part, completions", "completions")

        def complete(
            chosen_image: Chosen | None,
            mask: Any,
            *given: Any,
            progress: gr.Progress = gr.Progress(),  # noqa: B008
        ) -> list[tuple[str, str]]:
            values = settings.values(given)
            painted = decode_mask(mask, playground.size)
            kept, completions = playground.complete(chosen_image, painted, values, progress)
            assert chosen_image is not None
            captions = ["original", "kept", *(f"completion {place}" for place in range(1, len(completions) + 1))]
            return self._files([chosen_image.image, kept, *completions], captions)

        self._on(run, complete, [chosen, mask, *settings.controls.values()], [shown], js=SEND_MASK)
        self._on_choice(offered, upload, chosen, painter)

    def _grow_tab(self) -> None:
        playground = self._playground
        chosen: gr.State = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                offered, upload = self._image_choice()
                preview = gr.HTML("", html_template=PREVIEW, elem_classes="preview", container=True, padding=True)
                own: dict[str, gr.components.Component] = {}
                most = playground.limits.side - min(playground.size)
                gr.HTML(f"<p>Pixels to add on each side, in multiples of {playground.factor}:</p>", padding=False)
                with gr.Row():
                    for name in ("up", "down", "left", "right"):
                        start = playground.factor * 2 if name == "right" else 0
                        own[name] = number(name.capitalize(), min(start, most), 0, most, playground.factor)
                own["class"] = self._class_choice("the image's own, or none")
                own["variants"] = self._image_count("Results", 2)
                own["paste"] = without_checks(
                    gr.Checkbox(True, label="Keep the image's own pixels exactly as they are")
                )
                settings = Settings(own | self._common_settings())
                run = gr.Button("Grow", variant="primary")
            with gr.Column(scale=2, min_width=320):
                shown = result_gallery("Original in its place, results", "grown")

        def grow(
            chosen_image: Chosen | None,
            *given: Any,
            progress: gr.Progress = gr.Progress(),  # noqa: B008
        ) -> list[tuple[str, str]]:
            values = settings.values(given)
            values["grow"] = {name: values.pop(name) for name in ("up", "down", "left", "right") if name in values}
            original, results = playground.grow(chosen_image, values, progress)
            captions = ["original in its place", *(f"result {place}" for place in range(1, len(results) + 1))]
            return self._files([original, *results], captions)

        self._on(run, grow, [chosen, *settings.controls.values()], [shown])
        self._on_choice(offered, upload, chosen, preview)

    def _common_settings(self) -> dict[str, gr.components.Component]:
        """Add the controls that all tabs have: the seed, and the options that decide how codes are drawn."""
        controls: dict[str, gr.components.Component] = {}
        defaults = self._playground.defaults
        with gr.Row(elem_classes="seed"):
            controls["seed"] = number("Seed", 0, -(2**53), 2**53)
            new_seed = gr.Button("New seed", min_width=100)
        new_seed.click(None, None, controls["seed"], js=NEW_SEED, api_visibility="private")
        with gr.Accordion("Temperature, guidance, filters", open=False):
            controls["temperature"] = slider("Temperature", defaults["temperature"], 2.0, 0.05)
            if self._playground.can_guide:
                controls["guidance"] = slider("Guidance", defaults["guidance"], 10.0, 0.25)
            for name in facts_of_kind(SamplingConfig, Filter):
                codebook_size = self._playground.prior.model.shape.V
                controls[name] = filter_control(name, SamplingConfig.model_fields[name], defaults[name], codebook_size)
        return controls

    def _image_count(self, label: str, default: int) -> gr.components.Component:
        """Return a field for the number of images to make."""
        most = self._playground.limits.images
        return number(label, min(default, most), 1, most)

    def _class_choice(self, default: str) -> gr.components.Component:
        """Return a list of the prior's classes; `default` is the text of the first entry, which is no class."""
        names = self._playground.prior.classes
        choices = [(default, ""), *((name, name) for name in names)]
        return without_checks(
            gr.Dropdown(choices, value="", label="Class", visible=bool(names), filterable=len(names) > 12)
        )

    def _image_choice(self) -> tuple[gr.Gallery, gr.UploadButton]:
        """Return a gallery of validation images to choose from, and a button to upload an image."""
        gallery = gr.Gallery(
            self._files([one.image for one in self._offered], [self._caption(one) for one in self._offered], True),
            label="Validation images: choose one",
            columns=6,
            height="auto",
            allow_preview=False,
            object_fit="contain",
            buttons=[],
            interactive=False,
            visible=bool(self._offered),
            elem_classes="pixels choice",
        )
        if self._problem:
            gr.HTML(f"<p>The validation images cannot be read: {html.escape(self._problem)}</p>")
        return gallery, upload_button()

    def _caption(self, chosen: Chosen) -> str:
        """Return the name of an image for screen readers, with its class."""
        return chosen.name if chosen.label is None else f"{chosen.name}, {self._playground.prior.classes[chosen.label]}"

    def _on_choice(
        self, offered: gr.Gallery, upload: gr.UploadButton, chosen: gr.State, shown: gr.components.Component
    ) -> None:
        """Put a selected or uploaded image into `chosen`, and show it."""

        def select(event: gr.EventData) -> tuple[Chosen, str]:
            index = index_of(event)
            if not isinstance(index, int) or not 0 <= index < len(self._offered):
                raise ConfigError("there is no such validation image")
            return self._offered[index], data_url(self._offered[index].image)

        def upload_image(path: Any) -> tuple[Chosen, str]:
            if not is_inside(path, self._folder) or not Path(path).is_file():
                raise ConfigError("nothing was uploaded")
            uploaded = self._playground.uploaded(Path(path), Path(path).name)
            return uploaded, data_url(uploaded.image)

        self._on(offered, select, None, [chosen, shown], "select")
        self._on(upload, upload_image, [upload], [chosen, shown], "upload")

    def _on(
        self,
        component: Any,
        function: Callable[..., Any],
        inputs: list[Any] | None,
        outputs: list[Any],
        event: str = "click",
        js: str | None = None,
    ) -> None:
        """Call a function at an event, one function at a time. The page shows its UserErrors as messages."""

        @wraps(function)
        def guarded(*given: Any, **named: Any) -> Any:
            try:
                with ONE_AT_A_TIME:
                    return function(*given, **named)
            except UserError as error:
                raise gr.Error(html.escape(one_line_message(error)), print_exception=False) from None

        getattr(component, event)(
            guarded, inputs, outputs, js=js, concurrency_limit=1, concurrency_id="model", api_visibility="private"
        )

    def _files(
        self, images: Sequence[ImageArray] | NDArray[np.uint8], captions: Sequence[str], is_permanent: bool = False
    ) -> list[tuple[str, str]]:
        """Write the images as PNG files; return the path and the caption of each. Deletes the files of old requests."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        if not is_permanent:
            self._results.append(folder)
            while len(self._results) > KEPT_RESULTS:
                shutil.rmtree(self._results.popleft(), ignore_errors=True)
        files = []
        for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
            path = folder / f"{index:06d}.png"
            save_png(path, image)
            files.append((str(path), caption))
        return files
