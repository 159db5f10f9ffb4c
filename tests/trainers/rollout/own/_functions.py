"""Rollout functions, as a user would write them."""


def rollout(prompts, trainer):
    """Up to three tokens, two of an environment, and what the model goes on with behind them."""
    ids, mask = [[] for _ in prompts], [[] for _ in prompts]
    for turn in (0, 1):
        contexts = [prompt + own for prompt, own in zip(trainer.prompt_ids, ids, strict=True)]
        said = trainer.sample(contexts, max_new_tokens=3 if turn == 0 else None)
        for own, marks, sample in zip(ids, mask, said, strict=True):
            own += sample.ids
            marks += [1] * len(sample.ids)
            if turn == 0:
                own += [61, 48 + sum(sample.ids) % 10]
                marks += [0, 0]
    return {"completion_ids": ids, "env_mask": mask, "even": [sum(own) % 2 for own in ids]}


def fixed(prompts, trainer):
    """What stands in `FIXED`, whoever asks; the same for TRL's trainer."""
    seen.append([list(prompts), type(trainer).__name__])
    encode = trainer.processing_class
    return {"prompt_ids": [encode(p)["input_ids"] for p in prompts], **{k: list(v) for k, v in FIXED.items()}}


def from_elsewhere(prompts, trainer):
    """Behind prompts that the data set does not have."""
    prompt_ids = [[88, *ids] for ids in trainer.prompt_ids]
    said = [sample.ids for sample in trainer.sample(prompt_ids, max_new_tokens=2)]
    return {"prompt_ids": prompt_ids, "completion_ids": said, "place": list(range(len(prompts)))}


def by_place(completions, place, **_):
    """A reward."""
    return place


def alone(prompts):
    """Takes too little."""


def breaks(prompts, trainer):
    raise ValueError("the game is over")


seen = []
FIXED = {
    "completion_ids": [[65, 61, 50, 66, 258], [67, 68, 61, 49, 48, 69, 258], [70, 258], [71, 61, 61, 61, 72, 73]],
    "env_mask": [[1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1, 1], [1, 1], [1, 0, 0, 0, 1, 1]],
    "logprobs": [[-5.0] * 5, [-5.0] * 7, [-5.0] * 2, [-5.0] * 6],
    "bonus": [0.0, 2.0, 1.0, 0.5],
}


def uneven(prompts, trainer):
    """As many turns of two tokens as the prompt's first digit says, and one more."""
    ids, mask = [[] for _ in prompts], [[] for _ in prompts]
    for turn in range(6):
        going = [i for i, prompt in enumerate(prompts) if turn <= int(prompt[0])]
        if not going:
            break
        said = trainer.sample([trainer.prompt_ids[i] + ids[i] for i in going], going, max_new_tokens=2)
        for i, sample in zip(going, said, strict=True):
            ids[i] += [*sample.ids, 61][: trainer.max_completion_length - len(ids[i])]
            mask[i] += [*([1] * len(sample.ids)), 0][: len(ids[i]) - len(mask[i])]
    return {"completion_ids": ids, "env_mask": mask}


def fails_on_one(prompts, trainer):
    """On the process that has the prompt 1+1=."""
    if "1+1=" in prompts:
        raise ValueError("no game for 1+1=")
    return uneven(prompts, trainer)


def wants_level(completions, even, level, **_):
    """A reward that is told `even` and is not told `level`."""
    return even


class Game:
    """Nothing to call with prompts."""
