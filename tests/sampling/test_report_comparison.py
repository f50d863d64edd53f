"""The page that compares runs: the best value is marked only among comparable metrics, and no run gets lost."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stage1_tokenizer.config.base import write_yaml
from tests.helpers.commands import names_of, run
from tests.helpers.report_runs import LOG, PRIOR_LOG, Page, config, prior_run, tokenizer_run, write_log

NONE = "\N{EN DASH}"


def compare(folder: Path, *runs: Path) -> str:
    """Run the command and return its page."""
    ended = run(names_of("sampling/report.py")["main"], *runs, "--out", folder / "page.html")
    assert ended.code == 0, ended.err
    return (folder / "page.html").read_text()


def row_of(text: str, label: str) -> list[tuple[str, bool]]:
    """Return a row of the table of metrics: each run's text, and True if it is marked as the best."""
    found = re.search(rf'<th scope="row">{label}</th>(.*?)</tr>', text)
    assert found
    return [(cell, "best" in tags) for tags, cell in re.findall(r"<td([^>]*)>(.*?)</td>", found.group(1))]


def changed(entries: list[dict[str, Any]], **values: float) -> list[dict[str, Any]]:
    """Return a log with other metrics in its validations."""
    names = {f"validation/{name}": value for name, value in values.items()}
    return [{**entry, **{name: names[name] for name in entry.keys() & names.keys()}} for entry in entries]


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    """A table with the better value marked, the settings that differ, and the same images through each tokenizer."""
    one = tokenizer_run(tmp_path / "one")
    other = tokenizer_run(tmp_path / "other", changed(LOG, psnr=27.75), seed=1)
    write_yaml(
        other / "config.yaml", config(optim={"lr": 0.5}, network={"kind": "sonnet", "factor": 4, "attention": []})
    )
    text = compare(tmp_path, one, other, prior_run(tmp_path / "prior"))
    page = Page(text)
    assert row_of(text, "PSNR") == [("20.25 dB", False), ("27.75 dB", True), (NONE, False)]
    assert "optim.lr 0.001 0.5" in page.text
    assert f"network.attention {NONE} []" in page.text
    assert "The same images" in page.text
    assert {"one", "other", "prior"} <= {*re.findall(r"\w+", page.text)}


def test_runs_on_different_data_have_no_best(tmp_path: Path) -> None:
    one = tokenizer_run(tmp_path / "one")
    other = tokenizer_run(tmp_path / "other", changed(LOG, psnr=27.75))
    tree = config()
    write_yaml(other / "config.yaml", config(data={**tree["data"], "image_size": [16, 16]}))
    assert not any(best for _, best in row_of(compare(tmp_path, one, other), "PSNR"))


def test_code_use_is_not_compared_between_codebook_sizes(tmp_path: Path) -> None:
    """Half of 512 codes is not worse than both of two codes; errors can still be compared."""
    one = tokenizer_run(tmp_path / "one")
    other = tokenizer_run(tmp_path / "other", changed(LOG, psnr=27.75, code_perplexity=100.0, code_usage=0.25))
    assert row_of(compare(tmp_path, one, other), "Perplexity")[1] == ("100", True)
    write_yaml(other / "config.yaml", config(bottleneck={"kind": "vq", "codebook_size": 512}))
    text = compare(tmp_path, one, other)
    assert not any(best for label in ("Perplexity", "Codes in use") for _, best in row_of(text, label))
    assert row_of(text, "PSNR")[1] == ("27.75 dB", True)


def test_priors_are_compared_only_over_the_codes_of_one_tokenizer(tmp_path: Path) -> None:
    """A prior's config names no data; bits over different codebooks cannot be compared."""
    one, same = prior_run(tmp_path / "one"), prior_run(tmp_path / "same", seed=1)
    other = prior_run(tmp_path / "other", tokenizer={"seed": 1})
    for folder in (same, other):
        write_log(folder, changed(PRIOR_LOG, bits_per_token=1.5))
    assert row_of(compare(tmp_path, one, same), "Bits per token") == [("2.500", False), ("1.500", True)]
    assert row_of(compare(tmp_path, one, other), "Bits per token") == [("2.500", False), ("1.500", False)]
    (same / "prior.safetensors").unlink()
    assert row_of(compare(tmp_path, one, same), "Bits per token") == [("2.500", False), ("1.500", False)]


@pytest.mark.parametrize("names", [("a/run", "b/run"), ("a/x/y/z/run", "b/x/y/z/run"), ("run", "a/run")])
def test_runs_of_the_same_name_stay_apart(tmp_path: Path, names: tuple[str, str]) -> None:
    """However far up their folders differ; each with its settings."""
    folders = [tmp_path / name for name in names]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(json.dumps(config(optim={"lr": 0.1 + number})))
        write_log(folder, LOG)
    text = compare(tmp_path, *folders)
    assert "optim.lr 0.1 1.1" in Page(text).text
    heads = re.findall(r"<th scope=\"col\">([^<]*run) \(tokenizer\)</th>", text)
    assert len(set(heads)) == 2
