"""How much the steps of a log interval computed, and how fast that is. Counted on the host, from lengths alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from hypo_train.metrics.flops import ModelFlops, Size
from hypo_train.trees.tree import Tree


class Throughput:
    """Rows, tokens and model FLOPs (see :mod:`hypo_train.metrics.flops`) since the last reading.

    ``mfu``, model FLOP utilisation, is all of a step's model FLOPs over its whole time and the device's peak:
    policy forward and backward, reference and sampling. Each part is logged too, so that other definitions can be
    had: the policy's alone over the time of its own phases is what pre-training calls MFU. Two cautions: decoding
    reads weights rather than computes, so a step that samples has a lower ``mfu`` at the same quality of code; and
    work that is saved (a shared prompt, a cached reference) leaves it, so compare ways to run a step by ``time/step``.
    """

    def __init__(self, flops: ModelFlops | None, peak_flops: float | None) -> None:
        """``flops``: None where the model's are not known; ``peak_flops``: the device's, a second, where known."""
        self._flops = flops
        self._peak_flops = peak_flops
        self.num_tokens = 0  # through the policy since the run's first step; a resumed run puts it back
        self._rows = 0
        self._tokens = 0
        self._computed: defaultdict[str, float] = defaultdict(float)

    def policy(self, tree: Tree, num_rows: int) -> None:
        """A tree of ``num_rows`` rows of the data went through the policy, forward and backward."""
        self._rows += num_rows
        self._tokens += tree.num_tokens
        self.num_tokens += tree.num_tokens
        if self._flops is not None:
            size = Size.of(tree)
            self._computed["policy"] += self._flops.policy.of(size) + self._flops.backward.of(size)

    def reference(self, tree: Tree, *, trunk_known: bool) -> None:
        """A tree went through the reference; ``trunk_known``: only the layers above the frozen ones, run already."""
        if self._flops is not None:
            rates = self._flops.above_trunk if trunk_known else self._flops.reference
            self._computed["reference"] += rates.of(Size.of(tree))

    def sample(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, prompts_known: bool
    ) -> None:
        """``completions`` were drawn, as many consecutive ones a prompt; ``prompts_known``: from the training pass."""
        if self._flops is not None:
            size = Size.of_samples(prompts, completions, prefill=not prompts_known)
            self._computed["sample"] += self._flops.policy.of(size)

    def read(self, steps: int, seconds: float) -> dict[str, float]:
        """Of ``steps`` steps that took ``seconds``: rates, and the mean FLOPs of a step's parts. Starts anew, but for
        the run's ``num_tokens``, in which a prompt that several completions share counts once."""
        metrics: dict[str, float] = {
            "num_tokens": self.num_tokens,
            "tokens_per_second": self._tokens / seconds,
            "train_samples_per_second": self._rows / seconds,
        }
        if self._flops is not None:
            per_second = sum(self._computed.values()) / seconds
            metrics |= {f"flops/{part}": computed / steps for part, computed in self._computed.items()}
            metrics["tflops_per_second"] = per_second / 1e12
            if self._peak_flops is not None:
                metrics["mfu"] = per_second / self._peak_flops
        self._rows, self._tokens = 0, 0
        self._computed.clear()
        return metrics


# Of metrics that say what one device did, and of those that all devices did together; the others are a mean.
_MOST = ("memory/",)
_TOGETHER = ("num_tokens", "tokens_per_second", "train_samples_per_second", "tflops_per_second")


def of_all_processes(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What a step cost on each process, as one: rates and counts add up, memory is the most, the rest is a mean."""
    found = {}
    for name in dict.fromkeys(name for of_one in costs for name in of_one):
        values = [of_one[name] for of_one in costs if name in of_one]
        if name.startswith(_MOST):
            found[name] = max(values)
        else:
            found[name] = sum(values) / (1 if name in _TOGETHER else len(values))
    return found
