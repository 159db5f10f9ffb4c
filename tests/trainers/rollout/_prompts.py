"""Prompts, and what a plain loop answers to them."""

import torch

from logratio.trainers.data.examples import Prompt
from logratio.trainers.rollout.engines.protocol import Sample


def prompts_of(tokenizer, *texts, columns=None):
    return [Prompt(tokenizer(t)["input_ids"], t, columns or {}, row) for row, t in enumerate(texts)]


@torch.no_grad()
def argmax_loop(model, ids, stops, limit):
    done = []
    while len(done) < limit:
        done.append(int(model(torch.tensor([[*ids, *done]])).logits[0, -1].argmax()))
        if done[-1] in stops:
            return done, True
    return done, False


def sample_of(ids, ended):
    return Sample(ids, "stop" if ended else "length", [0.0] * len(ids))


def said(samples):
    """(ids, ended) of each."""
    return [(s.ids, s.ended) for s in samples]


TEXTS = ("a", "some longer prompt", "12+34=", "zz9")
