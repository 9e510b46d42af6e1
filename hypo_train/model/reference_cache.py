"""A cache on disk of the reference model's log-probs of preference pairs.

    <folder>/<key>.safetensors    "logps" fp32 (rows, 2), chosen and rejected; metadata with key and checksum

The key is a hash of everything that the values depend on: the pairs' token ids (which reflect tokenizer, template,
truncation and data), every weight of the reference model, the model's code and settings, temperature and compute
dtype. Batch size and kernel change the last bits only and are not part of it. Files are written atomically, so two
runs that compute one key replace each other's equal files. A damaged file is reported and computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from hypo_train.config import Config, ConfigError
from hypo_train.data.plan import Plan
from hypo_train.data.rows import Pair, rows_hash
from hypo_train.distributed.processes import Processes
from hypo_train.model.head_functions import sequence_logprobs_call
from hypo_train.model.policy import Policy
from hypo_train.model.tree_model import ModelError
from hypo_train.model.weight_digest import initial_weights, weight_hashes
from hypo_train.trees.pack import Batcher
from hypo_train.utils.atomic import write_file
from hypo_train.utils.safe_print import safe_print

FORMAT_VERSION = 1  # raised when the file's layout or the computation changes
_SECONDS_PER_LINE = 30.0
# Settings of a model that do not affect its hidden states.
_NOT_COMPUTED_WITH = {"_name_or_path", "transformers_version", "use_cache", "output_attentions", "output_hidden_states"}


def precompute_pays(rows: Sequence[Pair], passes: float, *, shared_prompts: float) -> bool:
    """Return whether one reference pass over ``rows`` costs at most as many tokens as ``passes`` passes in the steps.

    The steps run the reference on a share of the prompts, ``shared_prompts``, for their samples anyway. A pair of such
    a prompt adds only its completions to a step. At equal cost it pays, because other runs can use the values. The
    answer does not depend on what the cache holds, so that a run can be repeated.
    """
    completions = sum(len(row.chosen) + len(row.rejected) for row in rows)
    prompts = sum(len(row.prompt) for row in rows)
    return completions + prompts <= passes * (completions + (1 - shared_prompts) * prompts)


def splits_to_precompute(plan: Plan) -> set[str]:
    """Return the splits ("train", "eval") whose reference log-probs are computed before the first step."""
    config: Config = plan.config
    rows: dict[str, Any] = {"train": plan.train_rows, "eval": plan.eval_rows}
    splits = {split for split in rows if rows[split]}
    if config.precompute_ref_log_probs is not None:
        return splits if config.precompute_ref_log_probs else set()
    if not config.asks_reference_about_pairs or config.kl_estimator == "exact":
        return set()
    epochs = plan.total_steps / plan.steps_per_epoch
    evaluations = 1 + math.ceil(plan.total_steps / config.eval_steps) if config.eval_steps else 1
    pays = {
        "train": precompute_pays(
            rows["train"], epochs, shared_prompts=config.online_fraction if config.draws_samples else 0
        ),
        "eval": precompute_pays(rows["eval"], evaluations, shared_prompts=0),
    }
    return {split for split in splits if pays[split]}


def cache_folder(config: Config) -> Path:
    """Return the cache's folder; it may not exist yet."""
    if config.ref_logps_cache_dir is not None:
        return Path(config.ref_logps_cache_dir)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hypo_train" / "reference_logps"


def require_writable(folder: Path) -> None:
    """Create ``folder`` if it does not exist. Raises ConfigError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"the reference log-probs cannot be kept in {str(folder)!r} ({error.strerror}): set ref_logps_cache_dir to "
            "a folder that can be written, or precompute_ref_log_probs: false"
        ) from error


def pair_reference_logps(
    policy: Policy,
    rows: Sequence[Pair],
    config: Config,
    *,
    batcher: Batcher,
    device: torch.device,
    processes: Processes,
    autocast: bool,
    folder: Path,
    split: str,
    progress: bool,
) -> Tensor:
    """Return the reference model's log-probs of chosen and rejected, fp32 (len(rows), 2) on ``device``.

    Args:
        processes: divide the rows; the main one reads and writes the file.
        autocast: compute under bfloat16 autocast, as the steps do.
        folder: the cache's folder, which must be writable.
        split: the name of the rows in printed lines.
        progress: show the progress and the time left.

    Raises:
        ModelError: a log-prob is not finite.
    """
    path = folder / f"{cache_key(policy, rows, config, autocast=autocast)}.safetensors"
    cached = processes.run_on_main(lambda: _kept(path, len(rows), split))
    if cached is not None:
        return cached.to(device)
    started = time.monotonic()
    label = f"{split}: reference log-probs"
    computed = _computed(policy, rows, config, batcher, device, processes, autocast, label, progress)
    _check_finite(computed, rows)
    spent = tqdm.format_interval(time.monotonic() - started)
    processes.run_on_main(lambda: _keep(path, computed, policy, f"{label} of {len(rows):,} pairs computed in {spent}"))
    return computed.to(device)


def _kept(path: Path, num_rows: int, split: str) -> Tensor | None:
    """Return the log-probs in the file, or None if there is no usable file."""
    if not path.exists():
        return None
    try:
        logps = _read(path, num_rows)
    except (_UnusableError, OSError, SafetensorError) as error:
        _say(f"{split}: {path} is not used, and is computed anew: {error}")
        return None
    _say(f"{split}: reference log-probs of {num_rows:,} pairs read from {path}")
    return logps


def _keep(path: Path, logps: Tensor, policy: Policy, what: str) -> None:
    try:
        _write(path, logps, policy)
    except OSError as error:  # the values are still used if they cannot be stored
        _say(f"{what}, not kept: {error}")
    else:
        _say(f"{what}, kept in {path}")


def cache_key(policy: Policy, rows: Sequence[Pair], config: Config, *, autocast: bool) -> str:
    """Return the SHA-256, in hexadecimal, of everything that the values depend on."""
    base = policy.base
    constants = {name: value for name, value in policy.head().constants().items() if name != "bias"}  # a weight
    facts = {
        "format_version": FORMAT_VERSION,
        "pairs": rows_hash(rows),
        "weights": _reference_weights(policy),
        "model": [type(base).__module__, type(base).__qualname__, transformers.__version__],
        "settings": settings_computed_with(base),
        "head": constants,
        "autocast": autocast,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def settings_computed_with(base: Any) -> dict[str, Any]:
    """Return the settings of a transformers model that affect its hidden states."""
    return {name: value for name, value in base.config.to_dict().items() if name not in _NOT_COMPUTED_WITH}


def _reference_weights(policy: Policy) -> dict[str, list[Any]]:
    """Return hashes of the reference model's weights and buffers."""
    return weight_hashes({**dict(policy.named_buffers()), **initial_weights(policy)})


def _computed(
    policy: Policy,
    rows: Sequence[Pair],
    config: Config,
    batcher: Batcher,
    device: torch.device,
    processes: Processes,
    autocast: bool,
    label: str,
    progress: bool,
) -> Tensor:
    """Return the log-probs, fp32 (len(rows), 2), on the CPU; batches have rows of similar length, the longest first."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i].num_tokens)
    size = config.per_device_eval_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    turns = processes.divide(batches, same_count=config.fsdp)
    own_batches = [batch for batch, _ in turns]
    batch_logps = []
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for batch in _shown(own_batches, label, sum(map(len, own_batches))) if progress else own_batches:
            tree = batcher.pairs([rows[i] for i in batch], []).to(device)
            batch_logps.append(policy.reference(tree, sequence_logprobs_call(tree, config)).float().view(2, -1).T.cpu())
    logps = torch.empty(len(rows), 2, dtype=torch.float32)
    for rank_results in processes.gather(list(zip(own_batches, batch_logps, strict=True))):
        for batch, values in rank_results:
            logps[batch] = values
    return logps


def _shown(batches: Sequence[list[int]], label: str, total: int) -> Iterator[list[int]]:
    """Yield the batches and show progress: a bar on a terminal, a line every 30 seconds elsewhere."""
    with tqdm(total=total, desc=label, unit="pair", dynamic_ncols=True, disable=None) as bar:  # None: off a terminal
        started = said = time.monotonic()
        done = 0
        for batch in batches:
            yield batch
            done += len(batch)
            bar.update(len(batch))
            now = time.monotonic()
            if bar.disable and now - said >= _SECONDS_PER_LINE:
                left = tqdm.format_interval((now - started) / done * (total - done))
                _say(f"{label}  {done:,}/{total:,} pairs  {left} left")
                said = now


def _check_finite(logps: Tensor, rows: Sequence[Pair]) -> None:
    bad = (~logps.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise ModelError(
            f"the reference's log-probs are not finite in {len(bad)} of {len(rows)} pairs, the first of them row "
            f"{rows[bad[0]].row} ({logps[bad[0]].tolist()}): the model's weights or its dtype do not serve this data"
        )


class _UnusableError(Exception):
    """A file of the cache does not hold what its name says."""


def _read(path: Path, num_rows: int) -> Tensor:
    """Return the log-probs of a file, fp32 (num_rows, 2), on the CPU. Raises _UnusableError for a damaged file."""
    content = path.read_bytes()  # not mapped: a mapped file that shrinks kills the process
    logps = safetensors.torch.load(content).get("logps")
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    if metadata.get("key") != path.stem:
        raise _UnusableError("it is of something else")
    if logps is None or logps.shape != (num_rows, 2) or logps.dtype != torch.float32:
        raise _UnusableError(f"it does not hold the log-probs of {num_rows} pairs")
    if metadata.get("sha256") != _digest(logps):
        raise _UnusableError("its content does not match its checksum")
    if not logps.isfinite().all():
        raise _UnusableError("it holds values that are not finite")
    return logps


def _write(path: Path, logps: Tensor, policy: Policy) -> None:
    """Write the file atomically."""
    metadata = {
        "key": path.stem,
        "sha256": _digest(logps),
        "model": str(policy.base.config._name_or_path),
        "rows": str(len(logps)),
        "format_version": str(FORMAT_VERSION),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write_file(path, safetensors.torch.save({"logps": logps}, metadata), shared=True)


def _digest(logps: Tensor) -> str:
    return hashlib.sha256(logps.numpy().tobytes()).hexdigest()


def _say(text: str) -> None:
    with tqdm.external_write_mode():
        safe_print(text)
