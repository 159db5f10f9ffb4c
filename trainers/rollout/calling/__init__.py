"""How rewards are called: what they are given, where they run, what they may answer with, and what is said where one
fails."""

from .asked import (
    GIVEN,
    Asked,
    CompletionError,
    Reward,
    RewardLog,
    TrainerState,
    check_signature,
    finite,
    main_thread,
    names_of,
)
from .calls import Calls

__all__ = [
    "GIVEN",
    "Asked",
    "Calls",
    "CompletionError",
    "Reward",
    "RewardLog",
    "TrainerState",
    "check_signature",
    "finite",
    "main_thread",
    "names_of",
]
