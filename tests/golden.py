"""Record what small runs give, bit by bit, and compare later code with it.

    python tests/golden.py record golden.json    # before a change that should change no number
    python tests/golden.py check golden.json     # after it

Each case trains a tiny model for ten steps, in one process or in two, and then once more from the checkpoint of
step five. What is kept of a run is every metric that is not a time or a size, the held-out samples, and a SHA-256 of
the final weights. The values belong to the machine and the library versions they were recorded with, so they are
compared on the same machine and never committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "train")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

STEPS, SAVE_STEPS = 10, 5
ALGORITHMS: dict[str, dict[str, Any]] = {
    "sft": {"algorithm": "sft"},
    "dpo": {"algorithm": "dpo"},
    "ipo": {"algorithm": "ipo"},
    "hypo": {"algorithm": "hypo"},
    "rloo": {"algorithm": "rloo", "reward": "tiny:reward_of_length", "beta": 0.1},
    "reward": {"algorithm": "reward"},
}
TRAINED: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-3},
    "lora": {"use_peft": True, "lora_r": 4},
    "last": {"num_layers_unfrozen": 1},
}
MORE: dict[str, dict[str, Any]] = {
    "hypo, exact KL": {"kl_estimator": "exact"},
    "hypo, samples drawn ahead": {"rollout_steps": 3},
    "hypo, a third of the prompts online": {"rollout_steps": 3, "online_fraction": 0.3},
    "hypo, generate": {"sampler": "generate"},
    "hypo, separate rows": {"attn_implementation": "sdpa"},
    "hypo, micro-batches of tokens": {"max_tokens_per_micro_batch": 60},
    "hypo, checkpointing": {"gradient_checkpointing": True},
    "hypo, muon": {"optim": "muon"},
    "dpo, warm-up and cosine": {"algorithm": "dpo", "warmup_ratio": 0.2, "lr_scheduler_type": "cosine"},
    "dpo, smoothed labels": {"algorithm": "dpo", "label_smoothing": 0.1},
}
SEVERAL: dict[str, dict[str, Any]] = {
    "hypo, fsdp": {"fsdp": True},
    "hypo, vocab-parallel": {"fsdp": True, "vocab_parallel": True},
}
GRID = {f"{name}, {part}": {**values, **TRAINED[part]} for name, values in ALGORITHMS.items() for part in TRAINED}
CASES = {1: {**GRID, **MORE}, 2: {**GRID, **SEVERAL}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["record", "check", "rank"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    options = parser.parse_args()
    if options.action == "rank":
        _run(options.file, 2, options.only)
        return 0
    found = _measure(options.only)
    if options.action == "record":
        options.file.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
        print(f"{len(found)} runs recorded in {options.file}")
        return 0
    known = json.loads(options.file.read_text(encoding="utf-8"))
    different = [name for name, values in found.items() if values != known.get(name)]
    for name in different:
        print(f"{name}: {_difference(known.get(name), found[name])}")
    missing = [name for name in known if name not in found] if not options.only else []
    print(f"{len(found) - len(different)} of {len(found)} runs are the same, bit by bit; {len(missing)} were not run")
    return 1 if different or missing else 0


def _measure(only: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        _save_models(folder)
        ranks = _start_ranks(folder, only)
        _run(folder, 1, only)
        for rank in ranks:
            _, error = rank.communicate()
            if rank.returncode:
                raise SystemExit(error)
        found = {}
        for path in sorted(folder.glob("*/*/found.json")):
            found[f"{path.parent.name}, {path.parent.parent.name}"] = json.loads(path.read_text(encoding="utf-8"))
        return found


def _save_models(folder: Path) -> None:
    import tiny

    tiny.save(tiny.new_model("llama"), folder / "model")


def _start_ranks(folder: Path, only: str) -> list[subprocess.Popen[str]]:
    from ranks import free_port

    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    shared["PYTHONPATH"] = os.pathsep.join([str(HERE / "train"), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "rank", str(folder), "--only", only]
    return [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def _run(folder: Path, world: int, only: str) -> None:
    """Train every case, in this process alone or as one of two."""
    import tiny
    import torch
    from accelerate.state import AcceleratorState

    from hypo_train.train import train

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main_process = os.environ.get("RANK", "0") == "0"
    for name, changes in CASES[world].items():
        if only not in name:
            continue
        case = folder / ("one process" if world == 1 else "two processes") / name
        case.mkdir(parents=True, exist_ok=True)
        own = {"per_device_train_batch_size": 4 // world, "num_eval_rows": 8, "max_steps": STEPS, "eval_steps": 5}
        own |= {"save_steps": SAVE_STEPS, "save_total_limit": 5, "adam_epsilon": 1e-5, **changes}
        config = tiny.make_config(case, folder / "model", **own)
        with open(os.devnull, "w") as nowhere:
            sys.stdout, shown = nowhere, sys.stdout
            try:
                train(config, progress=False)
                if main_process:
                    whole = _outcome(case / "run")
                    shutil.rmtree(case / "run" / f"checkpoint-{STEPS}")
                if world > 1:
                    torch.distributed.barrier()
                train(config.model_copy(update={"resume_from_checkpoint": "auto"}), progress=False)
            finally:
                sys.stdout = shown
        if main_process:
            found = {"whole": whole, "resumed": _outcome(case / "run")}
            (case / "found.json").write_text(json.dumps(found), encoding="utf-8")
        if world == 1:
            AcceleratorState._reset_state(reset_partial_state=True)
    if world > 1:
        torch.distributed.destroy_process_group()


def _outcome(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    costs = ("time/", "flops/", "memory/", "tokens_per_second", "train_samples_per_second", "tflops_per_second", "mfu")
    metrics = [{key: value for key, value in line.items() if not key.startswith(costs)} for line in lines]
    digest = hashlib.sha256()
    for path in sorted((run / "final").glob("*.safetensors")):
        digest.update(path.read_bytes())
    samples = sorted((run / "samples").glob("*.jsonl")) if (run / "samples").exists() else []
    return {
        "metrics": metrics,
        "samples": [hashlib.sha256(path.read_bytes()).hexdigest() for path in samples],
        "weights": digest.hexdigest(),
    }


def _difference(known: Any, found: Any) -> str:
    if known is None:
        return "it was not recorded"
    for kind in ("whole", "resumed"):
        for part in ("metrics", "samples", "weights"):
            if known[kind][part] != found[kind][part]:
                if part != "metrics":
                    return f"other {part} ({kind})"
                for old, new in zip(known[kind][part], found[kind][part], strict=False):
                    if old != new:
                        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
                        return f"step {new.get('step')}: other {', '.join(keys[:4])} ({kind})"
                return f"another number of log lines ({kind})"
    return "no difference"


if __name__ == "__main__":
    sys.exit(main())
