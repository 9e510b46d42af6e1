"""The registry of algorithms, which ``algorithm:`` names. One entry holds all properties of an algorithm.

To add an algorithm without editing this package, write an :class:`Algorithm` in your own module and name it as
``algorithm: package.module:object`` (``docs/extending.md``). This module imports nothing heavy, because a configuration
is checked against it before torch is loaded.
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
# Takes log-probs (P,) of chosen and rejected, the reference's log-probs of both, and beta. Returns losses (P,).
PairLoss = Callable[[Any, Any, Any, Any, float], Any]


class Citation(NamedTuple):
    """The paper that introduced an algorithm."""

    key: str
    title: str
    authors: str
    arxiv: str


@dataclass(frozen=True)
class Algorithm:
    """The properties of an algorithm: its model, its rows and its loss.

    Raises:
        ValueError: the properties contradict each other.
    """

    name: str
    title: str
    """The name in model cards and reports."""
    row_type: RowType = "pair"
    """The kind of row in the data set: a preference pair, an SFT example, or a prompt."""
    micro_batch_loss: str = "hypo_train.algorithms.preference:micro_batch_loss"
    """``module:function`` of ``(run, batch, meter)`` that returns the mean loss () of a micro-batch."""
    preference: str | PairLoss | None = None
    """The loss of a pair where ``loss_type`` names none: "sigmoid" or "ipo" (its sum over tokens), or a function."""
    has_reference: bool = True
    """The loss compares the policy with the frozen reference model."""
    draws_samples: bool = False
    """Every step samples completions from the current policy."""
    learns_from_reward: bool = False
    """The loss uses the rewards of the samples."""
    trains_reward_model: bool = False
    """The trained model has a score head instead of the LM head."""
    citation: Citation | None = None

    def __post_init__(self) -> None:
        if callable(self.preference) and (self.row_type != "pair" or not self.has_reference):
            raise ValueError(f"{self.name}: a preference function needs pairs and a reference model")

    @property
    def is_hybrid(self) -> bool:
        """True if the loss uses both pairs and online samples (HyPO)."""
        return self.row_type == "pair" and self.draws_samples

    @property
    def asks_reference_about_pairs(self) -> bool:
        """True if the loss uses the reference model's log-probs of the pairs."""
        return self.row_type == "pair" and self.has_reference

    @property
    def row_noun(self) -> str:
        """The plural of the row type, for messages."""
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


def is_built_in(name: str) -> bool:
    """Return whether ``name`` is one of this package's algorithms."""
    return name in ALGORITHMS


def check_algorithm_name(name: str) -> None:
    """Raise ValueError unless ``name`` is registered or has the form ``package.module:object``; import nothing."""
    if name not in ALGORITHMS and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(f"should be {', '.join(map(repr, ALGORITHMS))} or 'package.module:object'")


@cache
def find_algorithm(name: str) -> Algorithm:
    """Return the algorithm called ``name``; import it if ``name`` is ``package.module:object``.

    Raises:
        ConfigError: there is no such algorithm.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    module, _, attribute = name.partition(":")
    try:
        algorithm = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"algorithm={name!r}: {error}") from error
    if not isinstance(algorithm, Algorithm):
        raise ConfigError(
            f"algorithm={name!r}: {attribute} is a {type(algorithm).__name__}, should be a "
            "hypo_train.algorithms.registry.Algorithm"
        )
    return algorithm
