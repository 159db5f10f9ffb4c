"""A user's own run, measured: `logratio bench run.yaml`."""
