"""An option that the chosen variants do not read is refused; what reads it is declared where a variant is entered."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from logratio.losses import (
    DPO_TYPES,
    GRPO_TYPES,
    LOSSES,
    CompletionLogps,
    CPOLoss,
    DPOLoss,
    GRPOLoss,
    Kind,
    Loss,
    PairLogps,
    Totals,
    TPOLoss,
    Variants,
    linear_jsd,
    variant,
)
from logratio.losses.options import readers_said

from ._families import refused


def test_a_table_knows_who_reads_what():
    table: Variants[int] = Variants()
    table.enter("a", 1, reads=("x", "y"))
    table.enter("b", 2, reads=("x",), ignores=("z",))
    table.enter("c", 3)
    table["d"] = 4  # put in without a word
    assert table.readers("x") == ["a", "b"] and table.said("x") == "a, b"
    assert table.readers("y") == ["a"] and table.said("y") == "a"
    assert table.readers("z") == ["a", "c", "d"] and table.said("z") == "all but b"
    assert table.readers("w") == ["a", "b", "c", "d"] and table.said("w") == ""
    assert table == {"a": 1, "b": 2, "c": 3, "d": 4}
    with refused("a variant named 'a' is registered already"):
        table.enter("a", 5)
    assert table["a"] == 1


def test_a_formula_is_entered_with_what_it_reads():
    table: Variants[Any] = Variants()

    @variant(table, reads=("x",), ignores=("y",))
    def first() -> None: ...

    @variant(table, "other")
    def second() -> None: ...

    assert table == {"first": first, "other": second}
    assert table.readers("x") == ["first"] and table.readers("y") == ["other"]


SMOOTHED = "it is an option of cdpo, robust, exo_pair, aot, aot_unpaired"


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (
            DPOLoss,
            {"label_smoothing": 0.1},
            f"label_smoothing=0.1 is not read by loss_type sigmoid; leave it out: {SMOOTHED}",
        ),
        (
            DPOLoss,
            {"loss_type": ("ipo", "hinge"), "label_smoothing": 0.1},
            f"label_smoothing=0.1 is not read by loss_type ipo, hinge; leave it out: {SMOOTHED}",
        ),
        (
            DPOLoss,
            {"loss_type": "sft", "beta": 0.5},
            "beta=0.5 is not read by loss_type sft; leave it out: it is an option of all but sft",
        ),
        (
            DPOLoss,
            {"f_alpha_divergence_coef": 0.2},
            "f_alpha_divergence_coef=0.2 is not read by f_divergence_type reverse_kl; leave it out: it is an option of "
            "alpha_divergence",
        ),
        *(
            (
                DPOLoss,
                {"loss_type": name, "f_divergence_type": "forward_kl"},
                f"f_divergence_type=forward_kl is not read by loss_type {name}; leave it out: it is an option of "
                "sigmoid, hinge, ipo, robust, exo_pair, ipo_sum, sigmoid_norm, discopop, sba",
            )
            for name in ("sft", "nca_pair")
        ),
        (
            CPOLoss,
            {"simpo_gamma": 1.0},
            "simpo_gamma=1.0 is not read by loss_type sigmoid; leave it out: it is an option of simpo, alphapo",
        ),
        (
            CPOLoss,
            {"loss_type": "simper", "beta": 2.0},
            "beta=2.0 is not read by loss_type simper; leave it out: it is an option of all but simper",
        ),
        (
            TPOLoss,
            {"loss_type": "ipo", "label_smoothing": 0.1},
            "label_smoothing=0.1 is not read by loss_type ipo; leave it out: it is an option of sigmoid, tpo-l",
        ),
        (
            GRPOLoss,
            {"loss_type": "sapo", "epsilon": 0.1},
            "epsilon=0.1 is not read by loss_type sapo; leave it out: it is an option of dapo, grpo, "
            "dr_grpo, bnpo, luspo, gmpo, rloo, clip_cov, cfpo, fipo, cispo",
        ),
        *(
            (
                GRPOLoss,
                {"loss_type": name, "importance_sampling_level": "sequence"},
                f"importance_sampling_level=sequence is not read by loss_type {name}; leave it out: it is an option of "
                "all but gmpo, rloo, real, target_po, m2po, a2po, vespo, reinforce, topr, kimi",
            )
            for name in ("gmpo", "vespo", "rloo")
        ),
        (
            GRPOLoss,
            {"loss_type": "gmpo", "beta": 0.1, "use_bias_correction_kl": False},
            "use_bias_correction_kl=False is not read by loss_type gmpo; leave it out: it is an option of all but "
            "gmpo, rloo, real, target_po, a2po",
        ),
        (GRPOLoss, {"kl_estimator": "k2"}, "kl_estimator=k2 is read only where beta is not 0; leave it out"),
        (
            GRPOLoss,
            {"use_bias_correction_kl": False},
            "use_bias_correction_kl=False is read only where beta is not 0; leave it out",
        ),
    ],
)
def test_an_option_that_is_not_read_is_refused(loss, options, message):
    with refused(message):
        loss(**options)


def test_of_several_losses_one_reads_it():
    DPOLoss(loss_type=("sigmoid", "cdpo"), label_smoothing=0.1)
    DPOLoss(loss_type=("sft", "sigmoid"), beta=0.5, ld_alpha=0.5, f_divergence_type="forward_kl")
    with refused(f"label_smoothing=0.1 is not read by loss_type sigmoid, sft; leave it out: {SMOOTHED}"):
        DPOLoss(loss_type=("sigmoid", "sft"), label_smoothing=0.1)


def test_a_default_that_is_given_is_no_matter():
    DPOLoss(loss_type="sft", beta=0.1, label_smoothing=0.0, irpo_alpha=1.0)
    GRPOLoss(loss_type="rloo", importance_sampling_level="token", kl_estimator="k3", beta=0)
    GRPOLoss(beta=0.1, kl_estimator="k2", use_bias_correction_kl=False)


OTHERS = {
    "label_smoothing": 0.3,
    "f_divergence_type": "forward_kl",
    "importance_sampling_level": "sequence",
    "loss_aggregation": "prompt_mean",
    "kl_estimator": "k1",
    "use_bias_correction_kl": False,
    "top_entropy_quantile": 0.4,
    "epsilon": 0.05,
    "epsilon_high": 0.05,
    "delta": 0.9,
    "ld_alpha": 0.5,
    "down_sample": True,
    "humanline_clip": (-0.05, 0.05),
    "chi_po_r_max": 0.01,
    "beta": 0.3,
    "rejected_weight": 0.1,
    "z_loss_coef": 0.1,
    "m2po_threshold": 0.15,
    "cov_share": 0.5,
    "clip_cov_low": 0.5,
    "clip_cov_high": 0.0,
}
"""Another value; elsewhere half as much again."""
COMPARED = {"clip_cov_low": -2.0, "clip_cov_high": 0.85}
"""Two of five tokens have such covariances and are not clipped."""
UNDEFINED = {
    *(("rloo", option) for option in ("beta", "top_entropy_quantile", "kl_estimator", "loss_aggregation")),
    ("gmpo", "loss_aggregation"),
    *(
        (name, option)
        for name in ("real", "target_po", "a2po")
        for option in ("beta", "top_entropy_quantile", "kl_estimator", "loss_aggregation")
    ),
    *((name, "down_sample") for name, entry in DPO_TYPES.items() if entry.averages),
}
"""Refused since they have no meaning there, not since nothing reads them."""


def declared() -> list[tuple[str, str, str]]:
    """(method, option, loss_type) of every option that is not read by all of them."""
    return [
        (method, option.name, name)
        for method, loss in LOSSES.items()
        if "loss_type" in loss.option_tables
        for option in dataclasses.fields(loss)
        if loss.option_tables["loss_type"].said(option.name)
        for name in loss.option_tables["loss_type"]
        if (name, option.name) not in UNDEFINED
        if option.name != "use_bias_correction_kl" or name not in ("rloo", "real", "target_po", "a2po")
        if option.name != "f_divergence_type" or DPO_TYPES[name].divergences  # of others it is not defined
    ]


NUMBERS = (
    [[-1.0, -2.0, -0.3], [-0.5, -1.5, 0.0]],
    [[-1.1, -1.7, -0.9], [-0.3, -1.2, 0.0]],
    [[-1.5, -1.6, -0.6], [0.0, -1.7, 0.0]],  # log-ratios 0.5, -0.4, 0.3 of A > 0 and -0.5, 0.2 of A < 0
)


def outcome(loss: Loss) -> list[float]:
    """Value, gradient and next state of two uneven examples; where there are old log-probs, off policy."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    policy, ref, old = (torch.tensor(x, dtype=torch.float64) for x in NUMBERS)
    entropy = torch.tensor([[1.0, 0.2, 2.0], [0.5, 1.5, 0.0]], dtype=torch.float64)
    leaves = [policy.requires_grad_()]
    kept, totals = {"policy": CompletionLogps(policy, mask, entropy), "ref": CompletionLogps(ref, mask, entropy)}, None
    if loss.kind is Kind.PAIRED:
        leaves.append(old.requires_grad_())  # of rejected
        sides = CompletionLogps(old, mask.flip(0)), CompletionLogps(old.detach() - ref, mask.flip(0), entropy)
        given = torch.tensor([0.5, -1.0])
        pairs = {name: PairLogps(x, y, margin=given) for (name, x), y in zip(kept.items(), sides, strict=True)}
        totals = Totals.of(pairs["policy"], loss.collect(*pairs.values()) if loss.window_pass else None)
        value = loss(*pairs.values() if loss.wants_reference else [pairs["policy"]], totals=totals).loss
    elif loss.kind is Kind.SEQUENCE:
        totals = Totals.of(kept["policy"])
        more = {"log_z": 2 * policy}
        if loss.divergence is not None:  # from a teacher of as many words as there are tokens
            words = torch.eye(3, dtype=torch.float64)
            values = linear_jsd(policy, words, ref, words, **loss.divergence.jsd)
            more["divergence"] = values[:, None].expand(2, 3)
        value = loss(dataclasses.replace(kept["policy"], **more), totals=totals).loss
    elif loss.kind is Kind.LISTED:
        rewards, totals = torch.tensor([1.0, 0.5], dtype=torch.float64), Totals.of(kept["policy"], sizes=[2])
        value = loss(**kept, rewards=rewards, sizes=[2], totals=totals).loss
    else:
        advantages = torch.tensor([1.0, -2.0], dtype=torch.float64)
        more = {"prompt_tokens": torch.tensor([4, 7])} if loss.wants_prompt_tokens else {}
        more |= {"prompts": torch.tensor([3, 3])} if loss.wants_prompts else {}
        more |= {"advantages": advantages, "old": CompletionLogps(old, mask)} if loss.kind is Kind.GROUPED else {}
        totals = Totals.of(kept["policy"], loss.collect(**kept, **more) if loss.window_pass else None, advantages)
        value = loss(**kept, totals=totals, **more).loss
    value.backward()
    grads = [g for x in leaves if x.grad is not None for g in x.grad.flatten().tolist()]
    return [value.item(), *grads, *loss.advance(totals).values()]


@pytest.mark.parametrize(("method", "option"), dict.fromkeys((method, option) for method, option, _ in declared()))
def test_what_is_declared_as_read_changes_the_loss_and_nothing_else_does(method, option):
    """By its numbers, with the check gone round."""
    names = [name for of, one, name in declared() if (of, one) == (method, option)]
    table = LOSSES[method].option_tables["loss_type"]
    assert [name for name in names if changes(method, option, name)] == [n for n in names if n in table.readers(option)]


def changes(method, option, name):
    """Whether another value of the option changes anything that the loss gives."""
    base = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
    if method == "tpo":
        base["tpo_alpha"] = 0.0
    if name == "clip_cov":
        base |= COMPARED
    if option == "fipo_half_life" and name == "fipo":
        base["fipo_clip"] = 1.0
    if option in ("kl_estimator", "use_bias_correction_kl"):
        base["beta"] = 0.5
    plain = LOSSES[method](loss_type=name, **base)
    before = outcome(plain)
    object.__setattr__(plain, option, OTHERS[option] if option in OTHERS else 1.5 * getattr(plain, option))
    return outcome(plain) != before


def test_help_says_who_reads_an_option():
    assert readers_said(DPOLoss, "label_smoothing") == "loss_type: cdpo, robust, exo_pair, aot, aot_unpaired"
    assert readers_said(DPOLoss, "f_alpha_divergence_coef") == "f_divergence_type: alpha_divergence"
    assert (
        readers_said(GRPOLoss, "use_bias_correction_kl")
        == "loss_type: all but gmpo, rloo, real, target_po, a2po; beta: not 0"
    )
    assert readers_said(GRPOLoss, "entropy_coef") == readers_said(Loss, "anything") == ""


def test_all_that_only_some_read_is_declared_for_existing_options():
    for loss in LOSSES.values():
        names = {f.name for f in dataclasses.fields(loss)}
        for table in loss.option_tables.values():
            for options in (*table.reads.values(), *table.ignores.values()):
                assert set(options) <= names
        assert {*loss.option_tables, *loss.option_switches, *loss.option_switches.values()} <= names
    assert "label_smoothing" in DPO_TYPES.reads["cdpo"] and "delta" in GRPO_TYPES.reads["dapo"]


README = (Path(__file__).parents[2] / "README.md").read_text()
ROWS = {row.split("`")[1]: row.split(" | ") for row in README.splitlines() if row.startswith("| `")}


@pytest.mark.parametrize("method", LOSSES)
def test_the_readmes_table_is_of_the_declarations(method):
    """It names every loss_type; who reads which option stands in the method's page, which is generated."""
    table = LOSSES[method].option_tables.get("loss_type")
    named = ROWS[method][1].strip(" |").partition(";")[0]
    assert sorted(named.split(", ")) == sorted(table or [""])
