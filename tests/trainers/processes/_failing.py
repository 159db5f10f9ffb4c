"""A run of several processes of which number 1 fails in its second step: `torchrun _failing.py HOW OPTIONS...`."""

import os
import signal
import sys
import time
from typing import Any
from unittest.mock import patch

from logratio.trainers import cli
from logratio.trainers.step import Step

HOW, WORDS = sys.argv[1], sys.argv[2:]
STEP, calls = Step.__call__, []


def failing(self: Step, *args: Any, **kwargs: Any) -> Any:
    calls.append(1)
    if len(calls) == 2 and self.accelerator.process_index == 1:
        if HOW == "raise":
            raise ZeroDivisionError("of all things")
        if HOW == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)
    return STEP(self, *args, **kwargs)


with patch.object(Step, "__call__", failing):
    sys.exit(cli.main(["train", *WORDS]))
