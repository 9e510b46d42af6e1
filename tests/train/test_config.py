"""What a user writes in a recipe or on the command line, and what comes of it."""

from __future__ import annotations

import importlib

import pytest
import yaml
from pydantic import ValidationError

from hypo_train.cli import help_text
from hypo_train.config import Config, ConfigError, load_config

REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d"]


@pytest.fixture
def recipe(tmp_path):
    """Write a YAML file, return its path."""

    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def required_and(flags: str) -> list[str]:
    return [*REQUIRED, *flags.split()]


def problem(argv: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    return str(caught.value)


def test_the_required_fields_alone_give_the_documented_defaults():
    config = load_config(REQUIRED)
    assert (config.model_name_or_path, config.dataset_name) == ("m", "d")
    assert (config.algorithm, config.beta, config.kl_coef, config.num_generations) == ("hypo", 0.1, 1e-4, 2)
    assert (config.temperature, config.top_k, config.top_p) == (1.0, 0, 1.0)
    assert config.max_chunk_bytes is None, "the device decides"


def test_flags_override_the_file_which_overrides_the_defaults(recipe):
    path = recipe("model_name_or_path: m\ndataset_name: d\nbeta: 0.05\nseed: 7\n")
    config = load_config(["--config", path, "--seed", "8"])
    assert (config.beta, config.seed, config.kl_coef) == (0.05, 8, 1e-4)


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--learning_rate", "3e-6"], "learning_rate", 3e-6),
        (["--learning_rate=3e-6"], "learning_rate", 3e-6),
        (["--learning-rate", "3e-6"], "learning_rate", 3e-6),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--resume"], "resume_from_checkpoint", "auto"),
        (["--resume", "auto"], "resume_from_checkpoint", "auto"),
        (["--resume", "runs/hypo/checkpoint-5"], "resume_from_checkpoint", "runs/hypo/checkpoint-5"),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", "auto"),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--gradient_checkpointing", "selective"], "gradient_checkpointing", "selective"),
        (["--report_to", "none"], "report_to", []),
        (["--report_to", "wandb"], "report_to", ["wandb"]),
        (["--report_to", "tensorboard", "mlflow"], "report_to", ["tensorboard", "mlflow"]),
        (["--report_to", "[trackio, wandb]"], "report_to", ["trackio", "wandb"]),
        (["--report_to", "[]"], "report_to", []),
        (["--bf16", "none"], "bf16", None),
        (["--zero_stage", "2"], "zero_stage", 2),
        (["--bf16", "False"], "bf16", False),
        (["--num_layers_unfrozen", "4"], "num_layers_unfrozen", 4),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora_target_modules", "[q_proj, 'v_proj']"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora_target_modules", "all-linear"], "lora_target_modules", "all-linear"),
        (["--dataset_config", "2024"], "dataset_config", "2024"),
        (["--reward", "my.rewards:score"], "reward", "my.rewards:score"),
        (["--resume_from_checkpoint", "auto"], "resume_from_checkpoint", "auto"),
        (["--output_dir", "../a b/c"], "output_dir", "../a b/c"),
    ],
)
def test_a_flag_is_read_as_its_field_type(flags, field, value):
    assert getattr(load_config([*REQUIRED, *flags]), field) == value


def test_a_bare_flag_before_another_flag_is_true():
    config = load_config(["--use_peft", *REQUIRED])
    assert config.use_peft is True
    assert config.model_name_or_path == "m"


def test_numbers_that_yaml_reads_as_text_are_numbers(recipe):
    # In YAML 1.1, which PyYAML follows, 3e-6 without a dot is a string.
    text = "model_name_or_path: m\ndataset_name: d\nlearning_rate: 3e-6\nadam_epsilon: 1E-5\n"
    assert isinstance(yaml.safe_load(text)["learning_rate"], str)
    config = load_config(["--config", recipe(text)])
    assert (config.learning_rate, config.adam_epsilon) == (3e-6, 1e-5)


def test_a_typo_in_a_key_suggests_the_nearest_name(recipe):
    path = recipe("model_name_or_path: m\ndataset_name: d\nlerning_rate: 1e-6\n")
    message = problem(["--config", path])
    assert message == (
        f"1 problem in the configuration: unknown key 'lerning_rate' in {path}: did you mean learning_rate?"
    )


def test_a_typo_in_a_flag_suggests_the_nearest_flag():
    assert "unknown flag --num_generation: did you mean --num_generations?" in problem(
        [*REQUIRED, "--num_generation", "4"]
    )
    assert "unknown flag --confg: did you mean --config?" in problem([*REQUIRED, "--confg", "x.yaml"])


def test_the_beginning_of_a_name_suggests_the_name():
    assert "unknown flag --missing_eos: did you mean --missing_eos_penalty?" in problem([*REQUIRED, "--missing_eos=1"])


def test_a_fields_short_and_long_flag_exclude_each_other():
    flags = [*REQUIRED, "--resume", "--resume_from_checkpoint", "auto"]
    assert "--resume_from_checkpoint is given more than once" in problem(flags)


def test_a_name_that_resembles_none_points_to_the_help():
    assert "unknown flag --xyzzy (--help lists the fields)" in problem([*REQUIRED, "--xyzzy", "1"])


def test_all_problems_are_listed_one_a_line_after_their_number(recipe):
    path = recipe("beta: -1\nlabel_smoothing: 0.5\nalgorithm: hyppo\nfoo: 1\nseed: 1\nseed: 2\n")
    lines = problem(["--config", path, "--top_p", "1.5", "--lora_rr", "8"]).split("\n")
    assert lines[0] == "9 problems in the configuration:"
    assert len(lines) == 10
    expected = [
        "seed is given more than once",
        "unknown key 'foo'",
        "unknown flag --lora_rr: did you mean --lora_r?",
        "algorithm='hyppo': should be 'hypo', 'dpo', 'ipo', 'rloo', 'reward', 'sft' or 'package.module:object'",
        "beta=-1: should be greater than 0",
        "label_smoothing=0.5: should be less than 0.5",
        "top_p='1.5': should be less than or equal to 1",
        "model_name_or_path is missing",
        "dataset_name is missing",
    ]
    for text in expected:
        assert sum(text in line for line in lines) == 1, text


@pytest.mark.parametrize("text", ["dataset_name: d\n", "dataset_name: d\nmodel_name_or_path:\n"])
def test_a_missing_model_is_named_with_the_flag_that_sets_it(recipe, text):
    message = problem(["--config", recipe(text)])
    assert message.endswith("model_name_or_path is missing: set it in the file or with --model_name_or_path")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seed -1", "seed='-1': should be greater than or equal to 0"),
        ("--learning_rate 0", "learning_rate='0': should be greater than 0"),
        ("--learning_rate abc", "learning_rate='abc': should be a valid number"),
        (
            "--gradient_checkpointing full",
            "gradient_checkpointing='full': should be a valid boolean, unable to "
            "interpret input; or it should be 'selective'",
        ),
        ("--learning_rate nan", "learning_rate='nan': should be a finite number"),
        ("--kl_coef inf", "kl_coef='inf': should be a finite number"),
        ("--num_train_epochs 0", "num_train_epochs='0': should be greater than 0"),
        ("--beta 0", "beta='0': should be greater than 0"),
        ("--kl_coef -1", "kl_coef='-1': should be greater than or equal to 0"),
        ("--label_smoothing -0.1", "label_smoothing='-0.1': should be greater than or equal to 0"),
        ("--temperature 0", "temperature='0': should be greater than 0"),
        ("--top_p 0", "top_p='0': should be greater than 0"),
        ("--top_k 1.5", "top_k='1.5': should be a valid integer"),
        ("--lora_dropout 1", "lora_dropout='1': should be less than 1"),
        ("--adam_beta2 1", "adam_beta2='1': should be less than 1"),
        ("--warmup_ratio 1.1", "warmup_ratio='1.1': should be less than or equal to 1"),
        ("--max_completion_length 1", "max_completion_length='1': should be greater than or equal to 2"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size='0': should be greater than 0"),
        ("--max_steps 0", "max_steps=0: use a positive number, or -1 for num_train_epochs"),
        ("--max_steps -2", "max_steps='-2': should be greater than or equal to -1"),
        ("--dtype float16", "dtype='float16': use bfloat16, fp16 is not served"),
        ("--reward score", "reward='score': write it as package.module:function"),
        ("--num_generations 1", "num_generations=1: hypo compares the samples of a prompt, use at least 2"),
        (
            "--algorithm dpo --kl_estimator exact",
            "kl_estimator=exact with algorithm=dpo: only hypo has this estimator",
        ),
        ("--algorithm dpo --online_fraction 0.5", "online_fraction=0.5 with algorithm=dpo: only hypo has pairs"),
        ("--online_fraction 0", "online_fraction='0': should be greater than 0"),
        ("--algorithm ipo --rollout_steps 2", "rollout_steps=2 with algorithm=ipo: it draws no samples"),
        ("--kl_estimator k3", "kl_estimator='k3': should be 'sampled' or 'exact'"),
        ("--algorithm ipo --label_smoothing 0.1", "label_smoothing=0.1: algorithm=ipo does not read it, leave it out"),
        ("--zero_stage 3", "zero_stage=3: weights are sharded by PyTorch's FSDP2 here, set fsdp: true instead"),
        ("--zero_stage 1 --fsdp", "zero_stage=1 with fsdp=true: both shard the optimizer's state, choose one"),
        (
            "--zero_stage 2 --optim muon",
            "zero_stage=2 with optim=muon: its state needs the tensors' shapes, which ZeRO flattens",
        ),
        ("--use_peft --num_layers_unfrozen 4", "use_peft=true with num_layers_unfrozen=4: choose one"),
        ("--dataset_test_split test --num_eval_rows 9", "num_eval_rows=9 with dataset_test_split='test'"),
        ("--eval_steps 5", "eval_steps=5: nothing to evaluate on, set dataset_test_split or num_eval_rows"),
        ("--seed 1 2", "--seed takes one value, and is given '1', '2': flags begin with --, quote spaces"),
        ("--run_name a -beta 0.2", "--run_name takes one value, and is given 'a', '-beta', '0.2': flags begin with --"),
        ("--learning_rate", "learning_rate='': needs a value"),
        ("--ref_logps_cache_dir", "ref_logps_cache_dir='': needs a value"),
        ("--seed 1 --seed 2", "--seed is given more than once"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_what_is_wrong(flags, message):
    text = problem(required_and(flags))
    assert text.startswith(f"1 problem in the configuration: {message}")
    assert "\n" not in text


def test_conflicting_settings_are_all_listed():
    text = problem(required_and("--num_generations 1 --eval_steps 5 --max_steps 0"))
    assert text.startswith("3 problems")
    assert len(text.split("\n")) == 4


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("", "vocab_parallel=true without fsdp"),
        ("--fsdp --algorithm reward", "vocab_parallel=true with algorithm=reward: a reward model has no LM head"),
        ("--fsdp --impl reference", "vocab_parallel=true with impl=reference: that needs the full vocabulary"),
    ],
)
def test_vocab_parallel_is_refused_where_it_has_no_effect(flags, why):
    assert why in problem(required_and(f"--vocab_parallel {flags}"))


@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "sft"])
def test_one_sample_a_prompt_is_refused_for_hypo_alone(algorithm):
    assert load_config([*REQUIRED, "--algorithm", algorithm, "--num_generations", "1"]).num_generations == 1


@pytest.mark.parametrize(("key", "kind"), [("beta", "float"), ("save_steps", "int"), ("lora_r", "int")])
def test_yes_and_no_are_not_numbers(recipe, key, kind):
    path = recipe(f"model_name_or_path: m\ndataset_name: d\n{key}: yes\n")
    assert f"{key}=True: should be {kind}, not true or false" in problem(["--config", path])


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("report_to: no", "none logs to metrics.jsonl only"),
        ("resume_from_checkpoint: true", "auto resumes from the newest checkpoint"),
    ],
)
def test_a_boolean_for_a_text_field_is_answered_with_the_fix(recipe, line, fix):
    assert fix in problem(["--config", recipe(f"model_name_or_path: m\ndataset_name: d\n{line}\n")])


def test_a_key_without_a_value_says_so(recipe):
    path = recipe("model_name_or_path: m\ndataset_name: d\nbeta:\n")
    assert problem(["--config", path]).endswith("beta has no value: write one, or leave it out")


def test_a_number_where_text_belongs_asks_for_quotes(recipe):
    path = recipe("model_name_or_path: m\ndataset_name: d\ndataset_config: 2024\n")
    assert "dataset_config=2024: should be a valid string (put it in quotes)" in problem(["--config", path])


def test_a_field_of_two_types_is_one_problem(recipe):
    path = recipe("model_name_or_path: m\ndataset_name: d\nlora_target_modules: 3\n")
    assert problem(["--config", path]).startswith("1 problem in the configuration: lora_target_modules=3: should be")


def test_a_missing_recipe_is_named(tmp_path):
    assert problem(["--config", "nope.yaml"]) == "--config nope.yaml: No such file or directory"
    assert problem(["--config", str(tmp_path)]) == f"--config {tmp_path}: Is a directory"
    assert problem(["--config"]).startswith("--config needs one file")


@pytest.mark.parametrize("text", ["a: [1, 2\n", "a: 1\n\tb: 2\n", "date: 2024-13-45\n", "a: 1\n---\nb: 2\n"])
def test_a_recipe_that_is_not_yaml_is_named_in_one_line(recipe, text):
    path = recipe(text)
    message = problem(["--config", path])
    assert message.startswith(f"--config {path}: not valid YAML: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\n\tb: 2\n", r"line 2: found character '\t' that cannot start any token: indent with spaces"),
        (b"a: 1\nb 2\nc: 3\n", "line 2: could not find expected ':': a line is of the form 'name: value'"),
        (b"a: 1\nb: caf\xe9\n", "line 2 is no UTF-8, save the file in that encoding"),
    ],
)
def test_a_line_that_is_not_yaml_is_named_with_its_fix(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert problem(["--config", str(path)]).startswith(f"--config {path}: not valid YAML: {message}")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("per_device_batch_size", "use per_device_train_batch_size"),
        ("lr", "use learning_rate"),
        ("ref_model", "the reference is the model that training starts from, leave it out"),
    ],
)
def test_a_name_from_another_trainer_is_answered_with_ours(recipe, name, fix):
    """And not with the nearest name, which would be that of another setting."""
    path = recipe(f"model_name_or_path: m\ndataset_name: d\n{name}: 1\n")
    assert problem(["--config", path]).endswith(f"unknown key {name!r} in {path}: {fix}")
    assert problem([*REQUIRED, f"--{name}", "1"]).endswith(f"unknown flag --{name}: {fix}")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "- beta\n- 0.1\n", "beta\n", "3\n"])
def test_a_recipe_that_is_no_mapping_says_what_it_should_hold(recipe, text):
    path = recipe(text)
    assert problem(["--config", path]) == f"--config {path}: should hold lines of the form 'name: value'"


@pytest.mark.parametrize("text", ["[" * 3000, "a: " + "{a: " * 3000])
def test_a_recipe_that_is_nested_too_deep_is_one_line(recipe, text):
    assert "nested too deep" in problem(["--config", recipe(text)])


def test_a_number_of_thousands_of_digits_is_one_line(recipe):
    path = recipe("model_name_or_path: m\ndataset_name: d\nseed: 0b" + "1" * 20_000)
    assert "seed=an integer of thousands of digits: should be less than 4294967296" in problem(["--config", path])


def test_a_value_of_thousands_of_letters_is_shortened():
    message = problem([*REQUIRED, "--seed", "x" * 5000])
    assert "xxx... (5002 characters): should be a valid integer" in message
    assert len(message) < 400


@pytest.mark.parametrize("field", ["output_dir", "dataset_name", "lora_target_modules"])
@pytest.mark.parametrize(
    ("text", "wrong"),
    [("a\0b", "text without a NUL character"), ("\ud800", "a valid ")],
)
def test_text_that_no_file_name_can_hold_is_refused(field, text, wrong):
    flags = dict(zip(REQUIRED[::2], REQUIRED[1::2], strict=True)) | {f"--{field}": text}
    assert f"{field}={text!r}: should be {wrong}" in problem([part for pair in flags.items() for part in pair])


def test_a_base_with_a_nul_is_one_line(recipe):
    assert "base='\\x00' in" in problem(["--config", recipe('base: "\\0"\n')])


@pytest.mark.parametrize("argv", [["--x\ny", "1"], ["a\nb.yaml"], ["--x\ny", "--x\ny"]])
def test_a_line_break_in_a_flag_breaks_no_line(argv):
    message = problem([*REQUIRED, *argv])
    assert message.count("\n") == (2 if message[0] == "2" else 0)


# A recipe on top of another


@pytest.fixture
def recipes(tmp_path):
    """Write YAML files by name, return the path of the last."""

    def write(**files: str) -> str:
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / f"{name}.yaml")

    return write


def test_a_recipe_overrides_its_base_and_flags_override_both(recipes):
    path = recipes(
        common="model_name_or_path: m\ndataset_name: d\nbeta: 0.05\nseed: 1\nlora_r: 8\n",
        middle="base: common.yaml\nseed: 2\nlora_r: 9\n",
        last="base: middle.yaml\nlora_r: 10\n",
    )
    config = load_config(["--config", path])
    assert (config.model_name_or_path, config.beta, config.seed, config.lora_r) == ("m", 0.05, 2, 10)
    assert load_config(["--config", path, "--beta", "0.2", "--lora_r", "11"]).lora_r == 11


def test_a_base_is_relative_to_the_file_that_names_it(recipes, tmp_path, monkeypatch):
    recipes(common="model_name_or_path: m\ndataset_name: d\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "run.yaml").write_text("base: ../common.yaml\nseed: 3\n")
    monkeypatch.chdir(tmp_path / "sub")
    assert load_config(["--config", "run.yaml"]).seed == 3
    monkeypatch.chdir(tmp_path)
    assert load_config(["--config", "sub/run.yaml"]).model_name_or_path == "m"


def test_a_null_in_a_recipe_takes_back_what_its_base_says(recipes):
    path = recipes(
        common="model_name_or_path: m\ndataset_name: d\nmax_new_tokens: 53\n",
        run="base: common.yaml\nmax_new_tokens: null\n",
    )
    assert load_config(["--config", path]).max_new_tokens is None


def test_a_typo_is_named_in_the_file_where_it_stands(recipes, tmp_path):
    path = recipes(
        common="model_name_or_path: m\ndataset_name: d\nbetaa: 0.1\n",
        run="base: common.yaml\nseed: 1\nseed: 2\nbae: x\n",
    )
    message = problem(["--config", path])
    assert message.startswith("3 problems")
    assert f"unknown key 'betaa' in {tmp_path / 'common.yaml'}: did you mean beta?" in message
    assert f"seed is given more than once in {path}" in message
    assert f"unknown key 'bae' in {path}: did you mean base?" in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: a.yaml\n"}, "base='a.yaml' in {a}: a recipe cannot be its own base: {a} -> a.yaml"),
        (
            {"b": "base: ./a.yaml\n", "a": "base: b.yaml\n"},
            "base='./a.yaml' in {b}: a recipe cannot be its own base: {a} -> {b} -> ./a.yaml",
        ),
        ({"a": "base: nowhere.yaml\n"}, "base {nowhere} of {a}: No such file or directory"),
        ({"b": "- 1\n", "a": "base: b.yaml\n"}, "base {b} of {a}: should hold lines of the form 'name: value'"),
        ({"b": "a: [1\n", "a": "base: b.yaml\n"}, "base {b} of {a}: not valid YAML"),
        ({"a": "base: 3\n"}, "base=3 in {a}: should be the path of a recipe, relative to this one"),
        ({"a": "base:\n"}, "base=None in {a}: should be the path of a recipe, relative to this one"),
        ({"a": "base: [b.yaml]\n"}, "base=['b.yaml'] in {a}: should be the path of a recipe"),
    ],
)
def test_a_base_that_cannot_be_used_is_named_with_its_heir(recipes, tmp_path, files, message):
    text = problem(["--config", recipes(**files)])
    names = {name: tmp_path / f"{name}.yaml" for name in ("a", "b", "nowhere")}
    assert text.startswith(message.format(**names))
    assert "\n" not in text


def test_the_yaml_of_a_run_stands_alone(recipes):
    path = recipes(common="model_name_or_path: m\ndataset_name: d\n", run="base: common.yaml\nseed: 5\n")
    config = load_config(["--config", path])
    assert "base" not in yaml.safe_load(config.to_yaml())
    assert load_config(["--config", recipes(flat=config.to_yaml())]) == config


def test_a_recipe_in_another_encoding_is_a_one_line_error(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("output_dir: caf\xe9\n".encode("latin-1"))
    assert f"--config {path}: not valid YAML" in problem(["--config", str(path)])


def test_a_nested_recipe_is_refused(recipe):
    path = recipe("model_name_or_path: m\ndataset_name: d\nlora:\n  r: 8\n")
    assert f"unknown key 'lora' in {path}" in problem(["--config", path])


def test_a_recipe_given_without_its_flag_is_recognised():
    assert "unexpected argument 'x.yaml': settings are written as --config x.yaml" in problem(["x.yaml", *REQUIRED])


def test_a_config_survives_its_own_yaml(recipe):
    flags = "--lora_target_modules a b --kl_coef 1e-7 --output_dir null/é --dataset_config 2024"
    config = load_config(required_and(flags))
    assert config.lora_target_modules == ["a", "b"]
    assert load_config(["--config", recipe(config.to_yaml())]) == config


def test_the_yaml_of_a_config_lists_every_field():
    assert list(yaml.safe_load(load_config(REQUIRED).to_yaml())) == list(Config.model_fields)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_config(REQUIRED).seed = 1


def test_settings_that_bias_the_kl_are_warned_about():
    assert load_config(REQUIRED).warnings() == []
    for flags in (["--top_k", "50"], ["--top_p", "0.9"]):
        [line] = load_config([*REQUIRED, *flags]).warnings()
        assert "KL is biased" in line
        assert load_config([*REQUIRED, *flags, "--algorithm", "dpo"]).warnings() == []


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--lora_r 64", "lora_r=64 has no effect without use_peft: true"),
        ("--lora_target_modules all-linear", "lora_target_modules='all-linear' has no effect without use_peft: true"),
        ("--algorithm dpo --kl_coef 0.1", "kl_coef=0.1 has no effect without algorithm: hypo"),
        ("--algorithm dpo --num_generations 8", "num_generations=8 has no effect without algorithm: hypo or rloo"),
        ("--importance_cap 3", "importance_cap=3.0 has no effect without rollout_steps above 1"),
    ],
)
def test_settings_that_nothing_reads_are_warned_about(flags, line):
    assert load_config(required_and(flags)).warnings() == [line]


def test_settings_that_are_read_are_not_warned_about():
    assert load_config(required_and("--use_peft --lora_r 64 --kl_coef 0.1 --num_generations 8")).warnings() == []


def test_help_documents_every_field_and_fits_in_100_columns():
    text = help_text()
    lines = text.split("\n")
    assert max(map(len, lines)) <= 100
    for name, field in Config.model_fields.items():
        place = next(i for i, line in enumerate(lines) if line.startswith(f"  --{name} "))
        assert "default: " in lines[place] or "(required)" in lines[place]
        assert len(lines[place + 1].strip()) > 10, f"{name} has no text"
        assert field.description
    assert "--algorithm  hypo | dpo | ipo | rloo | reward | sft | package.module:object  (default: hypo)" in text
    assert "--bf16  bool | none  (default: none)" in text
    assert "--model_name_or_path  str  (required)" in text


def test_help_shows_how_to_call_the_program():
    text = help_text()
    for usage in (
        "python -m hypo_train --config recipe.yaml --learning_rate 1e-6",
        "python -m hypo_train demo --help",
    ):
        assert usage in text


# Paths: no shell expands those in a file, nor --name=~/folder


PATHS = ["output_dir", "model_name_or_path", "dataset_name", "ref_logps_cache_dir", "reward_model_path"]


@pytest.mark.parametrize("name", [*PATHS, "resume_from_checkpoint"])
def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"model_name_or_path": "m", "dataset_name": "d", name: "~/folder"}
    assert getattr(Config(**settings), name) == f"{tmp_path}/folder"


def test_a_recipe_and_its_base_may_be_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("model_name_or_path: m\ndataset_name: ~/data.jsonl\n")
    (tmp_path / "recipe.yaml").write_text("base: ~/base.yaml\n")
    assert load_config(["--config=~/recipe.yaml"]).dataset_name == f"{tmp_path}/data.jsonl"


# For each command, the arguments before and after the path.
WITH_A_PATH = {
    "config": ([*REQUIRED, "--output_dir"], []),
    "export.settings": ([], ["--output_dir", "out"]),
    "evaluation.settings": ([], []),
    "report.settings": ([], []),
    "judges.settings": ([], ["--judge", "module:function"]),
}


@pytest.mark.parametrize("command", WITH_A_PATH)
@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("$HOME/runs", "should be a path without $HOME: variables are not replaced here, write its value or ~"),
        ("runs/${USER}", "should be a path without ${USER}: variables are not replaced here, write its value or ~"),
        ("~nobody-of-this-name/runs", "should be a path in full: there is no such home folder"),
        ("runs/hypo ", "should be a path without white space before or after it"),
        ("runs/hypo\n", "should be a path without white space before or after it"),
        ("runs\n/hypo", "should be a path on one line"),
    ],
)
def test_a_path_that_is_not_what_it_seems_is_refused(command, path, problem):
    module = importlib.import_module(f"hypo_train.{command}")
    load = load_config if command == "config" else module.load_settings
    before, after = WITH_A_PATH[command]
    with pytest.raises(ConfigError) as error:
        load([*before, path, *after])
    assert problem in str(error.value)


@pytest.mark.parametrize("text", ['{"min_lr": 1e-7, "num_cycles": 2}', "{min_lr: 1e-7, num_cycles: 2}"])
def test_arguments_of_a_schedule_are_numbers(recipe, text):
    for arguments in (["--lr_scheduler_kwargs", text], ["--config", recipe(f"lr_scheduler_kwargs: {text}\n")]):
        kwargs = load_config([*REQUIRED, *arguments]).lr_scheduler_kwargs
        assert kwargs == {"min_lr": 1e-7, "num_cycles": 2}
        assert type(kwargs["num_cycles"]) is int
