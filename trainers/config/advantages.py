"""The advantages that a run names: of the table, or module:function."""

from __future__ import annotations

import inspect
from functools import cache

from logratio.losses.advantages import ADVANTAGES, Advantage

from ..errors import UserError
from ..ground.plugins import import_object

OPTION = "--advantage_type"


@cache
def advantage_called(name: str) -> Advantage:
    """One of `ADVANTAGES`, or `module:function` of (rewards [groups, G], context) -> [groups, G], or that with one a
    token behind it. A function that `@advantage` has entered says what it asks of the rollouts; another is given groups
    of two at least. Raises UserError where there is no such advantage.
    """
    if name in ADVANTAGES:
        return ADVANTAGES[name]
    if ":" not in name:
        raise UserError(f"{OPTION} {name} is unknown, expected one of: {', '.join(ADVANTAGES)}, or module:function")
    function = import_object(name, OPTION)
    if not callable(function) or isinstance(function, type):
        kind = type(function).__name__
        raise UserError(f"{OPTION} {name} must be a function of (rewards, context), but is {kind}")
    try:
        inspect.signature(function).bind("rewards", "context")
    except TypeError as error:
        raise UserError(f"{OPTION} {name} must be a function of (rewards, context): {error}") from None
    entered = (one for one in ADVANTAGES.values() if one.formula is function)
    return next(entered, Advantage(function, smallest_group=2, whitened=False, wants_greedy=False))
