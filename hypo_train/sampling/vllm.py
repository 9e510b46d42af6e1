"""The vLLM sampler: vLLM in this process and on the same GPU, with its own copy of the weights."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import torch

from hypo_train.model.positions import check_sample_length, rope_limit
from hypo_train.sampling.merged_weights import merged_weights, unties
from hypo_train.sampling.protocol import MODELS_OWN, Distribution, Sampler, SampleRequest, Samples, base_model


class VLLMSampler(Sampler):
    """Samples with vLLM, which needs memory for its own copy of the weights and for a KV pool.

    Args:
        model: the trained model, or a PeftModel around it; its weights are copied to vLLM with LoRA merged.
        name_or_path: the checkpoint that vLLM builds its model from, of the same architecture.
        eos_token_ids, pad_token_id, distribution, score: see ``GenerateSampler``.
        dtype: vLLM's compute dtype.
        gpu_memory_utilization: the fraction of the GPU's memory for vLLM's weights and KV.
        max_model_len: the most tokens of prompt and completion; None = the model's own limit. At most the length up to
            which LongRoPE has its short factors: with a larger one, vLLM gives every row the long factors.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the adapter is on embeddings that the LM head shares; vLLM has one matrix for both.
    """

    live = False

    def __init__(
        self,
        model: Any,
        name_or_path: str,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        distribution: Distribution = MODELS_OWN,
        score: bool = False,
        dtype: str = "bfloat16",
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
    ) -> None:
        if unties(model):
            raise ValueError("the adapter is on the matrix that embeddings and head share, which vLLM cannot separate")
        if (limit := rope_limit(base_model(model).config)) is not None:
            max_model_len = min(max_model_len or limit.tokens, limit.tokens)
        self.distribution = distribution
        # Without this, vLLM's engine runs in another process, which cannot read the trainer's tensors.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm
        except ImportError as error:
            raise ImportError("VLLMSampler needs vLLM: pip install 'hypo-kernels[vllm]'") from error
        self._vllm = vllm
        self._engine = vllm.LLM(
            model=name_or_path,
            dtype=dtype,
            load_format="safetensors",  # not a pickle, which could run code
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_len,
            generation_config="vllm",  # not the checkpoint's, which could change the distribution
            logprobs_mode="processed_logprobs",  # under the sampling distribution
            enable_sleep_mode=True,
        )
        self.model = model
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.score = score
        self._outdated = True  # the trained model can differ from the checkpoint from the start
        self._asleep = False

    def draw(self, request: SampleRequest) -> Samples:
        check_sample_length(base_model(self.model), max(map(len, request.prompts)) + request.max_new_tokens)
        self._bring_up_to_date()
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompt} for prompt in request.prompts],
            [self._params(request, p) for p in request.prompt_indices or range(len(request.prompts))],
            use_tqdm=False,
        )
        completions = [c for out in outputs for c in sorted(out.outputs, key=lambda c: c.index)]
        return self._samples(completions)

    def weights_changed(self, step: int) -> None:
        """Record that the weights changed; the next `sample` copies them to vLLM."""
        self.version = step
        self._outdated = True

    def release(self) -> None:
        """Put vLLM to sleep: its weights move to host memory, and its KV pool is freed."""
        if not self._asleep:
            self._engine.sleep(level=1)
            self._asleep = True

    def _bring_up_to_date(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False
            self._outdated = True  # the weights that come back are old
        if self._outdated:
            self._engine.apply_model(self._push)
            self._engine.reset_prefix_cache()  # computed with the old weights
            self._outdated = False

    def _push(self, engine_model: Any) -> None:
        engine_model.load_weights(merged_weights(self.model))

    def _params(self, request: SampleRequest, prompt: int) -> Any:
        """Return the parameters for one prompt. Its seed is its own, or equal prompts would get equal completions."""
        return self._vllm.SamplingParams(
            n=request.n,
            temperature=float(self.distribution.temperature),
            top_p=float(self.distribution.top_p),
            top_k=self.distribution.top_k,
            max_tokens=request.max_new_tokens,
            ignore_eos=True,  # only stop_token_ids end a completion
            stop_token_ids=self.eos_token_ids,
            logprobs=0 if self.score else None,  # of the drawn token only
            seed=random.Random(f"{request.seed}/{prompt}").getrandbits(62),
            detokenize=False,
        )

    def _samples(self, completions: Sequence[Any]) -> Samples:
        device = next(self.model.parameters()).device
        rows = [list(completion.token_ids) for completion in completions]
        length = max(map(len, rows))
        tokens = torch.tensor([row + [self.pad_token_id] * (length - len(row)) for row in rows])
        mask = torch.arange(length) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
        logprobs = None
        if self.score:
            scores = [
                [step[token].logprob for token, step in zip(row, completion.logprobs, strict=True)]
                for row, completion in zip(rows, completions, strict=True)
            ]
            logprobs = torch.tensor([row + [0.0] * (length - len(row)) for row in scores]).to(device)
        return Samples(
            tokens=tokens.to(device),
            mask=mask.to(device),
            logprobs=logprobs,
            ended=torch.tensor([row[-1] in self.eos_token_ids for row in rows]).to(device),
            version=self.version,
        )
