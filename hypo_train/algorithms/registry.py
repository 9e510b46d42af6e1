"""The algorithms that ``algorithm:`` can name: one entry says everything that the rest of the code asks.

An algorithm from outside this package is an :class:`Algorithm` in a module of yours, named as
``algorithm: package.module:object`` (``docs/extending.md``). This module imports nothing heavy: a configuration is
checked against it before torch is loaded.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from hypo_train.utils.errors import ConfigError

RowType = Literal["pair", "example", "prompt"]
# A loss (P,) of the log-probs (P,) of P pairs: chosen, rejected, reference's chosen, reference's rejected; and beta.
PairLoss = Callable[[Any, Any, Any, Any, float], Any]


class Citation(NamedTuple):
    """The paper that an algorithm is from."""

    key: str
    title: str
    authors: str
    arxiv: str


@dataclass(frozen=True)
class Algorithm:
    """What is trained, on which rows, and by which loss.

    Raises:
        ValueError: properties that contradict each other.
    """

    name: str
    title: str
    """Name in a model card and a report."""
    row_type: RowType = "pair"
    """A row of the data set: a preference pair, an example to imitate, or a prompt."""
    micro_batch_loss: str = "hypo_train.algorithms.preference:micro_batch_loss"
    """``module:function`` of ``(run, batch, meter)`` that returns the mean loss () of a micro-batch."""
    preference: str | PairLoss | None = None
    """The loss of a pair: a name that ``fused_hypo_loss`` knows ("sigmoid" or "ipo"), or a function."""
    has_reference: bool = True
    """The loss compares the policy with the frozen reference model."""
    draws_samples: bool = False
    """Every step samples completions from the current policy."""
    learns_from_reward: bool = False
    """The samples' rewards are what it learns from."""
    trains_reward_model: bool = False
    """The model has a score in the place of the LM head."""
    citation: Citation | None = None

    def __post_init__(self) -> None:
        if callable(self.preference) and (self.draws_samples or self.row_type != "pair" or not self.has_reference):
            raise ValueError(f"{self.name}: a preference function serves pairs with a reference and without samples")

    @property
    def is_hybrid(self) -> bool:
        """Whether the loss is of pairs and of online samples (HyPO)."""
        return self.row_type == "pair" and self.draws_samples

    @property
    def asks_reference_about_pairs(self) -> bool:
        """Whether the reference model's log-probs of the pairs are part of the loss."""
        return self.row_type == "pair" and self.has_reference

    @property
    def row_noun(self) -> str:
        """The plural of its row type, for messages."""
        return f"{self.row_type}s"

    def load_micro_batch_loss(self) -> Callable[..., Any]:
        """Import and return the function that ``micro_batch_loss`` names."""
        module, _, function = self.micro_batch_loss.partition(":")
        loss: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loss


_HERE = "hypo_train.algorithms"
_BUILT_IN = (
    Algorithm(
        "hypo",
        "HyPO (Hybrid Preference Optimization)",
        preference="sigmoid",
        draws_samples=True,
        citation=Citation(
            "song2024importance",
            "The Importance of Online Data: Understanding Preference Fine-tuning via Coverage",
            "Song, Yuda and Swamy, Gokul and Singh, Aarti and Bagnell, J. Andrew and Sun, Wen",
            "2406.01462",
        ),
    ),
    Algorithm(
        "dpo",
        "DPO (Direct Preference Optimization)",
        preference="sigmoid",
        citation=Citation(
            "rafailov2023direct",
            "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
            "Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D. and "
            "Finn, Chelsea",
            "2305.18290",
        ),
    ),
    Algorithm(
        "ipo",
        "IPO (Identity Preference Optimization)",
        preference="ipo",
        citation=Citation(
            "azar2023general",
            "A General Theoretical Paradigm to Understand Learning from Human Preferences",
            "Azar, Mohammad Gheshlaghi and Rowland, Mark and Piot, Bilal and Guo, Daniel and Calandriello, Daniele and "
            "Valko, Michal and Munos, Rémi",
            "2310.12036",
        ),
    ),
    Algorithm(
        "rloo",
        "RLOO (REINFORCE leave-one-out)",
        row_type="prompt",
        micro_batch_loss=f"{_HERE}.rloo:micro_batch_loss",
        draws_samples=True,
        learns_from_reward=True,
        citation=Citation(
            "ahmadian2024back",
            "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
            "Ahmadian, Arash and Cremer, Chris and Gallé, Matthias and Fadaee, Marzieh and Kreutzer, Julia and "
            "Pietquin, Olivier and Üstün, Ahmet and Hooker, Sara",
            "2402.14740",
        ),
    ),
    Algorithm(
        "reward",
        "a Bradley-Terry reward model",
        micro_batch_loss=f"{_HERE}.reward_model:micro_batch_loss",
        has_reference=False,
        trains_reward_model=True,
    ),
    Algorithm(
        "sft",
        "supervised fine-tuning",
        row_type="example",
        micro_batch_loss=f"{_HERE}.sft:micro_batch_loss",
        has_reference=False,
    ),
)
ALGORITHMS = {algorithm.name: algorithm for algorithm in _BUILT_IN}


def check_algorithm_name(name: str) -> None:
    """Raise ValueError unless ``name`` is registered or has the form ``package.module:object``; import nothing."""
    if name not in ALGORITHMS and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(f"should be {', '.join(map(repr, ALGORITHMS))} or 'package.module:object'")


@cache
def find_algorithm(name: str) -> Algorithm:
    """Return the entry called ``name``, or import the one that ``package.module:object`` names.

    Raises:
        ConfigError: there is no such entry.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"algorithm={name!r}: {error}") from error
    if not isinstance(found, Algorithm):
        raise ConfigError(
            f"algorithm={name!r}: {attribute} is a {type(found).__name__}, should be a "
            "hypo_train.algorithms.registry.Algorithm"
        )
    return found
