"""Files for hosts and tools: the workflow, pre-commit's hooks, issue forms, the citation."""

import re
import shlex
from typing import Any

import pytest
import yaml

from tests.helpers.commands import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_anyone_can_run(path: Any) -> None:
    """Each step is an action of the host, .ci/run, or a target of the Makefile."""
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    assert {job["runs-on"].split("-")[0] for job in jobs.values()} >= {"ubuntu", "macos"}
    for step in (step for job in jobs.values() for step in job["steps"]):
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
        else:
            first, *rest = shlex.split(step["run"])
            assert (first, rest) == (".ci/run", []) or (first == "make" and set(rest) <= {*targets})


def test_hooks_need_no_download() -> None:
    """Each hook is local, and runs a tool of the lock."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for source in read(".pre-commit-config.yaml")["repos"]:
        assert source["repo"] == "local"
        for hook in source["hooks"]:
            assert hook["language"] == "system"
            tool = hook["entry"].split()[0]
            assert tool.startswith(".venv/bin/")
            assert re.search(rf"^{tool.removeprefix('.venv/bin/')}==", lock, flags=re.M)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_are_whole(path: Any) -> None:
    """The host does not show a form without these keys, and reports no error."""
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(part["attributes"]["label"] for part in form["body"])


def test_the_citation_has_this_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = read("CITATION.cff")
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


@pytest.mark.parametrize("file", ["Makefile", ".ci/run", "benchmarks/gpu.sh"])
def test_named_test_files_exist(file: str) -> None:
    """pytest runs nothing if one of its paths does not exist."""
    named = re.findall(r"tests/[\w/]+(?:\.py)?", (ROOT / file).read_text(encoding="utf-8"))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
