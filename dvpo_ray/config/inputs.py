"""The files and folders that a config names: what each must be, and whether it is there.

Importing this loads neither torch nor ray, so that a dry run can say what a run would miss. A name that may be one of the hub is left
to the run: only the hub knows it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.paths import from_home, or_nearest
from dvpo_ray.config.schema import Config, SplitData

MANIFEST = "gvm.json"
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
NAMED_DATA = {"ultrafeedback": "openbmb/UltraFeedback", "ultrafeedback_binarized": "HuggingFaceH4/ultrafeedback_binarized"}
"""Hub names of data sets with a short name."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ARTIFACTS = {"gvm": ("GVM artifact", "`dvpo gvm train`"), "reward_model": ("reward model", "`dvpo rm train`")}
"""What the folder that `gvm.path` or `reward_model.path` names is called, and the command that makes it."""


def is_local(path: str) -> bool:
    """Whether a path can only be one of this machine: it is there, starts like one, is not a possible hub name, or its first folder is there."""
    first, *rest = Path(path).parts or [""]
    return (
        path.startswith((".", "/"))
        or _HUB_NAME.fullmatch(path) is None
        or Path(path).suffix in DATA_SUFFIXES
        or Path(path).exists()
        or (bool(rest) and Path(first).is_dir())
    )


def no_artifact(path: str | Path, kind: Literal["gvm", "reward_model"] = "gvm") -> str | None:
    """Why a folder cannot be a value model or reward model, in a line that begins with its path; None where it may be one."""
    folder, (name, maker) = Path(path), _ARTIFACTS[kind]
    if (folder / MANIFEST).is_file():
        return None
    if not folder.is_dir():
        return f"{path}: no such folder{_here(path)}; give a {name} made by {maker}"
    return f"{path}: no {MANIFEST}, so this is not a {name}; {_final_of(folder, MANIFEST) or f'give a folder made by {maker}'}"


def no_checkpoint(path: str) -> str | None:
    """Why a folder of this machine cannot be a checkpoint of a model, in a line that begins with its path; None where it may be one."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return None
    if not folder.is_dir():
        what = "a file, not a checkpoint folder" if folder.exists() else f"no such checkpoint folder{_here(path)}"
        return f"{path}: {what}; give a folder with config.json or a hub name"
    advice = _final_of(folder, "config.json") or "give the folder that save_pretrained wrote"
    return f"{path}: no config.json, so this is not a checkpoint; {advice}"


def no_data(path: str) -> str | None:
    """Why a path of this machine cannot be rows, in a line that begins with it; None where it may be."""
    source = Path(path)
    if all((source / name).is_file() for name in ("config.yaml", "summary.json")):
        return f"{path}: a run folder, which has no rows of a data set; give a file or a folder of rows"
    if path in NAMED_DATA or source.is_dir() or not is_local(path):
        return None
    if not source.exists():
        return f"{path}: no such file or folder{or_nearest(path, DATA_SUFFIXES) or _here(path)}"
    if source.suffix in DATA_SUFFIXES:
        return None
    if source.suffix == ".csv":
        return f"{path}: CSV is not read; {from_csv(path)}"
    return f"{path}: unknown format {source.suffix or '(no suffix)'}; use .jsonl, .json, .parquet, a folder or a hub name"


def from_csv(path: str | Path) -> str:
    """The advice on how to make rows of a CSV file."""
    source = str(path)
    rows = str(Path(path).with_suffix(".jsonl")) if Path(path).suffix == ".csv" else "ROWS.jsonl"
    return f"convert it, for example by pandas.read_csv({source!r}).to_json({rows!r}, orient='records', lines=True)"


def _here(path: str | Path) -> str:
    """What a path that is not there is relative to; empty for an absolute one."""
    return "" if Path(path).is_absolute() else f" in {from_home(os.getcwd())}, where this command starts"


def _final_of(run_folder: Path, marker: str) -> str | None:
    """The advice to take `final/` of a run folder, where that holds the marker."""
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
        """What is wrong with the path and what would be right, in a line that begins with it; None where nothing is wrong."""
        folder = Path(self.path)
        if self.kind == "data":
            return no_data(self.path)
        if self.kind in ("policy", "trunk"):
            problem = no_checkpoint(self.path) if is_local(self.path) else None
            if problem is None and self.kind == "policy" and (folder / MANIFEST).is_file():
                return f"{self.path}: a value model, which writes no text; give a language model"
            return problem
        problem = no_artifact(self.path, self.kind)
        if problem is None and self.kind == "gvm" and _objective(folder) == "bradley_terry":
            return f"{self.path}: a reward model; only its last value was trained; give a folder made by `dvpo gvm train`"
        return problem


def problems(needed: Iterable[Needed]) -> list[str]:
    """What is wrong with them, one line each that begins with the key, without repeats."""
    return list(dict.fromkeys(f"{one.key} {problem}" for one in needed if (problem := one.problem) is not None))


def names_of_files(needed: Iterable[Needed]) -> list[str]:
    """A line for each name that is taken for one of the hub, while a file of this name lies here with a suffix."""
    on_hub = [one for one in needed if one.kind == "data" and one.path not in NAMED_DATA and not is_local(one.path)]
    return [f"{one.key} {one.path} is taken for a name on the hub{meant}" for one in on_hub if (meant := or_with_suffix(one.path))]


def or_with_suffix(name: str) -> str:
    """What to add to the error about rows that the hub did not give: the file of this name that lies here; empty if there is none."""
    file = next((name + suffix for suffix in DATA_SUFFIXES if Path(name + suffix).is_file()), None)
    return f"; did you mean {file}?" if file is not None else ""


def _objective(folder: Path) -> str | None:
    try:
        return _manifest(folder)["objective"]["name"]
    except (KeyError, TypeError):  # a damaged manifest; loading it says what is wrong
        return None


def _manifest(folder: Path) -> dict:
    """gvm.json; nothing where it is missing or damaged."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def scoring_warnings(config: Config) -> list[str]:
    """What the training of the model that scores rollouts said against its accuracy, one line each that begins with its path."""
    path = getattr(config, ALGORITHMS[config.algorithm].section).path
    return [f"{path}: {line}" for line in _manifest(Path(path)).get("heldout_warnings", [])] if path is not None else []


# ------------------------------------------------------------------------------------- what a checkpoint allows


def _too_many_layers(key: str, layers: int | None, checkpoint: str) -> list[str]:
    """One line if a checkpoint folder has fewer decoder layers than a setting asks for."""
    there = model_number(checkpoint, "num_hidden_layers")
    if layers is None or there is None or layers <= there:
        return []
    return [f"{key} {layers}: {checkpoint} has {counted(there, 'decoder layer')}; give {there} or fewer"]


def too_long_rows(config: Config, context: int | None = None) -> str | None:
    """Why the longest row of policy optimisation does not fit the context of `model.path`; None where it may fit.

    Args:
        context: of the model, in tokens; not given: by its config.json, if that is on this machine.
    """
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    context = context or model_number(config.model.path, "max_position_embeddings")
    if context is None or prompt + response <= context:
        return None
    return (
        f"data.max_prompt_tokens {prompt} + rollout.max_response_tokens {response} = {prompt + response} tokens, "
        f"but {config.model.path} has a context of {context}; lower one or both"
    )


def biased_sampling(config: Config) -> str | None:
    """Why a run of policy optimisation cannot sample like this; None where it can."""
    if config.rollout.top_p == 1.0:
        return None
    return (
        f"rollout.top_p is {config.rollout.top_p:g}: the engine would sample from a distribution that is cut off differently for every policy, so "
        "importance ratios and KL would be biased; set rollout.top_p=1 (dvpo eval takes any)"
    )


def policy_misfits(config: Config) -> list[str]:
    """What a run of policy optimisation asks of `model.path` that its config.json does not have; nothing for a hub name."""
    layers = _too_many_layers("policy.trainable_layers", config.policy.trainable_layers, config.model.path)
    return [*layers, *(problem for problem in (too_long_rows(config), biased_sampling(config)) if problem is not None)]


def value_model_misfits(config: Config, section: Literal["gvm", "reward_model"] = "gvm") -> list[str]:
    """What training a value model asks of its first checkpoint that the config.json there does not have; nothing for a hub name."""
    return _too_many_layers(f"{section}.num_layers", getattr(config, section).num_layers, value_model_start(config, section)[1])


def other_tokenizer(config: Config) -> list[str]:
    """One line if the model that scores rollouts has another vocabulary than the policy, by their tokenizer.json. Other differences, and
    tokenizers that are not here, are left to the run."""
    section = ALGORITHMS[config.algorithm].section
    path = getattr(config, section).path
    theirs, ours = _vocabulary(path), _vocabulary(config.model.path)
    if theirs is None or ours is None or theirs == ours:
        return []
    return [f"{section}.path {path}: trained with another tokenizer than that of {config.model.path}; use models with the same tokenizer"]


def _vocabulary(folder: str | None) -> dict | list | None:
    if folder is None:
        return None
    try:
        return json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))["model"].get("vocab")
    except (OSError, ValueError, KeyError):
        return None


def model_number(checkpoint: str, name: str) -> int | None:
    """A number of a checkpoint folder's config.json; None for a hub name, or if the number is not there."""
    try:
        config = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("text_config", config).get(name)


# ------------------------------------------------------------------------------------------ of each kind of run


def policy_inputs(config: Config, scored: bool = True) -> Iterator[Needed]:
    """What `dvpo train` reads. Without `scored`, not the models that score rollouts."""
    yield Needed("model.path", config.model.path, "policy")
    if scored:
        section = ALGORITHMS[config.algorithm].section
        yield from _if_set(f"{section}.path", getattr(config, section).path, section)
        yield from (Needed("scorer.ensemble", path, "gvm") for path in config.scorer.ensemble)
    yield from _data("data.prompts", config.data.prompts)
    if config.gvm.refresh.source is not None:
        yield from _data("data.preferences", config.data.preferences)


def plan_inputs(config: Config) -> Iterator[Needed]:
    """What `dvpo plan` reads: the policy, and the model that scores rollouts or, if that is not made yet, its first checkpoint."""
    yield Needed("model.path", config.model.path, "policy")
    section = ALGORITHMS[config.algorithm].section
    path = getattr(config, section).path
    yield Needed(f"{section}.path", path, section) if is_made(path) else Needed(*value_model_start(config, section), "trunk")


def not_made_yet(config: Config) -> str | None:
    """A note that the model that scores rollouts is not made yet, so that a plan follows the config; None if it is made."""
    section = ALGORITHMS[config.algorithm].section
    path, (name, maker) = getattr(config, section).path, _ARTIFACTS[section]
    if is_made(path):
        return None
    missing = f"{section}.path is not set" if path is None else f"{section}.path {path}: no such folder{_here(path)}"
    return f"{missing}; the plan assumes the {name} that {maker} makes from this config"


def is_made(path: str | None) -> bool:
    """Whether the folder of a value or reward model is there."""
    return path is not None and Path(path).is_dir()


def value_model_start(config: Config, section: Literal["gvm", "reward_model"]) -> tuple[str, str]:
    """The checkpoint that a value model starts from: the key that names it, and its path."""
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


def _data(section: str, data: SplitData | None) -> Iterator[Needed]:
    if data is not None:
        yield Needed(f"{section}.path", data.path, "data")
        yield from _if_set(f"{section}.heldout_path", data.heldout_path, "data")


def _if_set(key: str, path: str | None, kind) -> Iterator[Needed]:
    if path is not None:
        yield Needed(key, path, kind)
