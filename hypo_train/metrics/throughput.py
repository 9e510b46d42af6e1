"""Count rows, tokens and model FLOPs of a log interval on the host, from sequence lengths, and turn them into rates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from hypo_train.metrics.flops import ModelFlops, Size
from hypo_train.trees.tree import Tree


class Throughput:
    """Count rows, tokens and model FLOPs (see :mod:`hypo_train.metrics.flops`) since the last reading.

    ``mfu`` (model FLOP utilisation) is the model FLOPs of a full step (policy forward and backward, reference,
    sampling) divided by the step's time and the device's peak. Each part is logged too, for other definitions:
    the MFU of pre-training uses only the policy's passes and the time of their phases. Decoding is limited by memory
    bandwidth, so a step that samples has a lower ``mfu``. Saved work (a shared prompt, a cached reference) is
    not counted, so compare implementations of a step by ``time/step``.

    Args:
        flops: FLOPs of the model's passes; None if they are not known.
        peak_flops: the device's peak FLOP/s; None if it is not known.
    """

    def __init__(self, flops: ModelFlops | None, peak_flops: float | None) -> None:
        self._flops = flops
        self._peak_flops = peak_flops
        # Tokens through the policy, and online samples, since the first step of the run; restored on resume.
        self.num_tokens = 0
        self.num_online_samples = 0
        self._rows = 0
        self._tokens = 0
        self._computed: defaultdict[str, float] = defaultdict(float)

    def policy(self, tree: Tree, num_rows: int) -> None:
        """Count the policy's forward and backward pass over a tree of ``num_rows`` data rows."""
        self._rows += num_rows
        self._tokens += tree.num_tokens
        self.num_tokens += tree.num_tokens
        if self._flops is not None:
            size = Size.of(tree, self._flops.windows)
            self._computed["policy"] += self._flops.policy.of(size) + self._flops.backward.of(size)

    def reference(self, tree: Tree, *, trunk_known: bool) -> None:
        """Count the reference model's forward pass over a tree.

        ``trunk_known``: the policy's pass has run the shared frozen layers; the reference runs only those above.
        """
        if self._flops is not None:
            rates = self._flops.above_trunk if trunk_known else self._flops.reference
            self._computed["reference"] += rates.of(Size.of(tree, self._flops.windows))

    def sample(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, prompts_known: bool
    ) -> None:
        """Count online samples: ``completions``, the same number of consecutive ones for each prompt.

        ``prompts_known``: keys and values of the prompts come from the training pass, so there is no prefill.
        """
        self.num_online_samples += len(completions)
        if self._flops is not None and completions:
            size = Size.of_samples(prompts, completions, self._flops.windows, prefill=not prompts_known)
            self._computed["sample"] += self._flops.policy.of(size)

    def read(self, steps: int, seconds: float) -> dict[str, float]:
        """Return rates over ``seconds`` and each part's mean FLOPs over ``steps`` steps, and reset the counts.

        ``num_tokens`` and ``num_online_samples`` count from the start of the run and are not reset; a prompt that
        several completions share counts once.
        """
        metrics: dict[str, float] = {
            "num_tokens": self.num_tokens,
            "tokens_per_second": self._tokens / seconds,
            "train_samples_per_second": self._rows / seconds,
        }
        if self.num_online_samples:
            metrics["num_online_samples"] = self.num_online_samples
        if self._flops is not None:
            per_second = sum(self._computed.values()) / seconds
            metrics |= {f"flops/{part}": computed / steps for part, computed in self._computed.items()}
            metrics["tflops_per_second"] = per_second / 1e12
            if self._peak_flops is not None:
                metrics["mfu"] = per_second / self._peak_flops
        self._rows, self._tokens = 0, 0
        self._computed.clear()
        return metrics


_MAXIMA = ("memory/",)
_SUMS = ("num_tokens", "num_online_samples", "tokens_per_second", "train_samples_per_second", "tflops_per_second")


def combine_processes(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the costs from all processes: sums of rates and counts, the maximum of memory, else means."""
    combined = {}
    for name in dict.fromkeys(name for process in costs for name in process):
        values = [process[name] for process in costs if name in process]
        if name.startswith(_MAXIMA):
            combined[name] = max(values)
        else:
            combined[name] = sum(values) / (1 if name in _SUMS else len(values))
    return combined
