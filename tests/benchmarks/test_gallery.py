"""The pages of docs/losses/ have every registered variant and are up to date, and their curves are the losses'."""

import math
import re
from pathlib import Path

import pytest

from logratio.benchmarks.gallery.command import main
from logratio.benchmarks.gallery.curves import drawn
from logratio.benchmarks.gallery.families import groups, variants
from logratio.benchmarks.gallery.page import page
from logratio.losses import LOSSES
from logratio.trainers.errors import UserError

DOCS = Path(__file__).parents[2] / "docs" / "losses"


@pytest.mark.parametrize("method", LOSSES)
def test_a_page_is_up_to_date(method):
    """Else: logratio gallery --method METHOD"""
    assert page(method) == (DOCS / f"{method}.md").read_text()


@pytest.mark.parametrize("method", LOSSES)
def test_every_registered_variant_is_on_its_page_and_in_one_picture_there(method):
    registered = list(getattr(LOSSES[method], "option_tables", {}).get("loss_type", [method]))
    text = (DOCS / f"{method}.md").read_text()
    assert sorted(re.findall(r"^#{2,3} `(\S+)`$", text, re.MULTILINE)) == sorted(registered)
    told = re.findall(r"^!\[(.+): value and step\]\((\S+)\)$", text, re.MULTILINE)
    assert sorted(name for names, _ in told for name in names.split(", ")) == sorted(registered)
    assert {file for _, file in told} == {path.name for path in DOCS.glob(f"{method}*.png")}


def test_no_page_is_of_no_method():
    assert {path.stem for path in DOCS.glob("*.md")} == set(LOSSES)


def curves(method, name):
    """panel -> line -> {x: y}"""
    one = variants(method)[name]
    found = drawn(one.loss, one.state)
    return {
        title: {label: {round(x, 6): v for x, v in zip(found.x, y, strict=True)} for label, y in lines.items()}
        for title, lines in found.panels.items()
    }


def test_dpo_by_hand():
    """Of the margin alone: sigmoid(-beta m) beta, to either side, wherever chosen is."""
    found = curves("dpo", "sigmoid")
    for place in ("r = 0", "r = −5"):
        for m in (-30.0, 0.0, 10.0):
            weight = 0.1 / (1 + math.exp(0.1 * m))
            assert found["value"][f"chosen at {place}"][m] == pytest.approx(math.log1p(math.exp(-0.1 * m)))
            assert found["weight of the margin"][f"chosen at {place}"][m] == pytest.approx(weight)
            steps = found[f"steps at {place}"]
            assert (steps["step of chosen"][m], steps["step of rejected"][m]) == pytest.approx((weight, -weight))


def test_what_looks_at_a_side_of_its_own():
    """dpop below the reference is 1 + lambda times as steep in chosen; at it apo_down leaves chosen alone."""
    dpop = curves("dpo", "dpop")
    weight = 0.1 / (1 + math.exp(0.1 * (30 - 50 * 5)))  # x = beta (m - lambda max(0, -r_w))
    assert dpop["steps at r = −5"]["step of chosen"][30.0] == pytest.approx(51 * weight)
    assert dpop["steps at r = −5"]["step of rejected"][30.0] == pytest.approx(-weight)
    apo = curves("dpo", "apo_down")["steps at r = 0"]
    assert apo["step of chosen"][0.0] == pytest.approx(0, abs=1e-12)
    assert apo["step of rejected"][0.0] == pytest.approx(-0.025)


def test_what_compares_with_the_step():
    """aot's pair of the largest margin stands against the reference's largest one, 5; chosen is as likely there."""
    found = curves("dpo", "aot")["value"]["chosen at r = 0"]
    assert found[30.0] == pytest.approx(math.log1p(math.exp(-0.1 * (30 - 5))))
    # one of 10 is third behind 15, which the largest of the others is, and so against the third of -5, 0, 0, 5
    assert found[10.0] == pytest.approx(math.log1p(math.exp(-0.1 * 10)))


def test_a_pair_without_a_reference_is_drawn_where_it_can_be():
    found = curves("cpo", "simper")
    chosen, rejected = math.exp(-1) / 10, math.exp(-2) / 10  # of averages -1 and -2
    steps = found["steps at log p = −10"]
    assert steps["step of chosen"][10.0] == pytest.approx(chosen)
    assert steps["step of rejected"][10.0] == pytest.approx(-rejected)
    assert found["value"]["chosen at log p = −10"][10.0] == pytest.approx(10 * (rejected - chosen))
    assert math.isnan(steps["step of chosen"][-9.5]) and not math.isnan(steps["step of chosen"][-9.0])


def test_grpo_by_hand():
    """The gradient is rho A, and nothing where the clip holds."""
    step = curves("grpo", "dapo")["step"]
    assert step["A = 1"][-1.0] == pytest.approx(math.exp(-1)) and step["A = 1"][0.2] == 0
    assert step["A = −1"][1.0] == pytest.approx(-math.exp(1)) and step["A = −1"][-0.5] == 0
    assert curves("grpo", "dr_grpo") == curves("grpo", "dapo")  # their normalisers are alike at one token


def test_the_others_by_hand():
    kto = curves("kto", "kto")["step"]
    assert (kto["desirable"][5.0], kto["undesirable"][5.0]) == pytest.approx((0.025, -0.025))  # its steepest, at r = z
    assert all(y == pytest.approx(p) for p, y in curves("sft", "dft")["step"]["H = 3 nats"].items())
    infonca = curves("listwise", "infonca")["steps, the best moves"]
    weights = [math.exp(reward) for reward in (3, 2, 1, 0)]
    for reward, weight in zip((3, 2, 1, 0), weights, strict=True):  # beta (q - p), p = 1/4
        assert infonca[f"step at R = {reward}"][0.0] == pytest.approx(0.1 * (weight / sum(weights) - 0.25))
    p = math.e / (math.e + 3)  # the best alone at r = 10
    assert infonca["step at R = 3"][10.0] == pytest.approx(0.1 * (weights[0] / sum(weights) - p))
    eaft = curves("sft", "eaft")["step"]
    assert eaft["H = 3 nats"][0.5] == pytest.approx(6 * eaft["H = 0.5 nats"][0.5]) != 0  # as the entropies
    gkd = curves("sft", "gkd")["value"]["H = 3 nats"]  # p = 1/2, q = 1: 1/2 ln 4/3 + 1/2 (1/2 ln 2/3 + 1/2 ln 2)
    assert gkd[0.5] == pytest.approx(0.5 * math.log(4 / 3) + 0.25 * math.log(4 / 3))
    asft = curves("sft", "asft")["value"]["H = 3 nats"]  # KL((1/2, 1/2) || p) = -1/2 ln 4 p (1 - p)
    assert asft[0.25] == pytest.approx(0.25 * math.log(4) - 0.025 * math.log(3 / 4))


def test_laws_that_are_broken_on_purpose():
    broken = {(m, name): one.broken for m in ("sft", "kto") for name, one in variants(m).items() if one.broken}
    follows = {("sft", "gkd"): ["direction"]}
    held = (("sft", "dft"), ("sft", "eaft"), ("sft", "asft"), ("kto", "bco"))
    assert broken == follows | {one: ["gradient"] for one in held}
    assert variants("dpo")["discopop"].broken == ["direction"]


def test_a_family_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["--method", "orpo", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "orpo.md").read_text() == (DOCS / "orpo.md").read_text()
    assert (tmp_path / "orpo.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match=r"unknown method 'ppo', expected one of: "):
        main(["--method", "ppo", "--out", str(tmp_path)])


def test_pictures_have_few_variants():
    assert all(len(members) <= 8 for method in LOSSES for _, _, members in groups(method))
