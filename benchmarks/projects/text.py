"""The atlas's tables of law by project, and what TRL does around its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logratio.benchmarks.peers.text import table

from .installed import INSTALL, PROJECTS
from .reasons import reason_of
from .subjects import OURS
from .trl_runs import SYNCS

HEAD = """## Functions, law by project

What the laws of [`check_loss`, `check_advantage` and `check_kernel`](laws.md) say of the functions of
{versions}, each called as its own trainer
calls it: told the totals of the step where it asks for them, else averaged over the micro-batches. Losses on fixed
batches in float64, the same for all (three examples of uneven length, log-ratios of 0.25 a token; `finite` in float32,
with log-ratios up to 1e4), advantages in float32, heads in float64 to bfloat16 on a CPU. verl, OpenRLHF and torchtune
are imported file by file, without what they install: `{install}`.

A number is of functions that keep the law, of those that it can be asked of (–: of none); why stands below.
"""
TITLES = {"loss": "losses", "advantage": "advantages", "head": "heads: log-probs of hidden states or logits"}


def project_tables(found: dict[str, Any]) -> str:
    """All of it."""
    rows = found["rows"]
    versions = ", ".join(f"{project} {version}" for project, version in found["versions"].items())
    out = [HEAD.format(versions=versions, install=INSTALL)]
    for what, title in TITLES.items():
        out += [f"### {title[0].upper()}{title[1:]}\n", _laws([row for row in rows if row["what"] == what])]
        if missing := [project for project in PROJECTS if project not in found["versions"]]:
            out.append(f"Not installed: {', '.join(missing)}.\n")
    out += ["### What is broken, and why\n", _broken(rows), "Not asked, and so not counted:\n", _not_asked(rows)]
    return "\n".join(out)


RUNS = """## What TRL's GRPO does around its loss

Run in TRL itself, on a tiny Llama with LoRA on a CPU.

**Adapters in bfloat16.** `use_transformers_continuous_batching` with `bf16`, TRL's default, casts the model that is
trained to bfloat16 before it samples, adapters and all, and leaves it so. After three steps at TRL's learning rate of
1e-6 the adapters are {cast[with][dtype]}, and {cast[with][moved]} of {cast[with][weights]} of their weights have moved;
without it they are {cast[without][dtype]}, and {cast[without][moved]} have. What a step changes by less than half of
what bfloat16 tells apart, about 0.2 % of the weight, is lost. Ours samples with the policy's modules as they are.

**Merged adapters.** Weights for vLLM are made by `merge_adapter` and taken back by `unmerge_adapter`, in the dtype of
the base, which is also the reference. After {syncs} such syncs and no step, {merged[bfloat16][changed]} of
{merged[bfloat16][weights]} base weights in bfloat16 are others, by up to {low:.2g} % of a layer's norm (by {high:.1e} %
in float32), for adapters of up to {adapters:.0f} % of it. Ours samples with the adapters beside the base, and no weight
is touched.

**The last prompts.** TRL's sampler deals whole windows only: of {last_prompts[prompts]} prompts, two a step, an epoch
sees {last_prompts[seen]}. Ours takes a last step with fewer: the law `last_window` above.
"""


def run_text(found: dict[str, Any]) -> str:
    """What `measure_runs` has found."""
    low, high = (found["merged"][name] for name in ("bfloat16", "float32"))
    shares = {"low": 100 * low["drift"], "high": 100 * high["drift"], "adapters": 100 * low["adapters"]}
    return RUNS.format(**found, **shares, syncs=SYNCS)


def _laws(rows: Sequence[dict[str, Any]]) -> str:
    projects = [name for name in (*PROJECTS, "ours") if any(row["project"] == name for row in rows)]
    laws = list(dict.fromkeys(law for row in rows for law in (*row["held"], *row["broken"], *row["not_asked"])))

    def cell(law: str, project: str) -> str:
        own = [row for row in rows if row["project"] == project]
        held, broken = (sum(law in row[key] for row in own) for key in ("held", "broken"))
        if not held + broken:
            return "–"
        return f"**{held} of {held + broken}**" if broken else f"{held} of {held}"

    lines = [[f"`{law}`", *(cell(law, project) for project in projects)] for law in laws if law not in OURS]
    return table(["law", *projects], lines)


def _broken(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each project, law and reason: of which functions, and what was seen of the first."""
    grouped: dict[tuple[str, str, str, str], list[tuple[str, str]]] = {}
    for row in rows:
        for law, said in row["broken"].items():
            known = reason_of(row, law)
            key = (row["project"], row["what"], law, known[-1] if known else "")
            grouped.setdefault(key, []).append((row["name"], said))
    lines = []
    for (project, what, law, reason), seen in sorted(grouped.items(), key=_order):
        asked = [
            row for row in rows if (row["project"], row["what"]) == (project, what) and law not in row["not_asked"]
        ]
        names = [f"all {len(seen)}"] if len(seen) == len(asked) > 2 else [name for name, _ in seen]
        more = [f"and {len(names) - 5} more"] if len(names) > 5 else []
        lines.append([project, f"`{law}`", "; ".join([*names[:5], *more]), seen[0][1], reason])
    return table(["", "law", "of", "what was seen, of the first", "why"], lines)


def _order(item: tuple[tuple[str, str, str, str], Any]) -> tuple[int, int]:
    project, what, *_ = item[0]
    return list(TITLES).index(what), [*PROJECTS, "ours"].index(project)


def _not_asked(rows: Sequence[dict[str, Any]]) -> str:
    grouped: dict[str, set[str]] = {}
    for row in rows:
        for law, why in row["not_asked"].items():
            grouped.setdefault(why, set()).add(law)
    return "".join(
        f"- {', '.join(f'`{law}`' for law in sorted(laws))}: {why}.\n" for why, laws in sorted(grouped.items())
    )
