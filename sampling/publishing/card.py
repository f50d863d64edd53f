"""The model card: README.md of a published folder, with facts that are read from the run and its weights.

    run, weights, evaluations -> model_card -> README.md: front matter for the Hub, use, facts, metrics, data, licence

Only values of exactly the published weights are shown: the log's validation at their step, and evaluations that name
their fingerprint. Nothing in the card names a folder of this machine.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from sampling.publishing.source import Source, published_command, published_data
from sampling.report_outputs import read_json
from sampling.sampler import Sampler
from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.config.yaml_and_json import dump_yaml
from stage1_tokenizer.data.record import DataRecord
from stage1_tokenizer.diagnostics.report.markup import format_number
from stage1_tokenizer.diagnostics.report.run_folder import RunFolder, find_training
from stage1_tokenizer.diagnostics.report.run_sections import describe_classes, describe_data
from stage1_tokenizer.diagnostics.report.tokenizer import TOKENIZER_METRICS
from stage1_tokenizer.engine.errors import ConfigError
from stage2_prior.prior import PRIOR_FILE, TOKENIZER_SOURCE, count_parameters
from stage2_prior.report import PRIOR_METRICS

CARD = "README.md"
LIBRARY = "tessera-images"
HUB_LICENCES = frozenset(
    {
        "afl-3.0", "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0",
        "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-4.0", "creativeml-openrail-m", "gpl-2.0",
        "gpl-3.0", "isc", "lgpl-3.0", "mit", "mpl-2.0", "openrail", "openrail++", "unlicense", "wtfpl", "zlib",
    }
)  # fmt: skip
"""Licences that the Hub knows by these names; in a card's front matter another one is `other`, with its own name."""
MOST_EVALUATIONS = 5
LONGEST_CELL = 300


class Written(NamedTuple):
    """The content of a published folder, for its card."""

    target: str
    """The name by which others load it: hf:OWNER/NAME, or the folder's name."""
    licence: str
    images: Mapping[str, str]
    """Caption of each image file in the folder."""
    fingerprint: str
    """Fingerprint of the tokenizer in the folder."""
    rounding: str = ""
    """Sentence on the change by rounding to bfloat16; empty: the weights are not rounded."""
    diffusers_class: str | None = None
    """Class of diffusers that loads the folder; None: diffusers does not."""
    exported: Sequence[str] | None = None
    """Files that run without this package (sampling/exporting/); None: the folder has weights of ours."""

    @property
    def library(self) -> str:
        """Name of the library that loads the folder, as the Hub lists it."""
        if self.exported:
            return "onnx" if self.exported[0].endswith(".onnx") else "pytorch"
        return "diffusers" if self.diffusers_class else LIBRARY


def model_card(source: Source, written: Written) -> bytes:
    """Return the text of README.md."""
    title = written.target.rpartition("/")[2]
    lines = [front_matter(source, written), f"# {title}", "", summary(source), ""]
    for name, caption in written.images.items():
        lines += [f"![{_plain(caption)}]({name})", "", f"*{_plain(caption)}*", ""]
    lines += ["## Use", "", *_use(source, written), "", "## Facts", "", *_table(["", ""], facts(source, written)), ""]
    lines += [
        "## Metrics",
        "",
        *_rounding(source, written),
        *metrics(source),
        "",
        "## Training",
        "",
        *_training(source),
        "",
    ]
    lines += ["## Licence", "", f"{_plain(written.licence)}, as the publisher of these weights states it."]
    for kind, entries in source.origins.items():
        licence = _plain(entries.get("licence", "unknown"))
        lines.append(f"The {kind} was imported; the licence of its source: {licence}.")
    lines.append("")
    return "\n".join(lines).encode()


def front_matter(source: Source, written: Written) -> str:
    """Return the block that the Hub reads: licence, library, tags."""
    known = written.licence.lower() in HUB_LICENCES
    config = source.tokenizer.tokenizer.config
    can_sample = source.prior is not None or config.bottleneck.kind == "kl"
    kinds = [config.bottleneck.kind, *([prior_kind(source)] if source.prior else [])]
    tree = {
        "license": written.licence.lower() if known else "other",
        **({} if known else {"license_name": written.licence}),
        "library_name": written.library,
        **({"pipeline_tag": "unconditional-image-generation"} if can_sample else {}),
        "tags": ["tessera", "image-tokenizer", *kinds],
    }
    return dump_yaml(tree).decode().removesuffix("...\n") + "---\n"


def prior_kind(source: Source) -> str:
    """Return the kind of a run's prior."""
    assert source.prior is not None
    return str(source.prior.model.config.tree()["kind"])


def summary(source: Source) -> str:
    """Return the first sentences of the card."""
    config, prior = source.tokenizer.tokenizer.config, source.prior
    (height, width), colours = config.image_size, "grey" if config.image_channels == 1 else "colour"
    images = f"{colours} images of {height}x{width} pixels"
    if prior is None:
        return f"An image tokenizer (bottleneck `{config.bottleneck.kind}`) for {images}: {latent(source)}."
    classes = f" of {len(prior.classes):,} classes" if prior.classes else ""
    return (
        f"A prior (`{prior_kind(source)}`) that samples {images}{classes}, with its image tokenizer (bottleneck "
        f"`{config.bottleneck.kind}`): {latent(source)}."
    )


def latent(source: Source) -> str:
    """Return the latent of one image in words."""
    tokenizer = source.tokenizer.tokenizer
    try:
        return f"an image is {tokenizer.shape.in_words}"
    except ConfigError:
        (height, width), factor = tokenizer.config.image_size, tokenizer.config.network.factor
        return f"an image is a continuous latent of {height // factor}x{width // factor} positions"


def facts(source: Source, written: Written) -> Iterator[tuple[str, str]]:
    """Yield names and values that describe the weights."""
    tokenizer, prior = source.tokenizer, source.prior
    if prior is not None:
        yield "Parameters of the prior", f"{count_parameters(prior.model):,}"
        yield "Step of the prior", f"{prior.step:,}"
        yield "Classes", describe_classes(prior.classes) if prior.classes else "none"
        if TOKENIZER_SOURCE in source.headers[PRIOR_FILE]:
            yield "Tokenizer from", source.headers[PRIOR_FILE][TOKENIZER_SOURCE]
    yield "Network", f"{tokenizer.tokenizer.config.network.kind}, factor {tokenizer.tokenizer.config.network.factor}"
    yield "Parameters of the tokenizer", f"{count_parameters(tokenizer.tokenizer):,}"
    yield "Step of the tokenizer", f"{tokenizer.step:,}"
    yield "Fingerprint of the tokenizer", written.fingerprint
    for kind, entries in source.origins.items():
        yield from ((f"Imported {kind}, {key}", text) for key, text in entries.items())


def _rounding(source: Source, written: Written) -> Iterator[str]:
    """Yield the lines on rounded weights."""
    if written.rounding:
        rounded = "Prior and decoder are" if source.prior else "The decoder is"
        yield f"{rounded} stored as bfloat16, encoder and bottleneck as float32, so all codes are the same."
        yield f"{written.rounding} The metrics below are from before."
        yield ""


def metrics(source: Source) -> Iterator[str]:
    """Yield the lines on the metrics of these weights, from the run's log and its evaluations."""
    infos, step = PRIOR_METRICS if source.prior else TOKENIZER_METRICS, source.loaded.step
    rows = []
    for name, info in infos.items():
        curve = source.run.curves.get(name)
        value = dict(zip(curve.steps, curve.values, strict=True)).get(step) if curve else None
        if value is not None:
            better = f"{info.better} is better" if info.better else ""
            rows.append((info.label, info.format(value), better, info.meaning))
    if rows:
        yield f"On the validation split, at step {step:,} of the training:"
        yield ""
        yield from _table(["metric", "value", "", "meaning"], rows)
    evaluations = list(find_evaluations(source))
    for tree in evaluations[:MOST_EVALUATIONS]:
        yield ""
        yield from _evaluation(tree)
    if not rows and not evaluations:
        yield "None: the log has no validation of these weights, and there was no evaluation (`sampling/evaluate.py`)."


def find_evaluations(source: Source) -> Iterator[Tree]:
    """Yield the results in the run's folder that were measured with these weights, the newest first."""
    if source.prior is None:
        subject, key, expected = "tokenizer", "fingerprint", source.tokenizer.fingerprint
    else:
        subject, key, expected = "prior", "weights", str(Sampler(source.prior).settings()["weights"])
    folder = source.run.path / "evaluation"
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        tree = read_json(path)
        protocol = tree.get("protocol") if isinstance(tree, dict) else None
        measured = protocol.get(subject) if isinstance(protocol, dict) else None
        if isinstance(tree, dict) and isinstance(measured, dict) and measured.get(key) == expected:
            yield tree


def _evaluation(tree: Tree) -> Iterator[str]:
    """Yield the lines on one evaluation: a table, its warnings, and its protocol in short."""
    yield f"By `sampling/evaluate.py`, {_protocol(tree['protocol'])}:"
    yield ""
    rows = []
    for entry in tree.get("figures") or []:
        if isinstance(entry, dict) and isinstance(entry.get("value"), int | float):
            low, high = entry.get("low"), entry.get("high")
            ends = [format_number(end) for end in (low, high) if isinstance(end, int | float)]
            interval = " to ".join(ends) if len(ends) == 2 else ""
            value = f"{format_number(entry['value'])} {entry.get('unit') or ''}".rstrip()
            better = f"{entry['better']} is better" if entry.get("better") else ""
            rows.append((str(entry.get("label") or entry.get("name")), value, interval, better))
    yield from _table(["metric", "value", "95 % interval", ""], rows)
    for warning in tree.get("warnings") or []:
        yield ""
        yield f"> {_plain(str(warning))}"


def _protocol(protocol: Tree) -> str:
    """Return the facts of a protocol without which its metrics mean nothing, and none that names a folder."""
    reference = protocol.get("reference")
    data = reference.get("data") if isinstance(reference, dict) else None
    against = [str(data[key]) for key in ("kind", "split") if key in data] if isinstance(data, dict) else []
    measured = str(protocol.get("samples") or protocol.get("pictures") or "images").partition(" in ")[0]
    words = [measured, f"compared with {' '.join(against)}" if against else ""]
    words += [f"{key} {protocol[key]}" for key in ("extractor", "resize", "LPIPS") if key in protocol]
    return _plain("; ".join(filter(None, words)))


def _training(source: Source) -> Iterator[str]:
    """Yield the lines on the data and the command of the training."""
    if ("prior" if source.prior else "tokenizer") in source.origins:
        yield "None here: the weights are those of the imported file."
        return
    data = published_data(source.loaded.data)
    yield f"Data: {_plain(describe_data(data))}."
    record = DataRecord.saved_in(source.run.path)
    root = str(source.loaded.data.get("root") or "")
    for line in record.found[:2] if record else []:
        yield f"- {_plain(line.replace(root, str(data.get('root'))) if root else line)}"
    yield ""
    tokenizer_run = find_training(source.tokenizer.path) if source.prior else None
    for run in filter(None, (tokenizer_run, source.run)):
        yield from _session(run)
    if source.run.config:
        yield ""
        yield "All settings: [config.yaml](config.yaml)."


def _session(run: RunFolder) -> Iterator[str]:
    """Yield the command of a training, its machine, and the seconds that its steps took."""
    first = run.sessions[0] if run.sessions else {}
    words = first.get("command")
    if not (isinstance(words, list) and words):
        yield f"The command of the training of {_plain(run.weights_name)} is not recorded."
        return
    yield from ("```", shlex.join(published_command(words)), "```", "")
    seconds = run.seconds_of_steps
    machine = ", ".join(str(first[key]) for key in ("processor", "device", "precision") if key in first)
    yield _plain(f"{machine}{f'; {seconds:,.0f} seconds without validation and saving' if seconds else ''}")
    yield ""


def _use(source: Source, written: Written) -> Iterator[str]:
    """Yield the lines on the use of the folder."""
    name = written.target
    if written.exported:
        yield from _use_of_exported(written.library)
        return
    if written.diffusers_class:
        path = name.removeprefix("hf:")
        yield from (
            "```python", "import diffusers", "",
            f'model = diffusers.{written.diffusers_class}.from_pretrained("{path}")',
            "reconstruction = model(images).sample    # images (B, C, H, W) in [-1, 1]", "```",
        )  # fmt: skip
        return
    if source.prior is not None:
        yield from ("```", f"python sampling/generate.py --prior {shlex.quote(name)}", "```", "")
        code = ("from sampling.sampler import Sampler", "", f'images = Sampler.load("{name}").sample(16, seed=0)')
        yield from ("```python", f"{code[0]}", "", f"{code[2]}  # uint8 (16, H, W, C)", "```")
        return
    sample = source.tokenizer.tokenizer.config.bottleneck.kind == "kl"
    commands = ["sampling/generate.py"] if sample else ["stage2_prior/train.py"]
    yield "```"
    for command in ["sampling/reconstruct.py", *commands]:
        yield f"python {command} --tokenizer {shlex.quote(name)}"
    yield "```"


def _use_of_exported(library: str) -> Iterator[str]:
    """Yield the lines on the use of exported files. `export.json` has the names and shapes of the arrays."""
    if library == "onnx":
        code = [
            "import onnxruntime",
            "",
            'encoder, decoder = (onnxruntime.InferenceSession(f"{half}.onnx") for half in ("encoder", "decoder"))',
            "(codes,) = encoder.run(None, {encoder.get_inputs()[0].name: images})  # images (B, C, H, W) in [-1, 1]",
            "(images,) = decoder.run(None, {decoder.get_inputs()[0].name: codes})",
        ]
    else:
        code = [
            "import torch",
            "",
            'encoder, decoder = (torch.export.load(f"{half}.pt2").module() for half in ("encoder", "decoder"))',
            "codes = encoder(images)  # images (B, C, H, W) in [-1, 1]",
            "images = decoder(codes)",
        ]
    yield from ("```python", *code, "```", "", "[export.json](export.json) has the names, shapes and ranges.")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(_plain(cell) for cell in row)} |"


def _plain(text: str) -> str:
    """Return a text in one line in which Markdown and HTML have no meaning."""
    text = " ".join(text.split())[:LONGEST_CELL]
    for character in "\\`*_|<>[]":
        text = text.replace(character, f"\\{character}")
    return text
