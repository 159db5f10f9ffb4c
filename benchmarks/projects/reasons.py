"""Why a project's function breaks a law: a sentence for every law that is seen broken.

The first that fits is the reason: of this one function, of the project's, of all. A broken law without one, or one
that fits nothing, fails the command.
"""

from __future__ import annotations

from typing import Any

_TOKENS = "The token mean of the micro-batch: sum_j n_j / N of it is left out, a mean of means where lengths differ."
_ROWS = "The token mean of the micro-batch, weighted with its rows, see `split`."
_CONSTANT = "A pair of which nothing is scored adds the loss of log-ratios 0: the value is off, the gradient is not."
_ROUNDING = "All rewards equal, R - mean is the rounding of the mean in float32"
_TINY = f"{_ROUNDING}, which nothing magnifies: it changes no gradient that matters."
_MISSING = "NaN, a completion that could not be scored for ours and for TRL, makes NaN of what it is compared with."
_NOTHING = "0 / 0 where the whole step scores nothing."
_BY_DESIGN = (
    "As its paper has it: only the best of a group has an advantage, so that two that share the best have none."
)

REASONS: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("loss", "mask"): [
        ("Liger", "GRPO luspo", "Padding counts: the divisor has the padded width, and terms of padding are summed."),
        ("verl", "cispo", "The value is right; in the gradient 0 meets NaN, and is NaN."),
        ("", "", "Multiplies by the mask, and 0 times NaN or inf is NaN: whatever is masked has to be finite."),
    ],
    ("loss", "padding"): [
        ("", "", "The same: the columns that are added hold NaN."),
    ],
    ("loss", "split"): [
        (
            "verl",
            "geo_mean",
            (
                "The mean of the micro-batch, where its engine adds micro-batches up (the other losses are told the "
                "step's totals): k micro-batches are about k times the gradient."
            ),
        ),
        ("TRL", "GRPO bnpo", _TOKENS),
        ("Liger", "GRPO", _TOKENS),
    ],
    ("loss", "empty_example"): [
        ("verl", "geo_mean", "The mean of the micro-batch's rows, where the step's number was told; see `split`."),
        ("TRL", "GRPO bnpo", _ROWS),
        ("Liger", "GRPO", _ROWS),
        ("TRL", "DPO", _CONSTANT),
    ],
    ("loss", "nothing_scored"): [
        ("TRL", "DPO", _CONSTANT),
        ("", "", _NOTHING),
    ],
    ("loss", "finite"): [
        ("", "DPO discopop", "m exp(-x) with m = 0 and exp(-x) = inf, see the faults above."),
        ("", "ORPO", "log(1 - exp(a)) at a = 0, see the faults above."),
        ("", "GRPO", "exp of a log-ratio of 90 overflows float32, see the faults above."),
        ("verl", "geo_mean", "exp of a mean log-ratio of 90 overflows float32: its clamp is commented out."),
        (
            "OpenRLHF",
            "PolicyLoss gspo",
            "exp of a mean log-ratio of 90 overflows float32; its ppo holds log-ratios at 20.",
        ),
    ],
    ("loss", "low_precision"): [
        ("", "", "Computes in the dtype that it is given, where ours raises it to float32."),
    ],
    ("loss", "only_the_policy_learns"): [
        ("", "", "Detaches nothing: these have to be given without a graph."),
    ],
    ("loss", "no_broadcast"): [
        ("", "", "Compares no shapes: one row is taken for all."),
    ],
    ("loss", "direction"): [
        (
            "",
            "DPO discopop",
            "With the published temperature it falls where the log-ratios rise; so does ours, which is the formula's.",
        ),
        ("ours", "dpo discopop", "With the published temperature it falls where the log-ratios rise: the formula's."),
    ],
    ("advantage", "equal_rewards"): [
        (
            "OpenRLHF",
            "group_norm",
            (
                f"{_ROUNDING}, and so is the std, with 1e-9 beside it: their quotient is near 1, and a prompt that "
                "teaches nothing is pushed as hard as any."
            ),
        ),
        (
            "verl",
            "grpo",
            (
                f"{_ROUNDING}, and so is the std, with 1e-6 beside it: a prompt that teaches nothing is pushed by a "
                "third of a std."
            ),
        ),
        ("TRL", "GRPO", f"{_ROUNDING}, over std + 1e-4, see the faults above."),
        ("verl", "reinforce_plus_plus", f"{_ROUNDING}, over sqrt(var + 1e-8)."),
        ("", "", _TINY),
    ],
    ("advantage", "missing"): [
        ("", "", _MISSING),
    ],
    ("advantage", "monotone"): [
        ("verl", "grpo_passk", _BY_DESIGN),
        ("ours", "passk", _BY_DESIGN),
    ],
    ("advantage", "shift_invariant"): [
        (
            "verl",
            "gpg",
            (
                "alpha counts the rewards that are not 0, which a constant changes; GPG's counts the prompts whose "
                "rewards differ."
            ),
        ),
    ],
    ("head", "no_rows"): [
        ("verl", "logprobs_from_logits", "torch.stack of a list of no rows."),
    ],
    ("head", "budget"): [
        ("", "", "The log-softmax of bfloat16 logits is taken in bfloat16: 48 times the error of one in float32."),
    ],
}

"""(what, law) -> (project, beginning of the name, reason) of those that break it; "" fits all."""
Reason = tuple[str, str, str]


def reason_of(row: dict[str, Any], law: str) -> Reason | None:
    """The first that fits."""
    known = REASONS.get((row["what"], law), [])
    return next((x for x in known if x[0] in ("", row["project"]) and row["name"].startswith(x[1])), None)


def project_problems(rows: list[dict[str, Any]]) -> list[str]:
    """A law broken without a reason, and a reason for none; only where every project of the reasons was measured."""
    out, used = [], set()
    for row in rows:
        for law, said in row["broken"].items():
            found = reason_of(row, law)
            used.add((row["what"], law, found))
            if found is None:
                out.append(f"{row['project']}, {row['name']}: {law} is broken without a reason ({said})")
            elif row["project"] == "ours" and found[0] != "ours":
                out.append(f"ours, {row['name']}: {law} is broken ({said})")
    measured = {row["project"] for row in rows}
    for (what, law), known in REASONS.items():
        for project, name, reason in known:
            there = project in measured or (not project and len(measured) == 6)
            if there and (what, law, (project, name, reason)) not in used:
                out.append(f"{project or 'all'}, {name or 'all'}: {law} is kept, where a reason says that it is not")
    return out
