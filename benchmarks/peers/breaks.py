"""Laws that some variants break on purpose, by loss_type; `tests/losses/test_laws.py` sees each of them broken."""

from __future__ import annotations

WEIGHED_WITHOUT_GRADIENT = frozenset({"dft", "eaft", "asft", "cispo", "vespo", "topr", "fipo"})
"""They multiply log-probs by numbers of the policy that have no gradient: the law `gradient`."""
STEP_MEANS = frozenset({"bco", "beta_dpo", "alpha_dpo"})
"""Means of the step stand in them without a gradient: the same law, which holds with these means held still."""
RISES_AT_THE_REFERENCE = frozenset({"discopop"})
"""With the published temperature: the law `direction`."""
TEACHERS = frozenset({"gkd"})
"""They follow a teacher, whichever token is there: the law `direction`."""
COMPARES_WITH_OTHERS = frozenset({"target_po"})
"""Alone, or among completions of the same advantage, a completion stays where it is: the same law."""
BREAKS = {
    "gradient": WEIGHED_WITHOUT_GRADIENT | STEP_MEANS,
    "direction": RISES_AT_THE_REFERENCE | TEACHERS | COMPARES_WITH_OTHERS,
}
"""Law -> the loss_types that break it."""
