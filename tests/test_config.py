"""The config: what loads, and what is refused and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_ray.config import Config, dump_config, load_config, override_config
from dvpo_ray.config.keys import known_keys, nearest_keys
from dvpo_ray.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "cluster_configs").glob("*.yaml"))
MODEL = "model: {path: some/model}\n"


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "x.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    """The one line with which a config is refused, without the folder of its file."""
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(f"{path.parent}/", "")


# ---------------------------------------------------------------------------------------------------- loading


def test_file_then_overrides_then_defaults(write):
    config = load_config(write(MODEL + "policy: {learning_rate: 2.0e-6, clip_epsilon: 0.1}\n"), ["policy.learning_rate=1e-5", "seed=7"])
    assert config.policy.learning_rate == 1e-5
    assert config.policy.clip_epsilon == 0.1
    assert config.seed == 7
    assert config.gvm.learning_rate == 1.41e-5


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("policy.learning_rate=1e-5", "policy.learning_rate", 1e-5),
        ("policy.learning_rate=1E-5", "policy.learning_rate", 1e-5),
        ("policy.learning_rate=.5", "policy.learning_rate", 0.5),
        ("policy.betas=[0.9, 0.95]", "policy.betas", (0.9, 0.95)),
        ("train.steps=10_000", "train.steps", 10_000),
        ("train.steps=010", "train.steps", 10),
        ("kl.placement=off", "kl.placement", "off"),
        ("name=2024-01-01", "name", "2024-01-01"),
        ("train.trackers=[]", "train.trackers", []),
        ("ray.object_store_gib=null", "ray.object_store_gib", None),
        ("ray.object_store_gib=", "ray.object_store_gib", None),
        ("policy.lora.rank=8", "policy.lora.rank", 8),
        ("policy.lora={rank: 4}", "policy.lora.rank", 4),
        ("data.preferences={path: a.jsonl}", "data.preferences.path", "a.jsonl"),
        ("data.preferences.path=a=b.jsonl", "data.preferences.path", "a=b.jsonl"),
        ("model.path=models/a:b", "model.path", "models/a:b"),
    ],
)
def test_override_values_are_yaml(write, override, key, value):
    found = load_config(write(MODEL), [override])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins(write):
    assert load_config(write(MODEL), ["seed=1", "seed=2"]).seed == 2


def test_a_mapping_changes_what_it_names_and_leaves_the_rest(write):
    file = write(MODEL + "policy: {threads: 3, epsilon: 1.0e-6, deepspeed: {zero_stage: 2, offload_optimizer: true}, lora: {rank: 4, alpha: 7}}\n")
    policy = load_config(file, ["policy={threads: 2, deepspeed: {zero_stage: 1}}", "policy.lora={rank: 8}"]).policy
    assert (policy.threads, policy.epsilon, policy.deepspeed.zero_stage, policy.deepspeed.offload_optimizer) == (2, 1e-6, 1, True)
    assert (policy.lora.rank, policy.lora.alpha) == (8, 7.0)
    assert load_config(file, ["policy.lora=null"]).policy.lora is None


def test_a_mapping_is_not_blamed_for_what_the_file_has(write):
    file = write(MODEL + "policy: {thrads: 3}\n")
    assert refusal(file, "policy={epsilon: 1.0e-6}").startswith("x.yaml: unknown key policy.thrads")
    assert refusal(file, "policy={epsilon: 0}").startswith("override policy={epsilon: 0}: policy.epsilon is 0; expected a number above 0")


def test_empty_section_means_its_defaults(write):
    config = load_config(write(MODEL + "data:\npolicy:\n  deepspeed:\n  lora:\n"))
    assert config.data.max_prompt_tokens == 1024
    assert config.policy.deepspeed.zero_stage == 0
    assert config.policy.lora is None


def test_override_of_one_alias_leaves_the_other_alone(write):
    config = load_config(write(MODEL + "scorer: &frozen {threads: 3}\nreference: *frozen\n"), ["scorer.threads=5"])
    assert (config.scorer.threads, config.reference.threads) == (5, 3)


def test_byte_order_mark_is_no_part_of_the_first_key(write):
    assert load_config(write(b"\xef\xbb\xbf" + MODEL.encode())).model.path == "some/model"


@settings(max_examples=25, deadline=None)
@given(
    rate=st.floats(1e-300, 1e300),
    betas=st.tuples(*[st.floats(0.0, 1.0, exclude_min=True, exclude_max=True)] * 2),
    path=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1).filter(lambda path: not path.startswith("~")),
    placement=st.sampled_from(["reward", "loss", "off"]),
)
def test_dumped_config_loads_back_equal(tmp_path_factory, rate, betas, path, placement):
    config = Config(model={"path": path}, policy={"learning_rate": rate, "betas": betas}, kl={"placement": placement})
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("policy: {learning_rat: 1}", "x.yaml: unknown key policy.learning_rat; did you mean policy.learning_rate?"),
        ("policy: {zero_stage: 1}", "x.yaml: unknown key policy.zero_stage; did you mean policy.deepspeed.zero_stage?"),
        ("polcy: {clip_epsilon: 1}", "x.yaml: unknown key polcy; did you mean policy?"),
        (
            "learning_rate: 1",
            "x.yaml: unknown key learning_rate; did you mean sft.learning_rate, gvm.learning_rate or policy.learning_rate?",
        ),
        ("qqzzxx: 1", "x.yaml: unknown key qqzzxx; docs/configuration.md lists all keys"),
        ("1: 2", "x.yaml: unknown key 1; docs/configuration.md lists all keys"),
        ("policy: {clip_epsilon: high}", "x.yaml: policy.clip_epsilon is 'high'; expected a number above 0 and below 1"),
        ("policy: {clip_epsilon: 1}", "x.yaml: policy.clip_epsilon is 1; expected a number above 0 and below 1"),
        ("policy: {clip_epsilon: '0.2'}", "x.yaml: policy.clip_epsilon is '0.2'; expected a number above 0 and below 1"),
        ("kl: {coefficient: .nan}", "x.yaml: kl.coefficient is '.nan'; expected a number of at least 0"),
        ("batch: {prompts_per_step: 1.5}", "x.yaml: batch.prompts_per_step is 1.5; expected a whole number of at least 1"),
        ("batch: {prompts_per_step: true}", "x.yaml: batch.prompts_per_step is true; expected a whole number of at least 1"),
        ("batch: {prompts_per_step:}", "x.yaml: batch.prompts_per_step is nothing; expected a whole number of at least 1"),
        ("ray: {dashboard: 1}", "x.yaml: ray.dashboard is 1; expected true or false"),
        ("name: 7", "x.yaml: name is 7; expected text matching `^[A-Za-z0-9._-]+$`"),
        ("kl: {placement: reword}", "x.yaml: kl.placement is 'reword'; expected one of reward, loss, off"),
        ("train: {trackers: [tensorbord]}", 'x.yaml: train.trackers is ["tensorbord"]; expected a list, each item one of tensorboard, wandb, mlflow'),
        ("policy: {betas: [0.9]}", "x.yaml: policy.betas is [0.9]; expected a list of 2, each item a number above 0 and below 1"),
        ("policy: {lora: {target_modules: 3}}", "x.yaml: policy.lora.target_modules is 3; expected text or a list, each item text"),
        ("ray: {object_store_gib: big}", "x.yaml: ray.object_store_gib is 'big'; expected null or a number above 0"),
        ("policy: 3", "x.yaml: policy is 3; expected a mapping of settings"),
        ("policy: {deepspeed: {offload_optimizer: true}}", "x.yaml: policy.deepspeed: offload_optimizer needs zero_stage 1, 2 or 3"),
        (
            "rollout: {min_response_tokens: 9, max_response_tokens: 3}",
            "x.yaml: rollout.min_response_tokens (9) is above rollout.max_response_tokens (3)",
        ),
        (
            "policy: {clip_epsilon: 2, threads: 0}\nbatch: {size: 3}",
            "x.yaml: policy.threads is 0; expected a whole number of at least 1 (and 2 more)",
        ),
        ("data: [1\n", "x.yaml: not valid YAML at line 3: expected ',' or ']', but got '<stream end>'"),
        ("seed: 1\n\nseed: 2", "x.yaml: not valid YAML at line 4: key seed is there twice"),
        ("? [1, 2]\n: 3", "x.yaml: not valid YAML at line 2: found unhashable key"),
    ],
)
def test_mistakes_in_the_file(write, text, line):
    assert refusal(write(MODEL + text)) == line


def test_a_required_key_that_is_missing(write):
    assert refusal(write("seed: 1")).startswith("x.yaml: model.path is missing; expected text that is not empty: ")
    assert refusal(write(MODEL + "data: {preferences: {split: train}}")).startswith("x.yaml: data.preferences.path is missing; expected text")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "x.yaml: expected a mapping of settings at the top level, got nothing"),
        (b"- 1", "x.yaml: expected a mapping of settings at the top level, got [1]"),
        (b"model: \xff", "x.yaml: not UTF-8 text at byte 7; save the file as UTF-8"),
    ],
)
def test_files_that_hold_no_config(write, content, line):
    assert refusal(write(content)) == line


def test_files_that_are_not_there(tmp_path):
    assert refusal(tmp_path / "x.yaml") == "x.yaml: no such file"
    (tmp_path / "x.yaml").mkdir()
    assert refusal(tmp_path / "x.yaml") == "x.yaml: cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("policy.learning_rat=1", "override policy.learning_rat=1: unknown key policy.learning_rat; did you mean policy.learning_rate?"),
        ("polcy.clip_epsilon=1", "override polcy.clip_epsilon=1: unknown key polcy.clip_epsilon; did you mean policy.clip_epsilon?"),
        ("policy.lr=1", "override policy.lr=1: unknown key policy.lr; did you mean policy.learning_rate?"),
        ("lr=1", "override lr=1: unknown key lr; did you mean sft.learning_rate, gvm.learning_rate or policy.learning_rate?"),
        ("seed.x=1", "override seed.x=1: unknown key seed.x; did you mean seed?"),
        ("policy.lora={rnk: 3}", "override policy.lora={rnk: 3}: unknown key policy.lora.rnk; did you mean policy.lora.rank?"),
        ("policy.lora.rank=0", "override policy.lora.rank=0: policy.lora.rank is 0; expected a whole number of at least 1"),
        ("seed", "override seed: expected key=value, for example policy.learning_rate=1e-5"),
        ("=3", "override =3: expected key=value, for example policy.learning_rate=1e-5"),
        ("model.path=''", "override model.path='': model.path is ''; expected text that is not empty"),
        ("scorer.ensemble=['']", "override scorer.ensemble=['']: scorer.ensemble is [\"\"]; expected a list, each item text that is not empty"),
        (
            "ray.address=nonsense",
            "override ray.address=nonsense: ray.address: 'nonsense' is not the address of a Ray cluster; "
            "expected HOST:PORT, ray://HOST:PORT, auto or local",
        ),
        ("seed=[", "override seed=[: not valid YAML at line 1: expected the node content, but found '<stream end>'"),
        ("train.steps=3", "override train.steps=3: train is 'long'; expected a mapping of settings"),
    ],
)
def test_mistakes_in_an_override_name_the_override(write, override, line):
    text = MODEL + ("train: long\n" if override.startswith("train") else "")
    assert refusal(write(text), override) == line


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(known_keys())), st.data())
def test_a_key_with_one_letter_missing_is_found(path, data):
    name = path.rpartition(".")[2]
    if len(name) < 8:
        return
    cut = len(path) - len(name) + data.draw(st.integers(0, len(name) - 1))
    assert path in nearest_keys(path[:cut] + path[cut + 1 :])


# ---------------------------------------------------------------------------------------------------- value health


def test_disagreement_needs_an_ensemble_of_value_models(write):
    file = write(MODEL)
    assert "advantage.disagreement_coefficient needs at least one more GVM artifact in scorer.ensemble" in refusal(
        file, "advantage.disagreement_coefficient=1"
    )
    for named_twice in (["scorer.ensemble=[a]", "gvm.path=a"], ["scorer.ensemble=[a/]", "gvm.path=./a"], ["scorer.ensemble=[b, a, a]"]):
        assert "scorer.ensemble: a is named twice, here or by gvm.path" in refusal(file, *named_twice)
    assert "but algorithm grpo uses none; remove it" in refusal(file, "scorer.ensemble=[a]", "algorithm=grpo", "batch.samples_per_prompt=2")


@pytest.mark.parametrize("url", ["http://", "http:///path", "https://?x", "http://:80/", "ftp://host/", "host/path", "http://a b/"])
def test_what_is_not_a_url(write, url):
    assert f"gvm.refresh.url: '{url}' is not a URL; expected http://HOST/PATH" in refusal(write(MODEL), f"gvm.refresh.url={url}")


@pytest.mark.parametrize("url", ["http://h", "https://host:8/path?x=1", "http://[::1]:80/", "http://user:pass@host/"])
def test_what_is_a_url(write, url):
    assert load_config(write(MODEL), [f"gvm.refresh.url={url}"]).gvm.refresh.url == url


@pytest.mark.parametrize("asked", ["gvm.refresh_every_steps=10", "health.on_alarm=refresh"])
def test_a_refresh_needs_a_source_that_can_answer(write, asked):
    file, judge = write(MODEL), "evaluation.judge=vader"
    key = asked.replace("=10", "").replace("=", ": ")
    assert f"{key} needs gvm.refresh.source: judge, file or endpoint" in refusal(file, asked)
    assert "gvm.refresh.source judge needs evaluation.judge" in refusal(file, asked, "gvm.refresh.source=judge")
    assert "gvm.refresh.source endpoint needs gvm.refresh.url" in refusal(file, asked, "gvm.refresh.source=endpoint")
    assert "algorithm ppo does not use one" in refusal(file, asked, "gvm.refresh.source=judge", judge, "algorithm=ppo")
    assert load_config(file, [asked, "gvm.refresh.source=judge", judge]).gvm.refresh.source == "judge"
    assert load_config(file, [asked, "gvm.refresh.source=file"]).gvm.refresh.samples_per_prompt == 4


def test_overrides_on_top_of_a_config_are_checked_like_those_of_a_file():
    config = load_config(ROOT / "cluster_configs" / "local-cpu.yaml")
    assert override_config(config, []) is config
    changed = override_config(config, ["policy.threads=3", "gvm.num_layers=null"])
    assert (changed.policy.threads, changed.gvm.num_layers) == (3, None)
    assert changed.model_dump(exclude={"policy", "gvm"}) == config.model_dump(exclude={"policy", "gvm"})
    with pytest.raises(InputError, match=r"override policy\.thread=3: .*did you mean policy\.threads"):
        override_config(config, ["policy.thread=3"])
