"""The results of `dvpo bench trl`: samples per second, ratios, and where the gap lies; as lines for people and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from dvpo_ray.bench.measure import Spread
from dvpo_ray.bench.overhead import StepProfile, StepTime, by_round
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config

STAGES = ("generation", "scoring", "training", "rest")
TARGETS = {"ppo": 1.4, "dvpo": 2.5}


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one step.

    Attributes:
        step: all of it.
        generation: sampling. Here the frozen models score what is finished meanwhile.
        scoring: log-probs of the reference, values, rewards and advantages; here what is left of it after the sampling.
        training: the update.
    """

    step: float
    generation: float
    scoring: float
    training: float

    @classmethod
    def of_trl(cls, step: Mapping[str, float]) -> StageTimes:
        return cls(*(step[name] for name in ("step", "generation", "scoring", "training")))

    @classmethod
    def of_ours(cls, step: StepTime) -> StageTimes:
        stages = step.stages
        return cls(step.total, stages["generate"], stages["score"] + stages["reference"] + stages["advantage"], stages["update"])

    @property
    def rest(self) -> float:
        """Weight sync and logging; in TRL the data loader and the garbage collector."""
        return self.step - self.generation - self.scoring - self.training


@dataclass(frozen=True)
class TRLRun:
    """What the script in TRL's environment measured.

    Attributes:
        steps: the measured ones, without the first.
        versions: of TRL, transformers and torch.
        peak_memory_gib: of its process.
    """

    steps: list[StageTimes]
    versions: dict[str, str]
    peak_memory_gib: float


@dataclass(frozen=True)
class Contestant:
    """One of the three.

    Attributes:
        rounds: the measured steps of each round.
        samples: rollouts of a step.
        peak_memory_gib: of all its processes.
    """

    rounds: list[list[StageTimes]]
    samples: int
    peak_memory_gib: float

    @property
    def steps(self) -> list[StageTimes]:
        """Those of all rounds."""
        return [step for steps in self.rounds for step in steps]

    @property
    def samples_per_second(self) -> Spread:
        """At the step's median over rounds, and the range of all steps."""
        rates = [self.samples / step.step for step in self.steps]
        return Spread(self.samples / self.seconds["step"], min(rates), max(rates))

    @property
    def seconds_of_rounds(self) -> list[dict[str, float]]:
        """Median seconds of a step and of its stages in each round."""
        return [{name: statistics.median(getattr(step, name) for step in steps) for name in ("step", *STAGES)} for steps in self.rounds]

    @property
    def seconds(self) -> dict[str, float]:
        """The medians of these over the rounds."""
        return {name: statistics.median(one[name] for one in self.seconds_of_rounds) for name in ("step", *STAGES)}


@dataclass(frozen=True)
class TRLResults:
    """Everything that `dvpo bench trl` measured.

    Attributes:
        work: the work of a step, in words.
        trl: TRL's PPO.
        ours: this system by algorithm.
    """

    work: str
    trl: Contestant
    ours: dict[str, Contestant]

    @classmethod
    def of(cls, config: Config, trl: Sequence[TRLRun], profiles: Mapping[str, Sequence[StepProfile]]) -> TRLResults:
        """From what each round measured."""
        plan = derive_batch(config)
        samples = plan.samples_per_step
        work = (
            f"{samples} rollouts of {config.rollout.max_response_tokens} tokens, {plan.optimizer_steps_per_step} optimizer steps "
            f"of {plan.rows_per_minibatch} rows"
        )
        ours = {
            name: Contestant(
                [[StageTimes.of_ours(step) for step in profile.steps] for profile in rounds],
                samples,
                max(profile.peak_memory_gib for profile in rounds),
            )
            for name, rounds in profiles.items()
        }
        return cls(work, Contestant([run.steps for run in trl], samples, max(run.peak_memory_gib for run in trl)), ours)

    def ratio(self, algorithm: str) -> float:
        """Samples per second of an algorithm of ours over TRL's: the median over rounds."""
        return statistics.median(self.ratios_of_rounds(algorithm))

    def ratios_of_rounds(self, algorithm: str) -> list[float]:
        """The ratio of medians in each round by itself."""
        pairs = zip(self.ours[algorithm].seconds_of_rounds, self.trl.seconds_of_rounds, strict=True)
        return [trls["step"] / ours["step"] for ours, trls in pairs]

    def gap(self, algorithm: str) -> dict[str, float]:
        """Seconds that a step and its stages take longer in TRL."""
        ours = self.ours[algorithm].seconds
        return {name: seconds - ours[name] for name, seconds in self.trl.seconds.items()}

    def lines(self) -> list[str]:
        """The results for people."""
        header = f"{'':<18}{'samples/s (range)':<24}{'step':>9}" + "".join(f"{stage:>12}" for stage in STAGES) + f"{'peak GiB':>10}"
        rows = {"TRL PPO": self.trl, **{f"algorithm: {name}": contestant for name, contestant in self.ours.items()}}
        return [
            f"{self.work}; medians, stages in seconds",
            header,
            *(_row(name, contestant) for name, contestant in rows.items()),
            *(_gap_row(f"TRL less {name}", self.gap(name)) for name in self.ours),
            *(self._verdict(name) for name in self.ours),
        ]

    def _verdict(self, algorithm: str) -> str:
        ratio, target = self.ratio(algorithm), TARGETS[algorithm]
        rounds = by_round(self.ratios_of_rounds(algorithm), digits=2)
        met = "met" if ratio >= target else "MISSED"
        return f"{algorithm}: {ratio:.2f} x the samples per second of TRL's PPO{rounds}, target >= {target:g}, {met}"

    def as_json(self) -> dict:
        """The results for programs."""
        contestants = {"trl_ppo": self.trl, **self.ours}
        return {
            "work": self.work,
            "contestants": {
                name: {
                    "samples_per_second": asdict(contestant.samples_per_second),
                    "seconds": contestant.seconds,
                    "peak_memory_gib": contestant.peak_memory_gib,
                    "steps_by_round": [[asdict(step) for step in steps] for steps in contestant.rounds],
                }
                for name, contestant in contestants.items()
            },
            "ratios": {
                name: {
                    "ratio": self.ratio(name),
                    "by_round": self.ratios_of_rounds(name),
                    "target": TARGETS[name],
                    "gap_seconds": self.gap(name),
                }
                for name in self.ours
            },
        }


def _row(name: str, contestant: Contestant) -> str:
    rate, seconds = contestant.samples_per_second, contestant.seconds
    speed = f"{rate.median:.2f} ({rate.low:.2f}-{rate.high:.2f})"
    return f"{name:<18}{speed:<24}" + _stages(seconds) + f"{contestant.peak_memory_gib:>10.2f}"


def _gap_row(name: str, gap: Mapping[str, float]) -> str:
    return f"{name:<42}" + _stages(gap)


def _stages(seconds: Mapping[str, float]) -> str:
    return f"{seconds['step']:>9.3f}" + "".join(f"{seconds[stage]:>12.3f}" for stage in STAGES)
