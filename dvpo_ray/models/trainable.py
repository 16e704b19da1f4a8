"""Which parameters of a policy or value model are trained, and its full weights under the names of the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import LoraConfig, ModelConfig, PolicyConfig
from dvpo_ray.errors import InputError
from dvpo_ray.models.loading import first_line, load_model_config


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a transformers model, first to last."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__} has no list of {count} decoder layers")


def train_last_layers(model: PreTrainedModel, count: int) -> None:
    """Freeze all parameters except those of the last `count` decoder layers and the final norm.

    The backward pass then stops at the first trained layer, so fewer layers cost less.
    """
    layers = decoder_layers(model)
    if count > len(layers):
        raise InputError(f"policy.trainable_layers is {count}, but the model has {counted(len(layers), 'decoder layer')}")
    trained = {id(p) for layer in layers[-count:] for p in layer.parameters()}
    final_norm = getattr(model.base_model, "norm", None)
    if final_norm is not None:
        trained |= {id(p) for p in final_norm.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def disable_dropout(model: nn.Module) -> None:
    """Turn every dropout off for good, whatever the config of the model says: modules, and numbers that modules pass to functions."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def apply_lora(model: PreTrainedModel, lora: LoraConfig, task_type: str | None = "CAUSAL_LM", key: str = "lora") -> PeftModel:
    """Wrap a model with peft's low-rank adapters; only these are trained.

    Args:
        key: config key of the adapters, for the error.

    Raises:
        InputError: the adapters do not fit the model; names the key.
    """
    _check_lora(model, lora, key)
    try:
        adapters = PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=_target_modules(model, lora),
            layers_to_transform=lora.layers,
            task_type=task_type,
        )
        with _showing_whole_shapes(model):
            return get_peft_model(model, adapters)
    except ValueError as error:  # anything else that peft refuses
        raise InputError(f"{key}: {first_line(error)}") from error


@contextmanager
def _showing_whole_shapes(model: nn.Module) -> Iterator[None]:
    """Within this context parameters that ZeRO-3 has cut have the shape of the whole, and no more memory."""
    cut = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_shape")]
    held = [parameter.data for parameter in cut]
    for parameter in cut:
        parameter.data = parameter.data.new_empty(()).expand(parameter.ds_shape)
    try:
        yield
    finally:
        for parameter, data in zip(cut, held, strict=True):
            parameter.data = data


def _check_lora(model: PreTrainedModel, lora: LoraConfig, key: str) -> None:
    """Refuse layers and modules that the model does not have. peft ignores a name that fits nothing if another name fits."""
    count = len(decoder_layers(model))
    if unknown := [layer for layer in lora.layers or [] if not 0 <= layer < count]:
        raise InputError(f"{key}.layers names layer {unknown[0]}, but the model has the decoder layers 0 to {count - 1}")
    if lora.target_modules == "all-linear":
        return
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    for wanted in [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules:
        _check_target(model, linear, wanted, key, is_pattern=isinstance(lora.target_modules, str))


def _check_target(model: PreTrainedModel, linear: set[str], wanted: str, key: str, *, is_pattern: bool) -> None:
    """As in peft, a pattern must match a whole dotted name, and a name the end of it."""
    try:
        fits = re.compile(wanted if is_pattern else rf"(.*\.)?{re.escape(wanted)}").fullmatch
    except re.error as error:
        raise InputError(f"{key}.target_modules: {wanted!r} is not a regular expression: {error}; give a list of names, or all-linear") from None
    matched = [name for name, _ in model.named_modules() if fits(name)]
    if not matched or (other := [name for name in matched if name not in linear]):
        problem = f"fits {other[0]}, which is not a linear layer" if matched else "fits no module of the model"
        names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise InputError(f"{key}.target_modules: {wanted!r} {problem}; its linear layers are {names}")
    embedding = model.get_input_embeddings().weight
    if tied := [name for name in matched if model.get_submodule(name).weight is embedding]:
        raise InputError(f"{key}.target_modules: {tied[0]} has the weights of the input embedding (tie_word_embeddings), so no adapter fits it alone")


def _target_modules(model: PreTrainedModel, lora: LoraConfig) -> str | list[str]:
    """peft's `target_modules`. peft takes no "all-linear" together with `layers`, so it is replaced by the names of the linear layers."""
    if lora.layers is None or lora.target_modules != "all-linear":
        return lora.target_modules
    names = {name for layer in decoder_layers(model) for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    return sorted(name.rpartition(".")[2] for name in names)


def check_partial_training(model: ModelConfig, policy: PolicyConfig, transport: str = "auto") -> None:
    """Refuse a `policy.trainable_layers` or `policy.lora` that does not fit the policy, by its config alone.

    Args:
        transport: `weight_sync.transport`.

    Raises:
        InputError: names the key.
    """
    if policy.trainable_layers is None and policy.lora is None:
        return
    config = load_model_config(model.path, model.trust_remote_code)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        if policy.trainable_layers is not None:
            train_last_layers(skeleton, policy.trainable_layers)
        if policy.lora is not None:
            skeleton = apply_lora(skeleton, policy.lora, key="policy.lora")
    if transport == "adapters":
        _check_adapters_travel(skeleton)


def _check_adapters_travel(model: PeftModel) -> None:
    """Refuse adapters that engines do not take without the model."""
    other = next((name for name, module in model.get_base_model().named_modules() if isinstance(module, ParamWrapper)), None)
    if other is not None:
        raise InputError(
            f"weight_sync.transport is adapters, but {other} is not a linear layer, and its adapter does not travel alone; set it to auto"
        )


def _adapted(base: PreTrainedModel) -> dict[int, LoraLayer]:
    """The LoRA layer of each adapted parameter, by the id of the parameter. Wrappers of one module can be nested."""
    found: dict[int, LoraLayer] = {}
    for module in base.modules():
        if isinstance(module, ParamWrapper):
            found[id(module.get_param())] = module
        elif isinstance(module, LoraLayer):
            found[id(module.get_base_layer().weight)] = module
    return found


def _merged(parameter: torch.Tensor, layer: LoraLayer | None) -> torch.Tensor:
    """The parameter with its adapter, W + scaling * B A, summed in float32 at least."""
    if layer is None:
        return parameter.detach()
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return (parameter.to(dtype) + layer.get_delta_weight("default").to(dtype)).to(parameter.dtype).detach()


def _changing(base: PreTrainedModel) -> set[str]:
    """Names of the parameters that training changes, and of all other parameters in the same decoder layers.

    Inference engines fuse the projections of a layer and can't load half of a fused weight, so a layer travels whole.
    """
    trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    moving = tuple(block for block in _blocks(base) if any(name.startswith(block) for name in trained))
    return trained | {name for name, _ in base.named_parameters() if name.startswith(moving)}


def _blocks(base: PreTrainedModel) -> list[str]:
    """The prefix of each decoder layer's parameters."""
    layers = {id(layer) for layer in decoder_layers(base)}
    return [f"{name}." for name, module in base.named_modules() if id(module) in layers]


def adapter_weights(model: PeftModel, gather=None) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model's adapters alone, whole, under the names that peft saves them by.

    Args:
        gather: as for `full_weights`.
    """
    adapters = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    with nullcontext() if gather is None else gather(adapters):
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
            yield name, tensor.detach()


class WeightShape(NamedTuple):
    """A weight as `full_weights` yields it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def full_weights(model: nn.Module, gather=None, *, changing_only: bool = False, bucket_bytes: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight and saved buffer of a model, whole, with LoRA merged, under the names and in the shapes of its checkpoints.

    A model may hold several weights of a checkpoint as one parameter (the experts of a layer, for example). The weights of a decoder
    layer are turned back together.

    Args:
        model: a transformers model, or a peft LoRA model around one.
        gather: makes a context manager in which the given parameters are whole (ZeRO-3); never nested.
        changing_only: leave out buffers, and decoder layers, embeddings and norms without trained parameters.
        bucket_bytes: gather as many decoder layers and other weights together as fit into this; at least one.

    Yields:
        (name, tensor), detached. Tied weights appear once, under their first name.
    """
    base, adapted, groups = _weight_groups(model, changing_only)
    for bucket in _buckets(groups, bucket_bytes):
        parts = [part for group in bucket for part in _parts(group, adapted)]
        with nullcontext() if gather is None else gather(parts):
            for group in bucket:
                whole = {name.replace(".base_layer", ""): _merged(parameter, adapted.get(id(parameter))) for name, parameter in group.items()}
                yield from revert_weight_conversion(base, whole).items()


def describe_weights(model: nn.Module, *, changing_only: bool = False) -> list[WeightShape]:
    """What `full_weights` yields, in its order, from shapes alone: nothing is gathered or merged."""
    base, _, groups = _weight_groups(model, changing_only)
    described = []
    for group in groups:
        whole = {name.replace(".base_layer", ""): torch.empty(whole_shape(p), dtype=p.dtype, device="meta") for name, p in group.items()}
        described += [WeightShape(name, meta.dtype, tuple(meta.shape)) for name, meta in revert_weight_conversion(base, whole).items()]
    return described


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, also of one that ZeRO-3 has cut."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _weight_groups(model: nn.Module, changing_only: bool) -> tuple[PreTrainedModel, dict[int, LoraLayer], list[dict[str, torch.Tensor]]]:
    """The model without adapters, its adapted parameters, and the parameters that travel: those of a decoder layer, or one other."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    chosen = _changing(base) if changing_only else None
    blocks = _blocks(base)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    buffers = [(name, buffer) for name, buffer in base.named_buffers() if name in base.state_dict()] if not changing_only else []
    for name, parameter in [*base.named_parameters(), *buffers]:
        if ".lora_" not in name and (chosen is None or name in chosen):
            groups.setdefault(next((block for block in blocks if name.startswith(block)), name), {})[name] = parameter
    return base, _adapted(base), list(groups.values())


def _parts(group: dict[str, torch.Tensor], adapted: dict[int, LoraLayer]) -> list[torch.Tensor]:
    """The parameters of a group, and of the adapters on them."""
    layers = [adapted[id(parameter)] for parameter in group.values() if id(parameter) in adapted]
    return [*group.values(), *(p for layer in layers for n, p in layer.named_parameters() if n.startswith("lora_"))]


def _buckets(groups: list[dict[str, torch.Tensor]], bucket_bytes: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Neighbouring groups, as many as fit into `bucket_bytes`, at least one."""
    bucket, filled = [], 0
    for group in groups:
        size = sum(whole_shape(parameter).numel() * parameter.element_size() for parameter in group.values())
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append(group)
        filled += size
    if bucket:
        yield bucket
