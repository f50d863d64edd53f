"""The controls of the page, and the values that arrive from them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import gradio as gr
from annotated_types import Le
from pydantic.fields import FieldInfo

ComponentT = TypeVar("ComponentT", bound=gr.components.Component)

COMMAND_LABEL = "Command that makes the same images"
ADD_LABELS = """() => {
  const addLabels = () => {
    for (const image of document.querySelectorAll('.choice button img[alt]')) {
      if (image.alt) image.closest('button').ariaLabel = image.alt;
    }
    for (const field of document.querySelectorAll('#command textarea, #command input')) {
      Object.assign(field, { disabled: false, readOnly: true, ariaLabel: 'COMMAND_LABEL' });
    }
  };
  new MutationObserver(addLabels).observe(document.body, { childList: true, subtree: true });
  addLabels();
}""".replace("COMMAND_LABEL", COMMAND_LABEL)
"""Script for the browser: adds the labels for screen readers that Gradio leaves out, and lets the keyboard reach the
command."""


class Settings(NamedTuple):
    """The controls of a tab by the names of the options that they set."""

    controls: dict[str, gr.components.Component]

    def values(self, given: Sequence[Any]) -> dict[str, Any]:
        """Return the given values by option name; an empty control is left out, so that its option has its default."""
        return {key: value for key, value in zip(self.controls, given, strict=False) if value not in (None, "")}


def upload_button() -> gr.UploadButton:
    """Return a button for uploading an image. It passes on the file's path, or None if the request holds no file."""
    button = gr.UploadButton("Upload an image", file_types=["image"], size="sm", variant="secondary")
    button.data_model = None  # Gradio's own check raises an internal error on a value that is no file
    button.preprocess = lambda payload: payload.get("path") if isinstance(payload, dict) else None  # type: ignore[method-assign]
    return button


def index_of(event: gr.EventData) -> Any:
    """Return the index of the selected image, as it was sent: any value, or None."""
    try:
        return event.index
    except (AttributeError, TypeError):
        return None


def without_checks(component: ComponentT) -> ComponentT:
    """Return the component without Gradio's own checks, which raise internal errors on unexpected types; `tasks.py`
    checks the values. Lists and objects are refused and not shown, because Gradio turns a file path in them into one of
    its own files."""

    def preprocess(payload: Any) -> Any:
        if isinstance(payload, list | dict):
            raise gr.Error(f"{component.label}: must be a single value", print_exception=False)
        return payload

    component.preprocess = preprocess  # type: ignore[method-assign]
    return component


def number(label: str, value: int, low: int, high: int, step: int = 1) -> gr.components.Component:
    """Return a field for an integer."""
    return without_checks(gr.Number(value, label=label, minimum=low, maximum=high, step=step, min_width=80))


def slider(label: str, value: float, high: float, step: float) -> gr.components.Component:
    """Return a slider from 0 to `high`."""
    return without_checks(gr.Slider(0.0, high, value, step=step, label=label))


def filter_control(name: str, field: FieldInfo, default: Any, codebook_size: int) -> gr.components.Component:
    """Return the control for an option that filters codes; the option's type decides which kind of control."""
    label = name.replace("_", "-").capitalize()
    if field.annotation is bool:
        return without_checks(gr.Checkbox(default, label=label))
    if field.annotation is float:
        limits = [constraint.le for constraint in field.metadata if isinstance(constraint, Le)]
        return slider(label, default, float(str(limits[0])) if limits else 1.0, 0.01)
    return number(f"{label} (0: all codes)", default or 0, 0, codebook_size)


def result_gallery(label: str, name: str) -> gr.Gallery:
    """Return a gallery for results, with buttons to download them."""
    return gr.Gallery(
        label=label,
        columns=4,
        height="auto",
        object_fit="contain",
        buttons=["download", "download_all", "fullscreen"],
        interactive=False,
        elem_id=name,
        elem_classes="pixels",
    )
