"""Settings of what is watched while the policy is optimised, and of the Global Value Model's refresh."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from dvpo_ray.config.section import Count, Fraction, NonNegative, Positive, Section

_URL = re.compile(r"https?://[^\s/?#:]\S*")
GOLD_THRESHOLDS = ("trend_significance", "max_gold_divergence", "min_gold_correlation", "max_value_bias")
"""Keys of the rules that compare the estimate with the score of a gold judge."""


class HealthConfig(Section):
    """Alarms on the value or reward estimate that the policy is optimised towards. A rule whose threshold is null is off."""

    window_steps: Annotated[int, Field(ge=3)] = Field(10, description="Steps that an alarm judges together; a rule is silent for as many after one.")
    on_alarm: Literal["warn", "refresh", "stop"] = Field(
        "warn",
        description="Say so and go on; also refresh the GVM before the next step (`gvm.refresh`); or end the run in order: checkpoint, evaluation, "
        "final model.",
    )
    trend_significance: Positive | None = Field(
        2.5, description="Alarm when the estimate rises and the gold score falls, each by so many standard errors of its slope."
    )
    max_gold_divergence: Positive | None = Field(
        1.0,
        description="Alarm when the estimate has gained so many standard deviations more than the gold score since the start or the last refresh.",
    )
    min_gold_correlation: Annotated[float, Field(ge=-1.0, le=1.0)] | None = Field(
        0.1, description="Alarm when the estimate and the gold score of the responses correlate by less."
    )
    max_value_bias: Positive | None = Field(
        0.5, description="Alarm when the third of the responses farthest from the reference is overrated by more standard deviations."
    )
    max_calibration_error: Positive | None = Field(
        None, description="Alarm when values in the last third of a response miss the final estimate by more, in units of value. Needs no gold judge."
    )


class RefreshConfig(Section):
    """Where new preferences on the current policy's samples come from, and how the Global Value Model is trained on them."""

    source: Literal["judge", "file", "endpoint"] | None = Field(
        None,
        description="`judge`: that of `evaluation`. `file`: somebody answers `to_label.jsonl` of the run folder with `labels.jsonl`. `endpoint`: "
        "a URL that takes pairs by HTTP POST. Not set: there is no refresh.",
    )
    prompts: Count = Field(64, description="Training prompts that the current policy answers for one refresh.")
    samples_per_prompt: Annotated[int, Field(ge=2)] = Field(4, description="Responses to each of them.")
    pairs_per_prompt: Count = Field(2, description="Pairs of each prompt at most; no response is in two pairs.")
    min_score_gap: NonNegative = Field(0.05, description="Of the judge's pairs leave out those whose scores are closer.")
    heldout_fraction: Fraction = Field(0.1, description="Share of the prompts whose pairs measure the new GVM and never train it.")
    old_pairs_per_new: NonNegative = Field(
        1.0, description="Pairs mixed in for each new training pair, drawn from `data.preferences`, where set, and from earlier refreshes."
    )
    epochs: Positive = Field(1.0, description="Passes over the new and the old pairs, from the last GVM on.")
    timeout_seconds: Positive = Field(86400.0, description="How long `file` waits for the last label.")
    url: str | None = Field(None, description="Address that `endpoint` posts pairs to, `http://` or `https://`.")
    request_timeout_seconds: Positive = Field(60.0, description="How long one answer of the endpoint may take.")
    pairs_per_request: Count = Field(16, description="Pairs in one request to the endpoint.")
    retries: Annotated[int, Field(ge=0)] = Field(4, description="How often a failed request is sent again, after 1, 2, 4 ... seconds.")

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str | None) -> str | None:
        if url is not None and not (_URL.fullmatch(url) and _has_a_port(url)):
            raise ValueError(f"'{url}' is no URL; expected http://HOST/PATH or https://HOST/PATH")
        return url


def _has_a_port(url: str) -> bool:
    """Whether the port of a URL can be one; the scheme has its own where none is written."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False
