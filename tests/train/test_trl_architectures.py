"""A batch's loss and every parameter's gradient in ``HyPOTrainer`` (no KL) are those of TRL's ``DPOTrainer``, in fp32.

Rows are longer than every sliding window, experts' routers have their auxiliary loss, and policy and reference differ.
"""

import datasets
import pytest
import tiny
import torch
from short_runs import slow_unless

trl = pytest.importorskip("trl", reason="trl is not installed")
from hypo_train.trl import HyPOConfig, HyPOTrainer  # noqa: E402

WINDOW = {"sliding_window": 16}
CASES = {
    "mistral": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "gpt_oss": WINDOW,  # its routers have an auxiliary loss too
    "olmo3": WINDOW,
    "mixtral": {},
    "qwen3": {},
    "phi3": {},
    "gpt_neox": {},  # rotates a part of each head
    "cohere": {},  # scales its logits
    "opt": {"dropout": 0.0},
    "gpt2": {},
}
ROWS = [{**row, "prompt": 12 * (row["prompt"] + " ")} for row in tiny.pair_rows(4)]


def loss_and_gradients(kind, config, architecture, changes, folder):
    policy, reference = (tiny.new_model(architecture, seed=seed, **changes) for seed in (0, 1))
    trainer = kind(
        policy,
        reference,
        config(str(folder), beta=0.3, bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=tiny.word_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["attention_mask"].sum(1).min() > 16
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in policy.named_parameters()}, trainer


@pytest.mark.parametrize("architecture", slow_unless(["mistral", "mixtral"], list(CASES)))
def test_loss_and_gradients_are_those_of_dpo_trainer(architecture, tmp_path):
    changes = CASES[architecture]
    config = lambda *args, **settings: HyPOConfig(*args, kl_coef=0.0, **settings)  # noqa: E731
    loss, gradients, trainer = loss_and_gradients(HyPOTrainer, config, architecture, changes, tmp_path)
    assert trainer.why_trls_step is None
    expected, truth, theirs = loss_and_gradients(trl.DPOTrainer, trl.DPOConfig, architecture, changes, tmp_path)
    assert trainer.aux_loss_enabled == theirs.aux_loss_enabled == (architecture in ("mixtral", "gpt_oss"))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    largest = max(gradient.abs().max() for gradient in truth.values() if gradient is not None)
    for name, gradient in truth.items():
        if gradient is None:
            assert gradients[name] is None, name
            continue
        error = (gradients[name] - gradient).abs().max()
        assert error <= 1e-5 * max(largest, 1), f"{name}: {error:.2g} of {largest:.2g}"
