"""Uploading to the Hub: what is asked before training, what is sent after it, and what a failure says."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, RepoUrl
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

import hypo_train.checkpoint.hub as hub
from hypo_train.cli import main
from hypo_train.config import ConfigError, load_config
from hypo_train.train import train
from hypo_train.utils.errors import HubError

httpx = import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
USER = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


class FakeHub:
    """Stands in for HfApi: records the calls, and keeps the files of the one repository."""

    def __init__(self):
        self.user, self.calls, self.files, self.failures = USER, [], {}, {}

    def __call__(self):
        return self

    def _called(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.failures:
            raise self.failures[name]

    def whoami(self):
        self._called("whoami")
        return self.user

    def create_repo(self, repo_id, *, private, exist_ok):
        self._called("create_repo", repo_id, private, exist_ok)
        full_name = repo_id if "/" in repo_id else f"me/{repo_id}"
        return RepoUrl(f"https://huggingface.co/{full_name}", endpoint="https://huggingface.co")

    def list_repo_files(self, repo_id):
        return list(self.files)

    def create_commit(self, repo_id, operations, *, commit_message):
        self._called("create_commit", repo_id)
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del self.files[operation.path_in_repo]
            else:
                assert isinstance(operation, CommitOperationAdd)
                with operation.as_file() as file:
                    self.files[operation.path_in_repo] = file.read()


@pytest.fixture
def fake(monkeypatch):
    api = FakeHub()
    monkeypatch.setattr(hub, "HfApi", api)
    return api


def refused(status):
    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    return HfHubHTTPError(f"{status} from the Hub", response=httpx.Response(status, request=request))


def names_of(fake):
    return [call[0] for call in fake.calls]


@pytest.mark.parametrize("way", [{}, {"use_peft": True, "lora_r": 4}], ids=["full", "lora"])
def test_the_final_model_is_uploaded_without_local_names(settings, fake, tmp_path, way):
    fake.files = {"model-00001-of-00002.safetensors": b"", "notes.gguf": b"", "adapter_config.json": b""}
    config = settings(algorithm="dpo", push_to_hub=True, hub_model_id="lab/tiny", hub_private_repo=True, **way)
    result = train(config, progress=False)
    assert result.hub_url == "https://huggingface.co/lab/tiny"
    assert names_of(fake) == ["whoami", "create_repo", "create_repo", "create_commit"]
    assert ("create_repo", "lab/tiny", True, True) in fake.calls
    sent = {path.name for path in result.model_dir.iterdir()}
    assert fake.files.keys() == sent | {"notes.gguf"}, "outdated weights are deleted, other files are kept"
    assert {"README.md", "tokenizer.json"} < sent
    weights = "adapter_model.safetensors" if way else "model.safetensors"
    assert fake.files[weights] == (result.model_dir / weights).read_bytes()
    for folder in (tmp_path, config.model_name_or_path, config.dataset_name, config.output_dir):
        assert not [name for name, content in fake.files.items() if str(folder).encode() in content]
    if way:
        assert json.loads(fake.files["adapter_config.json"])["base_model_name_or_path"] is None
        kept = json.loads((result.model_dir / "adapter_config.json").read_text())
        assert kept["base_model_name_or_path"] == config.model_name_or_path, "the saved adapter still loads"


def test_nothing_is_sent_unless_asked_for(settings, fake):
    train(settings(algorithm="dpo", hub_model_id="lab/tiny"), progress=False)
    assert fake.calls == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (LocalTokenNotFoundError("no token"), "no login: run hf auth login, or set HF_TOKEN"),
        (refused(401), "401 from the Hub: log in again"),
        (OfflineModeIsEnabled("offline mode"), "the Hub cannot be reached, or HF_HUB_OFFLINE is set"),
        (httpx.ConnectError("no route"), "the Hub cannot be reached (no route)"),
    ],
)
def test_a_login_that_fails_is_named_before_training(settings, fake, failure, message):
    fake.failures["whoami"] = failure
    with pytest.raises(HubError) as caught:
        train(settings(algorithm="dpo", push_to_hub=True, hub_model_id="lab/tiny"), progress=False)
    assert str(caught.value).startswith(f"cannot upload to 'lab/tiny': {message}")
    assert names_of(fake) == ["whoami"]


@pytest.mark.parametrize(
    ("user", "repo_id", "message"),
    [
        ({**USER, "auth": {"accessToken": {"role": "read"}}}, "lab/tiny", "the token of me can only read"),
        (USER, "others/tiny", "me is not in 'others': use me/tiny, or an organisation of yours (lab)"),
        ({"name": "me"}, "others/tiny", "use me/tiny, or an organisation of yours (you have none)"),
    ],
)
def test_a_login_that_may_not_write_is_named(fake, user, repo_id, message):
    fake.user = user
    with pytest.raises(HubError, match=message.replace("(", r"\(").replace(")", r"\)")):
        hub.check_login(repo_id)


@pytest.mark.parametrize("repo_id", ["tiny", "me/tiny", "lab/tiny"])
def test_ones_own_and_ones_organisations_names_are_taken(fake, repo_id):
    hub.check_login(repo_id)


def test_a_repository_that_cannot_be_created_stops_the_run(settings, fake):
    fake.failures["create_repo"] = refused(403)
    config = settings(algorithm="dpo", push_to_hub=True, hub_model_id="lab/tiny")
    with pytest.raises(HubError, match="403 from the Hub: use a token that can write there"):
        train(config, progress=False)


def test_a_failing_upload_loses_nothing_and_says_how_to_repeat(settings, fake, capsys):
    fake.failures["create_commit"] = httpx.ReadTimeout("timed out")
    config = settings(algorithm="dpo", push_to_hub=True, hub_model_id="lab/tiny")
    with pytest.raises(HubError) as caught:
        train(config, progress=False)
    repeat = f"python -m hypo_train export {config.output_dir} --output_dir FOLDER --push_to_hub lab/tiny"
    assert str(caught.value).endswith(f"the Hub cannot be reached (timed out); to upload it: {repeat}")
    assert "\n" not in str(caught.value)
    flags = repeat.replace("FOLDER", f"{config.output_dir}-first").split()[3:]
    assert main(flags) == 2
    assert f"{flags[3]} is complete, but not uploaded: cannot upload to 'lab/tiny'" in capsys.readouterr().err
    fake.failures = {}
    folder = f"{config.output_dir}-again"
    assert main([*repeat.replace("FOLDER", folder).split()[3:], "--hub_private_repo"]) == 0
    assert "uploaded to https://huggingface.co/lab/tiny" in capsys.readouterr().out
    assert "model.safetensors" in fake.files


def test_only_the_main_process_uploads(settings, fake, monkeypatch):
    import hypo_train.train as module

    config = settings(push_to_hub=True, hub_model_id="lab/tiny")
    result = module.Result(None, None)
    monkeypatch.setattr(module, "refuse_to_overwrite", lambda config: None)
    monkeypatch.setattr(module, "_train", lambda run, progress: result)
    processes = SimpleNamespace(is_main=False, report_failures=nullcontext)
    monkeypatch.setattr(module, "prepare", lambda config, show: SimpleNamespace(config=config, processes=processes))
    assert train(config) is result
    assert fake.calls == []


@pytest.mark.parametrize(
    "name", ["a/b/c", "https://huggingface.co/a/b", "a--b", "a/b.git", ".a", "a b", "a/", "x" * 97]
)
def test_a_name_that_no_repository_can_have_is_refused(name):
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--push_to_hub", "--hub_model_id", name]
    with pytest.raises(ConfigError, match="should be organisation/name or name"):
        load_config(flags)
    assert main(["export", "runs/x", "--output_dir", "out", "--push_to_hub", name]) == 2


def test_the_repository_must_be_named():
    flags = ["--model_name_or_path", "m", "--dataset_name", "d"]
    with pytest.raises(ConfigError, match="push_to_hub=true without hub_model_id"):
        load_config([*flags, "--push_to_hub"])
    [warning] = load_config([*flags, "--hub_model_id", "lab/tiny"]).warnings()
    assert warning == "hub_model_id='lab/tiny' has no effect without push_to_hub: true"
