"""Training on what a rollout function makes: what is learned from it, on what it depends, and what is refused."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

import logratio.trainers
from logratio.trainers import cli, setup
from logratio.trainers.errors import UserError
from logratio.trainers.options import parse_train
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer
from logratio.trainers.rollout.own.function import load_function
from logratio.trainers.rollout.sets.windows import roll_out

from ..._runs import LATEST, back_to, completions, weights
from ..._runs import log as log_of
from ...processes._launch import launch
from .._server import SmallServer

OPTIONS = {"beta": 0.0, "num_generations": 2, "max_completion_length": 8, "learning_rate": 0.1, "max_steps": 1}
OPTIONS |= {
    "per_device_train_batch_size": 4,
    "adam_epsilon": 1.0,
    "max_grad_norm": 1e9,
    "lr_scheduler_type": "constant",
}


@pytest.fixture
def functions(workspace, monkeypatch):
    """The module of rollout functions, which the command line finds."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import _functions

    _functions.seen.clear()
    return _functions


def bonus(completion_ids, bonus, **_):
    return [one + len(ids) / 10 for one, ids in zip(bonus, completion_ids, strict=True)]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_trl_trains_the_same(functions, loss_type):
    """The same function, given the same prompts as often: metrics, and the weights after a step whose update is as good
    as the gradient itself."""
    from logratio.reference._trl_drive import constructed

    options = OPTIONS | {"loss_type": loss_type}
    rows = [{"prompt": "1+1="}, {"prompt": "2+2="}]
    start = tiny_model(3, num_hidden_layers=1)
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    more = {"reward_funcs": [bonus], "rollout_func": functions.fixed}
    with constructed("grpo", start, tiny_tokenizer(), rows, options, **more) as theirs:
        theirs.train()
        logged = next(row for row in theirs.state.log_history if "reward" in row)
        after = {name: p.detach().clone() for name, p in theirs.model.named_parameters()}
    args = logratio.trainers.GRPOConfig("out", gradient_checkpointing=False, shuffle_dataset=False, **options)
    ours = logratio.trainers.GRPOTrainer(
        start, bonus, args, train_dataset=rows, processing_class=tiny_tokenizer(), rollout_func=functions.fixed
    )
    ours.train()
    (trl_saw, _), (saw, _) = functions.seen
    assert trl_saw == saw == ["1+1=", "1+1=", "2+2=", "2+2="]
    (row,) = ours.state.log_history
    names = ("reward", "reward_std", "completions/mean_length", "completions/max_length", "completions/clipped_ratio")
    names += ("completions/mean_terminated_length", "entropy", "grad_norm", "rewards/bonus/mean")
    assert {n: row[n] for n in names} == pytest.approx({n: logged[n] for n in names}, rel=1e-4)
    assert row["completions/mean_length"] == (3 + 4 + 2 + 3) / 4
    for name, p in ours.model.named_parameters():
        moved, wanted = p.detach() - before[name], after[name] - before[name]
        assert torch.allclose(moved, wanted, rtol=1e-3, atol=1e-7) and wanted.abs().max() > 1e-6, name


WORDS = ["--num_generations", "3", "--max_completion_length", "10", "--batch_size", "2", "--learning_rate", "1e-2"]
WORDS += ["--rollout_func", "_functions:rollout", "--reward_funcs", "own:odd", "--lora_r", "2"]


def words(output, *more):
    rows = [{"prompt": f"{i % 5}+{i % 3}="} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["train", "grpo", "--dataset_name", "rows.jsonl", "--output_dir", output, *WORDS, "--max_steps", "3", *more]


def run_of(*more):
    run = setup.build(parse_train(words("out", *more)[1:]))
    for name, p in run.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    return run


def gradient(run):
    window = roll_out(run.rollouts, run.step, run.data.train[:2])
    result = run.step(window.micros, run.step.totals(window.examples, window.micros, True))
    grads = {name: p.grad.clone() for name, p in run.policy.named_parameters() if p.grad is not None}
    return window, result.reduced(run.accelerator), grads


@pytest.mark.parametrize("more", [[], ["--micro_batch_tokens", "20"]], ids=["whole", "cut"])
def test_what_the_environment_wrote_has_no_gradient(functions, more):
    """-A grad log p of the model's tokens, over their number: by plain passes over each completion."""
    run = run_of(*more)
    window, row, grads = gradient(run)
    run.policy.zero_grad()
    written = [c for e in window.examples for c in e.completions]
    assert all(c.scored[:1] == [True] and c.scored.count(False) == 2 for c in written)
    loss, tokens, model = 0.0, sum(sum(c.scored) for c in written), run.policy.model
    run.policy.eval()
    for example in window.examples:
        for c, advantage in zip(example.completions, example.advantages, strict=True):
            ids = torch.tensor([[*example.prompt_ids, *c.ids]])
            logps = model(input_ids=ids).logits[0].log_softmax(-1)[len(example.prompt_ids) - 1 : -1]
            own = logps.gather(-1, torch.tensor(c.ids)[:, None])[:, 0][torch.tensor(c.scored)]
            loss = loss - advantage * own.sum() / tokens
            behavior = [b for b, mine in zip(c.behavior, c.scored, strict=True) if mine]
            assert own.tolist() == pytest.approx(behavior, abs=1e-4)
    loss.backward()
    assert grads and row["sampling/logp_diff_max"] < 1e-4
    for name, p in run.policy.named_parameters():
        if p.requires_grad:
            assert (p.grad - grads[name]).norm() <= 1e-4 * p.grad.norm(), name
    assert max(g.abs().max() for g in grads.values()) > 1e-3


def test_what_is_said_of_the_environments_tokens_changes_nothing(functions, monkeypatch):
    """Their log-probabilities, as the function gives them: the same loss, metrics and gradient, to the bit."""
    monkeypatch.setattr(setup, "load_function", lambda name: functions.fixed)
    fixed = ["--num_generations", "2", "--sampling_correction", "sequence_truncate"]
    found = []
    for wrong in (-5.0, -1e9, None):
        masks = functions.FIXED["env_mask"]
        logprobs = [[-5.0 if mine else wrong for mine in mask] for mask in masks]
        monkeypatch.setitem(functions.FIXED, "logprobs", logprobs)
        _, row, grads = gradient(run_of(*fixed))
        found.append((row, grads))
    (one, first), *others = found
    for row, grads in others:
        assert row == one and all(torch.equal(grads[name], first[name]) for name in first)
    assert max(g.abs().max() for g in first.values()) > 0


def test_what_the_function_says_of_prompts_and_greedy_answers_counts(functions):
    """It is learned behind the function's own prompts, and each call's fields go to the rewards of what it made."""
    named = ["--rollout_func", "_functions:from_elsewhere", "--reward_funcs", "_functions:by_place"]
    run = run_of(*named, "--advantage_type", "remax")
    window, row, _ = gradient(run)
    assert [e.prompt_ids for e in window.examples] == [[88, *prompt.prompt_ids] for prompt in run.data.train[:2]]
    assert row["sampling/logp_diff_max"] < 1e-4
    assert [e.advantages for e in window.examples] == [(0, 1, 2), (2, 3, 4)], (
        "0 to 5, beside 0 and 1 of the greedy ones"
    )


def test_in_the_process_and_from_a_server_the_same_is_learned(functions, tokenizer):
    """In two turns, of the same tokens; what is kept has the environment's text, and counts the model's tokens."""
    server = SmallServer(tiny_model(42), tokenizer)
    try:
        at = ["--rollout_engine", "vllm", "--vllm_server_base_url", server.url, "--vllm_server_timeout", "60"]
        assert cli.main(words("here")) == 0 and cli.main(words("there", *at)) == 0
    finally:
        server.close()
    here, there = completions("here"), completions("there")
    names = ("step", "row", "completion", "completion_length", "reward", "finish_reason", "policy_version")
    assert [[row[n] for n in names] for row in here] == [[row[n] for n in names] for row in there]
    assert {row["engine"] for row in here} == {"logratio"} and {row["engine"] for row in there} == {"vllm"}
    assert all(row["completion"].count("=") >= 1 and row["completion_length"] <= 8 for row in here)
    assert max(row["sampling/logp_diff_max"] for row in [*log_of("here"), *log_of("there")]) < 1e-4
    one, other = weights("here"), weights("there")
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-5) for name in one)


def test_a_run_goes_on_between_two_steps_on_a_window(functions):
    """With the mask and the support of what the model wrote, to the bit; and greedy answers are asked for apart."""
    more = ["--num_iterations", "2", "--top_p", "0.9", "--keep_sampling_mask", "--advantage_type", "remax"]
    more += ["--max_steps", "4", "--eval_size", "1", "--eval_steps", "2"]
    assert cli.main(words("whole", *more)) == 0
    assert cli.main(words("out", *more, "--save_steps", "1")) == 0
    back_to(3)
    assert cli.main(words("out", *more, "--save_steps", "1", *LATEST)) == 0
    one, other = weights("whole"), weights("out")
    assert all(torch.equal(one[name], other[name]) for name in one)
    whole, out = log_of("whole"), log_of("out")
    assert [row["hash"] for row in whole] == [row["hash"] for row in out] and all(r["grad_norm"] > 0 for r in whole)
    assert max(row["sampling/logp_diff_max"] for row in whole[::2]) < 1e-4, "by the words that could be drawn"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["process", "server"])
def test_two_processes_take_as_many_turns_as_their_own_prompts_need(functions, tokenizer, where):
    """And learn what one learns; what the function raises on one of them ends both."""
    server = SmallServer(tiny_model(42), tokenizer)
    more = ["--rollout_func", "_functions:uneven", "--learning_rate", "1e-4", "--no_shuffle"]
    if where == "server":
        more += ["--rollout_engine", "vllm", "--vllm_server_base_url", server.url, "--vllm_server_timeout", "60"]
    path = os.pathsep.join([str(Path.cwd()), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    try:
        assert cli.main(words("alone", *more)) == 0
        done = launch(2, ["-m", "logratio.trainers.cli", *words("out", *more)], Path.cwd(), PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        kept = [[(row["step"], row["row"], row["completion"]) for row in completions(f)] for f in ("alone", "out")]
        assert kept[0] == kept[1] and len(kept[0]) == 18
        one, other = weights("alone"), weights("out")
        assert all(torch.allclose(one[name], other[name], rtol=0, atol=2e-6) for name in one)
        more[1] = "_functions:fails_on_one"
        done = launch(2, ["-m", "logratio.trainers.cli", *words("gone", *more)], Path.cwd(), PYTHONPATH=path)
    finally:
        server.close()
    assert done.returncode != 0 and "_functions:fails_on_one raised ValueError: no game for 1+1= (" in done.stderr
    assert done.stderr.count("Traceback") == 1, "the launcher's own"


LOADED = {
    "text": "--rollout_func='text' must be written as module:name",
    "_functions:missing": "--rollout_func='_functions:missing': the module '_functions' ({file}) has no 'missing'",
    "_functions:FIXED": "--rollout_func _functions:FIXED must be a function of (prompts, trainer), but is dict",
    "_functions:Game": "--rollout_func _functions:Game must be a function of (prompts, trainer), but is type",
    "_functions:alone": "--rollout_func _functions:alone is called with (prompts, trainer): too many positional "
    "arguments",
}


@pytest.mark.parametrize("name", LOADED)
def test_what_is_no_rollout_function_is_refused_before_a_model_is_loaded(functions, name):
    with pytest.raises(UserError) as told:
        load_function(name)
    assert str(told.value) == LOADED[name].format(file=functions.__file__)


def test_what_a_function_raises_ends_the_run_in_one_sentence(functions, capsys):
    """With the line in its own file; and a reward that wants what it does not say is named."""
    said = []
    for more in (["--rollout_func", "_functions:breaks"], ["--reward_funcs", "_functions:wants_level"]):
        assert cli.main(words("out", *more, "--overwrite_output_dir")) == 1
        said.append(capsys.readouterr().err.strip().splitlines()[-1])
    line = Path(functions.__file__).read_text().splitlines().index('    raise ValueError("the game is over")') + 1
    raised = f"_functions:breaks raised ValueError: the game is over ({functions.__file__}, line {line})"
    assert said[0] == f"logratio: step 1: --rollout_func {raised}"
    assert said[1].startswith(
        "logratio: step 1: --rollout_func _functions:rollout: the reward 'wants_level' needs 'level', which is neither "
        "a column of the data set (even) nor one of "
    )


def test_the_pages_example_runs(functions):
    page = (Path(__file__).parents[4] / "docs" / "rollouts.md").read_text().partition("## In turns")[2]
    (title, code), (command,) = (
        re.search(r'```python title="(.*?)"\n(.*?)```', page, re.DOTALL).groups(),
        re.search(r"```sh\n(.*?)```", page, re.DOTALL).groups(),
    )
    Path(title).write_text(code)
    assert cli.main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
    assert all(" Are you sure? " in row["completion"] for row in completions("runs/turns"))
