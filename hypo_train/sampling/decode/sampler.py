"""The fast engine: the model's own forward over the live weights, each prompt computed and kept once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.tree_model import attention_window
from hypo_train.sampling.decode.branches import Branches, KVShape, Rules, attention, num_slots, takes_packed
from hypo_train.sampling.decode.cuda_graphs import CapturedBranches, bucket, fingerprint
from hypo_train.sampling.decode.prefill import prefill
from hypo_train.sampling.decode.support import (
    compute_dtype,
    kv_shape,
    serves,
    text_config,
)
from hypo_train.sampling.merged_weights import MergedWeights, is_adapted, linear_layers, quantized, unmergeable
from hypo_train.sampling.protocol import MODELS_OWN, Distribution, PromptKV, Sampler, SampleRequest, Samples, base_model

_FREE_MEMORY_SHARE = 0.6  # of what a device has free goes to KV; the rest is for activations and logits
_STEPS_BETWEEN_CHECKS = 16  # of `done`, which an accelerator must be waited for
# LoRA's two small products a layer add an estimated 2 ms to a step of an 8B model on an H200; merging takes an
# estimated 20 ms an optimizer step and a second copy of the adapted weights. Short responses are not worth that.
_MERGE_FROM_TOKENS = 128
_PREFILL_TOKENS = 16384  # a pass; large enough to keep an accelerator busy, small enough for its memory
_PREFILL_TOKENS_CPU = 1024  # large products already, and rows of one pass differ little in length


class _Draws(NamedTuple):
    """Of all prompts of a call."""

    tokens: Tensor  # int64 (N, n, T)
    mask: Tensor  # bool (N, n, T)
    logprobs: Tensor  # fp32 (N, n, T)
    ended: Tensor  # bool (N, n)

    def put(self, batch: list[int], branches: Branches) -> None:
        """What was drawn for the prompts of `batch`; rows beyond them only filled up a graph."""
        rows, count = torch.tensor(batch, device=self.tokens.device), len(batch)
        self.tokens[rows], self.mask[rows] = branches.tokens[:count], branches.drawn[:count]
        self.logprobs[rows], self.ended[rows] = branches.logprobs[:count], branches.ended()[:count]


class DecodeSampler(Sampler):
    """Draws by decoding all branches of all prompts together; prompts are prefilled, and their KV held, once.

    Random numbers belong to (seed, the prompt's number, token), so neither the plan of batches nor an early end of
    other rows, nor how many processes divide a draw, changes it by more than the rounding of a product of another
    shape.

    Args:
        model: a decoder with a language-model head, or a PeftModel around one, that `serves` finds nothing
            against. A call leaves its parameters, gradients, train flags and configs, and the global random
            state, as they were.
        eos_token_ids: tokens that end a completion; empty = only `max_new_tokens` does.
        pad_token_id: what fills a row after its EOS; may be an EOS itself.
        distribution: what tokens are drawn from; HyPO's KL estimate is unbiased for the model's own alone.
        merge_lora: decode from a copy with LoRA merged into it, made anew after `weights_changed`, instead of
            adding the adapter's products at every step. None = for 128 new tokens and more, where the
            adapter is LoRA or DoRA on weights that are not packed. Under autocast on CUDA, weights of another
            dtype are copied, cast and merged in any case: a step would cast them all.
        capture: run the step as a CUDA graph; None = on CUDA. Its KV buffers stay from call to call, until
            `release`; prompts fill them up to the next of 128, 256, 512, ... tokens. A step that cannot be
            captured raises.
        max_kv_bytes: prompts are decoded in batches whose KV takes at most this much, at least a prompt each.
            None = all at once on the CPU, and as many as fit 0.6 of the free memory elsewhere.
        score: also give `logprobs`; they cost nothing.

    Raises:
        ValueError: a model that is not served, or a max_kv_bytes below 1.
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
        """False while there is a copy of the weights to decode from."""
        return self._merged is None

    def draw(self, request: SampleRequest) -> Samples:
        """Draw the completions that ``request`` asks for.

        Raises:
            ValueError: rows longer than the model's sliding window, or a ``prompt_kv`` of other prompts.
        """
        prompts, n, max_new_tokens = request.prompts, request.n, request.max_new_tokens
        prompt_kv, prompt_indices = request.prompt_kv, request.prompt_indices
        self._check_window(max(map(len, prompts)) + max_new_tokens)
        if prompt_kv is not None:
            _check_prompt_kv(prompt_kv, prompts)
        device = next(self.model.parameters()).device
        shape = replace(self._kv_shape, dtype=compute_dtype(self.model))
        # On the host: the same numbers whatever the device.
        generator = torch.Generator().manual_seed(request.seed)
        of_all = torch.rand(
            1 + max(prompt_indices or [len(prompts) - 1]), n, max_new_tokens, dtype=torch.float64, generator=generator
        )
        uniforms = of_all if prompt_indices is None else of_all[list(prompt_indices)]
        draws = _Draws(
            tokens=torch.full(uniforms.shape, self.pad_token_id, device=device),
            mask=torch.zeros(uniforms.shape, dtype=torch.bool, device=device),
            logprobs=torch.zeros(uniforms.shape, device=device),
            ended=torch.zeros(uniforms.shape[:2], dtype=torch.bool, device=device),
        )
        capture = device.type == "cuda" if self.capture is None else self.capture
        widths = _prompt_slots(prompts, prompt_kv, capture)
        with torch.no_grad(), eval_mode(self.model):
            model = self._up_to_date(max_new_tokens)
            batches = self._batches(widths, n * max_new_tokens, shape, device)
            lengths = []
            for batch in batches:
                # A graph has as many rows each time: the last prompt fills up the last batch's.
                rows = batch + batch[-1:] * (len(batches[0]) - len(batch) if capture else 0)
                branches, step = self._branches(model, shape, uniforms[rows].to(device), widths[batch[-1]], capture)
                self._plant(branches, rows, prompts, prompt_kv)
                lengths.append(self._decode(branches, step))
                draws.put(batch, branches)
                del branches, step  # before the next batch takes memory
        length = max(lengths)
        return Samples(
            tokens=draws.tokens[..., :length].flatten(0, 1),
            mask=draws.mask[..., :length].flatten(0, 1),
            logprobs=draws.logprobs[..., :length].flatten(0, 1) if self.score else None,
            ended=draws.ended.flatten(),
            version=self.version,
        )

    def weights_changed(self, step: int) -> None:
        """Live weights need nothing; a copy is made anew when the next `sample` reads it."""
        super().weights_changed(step)
        self._outdated = True

    def release(self) -> None:
        """Drop captured graphs with their KV buffers, and the copy of the weights."""
        self._captured = self._merged = None

    def _check_window(self, longest: int) -> None:
        window = attention_window(base_model(self.model))
        if window is not None and longest > window:
            raise ValueError(
                f"prompt and completion may have {longest} tokens, more than the {window} that the model's sliding "
                "window shows: sample with GenerateSampler, or lower max_new_tokens"
            )

    def _up_to_date(self, max_new_tokens: int) -> Any:
        """The model to decode from: the live one, or a copy of its weights as they are now."""
        dtype, device = compute_dtype(self.model), next(self.model.parameters()).device
        needed, wanted = copy_to_decode_from(
            self.model, dtype, device.type, max_new_tokens=max_new_tokens, merge_lora=self.merge_lora
        )
        if not needed:
            self._merged = None
            return self.model
        if self._merged is None or self._merged.dtype != wanted:
            self.release()  # so that there are never two
            self._merged = MergedWeights(self.model, wanted)
        elif self._outdated or self._merged.is_stale():
            self._merged.refresh()
        self._outdated = False
        return self._merged.model

    def _batches(self, widths: list[int], new_slots: int, shape: KVShape, device: torch.device) -> list[list[int]]:
        """Prompts by number, from the shortest to the longest, in batches whose KV fits."""
        limit = self.max_kv_bytes
        if limit is None and device.type != "cpu":
            held = self._captured.branches.nbytes() if self._captured else 0
            limit = int(_FREE_MEMORY_SHARE * (_free_bytes(device) + held))
        batches: list[list[int]] = [[]]
        for p in sorted(range(len(widths)), key=widths.__getitem__):
            # The longest so far sets the width of all.
            needed = (len(batches[-1]) + 1) * num_slots(widths[p], new_slots) * shape.bytes_per_token()
            if batches[-1] and limit is not None and needed > limit:
                batches.append([])
            batches[-1].append(p)
        return batches

    def _branches(
        self, model: Any, shape: KVShape, uniforms: Tensor, width: int, capture: bool
    ) -> tuple[Branches, Callable[[int], None]]:
        """Buffers for as many prompts and draws as `uniforms` has, and how to take a step in them."""
        config = text_config(model)
        packed = takes_packed(config)
        key = (tuple(uniforms.shape), width, shape, packed)
        held = self._captured
        if held and self._captured_key == key and held.fingerprint == fingerprint(model):
            held.branches.reset(uniforms)
            return held.branches, held.step
        held = self._captured = None  # before its successor takes memory
        eos_token_ids = torch.tensor(self.eos_token_ids, dtype=torch.int64, device=uniforms.device)
        rules = Rules(self.distribution, eos_token_ids, self.pad_token_id)
        branches = Branches(model, shape, rules, uniforms, width, packed=packed)
        if not capture:
            return branches, branches.step
        with attention(config, packed=packed):
            self._captured, self._captured_key = CapturedBranches(branches), key
        branches.reset(uniforms)
        return branches, self._captured.step

    def _plant(
        self, branches: Branches, batch: list[int], prompts: list[list[int]], prompt_kv: PromptKV | None
    ) -> None:
        """Load the prompts of `batch`, computed here or taken from `prompt_kv`."""
        if prompt_kv is not None:
            branches.load(0, prompt_kv.rows(batch))
            return
        with attention(text_config(branches.model), packed=False):
            for part in _prefill_parts(batch, prompts, branches.token.device):
                rows = [prompts[batch[i]] for i in part]
                branches.load(part.start, prefill(branches.model, rows, pad_token_id=self.pad_token_id))

    def _decode(self, branches: Branches, step: Callable[[int], None]) -> int:
        """Grow every branch to its end; how many tokens the longest may have."""
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
    """Whether decoding in ``dtype`` reads a :class:`MergedWeights` of the model's weights, and the dtype of that."""
    layers = [layer for _, layer in linear_layers(base_model(model))]
    cast = device_type == "cuda" and any(layer.weight.dtype != dtype for layer in layers)
    mergeable = unmergeable(model) is None and quantized(model) is None
    long = max_new_tokens >= _MERGE_FROM_TOKENS
    merge = any(map(is_adapted, layers)) and (long and mergeable if merge_lora is None else merge_lora)
    return merge or (cast and mergeable), dtype if cast else None


def _prompt_slots(prompts: list[list[int]], prompt_kv: PromptKV | None, capture: bool) -> list[int]:
    """How many KV slots each prompt takes, before its own are padded to its batch's."""
    widths = [len(prompt) for prompt in prompts]
    if prompt_kv is not None:
        widths = [prompt_kv.mask.shape[1]] * len(prompts)
    return [bucket(max(widths))] * len(prompts) if capture else widths


def _check_prompt_kv(kv: PromptKV, prompts: list[list[int]]) -> None:
    if kv.mask.sum(1).tolist() != [len(prompt) for prompt in prompts]:
        raise ValueError("prompt_kv is not of these prompts: its mask counts other numbers of tokens")


def prefill_tokens(device_type: str) -> int:
    """The most tokens, padding included, that a pass over several prompts has."""
    return _PREFILL_TOKENS_CPU if device_type == "cpu" else _PREFILL_TOKENS


def _prefill_parts(batch: list[int], prompts: list[list[int]], device: torch.device) -> Iterator[range]:
    """Consecutive places in `batch` whose prompts, padded, are one pass."""
    limit = prefill_tokens(device.type)
    start = 0
    for i, p in enumerate(batch):
        if i > start and (i + 1 - start) * len(prompts[p]) > limit:
            yield range(start, i)
            start = i
    yield range(start, len(batch))


def _free_bytes(device: torch.device) -> int:
    """What the driver has, and what torch holds without using it."""
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)
