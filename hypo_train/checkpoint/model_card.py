"""Write the model card (``README.md``) of a saved model.

Unknown metadata, such as the licence of a base model that states none, becomes a comment for the user to fill in.
"""

from __future__ import annotations

import json
import math
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from hypo_train.config import Config
from hypo_train.metrics.log import logged_evaluations
from hypo_train.utils.atomic import write_file
from hypo_train.utils.records import record_errors, write_json
from hypo_train.utils.redact import redacted

if TYPE_CHECKING:
    from hypo_train.algorithms.registry import Citation

DATA_FILE = "data.json"
# Settings of the machine and the logs, which do not affect the model.
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
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}
_PACKAGES = ("hypo-kernels", "torch", "transformers", "peft", "datasets")


def write_data_report(run: Path, report: dict[str, list[str]]) -> None:
    """Save the numbers of used and dropped rows of each split, for the model cards of the run."""
    write_json(run / DATA_FILE, report)


def write_card(folder: Path, config: Config, run: Path, *, step: int | None = None) -> None:
    """Write ``README.md`` into a model's folder; it replaces the one from peft.

    Args:
        run: the run's folder, with its metrics and its data report.
        step: the step after which the weights were saved; None for the last step.
    """
    text = card_text(config, run, is_adapter=(folder / "adapter_config.json").is_file(), step=step)
    with record_errors(folder / "README.md"):
        write_file(folder / "README.md", text.encode(errors="replace"))


def card_text(config: Config, run: Path, *, is_adapter: bool, step: int | None = None) -> str:
    """Return the card's text. Texts from data and settings are fenced or escaped, so they cannot break its layout."""
    local = _local_names(config, run)
    values = _without_folders(redacted(config.model_dump()), local)
    metadata, missing = _metadata(config, values, local, is_adapter)
    return _template().render(
        metadata=metadata,
        missing_metadata=missing,
        method=config.spec.title,
        base_model=_escaped(values["model_name_or_path"]),
        kind="A LoRA adapter" if is_adapter else "A model",
        step=step,
        data=_without_folders("\n".join(_data(values, run)), local),
        settings=yaml.safe_dump(_settings(config, values), sort_keys=False, allow_unicode=True),
        evaluation=_evaluation(run, step),
        versions="\n".join(f"{name} {_version(name)}" for name in _PACKAGES),
        paper=_bibtex(config.spec.citation) if config.spec.citation else None,
    )


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    # Jinja's autoescape is for HTML. Markdown is made safe by _fenced and _escaped.
    environment = jinja2.Environment(
        loader=loader, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["fenced"] = _fenced
    return environment.get_template("model_card.md.jinja")


def _local_names(config: Config, run: Path) -> dict[str, str]:
    """Return what stands in the card for the names of this machine's folders and files: their last part."""
    names = (config.model_name_or_path, config.dataset_name, config.reward_model_path)
    # Text that replaces ``name`` must not be found in it again, so the longest goes first.
    local = sorted((n for n in names if n is not None and not _is_hub_name(n, run) and "://" not in n), key=len)
    return {name: Path(name).name or "local" for name in reversed(local)}


def _without_folders(value: Any, local: dict[str, str]) -> Any:
    """Return ``value`` with the last parts of local names in the place of these; lists and dicts recursively."""
    if isinstance(value, str):
        for name, last in local.items():
            value = value.replace(name, last)
        return value
    if isinstance(value, list):
        return [_without_folders(item, local) for item in value]
    return {key: _without_folders(item, local) for key, item in value.items()} if isinstance(value, dict) else value


def _metadata(config: Config, values: dict[str, Any], local: dict[str, str], is_adapter: bool) -> tuple[str, list[str]]:
    """Return the card's metadata as YAML, and a line for each unknown field that the Hub needs."""
    base_model, dataset = config.model_name_or_path, config.dataset_name
    licence = _licence_of(base_model, is_local=base_model in local)
    data = ModelCardData(
        base_model=None if base_model in local else values["model_name_or_path"],
        datasets=None if dataset in local or "://" in dataset else [values["dataset_name"]],
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if config.spec.trains_reward_model else "text-generation",
        tags=[config.algorithm, "hypo-kernels", *(["lora"] if is_adapter else [])],
        **licence,
    )
    missing = {
        "base_model: the Hub name of the model that this one was trained from": data.base_model,
        "datasets: the Hub names of the data, in a list": data.datasets,
        "license: the licence of these weights; the base model states none that could be read here": data.license,
    }
    return data.to_yaml(), [line for line, value in missing.items() if value is None]


def _licence_of(base_model: str, *, is_local: bool) -> dict[str, Any]:
    """Return the licence in the base model's card, from its folder or the Hub's cache. Never downloads."""
    path: Any = Path(base_model).expanduser() / "README.md"
    if not path.is_file():
        path = None if is_local else try_to_load_from_cache(base_model, "README.md")
    if not isinstance(path, (str, Path)):
        return {}
    try:
        data = ModelCard.load(path).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # a broken card states no licence
        return {}
    names = ("license", "license_name", "license_link")
    return {name: data[name] for name in names if isinstance(data.get(name), str)} if data.get("license") else {}


def _is_hub_name(name: str, run: Path) -> bool:
    """Return whether ``name`` is that of a repository, and no path from where the run was started or is now."""
    folders = (Path(), *run.resolve().parents)  # an export may be started elsewhere than the run was
    is_path = any((folder / Path(name).expanduser()).exists() for folder in folders)
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)) and not is_path


def _data(values: dict[str, Any], run: Path) -> list[str]:
    lines = [f"dataset: {values['dataset_name']}", f"train: split {values['dataset_train_split']}"]
    if values["dataset_test_split"] is not None:
        lines.append(f"eval: split {values['dataset_test_split']}")
    elif values["num_eval_rows"]:
        lines.append(f"eval: the last {values['num_eval_rows']} rows of split {values['dataset_train_split']}")
    path = run / DATA_FILE
    report = redacted(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    return lines + [f"{split}: {line}" for split, split_lines in report.items() for line in split_lines]


def _settings(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    fields = Config.model_fields
    return {
        name: value
        for name, value in values.items()
        if name not in _NOT_SHOWN and (fields[name].is_required() or fields[name].default != getattr(config, name))
    }


def _evaluation(run: Path, step: int | None) -> dict[str, Any] | None:
    """Return the step and the rows (name, value ± error) of the last evaluation up to ``step``, or None."""
    evaluations = [line for line in logged_evaluations(run) if step is None or line["step"] <= step]
    if not evaluations:
        return None
    last = evaluations[-1]
    rows = [
        (name, f"{value:.4g}{_error(last.get(f'{name}_se'))}")
        for name, value in last.items()
        if name.startswith("eval_") and not name.endswith("_se") and isinstance(value, (int, float))
    ]
    return {"step": last["step"], "rows": rows}


def _error(value: Any) -> str:
    return f" ± {value:.2g}" if isinstance(value, (int, float)) and not math.isnan(value) else ""


def _bibtex(paper: Citation) -> str:
    year = f"20{paper.arxiv[:2]}"
    fields = {"title": paper.title, "author": paper.authors, "journal": f"arXiv:{paper.arxiv}", "year": year}
    return f"@article{{{paper.key},\n" + ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items()) + "\n}"


def _fenced(text: str, language: str) -> str:
    """Return a fenced block whose fence is longer than any run of backticks in ``text``."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _escaped(text: str) -> str:
    """Return ``text`` on one line, with the characters escaped that Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
