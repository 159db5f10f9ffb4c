"""What the tests of TRL's classes train on, and how."""

from logratio.benchmarks.peers import randoms

PLAIN = {"gradient_checkpointing": False, "save_strategy": "no", "max_steps": 3, "batch_size": 4, "learning_rate": 1e-3}


def rows(method="dpo", n=12):
    return randoms.random_rows(method, 7, n)
