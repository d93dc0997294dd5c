"""Checkpoints from a hub, through its own client."""

from __future__ import annotations

from pathlib import Path

from encoder_svc.errors import CheckpointError
from encoder_svc.models.checkpoint_files import CheckpointFiles


class Hub(CheckpointFiles):
    """A repository on the hub. Each file is downloaded (or found in the cache) when it is first asked for."""

    def __init__(self, repo_id: str, revision: str | None) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import logging as hub_logging
        from huggingface_hub.utils._validators import validate_repo_id

        self.name = repo_id
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            raise CheckpointError(f"--model {repo_id}: neither a folder that exists nor a hub id.") from None
        self._revision = revision
        # The hub client writes its lines to stderr by itself, and gives them to our log as well.
        hub_logging.get_logger().handlers.clear()
        self._refuse_if_out_of_reach("config.json")
        config = self.path("config.json")
        if config is not None:
            # A cached file lies in snapshots/COMMIT/; every further file comes from that very commit.
            self.commit = self._revision = config.parent.name

    def path(self, filename: str) -> Path | None:
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, filename, revision=self._revision))
        except LocalEntryNotFoundError as error:
            # Offline, the hub client does not ask its own note that this commit has no such file.
            if try_to_load_from_cache(self.name, filename, revision=self._revision) is _CACHED_NO_EXIST:
                return None
            raise self._unreachable() from error
        except EntryNotFoundError:
            return None
        except Exception as error:  # the hub client raises its HTTP library's errors as well as its own
            raise self._unreachable() from error

    def _refuse_if_out_of_reach(self, filename: str) -> None:
        """Asks the hub once for what is not in the cache: a download asks six times, and waits 23 s between them."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError

        if try_to_load_from_cache(self.name, filename, revision=self._revision) is not None:
            return
        try:
            get_hf_file_metadata(hf_hub_url(self.name, filename, revision=self._revision))
        except HfHubHTTPError:
            return  # it answers; what it says is the download's to make something of
        except Exception as error:
            raise self._unreachable() from error

    def _unreachable(self) -> CheckpointError:
        revision = f" at revision {self._revision}" if self._revision else ""
        return CheckpointError(
            f"--model {self.name}: not a folder that exists, and not to be had from the hub{revision} (no such "
            "repository, no access, or no network)."
        )
