"""A small Hugging Face Hub on this machine, for the real client: repositories of files, with revisions."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import patch
from urllib.parse import unquote

from huggingface_hub import constants

from stage1_tokenizer.engine.hub import download_weights


@dataclass
class FakeHub:
    """The repositories, their revisions, and the requests so far."""

    address: str = ""
    revisions: dict[tuple[str, str], str] = field(default_factory=dict)
    """(OWNER/NAME, revision) -> commit."""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    """(OWNER/NAME, commit) -> the files by name."""
    asked: list[str] = field(default_factory=list)
    """METHOD and path of every request."""

    def commit(self, repository: str, folder: Path, *tags: str) -> str:
        """Add a commit with the files of a folder to the main branch. Returns its name."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        for revision in ("main", name, *tags):
            self.revisions[repository, revision] = name
        self.files[repository, name] = files
        return name

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content for OWNER/NAME/resolve/REVISION/FILE."""
        owner, name, _, revision, file = [*unquote(path).strip("/").split("/", 4), *[""] * 5][:5]
        repository = f"{owner}/{name}"
        if not any(known == repository for known, _ in self.revisions):
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        commit = self.revisions.get((repository, revision))
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        content = self.files[repository, commit].get(file)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content


@contextmanager
def fake_hub(cache: Path) -> Iterator[FakeHub]:
    """Serve a hub, and let the client of this process use it, with an empty cache in a folder."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815 (the name is that of the base class)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with client_of(hub.address, cache):
            yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def client_of(address: str, cache: Path) -> Iterator[None]:
    """Let the client of this process ask another address, and forget what it has found before."""
    download_weights.cache_clear()
    with (
        patch.object(constants, "ENDPOINT", address),
        patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"),
        patch.object(constants, "HF_HUB_CACHE", str(cache)),
        patch.object(constants, "HF_HUB_OFFLINE", False),
    ):
        yield
    download_weights.cache_clear()
