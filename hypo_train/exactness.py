"""The proof, on a few tokens and before any training, that a model can be trained exactly here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypo_train.policy import Head, ModelError, Policy, first_line
from hypo_train.tree import pack


def check_exactness(policy: Policy) -> None:
    """Compare what the loss will compute with what the model computes, on a few tokens, before any training.

    Raises ModelError when the logits are not the head's function of the last hidden state, or when hidden
    states under the prefix mask differ from those of separate rows.
    """
    model = policy.base
    name = type(model).__name__
    _check_parts(policy)
    weight = policy.head().weight
    vocab, device = weight.shape[0], weight.device
    prompt = [(7 * i + 1) % vocab for i in range(5)]
    branches = [[(11 * i + 3) % vocab for i in range(4)], [(5 * i + 2) % vocab for i in range(6)]]
    precise = all(p.dtype == torch.float32 for p in policy.parameters())

    def both(hidden: Tensor, head: Head) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        return _logits(hidden, head), [_plain_logits(policy, prompt, branch) for branch in branches]

    training = policy.training
    policy.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=not precise):
            tree = pack([prompt], [(0, branch) for branch in branches], pad_token_id=0).to(device)
            in_tree, rows = functional_call(policy, _drawn_b(policy), (tree, both))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name} cannot be trained on packed trees: {first_line(error)}") from error
    finally:
        policy.train(training)
    alone, by_head = (torch.cat(logits) for logits in zip(*rows, strict=True))
    if not _close(by_head, alone, 1e-3 if precise else 1e-2):
        raise ModelError(
            f"{name} computes its logits in a way the kernels do not serve: they differ by "
            f"{(by_head - alone).abs().max():.2g} from its head applied to the last hidden state"
        )
    # Two layouts of a row round differently: by 3 % of the largest logit in 30 layers of bf16, where a wrong mask
    # is off by 30 %.
    if not _close(in_tree, alone, 1e-3 if precise else 1e-1):
        raise ModelError(
            f"{name} ({model.config._attn_implementation} attention) does not honour the prefix mask: logits "
            f"differ by {(in_tree - alone).abs().max():.2g} from those of separate rows; try attn_implementation: sdpa"
        )


def _check_parts(policy: Policy) -> None:
    """Refuse a head that is no linear layer, with or without LoRA, and an adapter that does not switch off."""
    name, head = type(policy.base).__name__, policy.base.get_output_embeddings()
    plain = head
    if policy.is_peft:
        from peft.tuners.lora import Linear

        plain = head.base_layer if type(head) is Linear else head
        for config in policy.model.peft_config.values():
            if config.bias != "none":
                raise ModelError(f"bias={config.bias!r} of the adapter also trains the reference: use bias='none'")
    if type(plain) is not nn.Linear:
        kind = "none" if head is None else type(head).__name__
        raise ModelError(f"{name} has no plain linear LM head (found {kind}), nor LoRA on one")


def _drawn_b(policy: Policy) -> dict[str, Tensor]:
    """Random values for the B of LoRA on the head: before training it is zero, and would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    of_head = {id(p) for p in policy.base.get_output_embeddings().parameters()}
    return {
        name: torch.randn(p.shape, generator=generator).to(p)
        for name, p in policy.named_parameters()
        if id(p) in of_head and ".lora_B." in name
    }


def _logits(hidden: Tensor, head: Head) -> Tensor:
    """The head's logits, before the temperature."""
    with torch.autocast(hidden.device.type, enabled=False):
        raw = (hidden.to(head.weight.dtype) @ head.weight.t()).float()
        if head.lora is not None:
            raw += head.lora.scale * (hidden.float() @ head.lora.A.float().t() @ head.lora.B.float().t())
        return replace(head, temperature=1.0).logits(raw)


def _plain_logits(policy: Policy, prompt: Sequence[int], branch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits (len(branch), V) of a plain row: the model's own, and the head's of the last hidden state."""
    head = policy.head()
    ids = torch.tensor([[*prompt, *branch]], device=head.weight.device)
    own = policy.base(input_ids=ids, use_cache=False).logits
    hidden = policy.base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    predicting = slice(len(prompt) - 1, -1)
    return own[0, predicting].float(), _logits(hidden[0, predicting], head)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Within ``tolerance`` of the largest value."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3))
