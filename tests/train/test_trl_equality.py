"""A real step of TRL's ``DPOTrainer`` and ``fused_hypo_loss`` agree on loss, rewards and every parameter's gradient."""

import pytest
import torch
from tiny import new_model, word_tokenizer

from hypo_kernels import fused_hypo_loss

# Prompts and answers of unequal lengths, so that both kinds of padding are there.
ROWS = [
    {"prompt": "tell me about the film ", "chosen": "it was very good", "rejected": "awful"},
    {"prompt": "what of the meal ", "chosen": "warm and fine", "rejected": "it was cold and dull"},
    {"prompt": "the song ", "chosen": "great", "rejected": "quite bad"},
]


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_dpo_loss_and_its_gradients_are_those_of_trl(impl, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    beta = 0.3
    policy, reference = new_model("llama", seed=0).train(), new_model("llama", seed=1)
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(tmp_path),
            beta=beta,
            per_device_train_batch_size=len(ROWS),
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=word_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    policy.zero_grad(set_to_none=True)

    mask = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    targets = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    with torch.no_grad():
        ref_hidden = reference.get_decoder()(**mask).last_hidden_state[:, :-1]
    ours = fused_hypo_loss(
        policy.get_decoder()(**mask).last_hidden_state[:, :-1],
        policy.lm_head.weight,
        targets,
        num_pairs=len(ROWS),
        ref_hidden=ref_hidden,
        ref_lm_head_weight=reference.lm_head.weight.detach(),
        beta=beta,
        kl_coef=0.0,
        impl=impl,
    )
    ours.loss.backward()

    torch.testing.assert_close(ours.loss.detach(), theirs.detach())
    assert abs(theirs.item() - 0.6931) > 0.01  # log 2 would be the loss of two equal models
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
    assert ours.chosen_rewards.mean().item() == pytest.approx(logged["rewards/chosen"], rel=1e-5)
    assert ours.rejected_rewards.mean().item() == pytest.approx(logged["rewards/rejected"], rel=1e-5)
    assert ours.margins.mean().item() == pytest.approx(logged["rewards/margins"], rel=1e-5)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=lambda text, name=name: f"{name}: {text}")
