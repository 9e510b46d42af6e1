"""Compare predicted and measured step times of small CPU runs: ``python -m benchmarks.scaling``.

The speeds of computation and memory come from the measured phases of one run, and the speed of links from collectives
that are timed alone. With these speeds the steps of the other runs are predicted, which differ in width, length, batch
size, training method and number of processes (one or two).

Gloo computes its collectives on the cores of the processes, so the prediction assumes no overlap. Times are CPU seconds
of one thread, and each phase counts with its fastest step, so that other work on the machine has little influence. The
time that a process waits for another one is not included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.step.material import EOS, FIRST_WORD, PAD, id_tokenizer
from hypo_train.config import Config
from hypo_train.data.plan import load_plan
from hypo_train.metrics.flops import ModelFlops
from hypo_train.metrics.log import read_metrics
from hypo_train.metrics.timing import _HostClock
from hypo_train.model.load import build_on_meta
from hypo_train.preflight.memory_estimate import Conditions
from hypo_train.preflight.step_time import Speeds, exchanges, predict, work_of
from hypo_train.sampling.registry import SAMPLERS
from hypo_train.train import train
from hypo_train.utils.rank_share import RankShare

WARM_UP, STEPS = 2, 5
VOCAB, LAYERS = 2048, 4
# The phases of a prediction, with the measured phases of each: a predicted forward pass includes the loss.
PHASES = {"sample": ["sample"], "reference": ["reference"], "forward": ["forward", "loss"], "backward": ["backward"]}
PHASES |= {"optimizer": ["optimizer"]}


class Case(NamedTuple):
    """The settings of one run, with lengths in tokens."""

    name: str
    processes: int = 1
    width: int = 320
    prompt: int = 32
    completion: int = 32
    batch: int = 4  # rows for each process
    settings: tuple[tuple[str, Any], ...] = ()


LORA = (("use_peft", True), ("lora_target_modules", "all-linear"))
FSDP = (("fsdp", True),)
ALONE = Case("as calibrated")
CASES = [
    ALONE,
    Case("wider: 512", width=512),
    Case("completions of 96 tokens", completion=96),
    Case("12 rows", batch=12),
    Case("LoRA", settings=LORA),
    Case("DDP", 2),
    Case("fsdp", 2, settings=FSDP),
    Case("fsdp, 512 wide, 2 micro-batches", 2, width=512, settings=(*FSDP, ("gradient_accumulation_steps", 2))),
]


def config_of(case: Case, folder: Path) -> Config:
    """Write the model and rows of a case to ``folder``, and return the configuration of its run."""
    torch.manual_seed(0)
    model, data = folder / "model", folder / "pairs.jsonl"
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=case.width,
        intermediate_size=4 * case.width,
        num_hidden_layers=LAYERS,
        num_attention_heads=case.width // 64,
        max_position_embeddings=512,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    LlamaForCausalLM(shape).save_pretrained(model)
    id_tokenizer(VOCAB).save_pretrained(model)
    draw = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(f"t{i}" for i in torch.randint(FIRST_WORD, VOCAB, (length,), generator=draw).tolist())

    lengths = {"prompt": case.prompt, "chosen": case.completion - 1, "rejected": case.completion - 1}
    rows = [{name: text(length) for name, length in lengths.items()} for _ in range(512)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Config(
        model_name_or_path=str(model),
        dataset_name=str(data),
        output_dir=str(folder / "run"),
        bf16=False,
        max_prompt_length=case.prompt,
        max_completion_length=case.completion,
        per_device_train_batch_size=case.batch,
        precompute_ref_log_probs=False,
        keep_sampling_memory=True,
        max_steps=WARM_UP + STEPS,
        logging_steps=1,
        report_to=[],
        **dict(case.settings),
    )


def run(cases: dict[Path, Config], processes: int, folder: Path) -> None:
    """Train all ``cases`` in one launch of ``processes`` processes."""
    folder.mkdir()
    values = [config.model_dump() for config in cases.values()]
    (folder / "configs.json").write_text(json.dumps(values), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    subprocess.run([*command, "-m", "benchmarks.scaling", "--train", str(folder)], check=True)


def train_all(folder: Path) -> None:
    """Train the configurations in ``folder``; called in each process that ``run`` starts."""
    warnings.simplefilter("ignore")
    with patch.object(_HostClock, "now", lambda self: time.process_time()):
        for values in json.loads((folder / "configs.json").read_text(encoding="utf-8")):
            train(Config(**values), progress=False)
    if dist.is_initialized() and dist.get_world_size() > 1 and (rate := _link()) and dist.get_rank() == 0:
        (folder / "link.json").write_text(json.dumps(rate), encoding="utf-8")


def _link(num_bytes: int = 2**21, calls: int = 50) -> float:
    """Return the bytes a second that a process sends in all-gathers and reduce-scatters as large as a layer."""
    full = torch.zeros(num_bytes // 4)
    shard = torch.zeros(len(full) // dist.get_world_size())
    dist.barrier()
    started = time.process_time()
    for _ in range(calls):
        dist.all_gather_into_tensor(full, shard)
        dist.reduce_scatter_tensor(shard, full)
    return 2 * calls * shard.nbytes * (dist.get_world_size() - 1) / (time.process_time() - started)


def measured(config: Config) -> dict[str, float]:
    """Return the fewest seconds of each phase over the steps after the warm-up."""
    lines = [line for line in read_metrics(Path(config.output_dir) / "metrics.jsonl") if line["step"] > WARM_UP]
    return {
        phase: min(sum(line.get(f"time/{name}", 0.0) for name in names) for line in lines)
        for phase, names in PHASES.items()
    }


def predicted(config: Config, count: int, speeds: Speeds) -> dict[str, float]:
    """Return the predicted seconds of each phase in one of ``count`` processes."""
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    plan, _ = load_plan(config, tokenizer, [EOS], RankShare(0, count))
    architecture = AutoConfig.from_pretrained(config.model_name_or_path)
    trained = build_on_meta(config, architecture, device_type="cpu", autocast=False)
    conditions = Conditions("cpu", autocast=False, shares_prompts=True, sampler=SAMPLERS["decode"])
    work = work_of(plan, conditions, set(trained.windows or [None]))
    exchanged = exchanges(trained, work.passes, count=count, sharded=config.fsdp, autocast=False)
    flops = ModelFlops.of_outline(trained, autocast=False)
    return {part.phase: part.seconds for part in predict(plan, trained, conditions, work, exchanged, flops, speeds)}


def calibrated(config: Config, seconds: dict[str, float], link: float) -> Speeds:
    """Return the speeds for which the predictions for ``config`` equal the measured ``seconds``.

    The three training passes share one speed, which makes their sum exact.
    """
    passes = ("reference", "forward", "backward")
    unit = predicted(config, 1, Speeds(1.0, 1e30, link))
    compute = sum(unit[phase] for phase in passes) / sum(seconds[phase] for phase in passes)
    unit = predicted(config, 1, Speeds(1e30, 1.0, link))
    return Speeds(compute, unit["sample"] / seconds["sample"], link, overlaps=False)


def table(rows: list[tuple[Case, dict[str, float], dict[str, float]]]) -> list[str]:
    """Return a Markdown table of the predicted and measured seconds of each phase and in total."""
    names = [*PHASES, "total"]
    lines = ["| run | processes | " + " | ".join(names) + " | predicted / measured |", "|---" * (len(names) + 3) + "|"]
    for case, expected, seconds in rows:
        total = [sum(times.get(phase, 0) for phase in PHASES) for times in (expected, seconds)]
        cells = [f"{expected.get(phase, 0):.3f} / {seconds.get(phase, 0):.3f}" for phase in PHASES]
        cells += [f"{total[0]:.3f} / {total[1]:.3f}", f"{total[0] / total[1]:.2f}"]
        lines.append(f"| {case.name} | {case.processes} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train is not None:
        train_all(arguments.train)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        configs = {}
        for i, case in enumerate(CASES):
            (folder / f"case{i}").mkdir()
            configs[case.name] = config_of(case, folder / f"case{i}")
        for count in (1, 2):
            chosen = {folder / case.name: configs[case.name] for case in CASES if case.processes == count}
            run(chosen, count, folder / f"start{count}")
        link = json.loads((folder / "start2" / "link.json").read_text(encoding="utf-8"))
        speeds = calibrated(configs[ALONE.name], measured(configs[ALONE.name]), link)
        print(f"calibrated: {speeds.compute / 1e9:.1f} GFLOP/s, {speeds.memory / 1e9:.2f} GB/s decoding, ", end="")
        print(f"{link / 1e9:.2f} GB/s sent")
        rows = [
            (case, predicted(configs[case.name], case.processes, speeds), measured(configs[case.name]))
            for case in CASES
        ]
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
