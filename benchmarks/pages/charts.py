"""Which curves stand on a page together, by what the logs have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .runs import Run

EVALUATED = "eval_"
NO_METRIC = ("hash",)
DEVIATION = "one standard deviation"


@dataclass(frozen=True)
class Chart:
    """metrics: log's names, each a line (the second dashed), with `eval_NAME` over it where there is one. band: the
    metrics of its lower and upper edge. spread: the metric that is added to and taken from the first one for a band.
    edges: what these are, in words. log: whether its scale may be logarithmic. noisy: whether a line of means tells
    more than single steps."""

    title: str
    metrics: tuple[str, ...]
    band: tuple[str, str] | None = None
    spread: str | None = None
    edges: str = ""
    log: bool = False
    noisy: bool = True
    note: str = ""

    @property
    def all(self) -> set[str]:
        """The metrics that it shows."""
        lines = {*self.metrics, *(EVALUATED + name for name in self.metrics)}
        edges = {*(self.band or ()), *([self.spread] if self.spread else [])}
        return lines | edges | {EVALUATED + name for name in edges}


LEARNING = (
    Chart("Loss", ("loss",), log=True),
    Chart("Reward", ("reward",), spread="reward_std", edges=DEVIATION),
    Chart("Reward margin", ("rewards/margins",)),
    Chart("Pairs in the right order", ("rewards/accuracies",), note="share whose chosen has the higher reward"),
    Chart("Rewards", ("rewards/chosen", "rewards/rejected")),
    Chart("Log-probs", ("logps/chosen", "logps/rejected"), note="nats"),
    Chart("KL from the reference", ("kl",)),
    Chart(
        "Completion length",
        ("completions/mean_length",),
        band=("completions/min_length", "completions/max_length"),
        edges="shortest to longest",
        note="tokens",
    ),
    Chart("Completions cut at the limit", ("completions/clipped_ratio",), note="share"),
    Chart("Groups of equal rewards", ("frac_reward_zero_std",), note="share, from which nothing is learned"),
    Chart("Entropy", ("entropy",), note="nats"),
    Chart("Sampled beside trained", ("sampling/logp_diff_mean",), log=True, note="|difference| of log-probs, nats"),
    Chart("Token accuracy", ("mean_token_accuracy",)),
    Chart("Gradient norm", ("grad_norm",), log=True, note="before clipping"),
    Chart("Learning rate", ("learning_rate",), noisy=False),
)
COST = (
    Chart("Time of a step", ("step_ms",), log=True, note="ms"),
    Chart("Time of its rollouts", ("rollout_ms",), log=True, note="ms"),
    Chart("Speed", ("tokens_per_s",), note="tokens/s"),
    Chart("Peak memory", ("peak_mem_mib",), noisy=False, note="MiB"),
)


def learning(runs: Sequence[Run]) -> list[Chart]:
    """Of what the runs learned; a chart of its own for each reward function, behind that of their sum."""
    logged = logged_by(runs)
    found = [chart for chart in LEARNING if logged & set(chart.metrics)]
    means = [name for name in logged if name.startswith("rewards/") and name.endswith("/mean")]
    functions = [
        Chart(f"Reward {name.split('/', 1)[1][:-5]}", (name,), spread=f"{name[:-5]}/std", edges=DEVIATION)
        for name in sorted(means)
    ]
    at = next((i for i, chart in enumerate(found) if chart.metrics == ("reward",)), 0) + 1
    return found[:at] + (functions if len(functions) > 1 else []) + found[at:]


def cost(runs: Sequence[Run]) -> list[Chart]:
    """Of time and memory."""
    return [chart for chart in COST if logged_by(runs) & set(chart.metrics)]


def rest(runs: Sequence[Run], shown: Iterable[Chart]) -> list[Chart]:
    """Each metric that none of these shows, by its name in the log."""
    seen = {name for chart in shown for name in chart.all} | set(NO_METRIC)
    left = logged_by(runs) - seen
    plain = {name.removeprefix(EVALUATED) if name.removeprefix(EVALUATED) in left else name for name in left}
    return [Chart(name, (name,)) for name in sorted(plain)]


def logged_by(runs: Sequence[Run]) -> set[str]:
    return {name for run in runs for name in run.columns}
