"""A filter is added in one place, as CONTRIBUTING says, and no command ignores it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.commands import ROOT

FIELD = """    min_p: Annotated[float, Filter(keep=keep_min_p)]"""
FUNCTION = "class ChooseConfig(Config):"
NEW_FIELD = '''    only: Annotated[int, Filter(keep=keep_only)] = Field(3, ge=0)
    """Only this code, the first being 1; 0 is no filter."""
'''
NEW_FUNCTION = '''def keep_only(probabilities: Tensor, number: int) -> Tensor:
    """probabilities (B, V) with all of it on one code."""
    if not number:
        return probabilities
    return torch.nn.functional.one_hot(torch.tensor(number - 1), probabilities.shape[-1]).to(probabilities).expand(
        len(probabilities), -1
    )


'''
USE = """
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

from sampling import agreement, app, check, complete, evaluate, generate, report_outputs, summary, sweep
from sampling.evaluation.options import EvaluateConfig
from sampling.evaluation.sources import sample_prior
from sampling.saved_images import read_png
from sampling.playground.tasks import Limits, Playground
from sampling.sampler import Sampler
from sampling.sampling_loop import PriorSource
from stage1_tokenizer.config.base import parse_command_line
from stage2_prior.prior import load_prior
from tests.helpers.artefacts import write_prior
from tests.helpers.commands import lone_accelerator, run

folder = Path(sys.argv[1])
write_prior(folder, ("rectangle", "triangle", "disk", "oval", "star"))
prior = load_prior(folder)
alike = lambda pictures: all(np.array_equal(pictures[0], picture) for picture in pictures)

def files(name, pattern="0*.png"):
    return [read_png(path) for path in sorted((folder / name).glob(pattern))]

def ended(main, *words):
    result = run(main, *words)
    assert result.code == 0, result.err
    return result.out

# generate: the default filters, another value does so otherwise, 0 does not; and it cannot be given for noise
for value in (3, 5, 0):
    ended(generate.main, "--prior", folder, "-n", 4, "--only", value, "--out", folder / f"g{value}")
ended(generate.main, "--prior", folder, "-n", 4, "--out", folder / "default")
ended(generate.main, "--prior", folder, "-n", 4, "--temperature", 0, "--out", folder / "greedy")
assert alike(files("g3")) and alike(files("g5")) and not alike(files("g0"))
assert alike([*files("g3"), *files("default"), *files("greedy")])
assert not alike([*files("g3"), *files("g5")])
refused = run(generate.main, "--tokenizer", folder, "--only", 5)
assert refused.code == 2 and "--only cannot be used with --tokenizer: it filters codes" in refused.err

# complete: everything but the top half is of one code
ended(complete.main, "--prior", folder, "-n", 1, "--variants", 3, "--no-paste", "--out", folder / "c3")
ended(complete.main, "--prior", folder, "-n", 1, "--variants", 3, "--no-paste", "--only", 0, "--out", folder / "c0")
assert alike(files("c3", "0*-?.png")) and not alike(files("c0", "0*-?.png"))

# evaluate: its samples are other ones, in a folder of their own, and it is idle where nothing is sampled
sets = []
for value in (3, 5):
    config = parse_command_line(EvaluateConfig, ["--prior", str(folder), "--sampling.only", str(value)])
    source = PriorSource(Sampler(prior, config.sampling), None, 0)
    samples = sample_prior(lone_accelerator(), source, 4, 64)
    sets.append(samples)
    assert np.array_equal(read_png(samples.path / "000000.png"), files(f"g{value}")[0])
assert sets[0].path != sets[1].path
refused = run(evaluate.main, "--tokenizer", folder, "--sampling.only", 5)
assert refused.code == 2 and "--sampling cannot be used with --tokenizer: nothing is sampled" in refused.err

# sweep: its values can be listed
parse_sweep = lambda *words: parse_command_line(sweep.SweepConfig, ["--prior", str(folder), *words]).combinations()
assert [draw.only for draw in parse_sweep("--only", "5,0")] == [5, 0] and [draw.only for draw in parse_sweep()] == [3]

# app: the page has a control for it, and its command names it
playground = Playground(prior, "float32", Limits(16, 24))
made = playground.sample({"n": 2, "only": 5}, lambda share: None)
assert np.array_equal(made.images[0], files("g5")[0]) and made.command.endswith("--only 5")
if importlib.util.find_spec("gradio") is not None:
    from sampling.playground.page import Page

    page = Page(playground, folder, 1, {playground.name: ""})
    labels = [getattr(part, "label", None) for part in page.blocks.blocks.values()]
    assert labels.count("Only (0: all codes)") >= 2, labels

# check and the report: the settings are read, and what is not the default is named
assert "0 bad" in ended(check.main, folder / "g5")
settings = json.loads((folder / "g5" / "settings.json").read_text())
assert report_outputs.shown_settings(settings)["only"] == 5
assert "only" not in report_outputs.shown_settings({**settings, "only": 3})

# summary: what it judges is drawn through it
judged = []
summary.measure_agreement = lambda train, held_out, images, *_: judged.append(images) or agreement.Agreement(1.0, 1.0)
summary.class_lines(summary.SummaryConfig(samples=4), prior)
assert alike([*judged[0], *files("g3")])
"""


def test_a_new_filter_is_a_function_and_a_field(tmp_path: Path) -> None:
    """In a copy of the packages one file is changed; all that samples then has it, and says so."""
    for package in ("stage1_tokenizer", "stage2_prior", "sampling", "tests/helpers"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "__init__.py").touch()
    path = tmp_path / "sampling" / "choose.py"
    text = path.read_text()
    assert text.count(FIELD) == text.count(FUNCTION) == 1
    path.write_text(text.replace(FIELD, NEW_FIELD + FIELD).replace(FUNCTION, NEW_FUNCTION + FUNCTION))
    settings = os.environ | {"PYTHONPATH": str(tmp_path), "GRADIO_TEMP_DIR": str(tmp_path / "page")}
    words = [sys.executable, "-c", USE, str(tmp_path / "run")]
    ended = subprocess.run(words, env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
