"""The model card (``README.md``) beside a saved model: what it is, and how it was made.

What cannot be known here, such as a licence that its base model does not state, is a line to be filled in.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from hypo_train.algorithms.registry import Algorithm
from hypo_train.checkpoint.files import put_text
from hypo_train.config import Config
from hypo_train.metrics.log import read_metrics
from hypo_train.utils.redact import redacted

DATA_FILE = "data.json"
# Of the machine that the run was on, not of the model; and what has a line of its own.
_NOT_SHOWN = {
    "output_dir",
    "resume_from_checkpoint",
    "ref_logps_cache_dir",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "run_name",
    "project",
    "peak_tflops",
}
_PACKAGES = ("hypo-kernels", "torch", "transformers", "peft", "datasets")


def write_data_report(run: Path, report: dict[str, list[str]]) -> None:
    """Keep what became of the rows of each split, for the cards of what the run saves."""
    put_text(run / DATA_FILE, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def write_card(folder: Path, config: Config, run: Path, *, step: int | None = None) -> None:
    """``README.md`` in ``folder``, in place of the one that peft writes.

    Args:
        run: the run's folder, with its metrics and its data report.
        step: after which the weights were saved; None = the last.
    """
    text = card_text(config, run, is_adapter=(folder / "adapter_config.json").is_file(), step=step)
    (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")


def card_text(config: Config, run: Path, *, is_adapter: bool, step: int | None = None) -> str:
    """The card as text; nothing that is read from data or settings can end a block it is shown in."""
    values = redacted(config.model_dump())
    start = values["model_name_or_path"]
    until = "" if step is None else f", as it was after step {step}"
    what = "A LoRA adapter" if is_adapter else "A model"
    lines = [
        _front_matter(config, values, is_adapter),
        f"# {config.spec.title} from {_inline(start)}",
        "",
        f"{what} trained with {config.spec.title} by `hypo_train`{until}.",
        "",
        "## Data",
        "",
        *_data(values, run),
        "## Recipe",
        "",
        "Settings that differ from their defaults:",
        "",
        _block("yaml", yaml.safe_dump(_settings(config, values), sort_keys=False, allow_unicode=True)),
        *_metrics(run, step),
        "## Versions",
        "",
        _block("text", "\n".join(f"{name} {_version(name)}" for name in _PACKAGES)),
        *_citation(config.spec),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front_matter(config: Config, values: dict[str, Any], is_adapter: bool) -> str:
    """Metadata as the Hub reads it; what it would not take, or nobody has said, is a comment on what to fill in."""
    start, data = config.model_name_or_path, config.dataset_name
    of_hub, data_of_hub = _is_hub_name(start), _is_hub_name(data)
    found: dict[str, Any] = {
        "base_model": values["model_name_or_path"] if of_hub else None,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-classification" if config.spec.trains_reward_model else "text-generation",
        "tags": [config.algorithm, "hypo-kernels", *(["lora"] if is_adapter else [])],
        "datasets": [values["dataset_name"]] if data_of_hub else None,
        **_licence_of(start),
    }
    text = yaml.safe_dump({k: v for k, v in found.items() if v is not None}, sort_keys=False, allow_unicode=True)
    blanks = []
    if not of_hub:
        blanks.append("# base_model: the Hub name of the model that this one was trained from")
    if not data_of_hub:
        blanks.append("# datasets: the Hub names of the data, in a list")
    if "license" not in found:
        blanks.append("# license: the licence of these weights; the base model states none that could be read here")
    return "\n".join(["---", text.rstrip(), *blanks, "---", ""])


def _licence_of(start: str) -> dict[str, str]:
    """The licence that the base model's own card states, from its folder or the Hub's cache; nothing is fetched."""
    path: Any = Path(start).expanduser() / "README.md"
    if not path.is_file():
        path = try_to_load_from_cache(start, "README.md") if _is_hub_name(start) else None
    if not isinstance(path, (str, Path)):
        return {}
    try:
        data = ModelCard.load(path).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # somebody's text: what cannot be read states nothing
        return {}
    names = ("license", "license_name", "license_link")
    return {name: data[name] for name in names if isinstance(data.get(name), str)} if data.get("license") else {}


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)) and not Path(name).expanduser().exists()


def _data(values: dict[str, Any], run: Path) -> list[str]:
    splits = [f"train: split {values['dataset_train_split']}"]
    if values["dataset_test_split"] is not None:
        splits.append(f"eval: split {values['dataset_test_split']}")
    elif values["num_eval_rows"]:
        splits.append(f"eval: the last {values['num_eval_rows']} rows of split {values['dataset_train_split']}")
    shown = [f"dataset: {values['dataset_name']}", *splits]
    path = run / DATA_FILE
    if path.is_file():
        report = redacted(json.loads(path.read_text(encoding="utf-8")))
        shown += [f"{split}: {line}" for split, lines in report.items() for line in lines]
    return [_block("text", "\n".join(shown))]


def _settings(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    fields = Config.model_fields
    return {
        name: value
        for name, value in values.items()
        if name not in _NOT_SHOWN and (fields[name].is_required() or fields[name].default != getattr(config, name))
    }


def _metrics(run: Path, step: int | None) -> list[str]:
    """The last evaluation up to ``step``, errors beside their means."""
    path = run / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    found = [x for x in lines if any(n.startswith("eval_") for n in x) and (step is None or x["step"] <= step)]
    if not found:
        return []
    last = {name: value for name, value in found[-1].items() if name.startswith("eval_")}
    rows = [
        f"| {name} | {value:.4g}{_error(last.get(f'{name}_se'))} |"
        for name, value in last.items()
        if not name.endswith("_se") and isinstance(value, (int, float))
    ]
    return ["## Evaluation", "", f"After step {found[-1]['step']}:", "", "| metric | value |", "|---|---|", *rows, ""]


def _error(value: Any) -> str:
    return f" ± {value:.2g}" if isinstance(value, (int, float)) and value == value else ""


def _citation(algorithm: Algorithm) -> list[str]:
    if algorithm.citation is None:
        return []
    key, title, authors, number = algorithm.citation
    entry = "\n".join(
        [
            f"@article{{{key},",
            f"  title = {{{title}}},",
            f"  author = {{{authors}}},",
            f"  journal = {{arXiv:{number}}},",
            f"  year = {{20{number[:2]}}}",
            "}",
        ]
    )
    return ["## Citation", "", _block("bibtex", entry)]


def _block(language: str, text: str) -> str:
    """A fenced block, whose fence is longer than any within it, and an empty line."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _inline(text: str) -> str:
    """Text in a heading, without what Markdown or HTML would read in it."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
