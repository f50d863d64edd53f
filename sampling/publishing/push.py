"""The push of a folder to the Hugging Face Hub. The package huggingface_hub (extra `hub`) has the user's token."""

from pathlib import Path
from typing import Any

from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.hub import HubName, explain_errors, import_hub, parse_hub_name


class HubTarget:
    """A repository that a folder is pushed to. The constructor checks that this user can reach the Hub."""

    def __init__(self, text: str) -> None:
        """text: hf:OWNER/NAME.

        Raises:
            ConfigError: another form, not logged in, no network, or huggingface_hub is not installed.
        """
        self.name = parse_hub_name(text, "--to")
        if self.name.revision:
            raise ConfigError(f"--to {text}: a push makes a new revision; leave @{self.name.revision} out")
        self._api: Any = import_hub("--to").HfApi(library_name="tessera-images")
        with explain_errors(f"--to {self.name}"):
            self._api.whoami()

    def push(self, folder: Path, message: str, private: bool) -> HubName:
        """Push all files of a folder in one commit. Returns the name with the new commit.

        private: only for a repository that does not exist yet.

        Raises:
            ConfigError: no right to write, or no network.
        """
        with explain_errors(f"--to {self.name}"):
            self._api.create_repo(self.name.repository, private=private, exist_ok=True)
            commit = self._api.upload_folder(repo_id=self.name.repository, folder_path=folder, commit_message=message)
        return self.name._replace(revision=str(commit.oid))
