"""Upload a saved model to the Hugging Face Hub, through huggingface_hub and its own login.

What names a folder of this machine stays here: in the JSON files it is replaced by none, and a model card has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hypo_train.utils.errors import HubError

_NetworkError: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever huggingface_hub has chosen
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json")
_NAMES_OF_FOLDERS = ("_name_or_path", "name_or_path", "base_model_name_or_path")


def check_login(repo_id: str) -> None:
    """Raise HubError if the Hub cannot be reached, or if its user may not write to ``repo_id``. Nothing is written."""
    with _explained(repo_id):
        user = HfApi().whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"cannot upload to {repo_id!r}: the token of {user['name']} can only read: log in with one that can write "
            "(hf auth login, or HF_TOKEN)"
        )
    owner, _, name = repo_id.rpartition("/")
    owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if owner and owner not in owners:
        raise HubError(
            f"cannot upload to {repo_id!r}: {user['name']} is not in {owner!r}: use {user['name']}/{name}, or an "
            f"organisation of yours ({', '.join(owners[1:]) or 'you have none'})"
        )


def create_repository(repo_id: str, *, private: bool | None) -> None:
    """Create the repository of a model, or leave the one of this name as it is. Raises HubError if that fails."""
    with _explained(repo_id):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)


def upload(folder: Path, repo_id: str, *, private: bool | None) -> str:
    """Upload the files of ``folder`` in one commit, create the repository if it is not there, and return its address.

    Weights that the repository has from an earlier upload and ``folder`` has not are deleted in the same commit.

    Raises:
        HubError: the Hub refuses something or cannot be reached; nothing is changed in ``folder``.
    """
    api = HfApi()
    with _explained(repo_id):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path.relative_to(folder).as_posix(): path for path in files}
        outdated = [name for name in api.list_repo_files(address.repo_id) if name not in names and _is_weights(name)]
        api.create_commit(
            address.repo_id,
            [
                *(CommitOperationAdd(name, _content(path)) for name, path in names.items()),
                *(CommitOperationDelete(name) for name in outdated),
            ],
            commit_message="Upload model",
        )
    return str(address)


def _is_weights(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _WEIGHTS)


def _content(path: Path) -> str | bytes:
    """Return the path of a file, or its text without the names of folders of this machine if it has some."""
    if path.suffix != ".json" or path.name == "tokenizer.json":  # which has texts alone, and is large
        return str(path)
    values = json.loads(path.read_text(encoding="utf-8"))
    local = [key for key in _NAMES_OF_FOLDERS if isinstance(values, dict) and _is_folder(values.get(key))]
    if not local:
        return str(path)
    return json.dumps(values | dict.fromkeys(local), indent=2, ensure_ascii=False).encode()


def _is_folder(name: Any) -> bool:
    return isinstance(name, str) and (name.startswith(("/", "./", "../", "~")) or Path(name).exists())


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Raise HubError, in one line, for the errors of huggingface_hub."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(f"cannot upload to {repo_id!r}: no login: run hf auth login, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        why = "the Hub cannot be reached, or HF_HUB_OFFLINE is set"
        raise HubError(f"cannot upload to {repo_id!r}: {why}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        fixes = {401: ": log in again (hf auth login, or HF_TOKEN)", 403: ": use a token that can write there"}
        fix = fixes.get(status, "") if status is not None else ""
        raise HubError(f"cannot upload to {repo_id!r}: {_first_line(error)}{fix}") from error
    except (_NetworkError, OSError, ValueError) as error:
        raise HubError(f"cannot upload to {repo_id!r}: the Hub cannot be reached ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
