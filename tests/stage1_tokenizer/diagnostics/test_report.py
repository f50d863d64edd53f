"""The report page: its metrics are those of the log, foreign text is escaped, and its size is bounded."""

import base64
import hashlib
import json
import os
import re
import shlex
import signal
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.bottlenecks.rvq import RvqConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.diagnostics.report.charts import Chart, Series, chart_html, linear_ticks, log_ticks, thin_curve
from stage1_tokenizer.diagnostics.report.markup import data_block, format_number, format_percent, tag
from stage1_tokenizer.diagnostics.report.run_folder import open_run
from stage1_tokenizer.diagnostics.report.tokenizer import tokenizer_page
from stage1_tokenizer.diagnostics.views.failures import rank_correlation
from stage1_tokenizer.engine.errors import InterruptionError
from stage1_tokenizer.engine.log_file import Curve, read_log
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.report import prior_page
from tests.helpers.artefacts import write_image_folder, write_tokenizer
from tests.helpers.commands import Ended, names_of, run, run_script
from tests.helpers.processes import run_processes
from tests.helpers.report_runs import LOG, Page, config, outputs, prior_run, tokenizer_run, write_log

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
CPU = torch.device("cpu")


def report(*arguments: object) -> Ended:
    """Run the command."""
    return run(names_of("sampling/report.py")["main"], *arguments)


def page_of(folder: Path, **options: Any) -> Page:
    """Return the page of a tokenizer's run, parsed."""
    return Page(tokenizer_page(open_run(folder), CPU, **options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's run."""
    return tokenizer_run(tmp_path_factory.mktemp("runs") / "shapes_vq")


@pytest.fixture(scope="module")
def written(trained: Path) -> str:
    """The page of that run."""
    return tokenizer_page(open_run(trained), CPU)


def test_the_metrics_are_those_of_the_log(written: str) -> None:
    """The values of the last validation, and the best value where it was another one."""
    page = Page(written)
    last = {name: value for entry in LOG for name, value in entry.items()}
    for label, name in (("PSNR", "psnr"), ("NMSE", "nmse"), ("Bits per image", "bits_per_image")):
        assert float(page.terms[label][0].split()[0]) == pytest.approx(last[f"validation/{name}"], rel=1e-3)
    assert page.terms["Codes in use"][0] == "87.5 %"
    assert page.terms["PSNR"][1] == "best 21.50 dB at step 20"
    assert page.terms["NMSE"][1] == "best 0.0723 at step 20"
    assert page.terms["Steps"] == ["30 of 30"]
    assert page.terms["Steps skipped"][0].startswith("2,")
    assert "half of them are not used: lower bottleneck.codebook_size" in page.text


def test_the_curves_hold_every_point_of_the_log(written: str) -> None:
    """In the data of the readout, in a table and in words."""
    charts = [json.loads(each["data-chart"] or "") for each in Page(written).all("div") if "data-chart" in each]
    series = {(tuple(one["x"]), tuple(one["y"])) for chart in charts for one in chart["series"]}
    assert ((20, 30), (21.5, 20.25)) in series
    assert ((10, 20, 30), (0.9, 0.4, 0.5)) in series
    labels = [each["aria-label"] or "" for each in Page(written).all("svg") if each.get("role") == "img"]
    assert any("training: 0.9000 at 10, 0.5000 at 30" in label or "total: 0.9000 at 10" in label for label in labels)
    assert all(label.count(" at ") >= 2 for label in labels)


def test_the_codes_are_those_of_the_tokenizer(trained: Path, written: str) -> None:
    """In the tables over the images, in the script's data, and in their counts."""
    loaded = LoadedTokenizer.load(trained)
    split = open_data(parse_data_config(loaded.data, "")).image_batches("validation", 0)
    with torch.inference_mode():
        codes = loaded.tokenizer.encode_codes(normalise(split.batch(np.arange(len(split)))[0]))[..., 0]
    found = re.search(r'<script type="application/json" id="tokens-data">(.*?)</script>', written)
    assert found
    data = json.loads(found.group(1))
    assert data["codes"] == codes.flatten(1).tolist()
    counts = torch.bincount(codes.flatten(), minlength=16)
    assert {int(code): uses for code, (uses, _) in data["used"].items()} == {
        code: count for code, count in enumerate(counts.tolist()) if count
    }
    ranks = [rank for _, rank in sorted(data["used"].values(), key=lambda pair: -pair[0])]
    assert sorted(ranks) == list(range(1, len(ranks) + 1))
    shown = [int(number) for number in re.findall(r"<td><span>(\d+)</span></td>", written)]
    assert shown == codes.flatten().tolist()


def test_a_page_loads_nothing_and_runs_only_its_own_script(written: str) -> None:
    """Every address is inside the page, and the policy allows one script, by its hash."""
    page = Page(written)
    for name, attributes in page.tags:
        for key in ("src", "href"):
            if key in attributes:
                assert re.match(r"data:|#", attributes[key] or ""), (name, attributes)
        assert not [key for key in attributes if key.startswith("on")], (name, attributes)
    assert not re.findall(r"url\((?!data:)", written)
    assert not re.findall(r"@import|https?://", written)
    (policy,) = (each["content"] or "" for each in page.all("meta") if "http-equiv" in each)
    assert "default-src 'none'" in policy
    scripts = re.findall(r"<script>(.*?)</script>", written, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1
    assert f"'sha256-{digest}'" in policy


def test_headings_images_and_tables_are_labelled(written: str) -> None:
    """One h1, no skipped level; alternative text for each image; headers for columns and rows; no dead link."""
    page = Page(written)
    levels = [int(name[1]) for name, _ in page.tags if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.all("img")
    assert all(each.get("alt") for each in page.all("img"))
    assert all(each.get("aria-label") for _, each in page.tags if each.get("role") == "img")
    assert all(each.get("scope") in ("col", "row") for each in page.all("th"))
    names = [each["id"] for _, each in page.tags if "id" in each]
    assert len(names) == len(set(names))
    targets = {(each["href"] or "")[1:] for each in page.all("a")}
    assert targets <= {*names}
    assert {"figures", "curves", "reconstructions", "failures", "codes", "atlas", "tokens", "run", "alarms"} <= targets


def test_foreign_text_is_escaped(tmp_path: Path) -> None:
    """Names of classes, runs, alarms and metrics; values of configs, evaluations and settings."""
    folder = tmp_path / NASTY.replace("/", "")
    classes = (NASTY.replace("/", "")[:60], "b")
    write_image_folder(tmp_path / "data", classes, per_class=3)
    data = {"kind": "folder", "root": str(tmp_path / "data"), "image_size": (8, 12), "validation_share": 0.5}
    tokenizer_run(folder, data=data)
    (folder / "config.yaml").write_text(json.dumps(config(config=NASTY, bottleneck={"kind": NASTY})))
    write_log(folder, [{"step": 1, "alarm": NASTY, "message": NASTY}], "alarms.jsonl")
    write_log(folder, [*LOG, {"step": 40, f"train/{NASTY}": 1.0}])
    session = {"step": 0, "command": ["train.py", NASTY], "packages": {NASTY: NASTY}, "device": NASTY}
    write_log(folder, [session], "environment.jsonl")
    outputs(folder, "generated", {"n": NASTY, NASTY: [NASTY]})
    (folder / "evaluation").mkdir()
    entry = {"name": NASTY, "label": NASTY, "value": 1.5, "unit": NASTY, "note": NASTY}
    evaluation = {"figures": [entry], "protocol": {NASTY: NASTY}, "warnings": [NASTY]}
    (folder / "evaluation" / "a.json").write_text(json.dumps(evaluation))
    ended = report(folder, "--out", tmp_path / "page.html")
    assert ended.code == 0, ended.err
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert not [attributes for attributes in page.all("img") if not (attributes["src"] or "").startswith("data:")]
    assert len(page.all("script")) == len(re.findall("<script", text)) == 2
    assert page.text.count("alert(1)") > 10


def test_text_and_attributes_are_escaped_and_control_characters_replaced() -> None:
    """All text passes through this one function."""
    assert tag("p", NASTY, title=NASTY).count("<") == 2
    assert "\x00" not in tag("p", "a\x00b\x1b\ud800")
    tag("p", "a\ud800").encode()
    assert "<" not in data_block("x", {"a": "</script><!--"})[len('<script type="application/json" id="x">') : -9]


INCOMPLETE = {
    "just begun": ("config.yaml", "no validation yet"),
    "no weights": ("config.yaml metrics.jsonl", "holds no tokenizer.safetensors"),
    "weights alone": ("tokenizer.safetensors", "folder holds no config.yaml"),
    "no log": ("config.yaml tokenizer.safetensors", "there are no curves"),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_the_page_of_an_incomplete_run_shows_what_exists(tmp_path: Path, trained: Path, name: str) -> None:
    """A notice names what is missing; the command succeeds."""
    files, sentence = INCOMPLETE[name]
    (tmp_path / "run").mkdir()
    for file in files.split():
        (tmp_path / "run" / file).write_bytes((trained / file).read_bytes())
    ended = report(tmp_path / "run")
    assert ended.code == 0, ended.err
    page = Page((tmp_path / "run/report.html").read_text())
    assert sentence in page.text
    if "metrics.jsonl" in files:
        assert page.terms["PSNR"][0] == "20.25 dB"
    if "tokenizer.safetensors" in files:
        assert page.terms["Weights"][0].startswith("step 7")


DAMAGE = {
    "metrics.jsonl": (b'{"step": 40, "validation/psnr": 99', "20.25 dB"),
    "alarms.jsonl": (b"\xff\xfe[[[\n", "dead codes"),
}


@pytest.mark.parametrize("name", ["reconstructions-00000030.png", "reconstructions-00000010.png"])
def test_one_bad_image_file_leaves_the_others(tmp_path: Path, name: str) -> None:
    """The other saved grids and the new reconstructions are shown."""
    folder = tokenizer_run(tmp_path / "run")
    (folder / "samples" / name).write_bytes(b"\x89PNG")
    page = page_of(folder)
    assert "cannot be read as an image" in page.text
    words = [each["alt"] or "" for each in page.all("img")]
    assert any("after 20 steps" in each for each in words)
    assert any(each.startswith("Reconstruction of it, PSNR") for each in words)


def test_a_broken_link_hides_no_evaluation(tmp_path: Path) -> None:
    """The link is named; the others are shown."""
    folder = prior_run(tmp_path / "prior")
    (folder / "evaluation").mkdir()
    (folder / "evaluation/a.json").write_text('{"figures": [{"value": 1.25, "label": "good one"}]}')
    (folder / "evaluation/b.json").symlink_to(tmp_path / "gone.json")
    assert report(folder).code == 0
    text = Page((folder / "report.html").read_text()).text
    assert "good one" in text
    assert "b.json cannot be read" in text


@pytest.mark.parametrize("name", DAMAGE)
def test_a_log_that_was_cut_off_is_read_up_to_there(tmp_path: Path, name: str) -> None:
    """A killed training leaves such a log, and a running one may."""
    folder = tokenizer_run(tmp_path / "run")
    added, kept = DAMAGE[name]
    with (folder / name).open("ab") as file:
        file.write(added)
    assert kept in page_of(folder).text


@pytest.mark.parametrize("line", [{"step": 10**400, "train/total": 1}, {"step": 50, "train/total": 10**400},
                                  {"step": -5, "train/total": 1}, {"step": 50, "train/total": float("nan")},
                                  {"step": 50, "train/total": -1.0}, {"step": 50, "train/total": "x"}])  # fmt: skip
def test_a_damaged_log_is_no_reason_to_fail(tmp_path: Path, line: dict[str, Any]) -> None:
    """Steps and values that no training writes."""
    write_log(tmp_path, [*LOG, line])
    (tmp_path / "config.yaml").write_text(json.dumps(config()))
    assert page_of(tmp_path).terms["PSNR"][0] == "20.25 dB"


def test_without_the_data_the_log_and_the_saved_images_are_shown(tmp_path: Path) -> None:
    """The data may be deleted or on another machine; --root names their folder."""
    write_image_folder(tmp_path / "data", ("a", "b"), per_class=4)
    data = {"kind": "folder", "root": str(tmp_path / "data"), "image_size": (8, 12), "validation_share": 0.5}
    folder = tokenizer_run(tmp_path / "run", data=data)
    (tmp_path / "data").rename(tmp_path / "moved")
    page = page_of(folder)
    assert page.terms["PSNR"][0] == "20.25 dB"
    assert "They cannot be made again" in page.text
    assert [each for each in page.all("img") if "after 20 steps" in (each["alt"] or "")]
    ended = report(folder, "--root", tmp_path / "moved")
    assert ended.code == 0
    assert "Also" in (folder / "report.html").read_text()
    assert "cannot be" not in Page((folder / "report.html").read_text()).text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    """Config, weights, samples, settings and evaluations, each on its own."""
    folder = tokenizer_run(tmp_path / "run")
    (folder / "config.yaml").write_text("a: [")
    (folder / "tokenizer.safetensors").write_bytes(b"no weights")
    (folder / "samples/reconstructions-00000020.png").write_bytes(b"no picture")
    made = outputs(folder, "generated", {"n": 2})
    (made / "settings.json").write_text("[" * 100_000)
    (folder / "evaluation").mkdir()
    (folder / "evaluation/a.json").write_text('{"figures": [{"value": "x"}, 3, {"value": 1.25, "label": "good one"}]}')
    (folder / "evaluation/b.json").write_text('{"figures"')
    (folder / "evaluation/a-nearest.png").write_bytes(b"\x89PNG")
    ended = report(folder)
    assert ended.code == 0, ended.err
    text = Page((folder / "report.html").read_text()).text
    for words in ("config.yaml: is not YAML", "is not a safetensors file", "settings.json cannot be read",
                  "b.json cannot be read", "good one", "Some of its metrics cannot be read"):  # fmt: skip
        assert words in text, words
    assert text.count("cannot be read as an image") == 2


def test_a_continuous_latent_has_no_codes_and_several_codes_show_the_first(tmp_path: Path) -> None:
    """Sections without content say so; with several codebooks the page shows the first and says so."""
    page = page_of(tokenizer_run(tmp_path / "kl", bottleneck=KlConfig()))
    assert page.text.count("is continuous: there are no codes") == 3
    rvq = tokenizer_run(tmp_path / "rvq", bottleneck=RvqConfig(codebook_size=16, depth=3, kmeans_init=False))
    page = page_of(rvq)
    assert "Of the 3 codes of a position the first one is shown" in page.text
    assert "2 x 3 positions, 3 codes each," in page.text
    assert not [each for each in page.all("figcaption") if "decoded alone" in str(each)]


@pytest.mark.slow
def test_the_largest_page_stays_within_its_bound(tmp_path: Path) -> None:
    """Noise of 256x256 and 16384 codes: nothing compresses, and all lists are full."""
    rng = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "data" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    data = {"kind": "folder", "root": str(tmp_path / "data"), "image_size": (256, 256), "validation_share": 0.5}
    bottleneck = VqConfig(codebook_size=16384, kmeans_init=False)
    folder = tokenizer_run(tmp_path / "run", data=data, factor=16, bottleneck=bottleneck)
    write_log(folder, [{"step": step, **{f"train/{name}": 1.0 + step * name % 7 for name in range(1, 30)}}
                       for step in range(1, 2000)])  # fmt: skip
    for number in range(1, 5):
        made = outputs(folder, "generated", {"n": 2}, f"{number:03d}")
        Image.fromarray(rng.integers(0, 256, (1000, 1000, 3), dtype=np.uint8)).save(made / "grid.png")
    ended = report(folder)
    assert ended.code == 0, ended.err
    assert 1_000_000 < (folder / "report.html").stat().st_size < 10_000_000


def test_a_small_runs_page_is_small(written: str) -> None:
    assert len(written.encode()) < 400_000


def test_a_prior_is_compared_in_words_with_the_simplest_models(tmp_path: Path) -> None:
    """Bits per token and the difference to both models; samples in order; generated images with their settings."""
    folder = prior_run(tmp_path / "prior")
    ended = report(folder)
    assert ended.code == 0, ended.err
    assert f"report: {folder / 'report.html'}" in ended.out
    page = Page((folder / "report.html").read_text())
    assert page.terms["Bits per token"][0] == "2.500"
    assert "33.3 % less than a model that knows only how frequent each code is (unigram, 3.750 bits)" in page.text
    assert "20 % less than a model that knows only the code before (bigram, 3.125 bits)" in page.text
    assert "class cat, temperature 0.75" in page.text
    strips = [each["alt"] for each in page.all("img") if "Samples after" in (each["alt"] or "")]
    assert strips == ["Samples after 5 steps", "Samples after 10 steps"]
    assert page.terms["Classes"] == ["2: cat, dog"]
    assert page.terms["Data"] == ["shapes, 8x12 pixels"]
    assert "each column has one class" in page.text


def test_columns_have_one_class_only_if_ten_is_a_multiple(tmp_path: Path) -> None:
    """The grids have ten columns, and three classes do not fill them evenly."""
    text = Page(prior_page(open_run(prior_run(tmp_path / "three", classes=("a", "b", "c"))), CPU)).text
    assert "classes are in turn: row by row" in text
    assert "each column" not in text
    assert "classes are in turn" not in Page(prior_page(open_run(prior_run(tmp_path / "no", classes=())), CPU)).text


def test_evaluations_are_shown_with_intervals_protocol_and_warnings(tmp_path: Path) -> None:
    """A file as evaluate.py writes it."""
    folder = prior_run(tmp_path / "prior") / "evaluation"
    folder.mkdir()
    figure = {"name": "fd", "label": "Fréchet distance (not FID)", "value": 12.345, "low": 11.5, "high": 13.5,
              "better": "lower", "note": "of features"}  # fmt: skip
    tree = {"format": 1, "kind": "prior", "figures": [figure], "protocol": {"split": "validation", "n": 500},
            "warnings": ["few pictures"]}  # fmt: skip
    (folder / "prior.json").write_text(json.dumps(tree))
    Image.fromarray(np.zeros((20, 40, 3), dtype=np.uint8)).save(folder / "prior-nearest.png")
    assert report(folder.parent).code == 0
    page = Page((folder.parent / "report.html").read_text())
    for words in ("Fréchet distance (not FID)", "12.35", "11.50 to 13.50", "lower", "of features", "few pictures"):
        assert words in page.text
    assert page.terms["split"] == ["validation"]
    assert "Samples beside their nearest training images" in [each["alt"] for each in page.all("img")]


WRONG: dict[str, tuple[list[str], str]] = {
    "no run": (["{}/empty"], "is no run's folder"),
    "nothing there": (["{}/nowhere"], "there is no such folder"),
    "twice": (["{}/run", "{}/run/."], "named twice"),
    "too many": (["{}/run"] * 9, "at most 8"),
    "a folder to write to": (["{}/run", "--out", "{}/empty"], "is a folder, not a file"),
    "no data there": (["{}/run", "--rot", "x"], "--rot"),
    "no runs at all": ([], "there is no run to report on"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_one_message(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config()))
    arguments, message = WRONG[name]
    ended = report(*(each.format(tmp_path) for each in arguments))
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_without_a_name_it_is_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        (tmp_path / "runs/stage1" / name).mkdir(parents=True)
        (tmp_path / "runs/stage1" / name / "config.yaml").write_text(json.dumps(config()))
    os.utime(tmp_path / "runs/stage1/old/config.yaml", (1, 1))
    assert report().out.strip() == "report: runs/stage1/new/report.html"


def test_a_thinned_curve_keeps_its_ends_and_its_peaks() -> None:
    """No more points than asked for, in order, and each is a point of the curve."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 299, 300, 301, 1000, 12_345):
        values = rng.normal(size=n).tolist()
        curve = Curve(list(range(0, 3 * n, 3)), values)
        few = thin_curve(curve)
        assert len(few.steps) <= 300
        assert few.steps == sorted(few.steps)
        assert {*zip(*few, strict=True)} <= {*zip(*curve, strict=True)}
        assert (few.steps[0], few.steps[-1]) == (curve.steps[0], curve.steps[-1])
        assert (min(few.values), max(few.values)) == (min(values), max(values))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 5), (1e-7, 3e-7), (999, 1001), (0.05, 1.2), (3, 8e9), (1, 1.25)]
)
def test_ticks_are_few_and_within_the_axis(low: float, high: float) -> None:
    for ticks in (linear_ticks(low, high), log_ticks(low, high) if low > 0 else [low, high]):
        assert 2 <= len(ticks) <= 7
        assert all(low - 1e-9 * abs(low) <= tick <= high * (1 + 1e-9) for tick in ticks)
        assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    "curve", [Curve([5], [0.0]), Curve([5], [3.0]), Curve([0, 0], [1.0, 1.0]), Curve([1, 2], [-1.0, 0.0]),
              Curve([1, 2], [5e-324, 5e-324]), Curve([1, 2, 3], [1e300, 1e-300, 1.0]), Curve([1, 2], [1e308, -1e308])]
)  # fmt: skip
@pytest.mark.parametrize("log", [False, True])
def test_any_curve_can_be_drawn(curve: Curve, log: bool) -> None:
    """One point, a constant, no positive value, extreme values: no division by zero and no coordinate that is not a
    number."""
    drawn = chart_html(Chart("t", "u", [Series("s", curve, dots=True)], log=log))
    usual = [value for value in curve.values if 1e-9 < abs(value) < 1e9 or value == 0]
    assert (drawn is None) == (not usual or (log and max(usual) <= 0))
    assert "nan" not in (drawn or "")
    assert "inf" not in (drawn or "")
    chart_html(Chart("t", "u", [Series("s", curve)], from_zero=True))


def test_the_numbers_below_a_chart_are_of_all_its_curves() -> None:
    """Runs that were validated at different steps: a row has a value of each curve with a step near it."""

    def table_of(*curves: Curve) -> list[list[str]]:
        drawn = chart_html(
            Chart("t", "u", [Series(str(number), each, dots=True) for number, each in enumerate(curves)])
        )
        rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", drawn or "")
        return [[step, *re.findall(r"<td>(.*?)</td>", cells)] for step, cells in rows]

    none = "\N{EN DASH}"
    assert table_of(Curve([325, 650], [1.0, 2.0]), Curve([200, 400, 650], [3.0, 4.0, 5.0])) == [
        ["200", none, "3"], ["325", "1", none], ["400", none, "4"], ["650", "2", "5"]]  # fmt: skip
    long = Curve(list(range(7, 1000, 7)), [float(step) for step in range(7, 1000, 7)])
    rows = table_of(long, Curve([step + 3 for step in long.steps], [step + 3.0 for step in long.steps]))
    assert len(rows) == 12
    assert none not in [cell for row in rows for cell in row]
    assert all(abs(float(cell) - float(row[0])) < 5 for row in rows for cell in row[1:])


def test_a_colour_has_the_same_meaning_in_every_chart(written: str) -> None:
    """Training and validation, also in charts with only one of them."""
    found = set(re.findall(r'swatch (c\d)[a-z ]*"></span>(training|validation)<', written))
    assert found == {("c0", "training"), ("c1", "validation")}


def test_rank_correlation_is_spearmans() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rank_correlation(x, x.exp()) == pytest.approx(1.0)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1.0)
    assert rank_correlation(x, torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(0.8)
    assert rank_correlation(x, torch.ones(5)) == 0.0


def test_numbers_are_as_people_read_them() -> None:
    assert [format_number(value) for value in (0.0390, 25.196, 1234567, 1e-9, 512.0)] == [
        "0.03900", "25.20", "1,234,567", "1.000e-09", "512"]  # fmt: skip
    assert [format_percent(share) for share in (0, 1, 0.9999, 0.875, 0.00001, 0.0012)] == [
        "0 %", "100 %", "> 99.9 %", "87.5 %", "< 0.01 %", "0.12 %"]  # fmt: skip


TINY = ("--data.image_size 16 --data.train_images 20 --data.validation_images 6 --network.channels 8 "
        "--network.residual_channels 4 --network.latent_channels 4 --network.blocks 1 --bottleneck.codebook_size 8 "
        "--batch_size 4 --log_every 1")  # fmt: skip


@pytest.fixture
def tokenizer_trainer(tmp_path: Path) -> Any:
    """The names of stage one's train.py, and a function that runs it."""
    names = names_of("stage1_tokenizer/train.py")
    return names, lambda *words: run(names["main"], *TINY.split(), "--out", tmp_path / "run", *words)


def test_a_training_writes_its_report_and_records_its_machine(tmp_path: Path, tokenizer_trainer: Any) -> None:
    """At the end of each start the page has the command, versions, device, and the step of a restart."""
    _, train = tokenizer_trainer
    ended = train("--steps", 2)
    assert ended.code == 0, ended.err
    assert f"report: {tmp_path / 'run/report.html'}" in ended.out
    page = Page((tmp_path / "run/report.html").read_text())
    (session,) = read_log(tmp_path / "run/environment.jsonl")
    assert session["packages"]["torch"] == torch.__version__.split("+")[0]
    assert page.terms["Device"] == ["cpu"]
    assert page.terms["Mixed precision"] == ["no"]
    assert "--bottleneck.codebook_size 8 --batch_size 4" in page.text
    logged = read_log(tmp_path / "run/metrics.jsonl")[-1]["validation/psnr"]
    assert float(page.terms["PSNR"][0].split()[0]) == pytest.approx(logged, abs=0.01)
    assert "Started again" not in page.terms
    again = train("--steps", 2)  # continues from its end
    assert again.code == 0
    assert Page((tmp_path / "run/report.html").read_text()).terms["Started again"] == ["at step 2"]


def test_the_command_is_the_first_one_whole_or_marked_as_cut(tmp_path: Path) -> None:
    """Later commands only continued the run. A run that began before commands were recorded was continued, not
    started."""
    folder = tokenizer_run(tmp_path / "run")
    began = ["python", "train.py", "--out", "it's a run"]
    sessions = [
        {"step": 0, "time": "2026-01-31T12:00:00Z", "command": began},
        {"step": 30, "time": "2026-02-01T12:00:00Z", "command": ["python", "train.py", "--steps", "7"]},
    ]
    write_log(folder, sessions, "environment.jsonl")
    page = page_of(folder)
    assert shlex.join(began) in page.text
    assert "--steps 7" not in page.text
    assert page.terms["Started"] == ["2026-01-31 12:00 UTC"]
    assert page.terms["Started again"] == ["at step 30"]
    assert "cut off here" not in page.text
    write_log(folder, [{**sessions[1], "command": ["python", "x" * 5000]}], "environment.jsonl")
    page = page_of(folder)
    assert page.terms["Continued at step 30"] == ["2026-02-01 12:00 UTC"]
    assert "Started" not in page.terms
    assert "It is cut off here, after 2,000 characters" in page.text


def test_a_training_leaves_its_page_out_if_told(tmp_path: Path, tokenizer_trainer: Any) -> None:
    """The option may change when the run is resumed."""
    _, train = tokenizer_trainer
    ended = train("--steps", 1, "--no-report")
    assert ended.code == 0
    assert "report" not in ended.out
    assert not (tmp_path / "run/report.html").exists()
    assert train("--steps", 1).code == 0
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.slow
def test_one_of_several_processes_writes_the_report(tmp_path: Path) -> None:
    """The others have ended by then."""
    words = ["--steps", "2", "--out", tmp_path / "run"]
    run_processes(2, run_script, "stage1_tokenizer/train.py", *TINY.split(), *words)
    page = Page((tmp_path / "run/report.html").read_text())
    assert page.terms["Processes"] == ["2"]
    assert "torchrun --nproc_per_node 2" in page.text or "accelerate launch --multi_gpu --num_processes 2" in page.text


def fails() -> None:
    raise RuntimeError("no\nluck")


def is_stopped(number: signal.Signals) -> None:
    """Send the same signal more than once, as torchrun and a terminal do."""
    with pytest.raises(InterruptionError):
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    raise InterruptionError("stopped")


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (fails, r"no\nluck"),
        (partial(is_stopped, signal.SIGTERM), "stopped"),
        (partial(is_stopped, signal.SIGINT), "stopped"),
    ],
)
def test_an_error_in_the_report_does_not_fail_the_training(
    tmp_path: Path, tokenizer_trainer: Any, happens: Callable[[], None], reason: str
) -> None:
    """A full disk, a bug, Ctrl-C: exit code 0, the summary, the reason and the command that writes the report."""
    names, train = tokenizer_trainer
    names["tokenizer_page"] = lambda *_: happens()
    ended = train("--steps", 1)
    assert ended.code == 0
    assert ended.err == ""
    *before, reported = ended.out.strip().splitlines()
    command = re.escape(shlex.join(["sampling/report.py", str(tmp_path / "run")])).replace("sampling", r"\S*sampling")
    assert re.search(rf"\({re.escape(reason)}\); the training is complete\. .*: \S*python\S* {command}$", reported)
    assert before[-1] == "writing the report ..."
    assert [line for line in before if re.match(r"next: \S*python\S* \S*stage2_prior/train\.py", line)]
    assert (tmp_path / "run/tokenizer.safetensors").exists()


def test_a_priors_training_writes_its_report_too(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    words = "--steps 2 --batch_size 8 --prior.layers 1 --prior.width 16 --prior.heads 2 --samples 2"
    ended = run(names_of("stage2_prior/train.py")["main"], *words.split(), "--tokenizer", tmp_path / "tokenizer",
                "--out", tmp_path / "run")  # fmt: skip
    assert ended.code == 0, ended.err
    page = Page((tmp_path / "run/report.html").read_text())
    logged = read_log(tmp_path / "run/metrics.jsonl")[-1]["validation/bits_per_token"]
    assert float(page.terms["Bits per token"][0]) == pytest.approx(logged, rel=1e-3)
    assert "Samples after 2 steps" in [each["alt"] for each in page.all("img")]


def test_a_prior_over_several_codes_per_position_has_a_page(tmp_path: Path) -> None:
    """Sequence length and tokenizer include the depth."""
    several = {"bottleneck": RvqConfig(codebook_size=16, depth=3, kmeans_init=False)}
    folder = prior_run(tmp_path / "prior", tokenizer=several)
    assert report(folder).code == 0
    page = Page((folder / "report.html").read_text())
    assert page.terms["Sequence"] == ["18 tokens out of 16"]
    assert page.terms["Latent"] == ["2 x 3 positions, 3 codes each, of a codebook of 16"]
