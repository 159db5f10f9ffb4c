"""What the judgements make of a file."""

from logratio.trainers.trl_names import consider


def judge(method, given, source="the options", **how):
    """The verdicts; UserError where one is a refusal."""
    return consider(method, given, **how).check(source)


def options(method="dpo", **given):
    """What a file becomes; UserError where one of its options is refused."""
    return judge(method, given).options


def verdict(key, method="dpo", **given):
    """On one option of a file."""
    (found,) = [v for v in consider(method, given).verdicts if v.key == key]
    return found
