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

from dvpo_ray.baselines.algorithms import ALGORITHMS
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
        return f"{path}: no such checkpoint folder; give a folder with config.json or a hub name"
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


def decoder_layers(checkpoint: str) -> int | None:
    """Decoder layers of a checkpoint folder by its config.json; None for a hub name, or a config that calls them otherwise."""
    try:
        config = json.loads((Path(checkpoint).expanduser() / "config.json").read_text(encoding="utf-8"))
        layers = config.get("text_config", config).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        return None
    return layers if isinstance(layers, int) else None


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
    if ALGORITHMS[config.algorithm].scorer == "reward_model":
        yield from _if_set("reward_model.path", config.reward_model.path, "reward_model")
    else:
        yield from _if_set("gvm.path", config.gvm.path, "gvm")
        yield from (Needed("scorer.ensemble", path, "gvm") for path in config.scorer.ensemble)


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
