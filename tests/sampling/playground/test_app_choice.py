"""Several priors on one server: a page for each, loaded when it is opened, and links between them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sampling.sampler import Sampler, SamplingConfig
from stage1_tokenizer.engine import pretrained
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage2_prior.prior import PRIOR_FILE
from tests.helpers.app_server import App, ask, called, ended, started
from tests.helpers.artefacts import pixels_of, write_prior, write_tokenizer
from tests.helpers.browser import browser
from tests.helpers.commands import names_of

gradio = pytest.importorskip("gradio", reason="the extra `app` is not installed")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The app, started in a folder with two runs: `new` with classes, and `old`, whose images have another size."""
    folder = tmp_path_factory.mktemp("runs")
    write_prior(folder / "runs/stage2/old", classes=(), seed=1, tokenizer={"factor": 2})
    write_prior(folder / "runs/stage2/new", label_dropout=0.5)
    app = started(folder, folder / "tmp", "--pictures", "6", runs=folder)
    yield app
    code, out, err = ended(app)
    assert (code, err) == (0, "")
    assert all(line.startswith("data: ") for line in out.splitlines())  # of the page that was opened later
    assert not list(app.temporary.glob("tessera-app-*"))


def config_of(app: App, root: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(ask(app, "GET", f"{root}/config").body)
    return tree


@pytest.mark.slow
def test_each_prior_has_its_page(app: App) -> None:
    """The page samples from its own prior, its files have its paths, and it links to the other one."""
    assert ask(app, "GET", "/1/config").status == 404  # nobody has opened this page yet
    for root, name, other in (("", "new", "/1/"), ("/1", "old", "/")):
        assert ask(app, "GET", f"{root}/").status == 200
        config = config_of(app, root)
        assert config["root"] == f"{app.address}{root}"
        head = next(each["props"]["value"] for each in config["components"] if each["type"] == "html")
        assert f"runs/stage2/{name}, step 9" in head
        assert f'<a href="{other}">runs/stage2/' in head
        labels = {each["id"]: each["props"].get("label") for each in config["components"]}
        call = next(each for each in config["dependencies"] if "Number" in [labels[i] for i in each["inputs"]])
        values = {"Number": 2, "Seed": 3, "Temperature": 1, "Top-p": 0.9, "Guidance": 1, "Min-p": 0}
        given = [values.get(labels[i], 0 if "Top-k" in str(labels[i]) else None) for i in call["inputs"]]
        answer = called(app, call["id"], given, f"session{name}", root)
        assert answer["success"], answer
        gallery = answer["output"]["data"][0]
        wanted = Sampler.load(app.prior / "runs/stage2" / name, SamplingConfig(guidance=1.0)).sample(2, seed=3)
        for image, expected in zip(gallery, wanted, strict=True):
            assert image["image"]["url"].startswith(f"{app.address}{root}/gradio_api/file=")
            assert (pixels_of(Path(image["image"]["path"])) == expected).all()


@pytest.mark.slow
def test_a_user_changes_the_prior(app: App) -> None:
    """In a browser: a link leads to the other page, which samples and shows its images; no script fails."""
    errors: list[str] = []
    with browser() as opened:
        page: Any = opened.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.set_default_timeout(60_000)
        page.goto(app.address)
        page.get_by_role("link", name="runs/stage2/old").click()
        page.wait_for_url("**/1/")
        page.get_by_label("Number", exact=True).fill("2")
        page.get_by_role("button", name="Sample", exact=True).click()
        images = "[...document.querySelectorAll('#samples .grid-container img')]"
        page.wait_for_function(f"{images}.filter(image => image.naturalHeight == 8).length == 2")
        page.get_by_role("link", name="runs/stage2/new").click()
        page.wait_for_url(f"{app.address}/")
    assert errors == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "status"), [("/999/", 404), ("/1x/", 404), ("/01/", 404), ("/1/etc", 404), ("/1", 404)]
)
def test_there_are_no_other_pages(app: App, path: str, status: int) -> None:
    assert ask(app, "GET", path).status == status


def test_a_refused_request_opens_no_page() -> None:
    """A page of another site, a rebound name, and a path that is none: no prior is loaded for these."""
    testclient = pytest.importorskip("starlette.testclient")
    opened: list[int] = []
    choice = _choice(opened)
    with testclient.TestClient(choice, base_url="http://127.0.0.1:7860") as client:
        assert client.get("/").text == "page 0 at /"
        foreign = {"origin": "http://evil.example"}
        assert client.get("/1/", headers=foreign).status_code == 403
        assert client.get("/1/", headers={"host": "evil.example"}).status_code == 421
        assert client.get("/1/config").status_code == 404
        assert opened == [0]
        assert [client.get("/1/").text for _ in range(2)] == ["page 1 at /"] * 2
        assert client.get("/1/config").text == "page 1 at /config"
        assert opened == [0, 1]
        damaged = client.get("/2/")
        assert (damaged.status_code, damaged.text) == (500, "prior 2 is damaged")
        assert client.get("/").text == "page 0 at /"


def _choice(opened: list[int]) -> Any:
    """Return a choice of three pages; the last one cannot be loaded."""
    from fastapi import FastAPI, Request  # noqa: PLC0415  (the extra `app`)
    from fastapi.responses import PlainTextResponse  # noqa: PLC0415

    from sampling.playground.choice import Choice, OpenedPage  # noqa: PLC0415
    from sampling.playground.guard import Guard  # noqa: PLC0415

    def open_page(number: int) -> OpenedPage:
        if number == 2:
            raise BadFileError("prior 2 is damaged")
        opened.append(number)
        app = FastAPI()

        @app.get("/{path:path}")
        def answer(request: Request) -> PlainTextResponse:
            return PlainTextResponse(f"page {number} at {request.url.path}")

        return OpenedPage(app, Guard(app, "127.0.0.1", Path("/srv/page"), {}))

    return Choice(open_page, 3)


def test_the_priors_to_choose_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, the newest first, then the models of the package with a prior, `shapes` before others; none is an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "package")
    list_priors = names_of("sampling/app.py")["list_priors"]
    with pytest.raises(ConfigError, match="no run to sample from"):
        list_priors()
    for name in ("birds", "shapes"):
        (tmp_path / "package" / name).mkdir(parents=True)
        (tmp_path / "package" / name / PRIOR_FILE).touch()
    write_tokenizer(tmp_path / "package" / "alone")
    assert list_priors() == ["pretrained:shapes", "pretrained:birds"]
    write_prior(Path("runs/stage2/own"))
    assert list_priors() == ["runs/stage2/own", "pretrained:shapes", "pretrained:birds"]
