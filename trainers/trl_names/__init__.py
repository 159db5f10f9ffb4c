"""The names of TRL: what becomes here of each option that a TRL user may give, and a file of theirs as one of ours."""

from .defaults import TRL_DEFAULTS
from .judging import consider, is_ours, names_of
from .verdicts import Judged, Kind, Verdict

__all__ = ["TRL_DEFAULTS", "Judged", "Kind", "Verdict", "consider", "is_ours", "names_of"]
