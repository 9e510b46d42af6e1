"""The compared arms: each starts from a seed's language model and trains on its pairs for the same number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The paper trains 5 epochs for its overfitting figure. The rest fits the model's size; β and λ are swept below.
EPOCHS, BATCH_SIZE, LEARNING_RATE = 5, 32, 5e-4
BETA, KL_COEF = 0.1, 3e-3
RLOO_BETA, RLOO_GENERATIONS = 0.05, 4
BETAS = (0.03, 0.1, 0.3, 1.0)
KL_COEFS = (1e-3, 3e-3, 1e-2, 3e-2)
GENERATIONS = (2, 4, 8)


@dataclass(frozen=True)
class Arm:
    """One way to train, by its settings."""

    name: str
    settings: dict[str, Any]

    @property
    def algorithm(self) -> str:
        return str(self.settings["algorithm"])


def dpo(beta: float) -> Arm:
    return Arm(f"dpo-beta-{beta:g}", {"algorithm": "dpo", "beta": beta})


def ipo(beta: float) -> Arm:
    return Arm(f"ipo-beta-{beta:g}", {"algorithm": "ipo", "beta": beta})


def hypo(kl_coef: float = KL_COEF, num_generations: int = 2, kl_estimator: str = "sampled") -> Arm:
    exact = "-exact" if kl_estimator == "exact" else ""
    settings = {"kl_coef": kl_coef, "num_generations": num_generations, "kl_estimator": kl_estimator}
    name = f"hypo-lambda-{kl_coef:g}-k-{num_generations}{exact}"
    return Arm(name, {"algorithm": "hypo", "beta": BETA, **settings})


def rloo() -> Arm:
    settings = {"algorithm": "rloo", "beta": RLOO_BETA, "num_generations": RLOO_GENERATIONS}
    return Arm(f"rloo-beta-{RLOO_BETA:g}-k-{RLOO_GENERATIONS}", settings)


# The rows of the table, by the paper's names.
METHODS = {"DPO": dpo(BETA), "IPO": ipo(BETA), "RLOO": rloo(), "HyPO": hypo()}
FRONTIERS = {
    "DPO": {f"β {beta:g}": dpo(beta) for beta in BETAS},
    "IPO": {f"β {beta:g}": ipo(beta) for beta in BETAS},
    "RLOO": {f"β {RLOO_BETA:g}": rloo()},
    "HyPO": {f"λ {kl_coef:g}": hypo(kl_coef) for kl_coef in KL_COEFS},
}
ESTIMATES = {
    **{f"{k} samples": hypo(num_generations=k) for k in GENERATIONS},
    "2 samples, exact": hypo(kl_estimator="exact"),
}


def arms() -> list[Arm]:
    """Return each arm once, those of the table first."""
    groups = (METHODS, *FRONTIERS.values(), ESTIMATES)
    return list({arm.name: arm for group in groups for arm in group.values()}.values())
