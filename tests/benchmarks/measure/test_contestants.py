"""One step of each contestant: the same tokens and the same gradient, weights of its own, and what it keeps."""

import statistics

import pytest
import torch

from logratio.benchmarks.measure.models import build
from logratio.benchmarks.measure.steps import step, trl_contestant
from logratio.benchmarks.measure.steps.contestants import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Ours,
    apply_update,
    kept_mib,
    policy_logps,
    share_frozen,
)
from logratio.benchmarks.measure.steps.ledger import cosine, gradient, plain, share_changed
from logratio.benchmarks.measure.steps.step_cases import METHODS, StepCase
from logratio.benchmarks.measure.steps.workloads import Lengths
from logratio.benchmarks.peers.truths import difference
from logratio.losses import DPOLoss
from logratio.reference._trl_batches import unpadded
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import tokens_key

CPU = torch.device("cpu")
SHORT = Lengths(6, 9, 0.4, 0.4, max_length=32)


def tiny_case(method="dpo", adapter="lora", **changes) -> StepCase:
    options = {"dtype": "float32", "num_generations": 3, "lengths": SHORT, "lora_r": 4} | changes
    size = options.pop("batch_size", 2 if method == "grpo" else 4)
    return StepCase(method, adapter, "tiny", "short", size, options.pop("micro_batch_tokens", 64), **options)


@pytest.fixture(scope="module")
def steps():
    """One case of every method, run on a CPU."""
    return {m: step.run(tiny_case(m), CPU, repeats=2, seed=0, only=("logratio", "trl")) for m in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_both_sides_compute_the_same_step(steps, method):
    ours, theirs = steps[method]["logratio"], steps[method]["trl"]
    assert ours["status"] == theirs["status"] == "ok", (ours.get("error"), theirs.get("error"))
    assert 0 < theirs["grad_rel_err"] < 1e-4 and "grad_rel_err" not in ours
    for row in (ours, theirs):
        assert row["ledger"]["logps_err"] < 1e-5 and row["ledger"]["grad_cosine"] > 1 - 1e-6
        assert row["ledger"]["share_changed"] > 0.99
        assert len(row["times_ms"]) == 2 and row["step_ms_p20"] <= row["step_ms_p50"] <= row["step_ms_p80"]
        assert row["num_tokens"] == ours["num_tokens"]
    assert ours["time_to_ours"] == 1.0
    case = tiny_case(method)
    computed = [case.padded_by_peer(case.window(259, seed)) for seed in range(2)]  # two rounds take two different steps
    assert theirs["num_padded_tokens"] == sum(computed) // 2 >= theirs["num_tokens"]
    assert 0 < ours["num_padded_tokens"] <= theirs["num_padded_tokens"]
    assert theirs["padding"] == pytest.approx(1 - 2 * theirs["num_tokens"] / sum(computed), abs=0.01)
    assert 0 <= ours["padding"] < 0.4 and ours["saved_mib"] > 0 and theirs["saved_mib"] > 0
    pairs = zip(theirs["times_ms"], ours["times_ms"], strict=True)
    assert theirs["time_to_ours"] == pytest.approx(statistics.median(a / b for a, b in pairs))
    assert ours["parts"]["forward and backward"] > 0


@pytest.mark.parametrize("adapter", ["qlora", "full"])
def test_other_adapters_train_what_they_should(adapter):
    rows = step.run(tiny_case("dpo", adapter), CPU, repeats=1, seed=0, only=("logratio", "trl"))
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert rows["trl"]["grad_rel_err"] < (1e-2 if adapter == "qlora" else 1e-4)  # TRL makes its adapters bfloat16
    assert rows["logratio"]["ledger"]["grad_cosine"] > 1 - 1e-6


def test_trl_is_fed_the_same_tokens():
    for method in METHODS:
        case = tiny_case(method)
        window = case.window(259, 0)
        old = None
        if method == "grpo":
            old = step.old_logps(case, build("tiny", "lora", dtype=torch.float32, device=CPU), [window], 0)
        rows = trl_contestant.ROWS[method](case, window)
        with step.ExitStack() as stack:
            model = build("tiny", "lora", dtype=torch.float32, device=CPU)
            trl = trl_contestant.Trl(case, model, None, CPU, stack, old=old)
            batches = trl.prepare(window, len(rows))
        assert len(batches) == 1
        got = unpadded(method, batches[0])
        sides = got.values() if method != "kto" else [got["completion"]]
        seen = [scored.split() for side in sides for scored in side]
        wanted = [(e.prompt_ids, c.ids) for e in window for c in e.completions]
        assert sorted(seen) == sorted(wanted), method


def test_a_side_that_computes_something_else_is_not_timed(monkeypatch):
    other = property(lambda case: DPOLoss(beta=0.2))
    monkeypatch.setattr(StepCase, "loss", other)  # TRL keeps its own default, 0.1
    rows = step.run(tiny_case("dpo"), CPU, repeats=1, seed=0, only=("logratio", "trl"))
    assert rows["trl"]["status"] == "failed" and "its gradient differs by" in rows["trl"]["error"]
    assert "step_ms_p50" not in rows["trl"] and rows["logratio"]["status"] == "ok"


@pytest.mark.parametrize(
    ("error", "status"), [(0.9e-4, "ok"), (1.1e-4, "failed"), (float("nan"), "failed"), (float("inf"), "failed")]
)
def test_how_far_a_gradient_may_differ(monkeypatch, error, status):
    monkeypatch.setattr(step, "difference", lambda a, b: error)
    rows = step.run(tiny_case("sft"), CPU, repeats=1, seed=0, only=("logratio", "trl"))
    assert rows["trl"]["status"] == status and ("step_ms_p50" in rows["trl"]) is (status == "ok")


@pytest.mark.parametrize(
    ("error", "status"), [(torch.OutOfMemoryError("no room\nfor it"), "oom"), (RuntimeError("x"), "failed")]
)
def test_one_that_fails_does_not_end_the_others(monkeypatch, error, status):
    def fails(self, *batches):
        raise error

    monkeypatch.setattr(trl_contestant.Trl, "backward", fails)
    rows = step.run(tiny_case("sft"), CPU, repeats=1, seed=0, only=("logratio", "trl"))
    assert rows["trl"]["status"] == status and "\n" not in rows["trl"]["error"]
    assert rows["logratio"]["status"] == "ok"


def test_contestants_share_what_is_frozen():
    model = build("tiny", "lora", dtype=torch.float32, device=CPU, lora_r=4)
    twin = share_frozen(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) and (p is q) is not p.requires_grad


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_no_contestant_trains_anothers_weights_or_its_reference(adapter):
    case = tiny_case("dpo", adapter)
    model = build("tiny", adapter, dtype=torch.float32, device=CPU, lora_r=4)
    before = [p.detach().clone() for p in model.parameters()]
    with step.ExitStack() as stack:
        both = [step.make(name, case, model, CPU, stack, None) for name in ("logratio", "trl")]
        for one in both:
            one.backward(one.prepare(case.window(259, 0)))
            one.update()
        trained = [{p.data_ptr() for p in one.model.parameters() if p.requires_grad} for one in both]
        assert len(trained[0]) == len(trained[1]) > 0 and not trained[0] & trained[1]
        for one in both if adapter == "full" else ():
            assert {p.data_ptr() for p in one.ref_model.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_both_sides_update_alike():
    case = tiny_case("dpo")
    model = build("tiny", "lora", dtype=torch.float32, device=CPU, lora_r=4)
    with step.ExitStack() as stack:
        ours, theirs = (step.make(name, case, model, CPU, stack, None).optimizer for name in ("logratio", "trl"))
        settings = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in (ours, theirs)]
    assert settings[0][0] == settings[1][0] and settings[0][0]["lr"] == LEARNING_RATE
    assert all(group == settings[1][0] for group in settings[1]), "what has weight decay and what has none"


def test_an_update_is_clipped():
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[30.0, 40.0]])
    apply_update(torch.optim.SGD(layer.parameters(), lr=1.0))
    assert (before - layer.weight).norm().item() == pytest.approx(MAX_GRAD_NORM, rel=1e-4) and layer.weight.grad is None


def test_rollouts_are_of_a_policy_some_updates_ago():
    case = tiny_case("grpo", batch_size=8, lengths=Lengths(6, 20))
    model, window = build("tiny", "lora", dtype=torch.float32, device=CPU), case.window(259, 0)
    table = step.old_logps(case, model, [window], 0)
    old = torch.cat([logps for e in window for logps in table[tokens_key(e)]])
    change = old - policy_logps(Policy(model), window)
    assert change.std().item() == pytest.approx(0.1, rel=0.1) and abs(change.mean().item()) < 0.02


@pytest.mark.parametrize("adapter", ["lora", "qlora", "full"])
def test_what_a_contestant_keeps(adapter):
    case = tiny_case("dpo", adapter)
    model = build("tiny", adapter, dtype=torch.float32, device=CPU, lora_r=4)
    ref_model = share_frozen(model) if adapter == "full" else None  # of its own: everything trains
    ours = Ours(case, model, ref_model, CPU)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    buffers = sum(b.nbytes for b in model.buffers())
    if adapter == "full":
        frozen = trained  # the reference's; buffers are shared
    before = kept_mib(ours)
    if adapter != "qlora":
        assert before * 2**20 == trained + frozen + buffers
    ours.backward(ours.prepare(case.window(259, 0)))
    ours.update()
    steps = sum(4 for p in model.parameters() if p.requires_grad)  # AdamW's count of steps
    assert (kept_mib(ours) - before) * 2**20 == pytest.approx(2 * trained + steps)
    if adapter == "qlora":
        whole = kept_mib(Ours(case, build("tiny", "lora", dtype=torch.float32, device=CPU, lora_r=4), None, CPU))
        linear = 3 * (4 * 128 * 128 + 3 * 128 * 384)
        assert (whole - before) * 2**20 == pytest.approx(linear * (4 - 0.5 - 1 / 64), rel=0.03)


def test_nf4_is_everywhere_but_in_the_head_and_its_plain_twin_computes_the_same():
    torch.manual_seed(0)
    model = build("tiny", "qlora", dtype=torch.float32, device=CPU)
    four = [name for name, m in model.named_modules() if type(m).__name__ == "Linear4bit" and "base_layer" in name]
    assert len(four) == 3 * 7  # layers x (q, k, v, o, gate, up, down)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    ids = torch.randint(256, (1, 12))
    with torch.no_grad():
        ours, twin = model(ids).logits, plain(model, torch.float32)(ids).logits
    torch.testing.assert_close(twin, ours, rtol=1e-4, atol=1e-4)


def test_the_ledger_sees_an_update_that_bfloat16_rounds_away():
    shares = {}
    for dtype in ("float32", "bfloat16"):
        case = tiny_case("sft", "full", dtype=dtype)
        model = build("tiny", "full", dtype=getattr(torch, dtype), device=CPU)
        shares[dtype] = share_changed(Ours(case, model, None, CPU), case.window(259, 0))
    assert shares["float32"] > 0.9 and shares["bfloat16"] < 0.5 * shares["float32"]


def test_difference_and_cosine_by_hand():
    a, b = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0])}, {"x": torch.tensor([0.0, 0.0])}
    b["y"] = torch.tensor([4.0])
    assert difference(a, b) == 3 / 4 and cosine(a, b) == 4 / 5
    with pytest.raises(ValueError, match="gradients of different parameters"):
        difference(a, {"x": a["x"]})


def test_a_gradient_is_that_of_one_piece_and_leaves_none():
    case = tiny_case("dpo")
    ours = Ours(case, build("tiny", "lora", dtype=torch.float32, device=CPU), None, CPU)
    window = case.window(259, 0)
    first, again = gradient(ours, window), gradient(ours, window)
    assert first.keys() == {name for name, p in ours.model.named_parameters() if p.requires_grad}
    assert difference(first, again) == 0
