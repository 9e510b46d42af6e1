"""The policy, its frozen reference and their LM head: everything that knows about transformers' models.

All log-probabilities are computed inside :meth:`Policy.forward`, so that a sharding wrapper's hooks see every
use of a parameter, the head's included. The reference costs what it must and no more: LoRA's is the model with
its adapter off, any other one a frozen copy of just the trained parameters, put in their place for a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hypo_kernels.head import LMHead
from hypo_train.config import Config
from hypo_train.tree import Tree, pack

T = TypeVar("T")
# What is asked of the hidden states (T, D) that predict a tree's targets, and of the head above them.
HeadFunction = Callable[[Tensor, LMHead], T]


class ModelError(ValueError):
    """The model cannot be loaded, or cannot be trained exactly here."""


class Policy(nn.Module):
    """A causal language model as the loss sees it: trees in, head-level results out."""

    def __init__(self, model: Any, *, is_peft: bool, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.is_peft = is_peft
        self.temperature = temperature
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        # Copies of the trained parameters alone; without an entry for LoRA, whose adapter can be switched off.
        self.reference_parameters = {} if is_peft else {name: p.detach().clone() for name, p in trained.items()}

    @property
    def base(self) -> Any:
        """The transformers model, without peft's wrapper."""
        return self.model.get_base_model() if self.is_peft else self.model

    def head(self) -> LMHead:
        """The LM head with the live weight; for use inside ``forward``."""
        linear, config = self.base.get_output_embeddings(), self.base.config.get_text_config()
        scaling = getattr(config, "logits_scaling", None)  # Granite divides, Cohere multiplies
        return LMHead(
            weight=linear.weight,
            bias=linear.bias,
            logit_softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=1.0 / scaling if scaling else float(getattr(config, "logit_scale", None) or 1.0),
            temperature=self.temperature,
        )

    def forward(self, tree: Tree, function: HeadFunction[T]) -> T:
        """``function(hidden (T, D), head)`` of the rows that predict the tree's targets."""
        hidden = self.base.get_decoder()(
            input_ids=tree.input_ids,
            position_ids=tree.position_ids,
            attention_mask=self._mask(tree),
            use_cache=False,
        ).last_hidden_state
        # Indexing, not index_select: its backward adds a prompt's several gradients in a fixed order on CUDA.
        return function(hidden.flatten(0, 1)[tree.rows], self.head())

    def _mask(self, tree: Tree) -> Tensor:
        """The prefix mask as the model's attention takes it: eager attention adds it to the scores."""
        if self.base.config._attn_implementation != "eager":
            return tree.attention_mask
        dtype = self.base.get_input_embeddings().weight.dtype
        scores = torch.zeros_like(tree.attention_mask, dtype=dtype)
        return scores.masked_fill(~tree.attention_mask, torch.finfo(dtype).min)

    @torch.no_grad()
    def reference(self, tree: Tree, function: HeadFunction[T]) -> T:
        """The same of the reference model: frozen, without dropout."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with self.model.disable_adapter() if self.is_peft else nullcontext():
                return functional_call(self, self.reference_parameters, (tree, function))
        finally:
            for module, training in modes.items():
                module.training = training

    def reference_to(self, device: torch.device) -> None:
        """Move the reference's parameters, which are no module's own, to ``device``."""
        self.reference_parameters = {name: p.to(device) for name, p in self.reference_parameters.items()}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save_pretrained(self, folder: Path) -> None:
        """Weights (LoRA: the adapter) that ``AutoModelForCausalLM.from_pretrained(folder)`` loads."""
        self.model.save_pretrained(folder)


def load_tokenizer(config: Config) -> Any:
    """The model's tokenizer; one without a padding token pads with its EOS, which masks keep apart."""
    _check_source(config)
    _check_architecture(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers raises a different class for every way to fail
        raise ModelError(f"cannot load the tokenizer of {config.model_name_or_path!r}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {config.model_name_or_path!r} has no EOS token: set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def eos_token_ids(model_generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's EOS and the checkpoint's (Llama 3 has several)."""
    more = getattr(model_generation_config, "eos_token_id", None)
    listed = [] if more is None else [more] if isinstance(more, int) else list(more)
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *listed]))


def load_policy(config: Config, *, autocast: bool) -> Policy:
    """The policy ready to train: loaded, its trained parameters chosen and in fp32, its head and mask checked.

    Raises:
        ModelError: not a causal language model, a head the kernels cannot serve exactly, attention that
            cannot take the prefix mask, or a choice of trained parameters that does not fit the model.
    """
    _check_source(config)
    _check_architecture(config)
    if config.dtype == "bfloat16" and not autocast:
        raise ModelError("dtype='bfloat16' needs bf16 compute: set bf16: true, or dtype: float32")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:
        raise ModelError(f"cannot load the model {config.model_name_or_path!r}: {_first_line(error)}") from error
    _disable_dropout(model)
    _check_window(model, config.max_prompt_length + config.max_completion_length)
    if config.use_peft:
        model = _with_lora(model, config)
    elif config.num_layers_unfrozen is not None:
        _unfreeze_last(model, config.num_layers_unfrozen)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # One update of 3e-6 changes 4 % of bf16 weights: what is trained is held in fp32.
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    policy = Policy(model, is_peft=config.use_peft, temperature=config.temperature)
    check_exactness(policy)
    return policy


def check_exactness(policy: Policy) -> None:
    """Compare what the loss will compute with what the model computes, on a few tokens, before any training.

    Raises ModelError when the logits are not the head's function of the last hidden state, or when hidden
    states under the prefix mask differ from those of separate rows.
    """
    model = policy.base
    name = type(model).__name__
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        kind = "none" if head is None else type(head).__name__
        raise ModelError(f"{name} has no plain linear LM head (found {kind}): adapters on the head are not served")
    vocab, device = head.weight.shape[0], head.weight.device
    prompt = [(7 * i + 1) % vocab for i in range(5)]
    branches = [[(11 * i + 3) % vocab for i in range(4)], [(5 * i + 2) % vocab for i in range(6)]]
    precise = all(p.dtype == torch.float32 for p in policy.parameters())
    training = policy.training
    policy.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=not precise):
            tree = pack([prompt], [(0, branch) for branch in branches], pad_token_id=0).to(device)
            in_tree = policy(tree, _logits)
            rows = [_plain_logits(policy, prompt, branch) for branch in branches]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name} cannot be trained on packed trees: {_first_line(error)}") from error
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


def _logits(hidden: Tensor, head: LMHead) -> Tensor:
    """The head's logits, before the temperature."""
    with torch.autocast(hidden.device.type, enabled=False):
        raw = hidden.to(head.weight.dtype) @ head.weight.t()
        return replace(head, temperature=1.0).logits(raw.float())


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


def _check_source(config: Config) -> None:
    """A local folder that is not there is not worth asking the Hub about."""
    name = config.model_name_or_path
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ModelError(f"model_name_or_path: there is no folder {name!r}")
    if path.is_dir() and not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise ModelError(f"model_name_or_path: the folder {name!r} has no config.json, so it is not a saved model")


def _check_architecture(config: Config) -> None:
    """Refuse encoders and sequence-to-sequence models before their weights are read."""
    try:
        found = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        where = "" if Path(config.model_name_or_path).is_dir() else "no local folder, and from the Hub: "
        raise ModelError(
            f"cannot read the config of {config.model_name_or_path!r}: {where}{_first_line(error)}"
        ) from error
    listed = found.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in (
        getattr(found, "auto_map", None) or {}
    )
    architectures = getattr(found, "architectures", None) or []
    masked = architectures and not any(
        a.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for a in architectures
    )
    if not listed or masked or getattr(found, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_name_or_path!r} is a {found.model_type} model"
            f"{f' ({architectures[0]})' if architectures else ''}, not a causal language model: "
            "choose a decoder that AutoModelForCausalLM loads"
        )


def _check_window(model: Any, longest: int) -> None:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is not None and (kinds is None or "sliding_attention" in kinds) and window < longest:
        raise ModelError(
            f"{type(model).__name__} attends to the last {window} tokens only, and prompt and completion may have "
            f"{longest}: lower max_prompt_length + max_completion_length to {window}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < longest:
        raise ModelError(
            f"{type(model).__name__} has {positions} positions, and prompt and completion may take {longest}: "
            f"lower max_prompt_length + max_completion_length to {positions}"
        )


def _disable_dropout(model: nn.Module) -> None:
    """A log-ratio of two dropout masks is noise; LoRA's own dropout is added later and stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):  # attention's, OPT's functional ones, layerdrop
                setattr(module, name, 0.0)


def _with_lora(model: Any, config: Config) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"lora_target_modules={targets!r}: {_first_line(error)}") from error


def _unfreeze_last(model: Any, count: int) -> None:
    """Train the last ``count`` decoder layers, the norm above them and an untied head."""
    decoder = model.get_decoder()
    layers = next((m for m in decoder.children() if isinstance(m, nn.ModuleList)), None)
    if layers is None:
        raise ModelError(f"num_layers_unfrozen: found no list of layers in {type(decoder).__name__}")
    if count > len(layers):
        raise ModelError(f"num_layers_unfrozen={count}: {type(model).__name__} has {len(layers)} layers")
    model.requires_grad_(False)
    for layer in layers[-count:]:
        layer.requires_grad_(True)
    for name, module in decoder.named_children():
        if "norm" in name or name == "ln_f":
            module.requires_grad_(True)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.requires_grad_(True)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
