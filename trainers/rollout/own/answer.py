"""What a rollout function answers, read: completions with what the model wrote in them, and fields for the rewards.

Each list has an entry for every prompt that the function was given, in their order:

    completion_ids  what stands behind the prompt, of the model and of the environment
    env_mask        of each of these tokens: true, the model wrote it, or false; without it, the model wrote all
    logprobs        of each the log-probability that it was drawn with; without them, those of `Turns.sample`. What
                    stands there for the environment's tokens is not looked at
    prompt_ids      the prompt's tokens; without them, the data set's
    finish_reason   "stop", or "length" where a limit cut it; without it, the last sample's, or by the last token

and every further one is a field that the rewards are given by its name, whole where it is no list.

Differs from TRL 1.16: (1) prompt_ids and logprobs may be left out. (2) finish_reason is read, and is no field. (3) the
prompt_ids of one prompt's completions must be alike, since these are one group. (4) a log-probability of the model's
that is no number is refused; TRL takes the trainer's own for it. (5) a list that is too short, and a field with the
name of a column, are refused; TRL gives some completions another value than others. (6) no completion is longer than
max_completion_length, the environment's tokens among them. (7) num_tokens in the log counts the environment's too, all
lengths do not, as in TRL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

from logratio.losses import Support

from ...data.examples import REWARD_ARGUMENTS, Prompt
from ...data.tokenization import common_prefix
from ...errors import UserError, counted, shown
from ..engines.protocol import FinishReason, Sample, is_logp
from .turns import Turns, checked_id

LISTS = ("completion_ids", "env_mask", "logprobs", "prompt_ids", "finish_reason")


def read(answer: Any, turns: Turns, prompts: Sequence[Prompt], positions: int | None) -> list[Sample]:
    """The completions, each `told` with its own prompt_ids and the fields. prompts: that the function was given.
    positions: that the model has learned; None: there is no end of them. UserError, with the place and the remedy, for
    what cannot be trained on."""
    if not isinstance(answer, Mapping) or answer.get("completion_ids") is None:
        raise UserError(
            'it must return a dict with "completion_ids", and perhaps env_mask, logprobs, prompt_ids, finish_reason '
            f"and fields for the rewards; got {shown(answer)}"
        )
    lists = {name: listed(name, answer[name], len(prompts)) for name in LISTS if answer.get(name) is not None}
    prompt_ids = [list(p.prompt_ids) for p in prompts]
    samples = []
    for i in range(len(prompts)):
        one = {name: values[i] for name, values in lists.items()}
        try:
            if "prompt_ids" in one:
                prompt_ids[i] = tokens("prompt_ids", one["prompt_ids"], turns.words)
                first = i - i % turns.num_generations
                if prompt_ids[i] != prompt_ids[first]:
                    raise UserError(
                        "its prompt_ids are others than those of the prompt's first completion: let what differs begin "
                        "the completion_ids, false in env_mask"
                    )
            samples.append(completion(one, turns, i, prompt_ids[i], positions))
        except UserError as error:
            row = prompts[i].row
            number = [p.row for p in prompts[:i]].count(row)
            raise UserError(f"completion {number} of row {row} of the data set: {error}") from error
    fields = fields_of(answer, turns, len(prompts))
    for i, prompt in enumerate(prompts):
        columns = {**prompt.columns, **{name: values[i] for name, values in fields.items()}}
        told = dataclasses.replace(prompt, prompt_ids=prompt_ids[i], columns=columns)
        samples[i] = dataclasses.replace(samples[i], told=told)
    return samples


def completion(one: Mapping[str, Any], turns: Turns, i: int, prompt_ids: list[int], positions: int | None) -> Sample:
    """The completion at place i."""
    ids = tokens("completion_ids", one["completion_ids"], turns.words)
    most = turns.max_completion_length
    if len(ids) > most:
        raise UserError(
            f"it has {counted(len(ids), 'token')}, the environment's among them, and --max_completion_length is "
            f"{most}: leave out what does not fit, or allow more"
        )
    if positions is not None and len(prompt_ids) + len(ids) > positions:
        raise UserError(
            f"it and its prompt have {len(prompt_ids) + len(ids)} tokens, and the model has learned "
            f"{positions} positions: make them shorter"
        )
    written = mask_of(one.get("env_mask"), len(ids))
    spans = spans_of(written)
    heard = as_heard(turns.heard[i], prompt_ids, ids, spans)
    support = turns.sampling.keep_support  # it has to be known what each token was drawn from
    if isinstance(heard, int) and ("logprobs" not in one or support):
        needs = "--keep_sampling_mask needs what could have been drawn" if support else 'there are no "logprobs"'
        remedy = "leave that option out" if support else "return logprobs"
        raise UserError(
            f"its token {heard} is the model's by env_mask, but not what sample() gave behind those before it, and "
            f"{needs}: hand on its ids as they are, not text that is tokenized again, or {remedy}"
        )
    known: list[Sample] = [] if isinstance(heard, int) else heard
    if "logprobs" in one:
        logps = given_logps(one["logprobs"], written)
    else:
        drawn = iter([logp for sample in known for logp in sample.logps])
        logps = [next(drawn) if mine else 0.0 for mine in written]
    version = min((s.version for s in known), default=turns.state.global_step)
    mask = None if all(written) else written
    reason = reason_of(one.get("finish_reason"), ids, known if written[-1] else [], turns.sampling.stop_ids)
    return Sample(ids, reason, logps, version, support_of(known, written, spans), mask)


def as_list(values: Any) -> list[Any] | None:
    """A list, tuple, tensor or array as a list; None of anything else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, list | tuple) else None


def listed(name: Any, values: Any, count: int) -> list[Any]:
    """A list with an entry for each of the prompts."""
    found = as_list(values)
    if found is None:
        raise UserError(
            f"{name} must be a list with an entry for each of {counted(count, 'completion')}, got {shown(values)}"
        )
    if len(found) != count:
        raise UserError(
            f"{name} has the length {len(found)} for {counted(count, 'completion')}: a function is given a prompt as "
            "often as completions of it are wanted, and answers each time with one"
        )
    return found


def tokens(name: str, ids: Any, words: int) -> list[int]:
    found = as_list(ids)
    if not found:
        raise UserError(f"its {name} must be a list of token ids, one at least; got {shown(ids)}")
    return [checked_id(token, words) for token in found]


def mask_of(mask: Any, count: int) -> list[bool]:
    """Of each of so many tokens, whether the model wrote it."""
    if mask is None:
        return [True] * count
    found = as_list(mask)
    if found is None or len(found) != count or not all(one in (0, 1) for one in found):
        raise UserError(
            f"its env_mask must have a 1 for each of its {counted(count, 'token')} that the model wrote and a 0 for "
            f"each other, got {shown(mask)}"
        )
    if not any(found):
        raise UserError("by its env_mask the model wrote none of it: let the model write one token at least")
    return list(map(bool, found))


def spans_of(written: Sequence[bool]) -> list[tuple[int, int]]:
    """(begin, end) of each stretch that the model wrote."""
    edges = [0, *written, 0]
    begins = [i for i, (before, now) in enumerate(zip(edges, edges[1:], strict=False)) if now and not before]
    ends = [i for i, (before, now) in enumerate(zip(edges, edges[1:], strict=False)) if before and not now]
    return list(zip(begins, ends, strict=True))


def as_heard(
    heard: Sequence[tuple[list[int], Sample]], prompt_ids: list[int], ids: list[int], spans: Sequence[tuple[int, int]]
) -> list[Sample] | int:
    """The samples that the model's stretches are made of, as far as these have them; or the first token that no sample
    explains, given what stands before it."""
    found = []
    for begin, end in spans:
        at = begin
        while at < end:
            before = [*prompt_ids, *ids[:at]]
            own = [sample for context, sample in heard if context == before]
            lengths = [common_prefix(sample.ids, ids[at:end]) for sample in own]
            length, which = max(((length, k) for k, length in enumerate(lengths)), default=(0, 0))
            if not length:
                return at
            found.append(own[which].first(length))
            at += length
    return found


def given_logps(logprobs: Any, written: Sequence[bool]) -> list[float]:
    """As they were given, 0 where the model did not write."""
    given = as_list(logprobs)
    if given is None or len(given) != len(written):
        raise UserError(
            f"its logprobs must have a number for each of its {counted(len(written), 'token')}, got {shown(logprobs)}"
        )
    found = [0.0] * len(written)
    for at, (logp, mine) in enumerate(zip(given, written, strict=True)):
        if mine:
            if not is_logp(logp):
                raise UserError(
                    f"the logprob of its token {at} is {shown(logp)}: the log-probability that the model drew it with, "
                    "a finite number not above 0, or leave logprobs out where sample() drew"
                )
            found[at] = float(logp)
    return found


def reason_of(said: Any, ids: Sequence[int], known: Sequence[Sample], ends: Collection[int]) -> FinishReason:
    """known: the samples, where the last of them ends the completion."""
    if said is None:
        return known[-1].finish_reason if known else "stop" if ids[-1] in ends else "length"
    if said not in get_args(FinishReason):
        raise UserError(f"its finish_reason must be one of {', '.join(get_args(FinishReason))}, got {shown(said)}")
    return said  # type: ignore[no-any-return]


def support_of(known: Sequence[Sample], written: Sequence[bool], spans: Sequence[tuple[int, int]]) -> Support | None:
    """Of all tokens; every word where the model did not write. known: of all that it did, one after the other."""
    if not any(sample.support is not None for sample in known):
        return None
    own = Support.cat([s.support or Support.whole(len(s.ids)) for s in known])
    each = iter(own.split([end - begin for begin, end in spans]))
    parts, at = [], 0
    for begin, end in spans:
        parts += [Support.whole(begin - at), next(each)]
        at = end
    return Support.cat([*parts, Support.whole(len(written) - at)])


def fields_of(answer: Mapping[Any, Any], turns: Turns, count: int) -> dict[str, list[Any]]:
    """What is left, for the rewards."""
    found = {}
    for name, values in answer.items():
        if name in LISTS:
            continue
        if not isinstance(name, str) or name in REWARD_ARGUMENTS or name in turns.columns:
            other = "a column of the data set has" if name in turns.columns else "rewards are given something else by"
            raise UserError(f"its field {name!r} has a name that {other}: choose another")
        found[name] = listed(name, values, count) if isinstance(values, list) else [values] * count
    return found
