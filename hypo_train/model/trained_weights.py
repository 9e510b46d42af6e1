"""Load the weights that a run ended with into a policy that was loaded as the run loaded it.

Its reference keeps the weights that the run started from, so that an evaluation compares the same two models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hypo_train.config import Config
from hypo_train.distributed.fsdp import shard_like
from hypo_train.model.load import refuse_missing
from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.tree_model import ModelError, first_line
from hypo_train.model.weight_files import SAFETENSORS_ONLY, refuse_pickles

ADAPTER_FILE = "adapter_config.json"


def whole_model_config(config: Config, folder: Path) -> Config:
    """Return the configuration that loads the whole model in ``folder``, whose adapters are merged, in fp32."""
    whole = {
        "use_peft": False,
        "load_in_4bit": False,
        "num_layers_unfrozen": None,
        "unfrozen_parameters": None,
        "dtype": "float32",
    }
    return config.model_copy(update={"model_name_or_path": str(folder), **whole})


def put_trained_weights(policy: Policy, folder: Path, *, trust_remote_code: bool) -> None:
    """Load the weights of the model in ``folder`` into the policy: an adapter's under LoRA, else all of them.

    Raises:
        ModelError: the folder's model cannot be loaded, has other parameters, or differs from the policy in a frozen
            one, which the reference shares.
    """
    refuse_pickles(folder, "the trained model")
    if policy.is_peft:
        _put_adapter(policy, folder)
        return
    saved = _saved_weights(folder, trust_remote_code=trust_remote_code)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            found = saved.get(name)
            if found is None or found.shape != parameter.shape:
                shape = "is not there" if found is None else f"is {tuple(found.shape)}"
                raise ModelError(
                    f"{str(folder)!r} is a model of another shape than its reference: {name} {shape}, and in the "
                    f"reference {tuple(parameter.shape)}"
                )
            if parameter.requires_grad:
                parameter.copy_(found)
            elif not torch.equal(found.to(parameter), parameter):
                raise ModelError(
                    f"{str(folder)!r} and its reference differ in {name}, which was not trained: the model that the "
                    "run started from has changed since"
                )


def put_saved(trained: Policy | RewardModel, saved: Mapping[str, Tensor], folder: Path) -> None:
    """Load the trained parameters of the checkpoint that was read from ``folder``.

    Raises:
        ModelError: the checkpoint has other parameters than those that the model trains.
    """
    parameters = trained.trained_parameters()
    shapes, wanted = ({name: t.shape for name, t in of.items()} for of in (saved, parameters))
    if shapes != wanted:
        differing = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
        raise ModelError(f"{str(folder)!r} is a checkpoint of another model: it differs in {differing[0]}")
    with torch.no_grad():
        for name, tensor in saved.items():
            parameters[name].copy_(shard_like(tensor, parameters[name]))


def _saved_weights(folder: Path, *, trust_remote_code: bool) -> dict[str, Tensor]:
    """Return the saved weights by name, in fp32, the dtype in which trained ones are saved."""
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code, **SAFETENSORS_ONLY}
    try:
        if (folder / ADAPTER_FILE).is_file():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(str(folder), **options).merge_and_unload()
            return dict(model.named_parameters())
        found: Any = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True, **options)
    except Exception as error:  # transformers raises many kinds of errors
        raise ModelError(f"cannot load the model {str(folder)!r}: {first_line(error)}") from error
    model, info = found
    refuse_missing(info, str(folder))
    return dict(model.named_parameters())


def _put_adapter(policy: Policy, folder: Path) -> None:
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    try:
        saved = load_peft_weights(str(folder), device="cpu")
    except Exception as error:
        raise ModelError(f"cannot load the adapter {str(folder)!r}: {first_line(error)}") from error
    wanted = get_peft_model_state_dict(policy.model, save_embedding_layers=False)
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in wanted.items()}:
        raise ModelError(f"{str(folder)!r} is another adapter than the run's configuration describes")
    set_peft_model_state_dict(policy.model, saved)
