"""`logratio compare`: which of several losses is better, with an interval."""
