"""README and docs as tests read them: their commands, fenced blocks, links and headings."""

import re
import shlex
from typing import NamedTuple

from tests.helpers.commands import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = {
    "stage1_tokenizer/train.py": "TrainTokenizerConfig",
    "stage1_tokenizer/analyze.py": "AnalyzeConfig",
    "stage1_tokenizer/compare.py": "CompareConfig",
    "stage1_tokenizer/import_weights/__main__.py": "ImportConfig",
    "sampling/check.py": "CheckConfig",
    "stage2_prior/train.py": "TrainPriorConfig",
    "stage2_prior/import_weights.py": "ImportPriorConfig",
    "stage2_prior/score.py": "ScoreConfig",
    "stage2_prior/plan.py": "PlanConfig",
    "sampling/generate.py": "GenerateConfig",
    "sampling/complete.py": "CompleteConfig",
    "sampling/reconstruct.py": "ReconstructConfig",
    "sampling/report.py": "ReportConfig",
    "sampling/summary.py": "SummaryConfig",
    "sampling/evaluate.py": "EvaluateConfig",
    "sampling/sweep.py": "SweepConfig",
    "sampling/publish.py": "PublishConfig",
    "sampling/app.py": "AppConfig",
    "sampling/codes.py": "CodesConfig",
}


class Block(NamedTuple):
    """A fenced block; commands have no language, printed lines have `text`."""

    language: str
    text: str


def documents() -> list[str]:
    """The text of README, CONTRIBUTING and all pages of docs."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
    return [path.read_text(encoding="utf-8") for path in paths]


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks, in order."""
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)]


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of each line that starts one of our scripts."""
    found = []
    text = re.sub(r"python -m (\w+)\.(\w+)", _as_script, text.replace("\\\n", " "))
    for line in text.splitlines():
        words = shlex.split(line, comments=True) if ".py" in line else []
        scripts = [index for index, word in enumerate(words) if word in SCRIPTS]
        if scripts:
            found.append((words[scripts[0]], words[scripts[0] + 1 :]))
    return found


def _as_script(module: re.Match[str]) -> str:
    """Return `python SCRIPT` for `python -m MODULE`; the script of a folder is its __main__.py."""
    path = f"{module[1]}/{module[2]}"
    return f"python {path}/__main__.py" if (ROOT / path).is_dir() else f"python {path}.py"


def commands() -> list[tuple[str, list[str]]]:
    """(script, arguments) of each command in README, CONTRIBUTING, docs, and the comments of the configs."""
    texts = [block.text for text in documents() for block in blocks_of(text) if not block.language]
    texts += [path.read_text(encoding="utf-8").replace("#", "") for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    return commands_of("\n".join(texts))


def anchors_of(text: str) -> set[str]:
    """The anchors that hosts make of a page's headings: `## Use it` becomes `use-it`."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
