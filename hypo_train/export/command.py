"""Export a run: load its weights, and write them as a folder, atomically."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from hypo_train.checkpoint.files import save_folder
from hypo_train.checkpoint.hub import check_login, upload
from hypo_train.checkpoint.model_card import write_card
from hypo_train.config import ConfigError, require_trust
from hypo_train.export.settings import ExportSettings
from hypo_train.export.source import Source
from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.source import generation_config, list_turn_end, load_tokenizer, read_architecture
from hypo_train.model.tree_model import ModelError
from hypo_train.sampling.merged_weights import merged_weights, unties
from hypo_train.utils.errors import HubError
from hypo_train.utils.quiet import quiet_libraries


def run(settings: ExportSettings) -> int:
    """Write the folder and print what it holds. Returns the exit status 0."""
    quiet_libraries()
    if settings.push_to_hub is not None:
        check_login(settings.push_to_hub)
    source = Source.find(settings.run_or_checkpoint)
    require_trust(source.config, given=settings.trust_remote_code, where=source.folder)
    writes_whole_model = _writes_whole_model(settings, source)
    tokenizer = load_tokenizer(source.config)
    start = read_architecture(source.config)
    trained = source.load(pad_token_id=tokenizer.pad_token_id)
    dtype = getattr(torch, settings.dtype) if settings.dtype else (start.dtype or torch.float32)

    def write(folder: Path) -> None:
        if writes_whole_model:
            save_whole_model(trained, folder, dtype, generation_config(source.config))
        else:
            trained.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        list_turn_end(folder, tokenizer)
        write_card(folder, source.config, source.run, step=_step(source))

    save_folder(settings.output_dir, write, advice="")
    kind = str(dtype).removeprefix("torch.") if writes_whole_model else "adapter"
    print(f"{source.folder} exported to {settings.output_dir} ({kind})")
    if settings.push_to_hub is not None:
        print(f"uploaded to {_uploaded(settings.output_dir, settings.push_to_hub, private=settings.hub_private_repo)}")
    return 0


def _uploaded(folder: Path, repo_id: str, *, private: bool | None) -> str:
    """Upload the folder and return its address. Raises HubError, which says that the folder is complete."""
    try:
        return upload(folder, repo_id, private=private)
    except HubError as error:
        raise HubError(
            f"{folder} is complete, but not uploaded: {error}; repeat it with another --output_dir"
        ) from error


def _writes_whole_model(settings: ExportSettings, source: Source) -> bool:
    """Return True to write a full model, False for an adapter. Raises ConfigError for flags that do not fit."""
    adapter = source.config.use_peft and not source.config.spec.trains_reward_model
    if settings.merge and not source.config.use_peft:
        raise ConfigError("--merge: the run trained no adapter, so there is nothing to merge: leave it out")
    if adapter and not settings.merge and settings.dtype is not None:
        raise ConfigError(f"--dtype {settings.dtype}: an adapter keeps the float32 it was trained in, add --merge")
    return settings.merge or not adapter


def _step(source: Source) -> int | None:
    return int(source.folder.resolve().name.removeprefix("checkpoint-")) if source.is_checkpoint else None


def save_whole_model(
    trained: Policy | RewardModel, folder: Path, dtype: torch.dtype, generation: GenerationConfig | None
) -> None:
    """Merge the adapters, and save the model as its transformers class does.

    Raises:
        ModelError: an adapter cannot be merged, or a weight is not finite in ``dtype``.
    """
    try:
        weights = dict(merged_weights(trained.model, dtype, embeddings=True))
    except ValueError as error:
        raise ModelError(str(error)) from error
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ModelError(f"{broken[0]} is not finite in {str(dtype).removeprefix('torch.')}: use --dtype float32")
    plain = _without_adapters(trained.base, dtype, unties=unties(trained.model))
    weights |= {name: buffer for name, buffer in trained.base.named_buffers() if name in plain.state_dict()}
    unknown = plain.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    plain.tie_weights()
    missing = [name for name, tensor in plain.state_dict().items() if tensor.is_meta]
    if unknown or missing:
        name = (unknown + missing)[0]
        raise ModelError(f"{type(plain).__name__} cannot be written: {name} is not in the model or has no value")
    if generation is not None:
        plain.generation_config = generation
    plain.save_pretrained(folder)


def _without_adapters(base: Any, dtype: torch.dtype, *, unties: bool) -> Any:
    """Return a model of the same class without adapters, on the meta device."""
    config = copy.deepcopy(base.config)
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for part in (config, config.get_text_config()) if unties else ():
        part.tie_word_embeddings = False
    with torch.device("meta"):
        return type(base)(config).eval()
