"""The value model: the trunk of a causal language model with a linear head. Its output at a token is the value of the state after the token.

It exists for every causal language model. Where transformers has a token classifier for the architecture, the value model is that class
with one label, so that the artifact loads as `AutoModelForTokenClassification`. Elsewhere the class is made here, in the same form.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import LoraConfig
from dvpo_ray.errors import InputError
from dvpo_ray.models.attention import attention_for
from dvpo_ray.models.cpu_linear import OneDNNLinear, onednn_is_faster, use_fast_linears
from dvpo_ray.models.loading import load_checkpoint, load_model_config, moved, straight_to, turn_off_randomness
from dvpo_ray.models.trainable import apply_lora


class ValueHead(nn.Linear):
    """A linear layer that computes in float32, whatever the dtype of the trunk and of its own weight.

    Rounding a value near 1 to bfloat16 would cost 0.004, more than most tokens change it.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        if self.weight.dtype == torch.float32 and onednn_is_faster():
            return OneDNNLinear.forward(self, hidden.float())
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden.float(), self.weight.float(), bias)


def value_model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of value models of an architecture."""
    if type(config) in AutoModelForTokenClassification._model_mapping:
        return AutoModelForTokenClassification._model_mapping[type(config)]
    return _made_class(AutoModelForCausalLM._model_mapping[type(config)])


@cache
def _made_class(language_model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A token classifier of one label on the trunk of a language model, like those of transformers."""
    base = next(cls for cls in language_model.__mro__ if cls.__name__.endswith("PreTrainedModel"))  # the architecture's own

    def __init__(self, config: PretrainedConfig) -> None:
        base.__init__(self, config)
        setattr(self, self.base_model_prefix, AutoModel.from_config(config))
        # What the output projection would read; in some architectures that is not the hidden size.
        width = getattr(config.get_text_config(), "word_embed_proj_dim", config.get_text_config().hidden_size)
        self.score = nn.Linear(width, 1)
        self.post_init()

    def forward(self, input_ids: Tensor, **inputs) -> TokenClassifierOutput:
        hidden = getattr(self, self.base_model_prefix)(input_ids=input_ids, **inputs).last_hidden_state
        return TokenClassifierOutput(logits=self.score(hidden))

    name = language_model.__name__.removesuffix("LMHeadModel").removesuffix("ForCausalLM") + "ForTokenClassification"
    return type(name, (base,), {"__init__": __init__, "forward": forward, "__module__": __name__})


def new_value_model(
    path: str,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    keep_head: bool = False,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """A value model on the trunk of a causal language model, with a zero head and no dropout.

    With a zero head every value is exactly 0, so the first targets depend on the outcomes alone.

    Args:
        path: checkpoint folder or hub name of the language model.
        num_layers: keep the first `num_layers` decoder layers; all if None.
        keep_head: the checkpoint is a value model; keep its head.

    Raises:
        InputError: the checkpoint is missing, lacks trunk weights, has fewer layers, or is not a causal language model.
    """
    config = load_model_config(path, trust_remote_code, num_labels=1)
    if num_layers is not None:
        keep_first_layers(config, num_layers, path)
    model, report = load_value_model(path, config, dtype, attention, trust_remote_code, device)
    head = [name for name, _ in head_parameters(model)]
    missing = sorted(set(report["missing_keys"]) - set(head))
    if missing:
        raise InputError(f"{path}: the checkpoint lacks {len(missing)} weights of the trunk, first {missing[0]}; give a complete checkpoint")
    if keep_head:
        if report["missing_keys"]:
            raise InputError(f"{path}: the checkpoint has no value head to keep; give a GVM artifact, or leave out gvm.keep_head")
        return model.eval()
    for _, parameter in head_parameters(model):
        nn.init.zeros_(parameter)
    return model.eval()


def load_value_model(
    path: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, dict]:
    """Load weights quietly and return the model, without dropout, with transformers' loading report.

    For the checkpoint of a language model the report names a new head and an unused output projection; the caller decides
    which other entries are errors.
    """
    turn_off_randomness(config)
    attention = attention_for(attention, config, dtype, on_gpu=torch.cuda.is_available())
    options = {"config": config, "dtype": dtype, "attn_implementation": attention, "output_loading_info": True}
    cls = value_model_class(config)
    if trust_remote_code and cls in AutoModelForTokenClassification._model_mapping.values():
        cls, options = AutoModelForTokenClassification, options | {"trust_remote_code": True}
    with straight_to(device):
        model, report = load_checkpoint("value model", path, lambda p: cls.from_pretrained(p, **options))
    model = use_fast_linears(moved(model, device))
    value_head(model).__class__ = ValueHead
    return model, report


def value_head(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns a hidden state into a value."""
    return model.get_submodule(head_weight_name(model).removesuffix(".weight"))


def head_weight_name(model: PreTrainedModel) -> str:
    """Parameter name of the weight of the value head."""
    return next(name for name, _ in head_parameters(model) if name.endswith(".weight"))


def head_parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the value head by name: all outside the trunk (`score.weight` and `score.bias` in most architectures)."""
    trunk = f"{model.base_model_prefix}."
    return [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith(trunk)]


def keep_first_layers(config: PretrainedConfig, num_layers: int, path: str, key: str = "gvm.num_layers") -> None:
    """Truncate a model config to its first decoder layers, in place, and every list with one entry per layer.

    Args:
        key: config key of the number, for the error.

    Raises:
        InputError: the model has fewer layers.
    """
    text = config.get_text_config()
    total = text.num_hidden_layers
    if num_layers > total:
        raise InputError(f"{key} is {num_layers}, but {path} has {counted(total, 'decoder layer')}; give {total} or fewer")
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == total and name not in ("architectures", "eos_token_id"):
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers


def check_trunk(path: str, num_layers: int | None, lora: LoraConfig | None, section: str, trust_remote_code: bool) -> None:
    """Refuse a number of layers or adapters that do not fit the trunk of a value model, by its config alone.

    Args:
        path: checkpoint that the trunk starts from.
        section: config section, for the error.

    Raises:
        InputError: names the key.
    """
    config = load_model_config(path, trust_remote_code)
    if num_layers is not None:
        keep_first_layers(config, num_layers, path, key=f"{section}.num_layers")
    if lora is not None:
        with torch.device("meta"):
            skeleton = value_model_class(config)(config)
            apply_lora(skeleton.base_model, lora, task_type=None, key=f"{section}.lora")
