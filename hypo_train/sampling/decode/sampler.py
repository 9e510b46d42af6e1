"""The decode sampler: runs the model's own forward pass, and computes and stores each prompt once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.positions import check_sample_length
from hypo_train.sampling.comparison import compute_dtype
from hypo_train.sampling.decode.branches import Branches, KVShape, Rules, attention, num_slots, takes_packed
from hypo_train.sampling.decode.cuda_graphs import CapturedBranches, bucket, memory_layout
from hypo_train.sampling.decode.prefill import prefill
from hypo_train.sampling.decode.support import kv_shape, serves, text_config
from hypo_train.sampling.merged_weights import MergedWeights, is_adapted, linear_layers, quantized, unmergeable
from hypo_train.sampling.protocol import MODELS_OWN, Distribution, PromptKV, Sampler, SampleRequest, Samples, base_model

_FREE_MEMORY_FRACTION = 0.6  # of a device's free memory is for KV; the rest is for activations and logits
_STEPS_BETWEEN_CHECKS = 16  # of whether all rows are done, which waits for the accelerator
# LoRA's two small products in each layer add an estimated 2 ms to a step of an 8B model on an H200. Merging takes an
# estimated 20 ms for each optimizer step and a second copy of the adapted weights, too much for short responses.
_MERGE_FROM_TOKENS = 128
_PREFILL_TOKENS = 16384  # in a pass: enough to keep an accelerator busy, and few enough for its memory
_PREFILL_TOKENS_CPU = 1024  # enough for large products, and few enough that a pass has little padding


class _Draws(NamedTuple):
    """The results for all prompts of a call."""

    tokens: Tensor  # int64 (N, n, T)
    mask: Tensor  # bool (N, n, T)
    logprobs: Tensor  # fp32 (N, n, T)
    ended: Tensor  # bool (N, n)

    def put(self, batch: list[int], branches: Branches) -> None:
        """Store the results for the prompts of `batch`; rows after them only filled up a graph's batch."""
        rows, count = torch.tensor(batch, device=self.tokens.device), len(batch)
        self.tokens[rows], self.mask[rows] = branches.tokens[:count], branches.drawn[:count]
        self.logprobs[rows], self.ended[rows] = branches.logprobs[:count], branches.ended()[:count]


class DecodeSampler(Sampler):
    """Decodes all branches of all prompts together; each prompt is prefilled and stored once.

    A random number depends on (seed, prompt index, sample, token) only. Batches, rows that end early and the number of
    processes therefore change the samples only by rounding.

    Args:
        model: a decoder with an LM head, or a PeftModel around one, that `serves` accepts. A call does not change
            its parameters, gradients, train flags and configs, nor the global random state.
        eos_token_ids: tokens that end a completion; empty = only `max_new_tokens` does.
        pad_token_id: fills a row after its EOS; it may be an EOS itself.
        distribution: the sampling distribution; HyPO's KL estimate is unbiased for the model's own only.
        merge_lora: decode from a copy of the weights with LoRA merged into them, which is updated after
            `weights_changed`. None = from 128 new tokens on, if the adapter is LoRA or DoRA on weights that are not
            packed. Under autocast on CUDA, weights of another dtype are always copied, cast and merged, because each
            step would cast them again.
        capture: run the step as a CUDA graph; None = on CUDA. Its KV buffers are kept until `release`, and prompts are
            padded to the next of 128, 256, 512, ... tokens. A step that cannot be captured raises.
        max_kv_bytes: the most memory of a batch's KV; a batch has at least one prompt. None = one batch on the CPU, and
            0.6 of the free memory elsewhere.
        score: also return `logprobs`, at no cost.

    Raises:
        ValueError: a model that is not supported, or a max_kv_bytes below 1.
    """

    takes_prompt_kv = True

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        distribution: Distribution = MODELS_OWN,
        merge_lora: bool | None = None,
        capture: bool | None = None,
        max_kv_bytes: int | None = None,
        score: bool = False,
    ) -> None:
        if max_kv_bytes is not None and max_kv_bytes < 1:
            raise ValueError(f"max_kv_bytes is {max_kv_bytes}: it must be at least 1, or None")
        self.model = model
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.distribution = distribution
        self.merge_lora = merge_lora
        self.capture = capture
        self.max_kv_bytes = max_kv_bytes
        self.score = score
        if reason := serves(model):
            raise ValueError(f"{reason}: sample with GenerateSampler")
        self._kv_shape = kv_shape(model)
        self._merged: MergedWeights | None = None
        self._outdated = False
        self._captured: CapturedBranches | None = None
        self._captured_key: Any = None

    @property
    def live(self) -> bool:
        """Return False while the sampler decodes from a copy of the weights."""
        return self._merged is None

    def draw(self, request: SampleRequest) -> Samples:
        """Draw the completions that ``request`` asks for.

        Raises:
            ValueError: rows that pass the limit of the model's RoPE, or a ``prompt_kv`` of other prompts.
        """
        prompts, n, max_new_tokens = request.prompts, request.n, request.max_new_tokens
        prompt_kv, prompt_indices = request.prompt_kv, request.prompt_indices
        check_sample_length(base_model(self.model), max(map(len, prompts)) + max_new_tokens)
        if prompt_kv is not None:
            _check_prompt_kv(prompt_kv, prompts)
        device = next(self.model.parameters()).device
        shape = replace(self._kv_shape, dtype=compute_dtype(self.model))
        # Drawn on the host, so that the numbers do not depend on the device.
        generator = torch.Generator().manual_seed(request.seed)
        all_uniforms = torch.rand(
            1 + max(prompt_indices or [len(prompts) - 1]), n, max_new_tokens, dtype=torch.float64, generator=generator
        )
        uniforms = all_uniforms if prompt_indices is None else all_uniforms[list(prompt_indices)]
        draws = _Draws(
            tokens=torch.full(uniforms.shape, self.pad_token_id, device=device),
            mask=torch.zeros(uniforms.shape, dtype=torch.bool, device=device),
            logprobs=torch.zeros(uniforms.shape, device=device),
            ended=torch.zeros(uniforms.shape[:2], dtype=torch.bool, device=device),
        )
        capture = device.type == "cuda" if self.capture is None else self.capture
        widths = _prompt_slots(prompts, prompt_kv, capture)
        with torch.no_grad(), eval_mode(self.model):
            model = self._model_to_decode_from(max_new_tokens)
            batches = self._batches(widths, n * max_new_tokens, shape, device)
            lengths = []
            for batch in batches:
                # A graph has a fixed number of rows: copies of the last prompt fill up the last batch.
                rows = batch + batch[-1:] * (len(batches[0]) - len(batch) if capture else 0)
                branches, step = self._branches(model, shape, uniforms[rows].to(device), widths[batch[-1]], capture)
                self._load_prompts(branches, rows, prompts, prompt_kv)
                lengths.append(self._decode(branches, step))
                draws.put(batch, branches)
                del branches, step  # free their memory before the next batch
        length = max(lengths)
        return Samples(
            tokens=draws.tokens[..., :length].flatten(0, 1),
            mask=draws.mask[..., :length].flatten(0, 1),
            logprobs=draws.logprobs[..., :length].flatten(0, 1) if self.score else None,
            ended=draws.ended.flatten(),
            version=self.version,
        )

    def weights_changed(self, step: int) -> None:
        """Record that the weights changed; a copy of them is updated by the next `sample`."""
        super().weights_changed(step)
        self._outdated = True

    def release(self) -> None:
        """Free captured graphs with their KV buffers, and the copy of the weights."""
        self._captured = self._merged = None

    def _model_to_decode_from(self, max_new_tokens: int) -> Any:
        """Return the live model, or an up-to-date copy of it."""
        dtype, device = compute_dtype(self.model), next(self.model.parameters()).device
        needed, wanted = copy_to_decode_from(
            self.model, dtype, device.type, max_new_tokens=max_new_tokens, merge_lora=self.merge_lora
        )
        if not needed:
            self._merged = None
            return self.model
        if self._merged is None or self._merged.dtype != wanted:
            self.release()  # before the new copy takes memory
            self._merged = MergedWeights(self.model, wanted)
        elif self._outdated or self._merged.is_stale():
            self._merged.refresh()
        self._outdated = False
        return self._merged.model

    def _batches(self, widths: list[int], new_slots: int, shape: KVShape, device: torch.device) -> list[list[int]]:
        """Return the indices of the prompts, from the shortest to the longest, in batches whose KV fits."""
        limit = self.max_kv_bytes
        if limit is None and device.type != "cpu":
            held = self._captured.branches.nbytes() if self._captured else 0
            limit = int(_FREE_MEMORY_FRACTION * (_free_bytes(device) + held))
        batches: list[list[int]] = [[]]
        for p in sorted(range(len(widths)), key=widths.__getitem__):
            # The longest prompt so far sets the width of the batch.
            needed = (len(batches[-1]) + 1) * num_slots(widths[p], new_slots) * shape.bytes_per_token()
            if batches[-1] and limit is not None and needed > limit:
                batches.append([])
            batches[-1].append(p)
        return batches

    def _branches(
        self, model: Any, shape: KVShape, uniforms: Tensor, width: int, capture: bool
    ) -> tuple[Branches, Callable[[int], None]]:
        """Return buffers for the prompts and samples of `uniforms`, and the function that takes a step in them."""
        config = text_config(model)
        packed = takes_packed(config)
        key = (tuple(uniforms.shape), width, shape, packed)
        held = self._captured
        if held and self._captured_key == key and held.memory_layout == memory_layout(model):
            held.branches.reset(uniforms)
            return held.branches, held.step
        held = self._captured = None  # before the new graphs take memory
        eos_token_ids = torch.tensor(self.eos_token_ids, dtype=torch.int64, device=uniforms.device)
        rules = Rules(self.distribution, eos_token_ids, self.pad_token_id)
        branches = Branches(model, shape, rules, uniforms, width, packed=packed)
        if not capture:
            return branches, branches.step
        with attention(config, packed=packed):
            self._captured, self._captured_key = CapturedBranches(branches), key
        branches.reset(uniforms)
        return branches, self._captured.step

    def _load_prompts(
        self, branches: Branches, batch: list[int], prompts: list[list[int]], prompt_kv: PromptKV | None
    ) -> None:
        """Load keys, values and logits of `batch`'s prompts, from `prompt_kv` or by a forward pass."""
        if prompt_kv is not None:
            branches.load(0, prompt_kv.rows(batch))
            return
        with attention(text_config(branches.model), packed=False):
            for part in _prefill_parts(batch, prompts, branches.token.device):
                rows = [prompts[batch[i]] for i in part]
                branches.load(part.start, prefill(branches.model, rows, pad_token_id=self.pad_token_id))

    def _decode(self, branches: Branches, step: Callable[[int], None]) -> int:
        """Decode until every branch has ended, and return an upper bound on their tokens."""
        config = text_config(branches.model)
        drops_rows = branches.token.device.type == "cpu" and self._captured is None
        branches.start()
        with attention(config, packed=takes_packed(config)):
            for count in range(1, branches.T):  # tokens drawn so far
                if drops_rows:
                    for row in reversed(branches.done.all(1).nonzero().flatten().tolist()):
                        branches.drop(row)
                    if not len(branches.token):
                        return count
                elif count % _STEPS_BETWEEN_CHECKS == 0 and branches.done.all():
                    return count
                step(branches.L + branches.n * count)
        return branches.T


def copy_to_decode_from(
    model: Any, dtype: torch.dtype, device_type: str, *, max_new_tokens: int, merge_lora: bool | None = None
) -> tuple[bool, torch.dtype | None]:
    """Return whether decoding in ``dtype`` needs a :class:`MergedWeights` of the model, and the dtype of that copy."""
    layers = [layer for _, layer in linear_layers(base_model(model))]
    cast = device_type == "cuda" and any(layer.weight.dtype != dtype for layer in layers)
    mergeable = unmergeable(model) is None and quantized(model) is None
    long = max_new_tokens >= _MERGE_FROM_TOKENS
    merge = any(map(is_adapted, layers)) and (long and mergeable if merge_lora is None else merge_lora)
    return merge or (cast and mergeable), dtype if cast else None


def _prompt_slots(prompts: list[list[int]], prompt_kv: PromptKV | None, capture: bool) -> list[int]:
    """Return how many KV slots each prompt needs, before the prompts of a batch are padded."""
    widths = [len(prompt) for prompt in prompts]
    if prompt_kv is not None:
        widths = [prompt_kv.mask.shape[1]] * len(prompts)
    return [bucket(max(widths))] * len(prompts) if capture else widths


def _check_prompt_kv(kv: PromptKV, prompts: list[list[int]]) -> None:
    if kv.mask.sum(1).tolist() != [len(prompt) for prompt in prompts]:
        raise ValueError("prompt_kv belongs to other prompts: its mask has other numbers of tokens")


def prefill_tokens(device_type: str) -> int:
    """Return the most tokens, padding included, of a forward pass over several prompts."""
    return _PREFILL_TOKENS_CPU if device_type == "cpu" else _PREFILL_TOKENS


def _prefill_parts(batch: list[int], prompts: list[list[int]], device: torch.device) -> Iterator[range]:
    """Yield ranges of `batch` whose padded prompts fit in one forward pass."""
    limit = prefill_tokens(device.type)
    start = 0
    for i, p in enumerate(batch):
        if i > start and (i + 1 - start) * len(prompts[p]) > limit:
            yield range(start, i)
            start = i
    yield range(start, len(batch))


def _free_bytes(device: torch.device) -> int:
    """Return the free memory: the driver's, and what torch has reserved but does not use."""
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)
