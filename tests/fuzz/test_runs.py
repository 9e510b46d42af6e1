"""Random small recipes on random rows: a run trains all steps, or is refused with a documented error."""

from __future__ import annotations

import json
import math
import shutil

import datasets
import pytest
import tiny
from accelerate.state import AcceleratorState
from budget import examples
from hypothesis import given
from hypothesis import strategies as st
from values import text

from hypo_train.config import Config, ConfigError
from hypo_train.metrics.log import read_metrics
from hypo_train.train import train
from hypo_train.utils.errors import NotFiniteError, is_users_mistake

words = st.lists(st.sampled_from(tiny.WORDS), max_size=12).map(" ".join)
texts = st.one_of(words, words, words, text)
rows = st.lists(
    st.one_of(
        st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}),
        st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words}),
    ),
    max_size=8,
)
ALGORITHMS = ["hypo", "dpo", "ipo", "rloo", "reward", "sft"]
CHANGES = {
    "num_eval_rows": st.integers(0, 3),
    "eval_steps": st.integers(0, 2),
    "max_prompt_length": st.sampled_from([1, 2, 16, 120, 10**6]),
    "max_completion_length": st.sampled_from([2, 3, 8]),
    "max_new_tokens": st.sampled_from([1, 2, 9, None]),
    "num_generations": st.integers(1, 3),
    "rollout_steps": st.integers(1, 3),
    "kl_estimator": st.sampled_from(["sampled", "exact"]),
    "beta": st.sampled_from([1e-30, 0.1, 1e6]),
    "kl_coef": st.sampled_from([0.0, 0.05, 1e30]),
    "temperature": st.sampled_from([1e-30, 0.01, 1.0, 1e6]),
    "top_k": st.sampled_from([0, 1, 10**9]),
    "top_p": st.sampled_from([1e-9, 0.5, 1.0]),
    "learning_rate": st.sampled_from([1e-300, 3e-3, 1e10]),
    "adam_beta1": st.sampled_from([0.0, 0.9]),
    "adam_epsilon": st.sampled_from([1e-300, 1e-37, 1e-8]),
    "weight_decay": st.sampled_from([0.0, 1e20]),
    "max_grad_norm": st.sampled_from([0.0, 1e-30, 1.0]),
    "warmup_ratio": st.floats(0, 1),
    "label_smoothing": st.sampled_from([0.0, 0.49]),
    "length_penalty": st.sampled_from([0.0, 1.0]),
    "missing_eos_penalty": st.sampled_from([0.0, 1.0]),
    "per_device_train_batch_size": st.sampled_from([1, 3, 2**40]),
    "gradient_accumulation_steps": st.integers(1, 3),
    "max_tokens_per_micro_batch": st.sampled_from([1, 50, None]),
    "group_by_length": st.booleans(),
    "use_peft": st.booleans(),
    "lora_target_modules": st.sampled_from(["all-linear", "nothing", ["q_proj", "lm_head"], ["lm_head"], "(", None]),
    "lora_dropout": st.sampled_from([0.0, 0.5]),
    "num_layers_unfrozen": st.sampled_from([1, 2, 3, None]),
    "gradient_checkpointing": st.sampled_from([True, False, "selective", None]),
    "attn_implementation": st.sampled_from(["auto", "sdpa", "eager", "no_such"]),
    "sampler": st.sampled_from(["auto", "decode", "generate"]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "bf16": st.booleans(),
    "impl": st.sampled_from(["auto", "torch", "reference"]),
    "max_chunk_bytes": st.sampled_from([1, 10**5, 2**30]),
    "precompute_ref_log_probs": st.sampled_from([True, False, None]),
    "reward": st.sampled_from(["tiny:reward_of_length", "tiny:nothing", "nothing:f", None]),
    "dataset_format": st.sampled_from(["preferences", "tldr"]),
    "dataset_train_split": st.sampled_from(["train", "test"]),
    "trust_remote_code": st.booleans(),
    "save_steps": st.integers(0, 2),
    "save_total_limit": st.integers(1, 2),
}


@st.composite
def recipes(draw):
    """Draw an algorithm and up to six other settings; with more, few recipes would run."""
    names = draw(st.lists(st.sampled_from([*CHANGES]), unique=True, max_size=6))
    return {"algorithm": draw(st.sampled_from(ALGORITHMS)), **{name: draw(CHANGES[name]) for name in names}}


@pytest.fixture
def place(tmp_path, tmp_path_factory, monkeypatch):
    """Return a folder with a tiny model, and use no cache of the user."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    tiny.save(tiny.new_model("llama"), tmp_path / "model")
    return tmp_path


@examples(15, share=0.05)
@given(data=rows, settings=recipes())
def test_a_run_trains_or_is_refused_in_one_line(place, data, settings):
    shutil.rmtree(place / "run", ignore_errors=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    path = place / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    try:
        config = Config(
            **{
                "output_dir": str(place / "run"),
                "model_name_or_path": str(place / "model"),
                "dataset_name": str(path),
                "bf16": False,
                "max_prompt_length": 16,
                "max_completion_length": 8,
                "max_steps": 2,
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "report_to": [],
                **({"reward": "tiny:reward_of_length"} if settings["algorithm"] == "rloo" else {}),
                **settings,
            }
        )
    except ValueError:  # test_configs checks the message
        return
    try:
        result = train(config, progress=False)
    except NotFiniteError:
        pass
    except (ConfigError, ValueError) as error:
        if not is_users_mistake(error):
            raise
        lines = str(error).split("\n")
        assert len(lines) == 1 or lines[0] == f"{len(lines) - 1} problems:"
    else:
        assert (result.model_dir / "config.json").is_file() or (result.model_dir / "adapter_config.json").is_file()
        lines = read_metrics(place / "run" / "metrics.jsonl")
        assert lines[-1]["step"] == 2
        losses = [value for line in lines for name, value in line.items() if name in ("loss", "eval_loss")]
        assert losses
        assert all(math.isfinite(value) for value in losses)
