"""The parts that the page is made of, and what arrives from them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import gradio as gr
from annotated_types import Le
from pydantic.fields import FieldInfo

ComponentT = TypeVar("ComponentT", bound=gr.components.Component)


class Settings(NamedTuple):
    """The controls of a tab, by the names of the options that they set."""

    named: dict[str, gr.components.Component]

    def values(self, given: Sequence[Any]) -> dict[str, Any]:
        """What arrived from the controls, in their order; what is left empty is left to its default."""
        return {key: value for key, value in zip(self.named, given, strict=False) if value not in (None, "")}


NAMES = """() => {
  const name = () => {
    for (const image of document.querySelectorAll('.choice button img[alt]')) {
      if (image.alt) image.closest('button').ariaLabel = image.alt;
    }
    for (const field of document.querySelectorAll('#command textarea, #command input')) {
      Object.assign(field, { disabled: false, readOnly: true, ariaLabel: 'The same pictures by a command' });
    }
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}"""
"""Run in the browser: what Gradio leaves without a name gets one, and the command can be focused."""


def upload_button() -> gr.UploadButton:
    """A button for a picture of one's own; the path is passed on, or None where none of the kind arrived."""
    button = gr.UploadButton("Upload a picture", file_types=["image"], size="sm", variant="secondary")
    button.data_model = None  # it would stumble over what is no file at all
    button.preprocess = lambda payload: payload.get("path") if isinstance(payload, dict) else None  # type: ignore[method-assign]
    return button


def index_of(event: gr.EventData) -> Any:
    """Which picture was selected; anything, or nothing, may have been sent as an event."""
    try:
        return event.index
    except (AttributeError, TypeError):
        return None


def as_given(component: ComponentT) -> ComponentT:
    """What arrives from it is passed on: Gradio's own checks know less, and stumble over what is no number at all.
    Lists and objects are refused without being shown: a file that they name may have become one of Gradio's."""

    def passed(payload: Any) -> Any:
        if isinstance(payload, list | dict):
            raise gr.Error(f"{component.label}: is no single value", print_exception=False)
        return payload

    component.preprocess = passed  # type: ignore[method-assign]
    return component


def number(label: str, value: int, low: int, high: int, step: int = 1) -> gr.components.Component:
    return as_given(gr.Number(value, label=label, minimum=low, maximum=high, step=step, min_width=80))


def slider(label: str, value: float, high: float, step: float) -> gr.components.Component:
    return as_given(gr.Slider(0.0, high, value, step=step, label=label))


def filter_control(name: str, field: FieldInfo, codes: int) -> gr.components.Component:
    """The control of an option that filters codes, by the option's type; `codes` is the number that there are."""
    label = name.replace("_", "-").capitalize()
    if field.annotation is bool:
        return as_given(gr.Checkbox(field.default, label=label))
    if field.annotation is float:
        bounds = [fact.le for fact in field.metadata if isinstance(fact, Le)]
        return slider(label, field.default, float(str(bounds[0])) if bounds else 1.0, 0.01)
    return number(f"{label} (0: all codes)", field.default or 0, 0, codes)


def result_gallery(label: str, name: str) -> gr.Gallery:
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
