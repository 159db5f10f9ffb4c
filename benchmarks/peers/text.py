"""docs/atlas.md out of docs/atlas.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .trainers.rows import LAW_REASONS

PEER_NAMES = {"trl": "TRL", "liger": "Liger"}

INTRODUCTION = """# Atlas: our losses beside TRL's and Liger's

Made by `{command}` (`--method dpo` measures one method, and writes nothing). {versions}

Every loss that TRL has (its trainers, run on their own first batch) or Liger (`liger_kernel.chunked_loss`, eager, on
the model's last hidden states), on one tiny random Llama with LoRA in float32 on a CPU: {batch} examples of uneven
length, the loss, and the gradient of every LoRA parameter. *Equal*: both relative errors are at most {equal:g} (float32
rounding; what differs is above 1e-3). Every verdict is a measurement, and every difference has its reason; the command
fails where one has none, or where a reason is given for what measures equal.

![Relative errors of loss and gradient, method by method](atlas-errors.png)

A dot is a variant; right of the dashed line are those that differ, which the tables below name.
"""

SYMBOLS = """Symbols: B examples and N tokens of the optimizer step, in k micro-batches of n_j tokens; x = beta Delta,
e label smoothing, sp = softplus; A advantage, rho = exp(log p - log p_old), |y| tokens of a completion, T padded width.
"""

SPLITS = """## What a split changes

The same {batch} examples in one micro-batch, and in {parts} of {each} as the user of each would accumulate them
(TRL: gradient_accumulation_steps={parts}; Liger: the mean of the micro-batches' losses): |change of the gradient| /
|gradient|. Ours divides by totals of the optimizer step, so that nothing but rounding moves. Below {equal:g}: rounding.

In TRL, this batch's gradient moves by {named}.

![How far a split moves the gradient, variant by variant](atlas-splits.png)
"""
NAMED = {"dpo aot": "aot", "dpo sft": "DPO's sft term", "kto kto": "KTO", "orpo orpo": "ORPO"}

FAULTS = """## Inputs at which a peer is not finite, wrong, or raises

Log-probabilities that are given, in float32; TRL's trainers are run with a model that returns them. Value of the loss,
largest entry of its gradient. Where no exact loss is given, a finite value and gradient are all that is asked for. Ours
holds exponents at 40: beyond, the loss is finite instead of right, and what is held has no gradient.
"""

LAWS = """## Whole trainers, law by law

What [`check_trainer`](laws.md#a-trainer) says of each: transformers' `Trainer` and TRL's under SGD, ours under AdamW,
with LoRA on a tiny Llama in float32 on a CPU; ours on one process and on two. Not asked is what a trainer was not given
a way to be asked.
"""


def markdown(atlas: dict[str, Any]) -> str:
    """The page."""
    found = ", ".join(f"{name} {version}" for name, version in atlas["versions"].items())
    moved = {row["variant"]: row.get("trl", 0.0) for row in atlas["splits"]}
    named = ", ".join(f"{100 * moved[name]:.2g} % ({short})" for name, short in NAMED.items() if name in moved)
    out = [
        INTRODUCTION.format(**{**atlas, "versions": f"Versions: {found}."}),
        *(_variants(atlas, peer) for peer in PEER_NAMES),
        SYMBOLS,
        SPLITS.format(**atlas, named=named or "what the table says", each=atlas["batch"] // atlas["parts"]),
        _splits(atlas),
    ]
    if atlas["faults"]:
        out += [FAULTS, _faults(atlas)]
    if atlas["laws"]:
        out += [LAWS, _laws(atlas)]
    return "\n".join(out)


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown; what would end a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _variants(atlas: dict[str, Any], peer: str) -> str:
    rows = [row for row in atlas["variants"] if row["peer"] == peer]
    equal = [row for row in rows if row["verdict"] == "equal"]
    out = [f"## Against {PEER_NAMES[peer]}\n", f"{len(equal)} of {len(rows)} variants are equal.\n"]
    others = [row for row in rows if row not in equal]
    if others:
        cells = (
            [
                code(row["variant"]),
                row["verdict"],
                _number(row, "grad_rel_err"),
                row["reason"].removeprefix("Refused: "),
            ]
            for row in others
        )
        out.append(table(["variant", "", "gradient differs by", "why"], cells))
    cells = ([code(row["variant"]), *(_number(row, key) for key in ("loss_rel_err", "grad_rel_err"))] for row in equal)
    out.append(table(["equal", "relative error of the loss", "of the gradient"], cells))
    return "\n".join(out)


def _number(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.1e}" if key in row else ""


def code(text: str) -> str:
    return f"`{text}`"


def _splits(atlas: dict[str, Any]) -> str:
    def cell(row: dict[str, Any], who: str) -> str:
        if who not in row:
            return ""
        return f"**{100 * row[who]:.2g} %**" if row[who] > atlas["equal"] else f"{row[who]:.1e}"

    rows = []
    for row in sorted(atlas["splits"], key=lambda row: not row["reasons"]):  # those that change first
        said = {reason: [p for p, r in row["reasons"].items() if r == reason] for reason in row["reasons"].values()}
        why = " ".join(f"{', '.join(PEER_NAMES[p] for p in peers)}: {reason}" for reason, peers in said.items())
        rows.append([code(row["variant"]), *(cell(row, who) for who in (*PEER_NAMES, "ours")), why])
    return table(["variant", *PEER_NAMES.values(), "ours", "why"], rows)


def _faults(atlas: dict[str, Any]) -> str:
    rows = []
    for row in atlas["faults"]:
        exact = "" if row["exact"] is None else f"{row['exact']:.4g}"
        results = [row[who]["shown"] if who in row else "" for who in (*PEER_NAMES, "ours")]
        rows.append([row["fault"], row["cause"], exact, *results])
    return table(["input", "what happens", "exact loss", *PEER_NAMES.values(), "ours"], rows)


def _laws(atlas: dict[str, Any]) -> str:
    rows = []
    for row in atlas["laws"]:
        broken = [
            f"{code(law)}: {said}. {LAW_REASONS.get((row['trainer'], law), '')}" for law, said in row["broken"].items()
        ]
        rows.append(
            [row["trainer"], f"{len(row['held'])}", "<br>".join(broken), ", ".join(map(code, row["not_asked"]))]
        )
    return table(["trainer", "laws held", "broken", "not asked"], rows)
