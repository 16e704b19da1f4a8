"""The files and folders that a config names: what each must be, and whether it is there.

Importing this loads neither torch nor ray, so that a dry run can say what a run would miss. Names that may be those of the hub are
left to the run: only the hub knows them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.schema import Config, PreferenceData, PromptData

MANIFEST = "gvm.json"
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
NAMED_DATA = ("ultrafeedback", "ultrafeedback_binarized")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MAKERS = {"gvm": "`dvpo gvm train`", "reward_model": "`dvpo rm train`"}
_NAMES = {"gvm": "GVM artifact", "reward_model": "reward model"}


def is_local(path: str) -> bool:
    """Whether a path can only be one of this machine: it is there, starts like one, has no hub name's form, or its first folder is there."""
    first, *rest = Path(path).parts or [""]
    return (
        path.startswith((".", "/", "~"))
        or _HUB_NAME.fullmatch(path) is None
        or Path(path).suffix in DATA_SUFFIXES
        or Path(path).exists()
        or (bool(rest) and Path(first).is_dir())
    )


def no_artifact(path: str | Path, kind: Literal["gvm", "reward_model"] = "gvm") -> str | None:
    """Why a folder is no value model or reward model, in a line that begins with its path; None where it may be one."""
    folder = Path(path).expanduser()
    if (folder / MANIFEST).is_file():
        return None
    if not folder.is_dir():
        return f"{path}: no such folder; give a {_NAMES[kind]} made by {_MAKERS[kind]}"
    return f"{path}: no {MANIFEST}, so this is no {_NAMES[kind]}; {_final_of(folder, MANIFEST) or f'give a folder made by {_MAKERS[kind]}'}"


def no_checkpoint(path: str) -> str | None:
    """Why a folder of this machine is no checkpoint of a model, in a line that begins with its path; None where it may be one."""
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return None
    if not folder.is_dir():
        what = "a file, no checkpoint folder" if folder.exists() else "no such checkpoint folder"
        return f"{path}: {what}; give a folder with config.json or a hub name"
    return f"{path}: no config.json, so this is no checkpoint; {_final_of(folder, 'config.json') or 'give the folder that save_pretrained wrote'}"


def _final_of(run_folder: Path, marker: str) -> str | None:
    """The advice to take what a run left in its `final/`, where that holds the marker."""
    return f"did you mean {run_folder / 'final'}?" if (run_folder / "final" / marker).is_file() else None


@dataclass(frozen=True)
class Needed:
    """Something that a setting or an option names and a run reads.

    Attributes:
        key: the setting or the option.
        path: as the user wrote it.
        kind: `data`; `policy`, a language model; `trunk`, a language or value model to start from; `gvm`; `reward_model`.
    """

    key: str
    path: str
    kind: Literal["data", "policy", "trunk", "gvm", "reward_model"]

    @property
    def problem(self) -> str | None:
        """One line that names the key, what is wrong and what would be right; None where nothing is."""
        problem = self._problem()
        return problem and f"{self.key} {problem}"

    def _problem(self) -> str | None:
        folder = Path(self.path).expanduser()
        if self.kind == "data":
            return f"{self.path}: no such file or folder" if _is_missing_data(self.path) else None
        if self.kind in ("policy", "trunk"):
            problem = no_checkpoint(self.path) if is_local(self.path) else None
            if problem is None and self.kind == "policy" and (folder / MANIFEST).is_file():
                return f"{self.path}: a value model, which writes no text; give a language model"
            return problem
        problem = no_artifact(self.path, self.kind)
        if problem is None and self.kind == "gvm" and _objective(folder) == "bradley_terry":
            return f"{self.path}: a reward model, of which only the last value was trained; give one made by `dvpo gvm train`"
        return problem


def problems(needed: Iterable[Needed]) -> list[str]:
    """What is wrong with them, one line each, once."""
    return list(dict.fromkeys(problem for one in needed if (problem := one.problem) is not None))


def _is_missing_data(path: str) -> bool:
    return path not in NAMED_DATA and is_local(path) and not Path(path).exists()


def _objective(folder: Path) -> str | None:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["objective"]["name"]
    except (ValueError, KeyError, TypeError):  # a damaged manifest; loading says in what
        return None


# ------------------------------------------------------------------------------------- what a checkpoint allows


def _too_many_layers(key: str, layers: int | None, checkpoint: str) -> str | None:
    """Why a checkpoint folder has not so many decoder layers, in a line that begins with the key; None where it may have them."""
    there = _model_number(checkpoint, "num_hidden_layers")
    if layers is None or there is None or layers <= there:
        return None
    return f"{key} {layers}: {checkpoint} has {there} decoder layers; give {there} or fewer"


def too_long_rows(config: Config, context: int | None = None) -> str | None:
    """Why the longest row of policy optimisation does not fit the positions of `model.path`; None where it may.

    Args:
        context: positions of the model; by its config.json where that is on this machine, when not given.
    """
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    context = context or _model_number(config.model.path, "max_position_embeddings")
    if context is None or prompt + response <= context:
        return None
    return (
        f"data.max_prompt_tokens {prompt} + rollout.max_response_tokens {response} = {prompt + response} tokens, but {config.model.path} has a "
        f"context of {context}"
    )


def policy_misfits(config: Config) -> list[str]:
    """What a run of policy optimisation asks of `model.path` that its config.json denies; nothing for a hub name."""
    layers = _too_many_layers("policy.trainable_layers", config.policy.trainable_layers, config.model.path)
    return [problem for problem in (layers, too_long_rows(config)) if problem is not None]


def value_model_misfits(config: Config, section: Literal["gvm", "reward_model"] = "gvm") -> list[str]:
    """What training a value model asks of the checkpoint it starts from that its config.json denies; nothing for a hub name."""
    problem = _too_many_layers(f"{section}.num_layers", getattr(config, section).num_layers, value_model_start(config, section)[1])
    return [] if problem is None else [problem]


def _model_number(checkpoint: str, name: str) -> int | None:
    """A number of a checkpoint folder's config.json; None for a hub name, or a config that calls it otherwise."""
    try:
        config = json.loads((Path(checkpoint).expanduser() / "config.json").read_text(encoding="utf-8"))
        number = config.get("text_config", config).get(name)
    except (OSError, ValueError, AttributeError):
        return None
    return number if isinstance(number, int) else None


# ------------------------------------------------------------------------------------------ of each kind of run


def policy_inputs(config: Config, scored: bool = True) -> Iterator[Needed]:
    """What `dvpo train` reads; without the models that score rollouts, where those come from elsewhere."""
    yield Needed("model.path", config.model.path, "policy")
    if scored:
        yield from _scoring_inputs(config)
    yield from _data("data.prompts", config.data.prompts)
    if config.gvm.refresh.source is not None:
        yield from _data("data.preferences", config.data.preferences)


def _scoring_inputs(config: Config) -> Iterator[Needed]:
    section = ALGORITHMS[config.algorithm].section
    yield from _if_set(f"{section}.path", getattr(config, section).path, section)
    yield from (Needed("scorer.ensemble", path, "gvm") for path in config.scorer.ensemble)


def plan_inputs(config: Config) -> Iterator[Needed]:
    """What `dvpo plan` reads: the policy, and what scores rollouts or, where that is not made yet, what it will start from."""
    yield Needed("model.path", config.model.path, "policy")
    section = ALGORITHMS[config.algorithm].section
    path = getattr(config, section).path
    if is_made(path):
        yield Needed(f"{section}.path", path, section)
    else:
        yield Needed(*value_model_start(config, section), "trunk")


def not_made_yet(config: Config) -> str | None:
    """Of which model a plan has to go by the config, because what scores rollouts is not there; None where it is."""
    section = ALGORITHMS[config.algorithm].section
    path = getattr(config, section).path
    if is_made(path):
        return None
    missing = f"{section}.path is not set" if path is None else f"{section}.path {path}: no such folder"
    return f"{missing}; planned is the {_NAMES[section]} that {_MAKERS[section]} makes of this config"


def is_made(path: str | None) -> bool:
    """Whether the folder of a value or reward model is there."""
    return path is not None and Path(path).expanduser().is_dir()


def value_model_start(config: Config, section: Literal["gvm", "reward_model"]) -> tuple[str, str]:
    """The key that names the checkpoint which a value model starts from, and the checkpoint."""
    init_from = getattr(config, section).init_from
    return ("model.path", config.model.path) if init_from is None else (f"{section}.init_from", init_from)


def preference_inputs(config: Config, section: Literal["gvm", "reward_model", "dpo"] = "gvm") -> Iterator[Needed]:
    """What `dvpo gvm train`, `dvpo rm train` and `dvpo dpo` read."""
    yield Needed("model.path", config.model.path, "policy")
    if section != "dpo":
        yield from _if_set(f"{section}.init_from", getattr(config, section).init_from, "trunk")
    yield from _data("data.preferences", config.data.preferences)


def sft_inputs(config: Config) -> Iterator[Needed]:
    """What `dvpo sft` reads."""
    yield Needed("model.path", config.model.path, "policy")
    yield from _if_set("data.sft", config.data.sft, "data")


def _data(section: str, data: PreferenceData | PromptData | None) -> Iterator[Needed]:
    if data is not None:
        yield Needed(f"{section}.path", data.path, "data")
        yield from _if_set(f"{section}.heldout_path", data.heldout_path, "data")


def _if_set(key: str, path: str | None, kind) -> Iterator[Needed]:
    if path is not None:
        yield Needed(key, path, kind)
