"""Turn a configuration into a run: load cheap inputs, check them, load the weights, build."""

from __future__ import annotations

import os
from collections.abc import Callable

from hypo_train.build import Models, Run, build_accelerator, build_run, load_models
from hypo_train.checkpoint.resume import date_of_run
from hypo_train.config import Config, ConfigError
from hypo_train.data.template_date import today
from hypo_train.distributed.processes import Processes
from hypo_train.inputs import Inputs
from hypo_train.preflight import check_run
from hypo_train.preflight.consistency import require_same_inputs, require_same_settings
from hypo_train.preflight.hub import offline_if_unreachable
from hypo_train.sampling.registry import candidates


def prepare(config: Config, *, show: Callable[[list[str]], None] | None = None) -> Run:
    """Check ``config`` and its inputs, the cheapest checks first, and return the built run.

    Args:
        show: called with the lines of the overview before weights are read.

    Raises:
        ValueError: the run cannot start.
    """
    _check_launcher()
    config.require_no_conflicts()
    accelerator = build_accelerator(config)
    processes = Processes()
    day = processes.run_on_main(lambda: date_of_run(config) or today())  # processes may start around midnight
    inputs = Inputs(config, processes.rank_share, template_date=day)

    def load() -> Models:
        autocast = accelerator.mixed_precision == "bf16"
        findings = check_run(inputs, device_type=accelerator.device.type, autocast=autocast)
        if show is not None and processes.is_main:
            show(findings.page())
        return load_models(inputs, accelerator, is_main=processes.is_main)

    with processes.report_failures():
        require_same_settings(processes, config, device_type=accelerator.device.type)
        _check_num_processes(config, processes.world_size)
        # If one process fails, for example because its machine lacks a file, it reports this before the others wait.
        with offline_if_unreachable(config):
            models = processes.run_on_all(load)
        require_same_inputs(processes, inputs, models)
        return build_run(inputs, models, accelerator, processes)


_REFUSED_VARIABLES = {
    "ACCELERATE_USE_FSDP": "set fsdp: true here, and start with torchrun or accelerate launch --multi_gpu",
    "ACCELERATE_USE_DEEPSPEED": "set zero_stage: 1 or 2 here (fsdp: true for ZeRO-3's sharding), and start with "
    "torchrun or accelerate launch --multi_gpu",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported, set fsdp: true here and start with torchrun",
}


def _check_launcher() -> None:
    """Raise ConfigError if accelerate's launcher is configured to shard the model."""
    for variable, fix in _REFUSED_VARIABLES.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(f"{variable} is set: {fix}")


def _check_num_processes(config: Config, count: int) -> None:
    """Raise ConfigError if the run cannot be trained by ``count`` processes."""
    if count == 1 and (config.fsdp or config.zero_stage):
        setting = "fsdp=true" if config.fsdp else f"zero_stage={config.zero_stage}"
        raise ConfigError(f"{setting} in one process: start several, as with torchrun --nproc_per_node 8 -m hypo_train")
    if count > 1 and candidates(config.sampler)[0].one_process:
        raise ConfigError(f"sampler={config.sampler} in {count} processes: it runs in one so far, use sampler: auto")
