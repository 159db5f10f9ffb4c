"""What a text's answer is: numbers as such, words and formulas as they are written."""

import importlib.util
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logratio.trainers.errors import UserError
from logratio.trainers.rollout.accuracy import accuracy_reward
from logratio.trainers.rollout.rewards import exact_answer, load_reward, load_rewards


@pytest.mark.parametrize(
    "completion, answer, right",
    [
        ("46", "46", True),
        ("47", "46", False),
        ("046", 46, True),
        ("46.0", "46", True),
        ("first 3, then 46.", "46", True),
        ("46, that is 40 and 6", "46", False),
        ("12+34=46\nA: 46 apples for 2 days", "46", True),
        ("A: 3\nno, A: 4\nA: 46", "46", True),
        ("#### 36,000", "36000", True),
        ("The answer is $1,000.50.", "1000.5", True),
        ("The answer is **46**.", "46", True),
        ("<answer>46</answer>", "46", True),
        ("To answer this: 40+6=46", "46", True),
        (r"so \boxed{46}, not 47", "46", True),
        (r"so \(46\)", "46", True),
        ("it is $46$.", "46", True),
        (r"46\%", "46", True),
        ("so it is 46 - that is all", "46", True),
        ("- 46", "46", True),
        ("A: 46 (forty-six)", "46", True),
        (r"x \approx 46", "46", True),
        ("x = -46", "46", False),
        ("x = -46", "-46", True),
        ("92-46", "-46", False),
        ("(92)-46", "-46", False),
        ("Answer: Paris.", "paris", True),
        ("It was\nParis", "paris", True),
        ("", "46", False),
        ("no idea", "46", False),
        ([{"role": "user", "content": "46"}, {"role": "assistant", "content": "A: 45"}], "46", False),
        ([{"role": "assistant", "content": "A: 46"}], "long story\n#### 46", True),
    ],
)
def test_exact_answer(completion, answer, right):
    assert exact_answer(completions=[completion], answer=[answer], prompts=[""]) == [float(right)]


def test_a_row_without_an_answer_is_neither_right_nor_wrong():
    assert exact_answer(completions=["None", "4", "4"], answer=[None, None, 4]) == [None, None, 1.0]


@settings(max_examples=50, deadline=None)
@given(st.integers(-(10**9), 10**9))
def test_a_number_is_its_own_answer_however_it_is_written(number):
    completions = [f"{number}", f"{number:,}", f"A: {number}", f"so it is {number:,}.00 in all", f"#### {number} of 7"]
    assert exact_answer(completions=completions, answer=[number] * 5) == [1.0] * 5
    assert exact_answer(completions=completions, answer=[number + 1] * 5) == [0.0] * 5


@pytest.mark.parametrize(
    "formula, number",
    [
        (r"\boxed{3e}", 3),
        (r"\boxed{3\pi}", 3),
        ("A: 3π", 3),
        (r"A: 3 \pi", 3),
        (r"A: 3\,\pi", 3),
        ("A: 3 pi", 3),
        ("A: 2 x", 2),
        ("A: 2*x", 2),
        (r"3 \cdot 46", 46),
        ("2 * 46", 46),
        ("2**46", 46),
        (r"\boxed{\frac{1}{2}}", 1),
        (r"\frac{1}{2}", 2),
        (r"\frac12", 12),
        ("A: 1/2", 1),
        ("5/2", 2),
        ("A: 3^2", 3),
        (r"2\sqrt{3}", 3),
        ("92-46", 46),
        ("(92)-46", 46),
        ("n-1", 1),
        ("n - 1", 1),
        ("x + 46", 46),
        ("5 -3", -3),
        ("x > 46", 46),
        ("f(46)", 46),
        ("A: 46, 47", 46),
        ("46, 47", 47),
        ("A: (46, 47)", 46),
        ("10²", 10),
        ("1e5", 1),
        ("5!", 5),
        ("A: 10:30", 10),
        ("A: 2024-01-02", 2024),
    ],
)
def test_a_formula_is_not_one_of_its_numbers(formula, number):
    assert exact_answer([formula, str(number)], [number, formula]) == [0.0, 0.0]
    assert exact_answer([formula], [formula]) == [1.0]


def test_formulas_are_compared_as_they_are_written():
    same = [(r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"A: 3 \pi", r"\boxed{3\pi}"), (r"so \boxed{x^{2}}", "x^{2}")]
    others = [(r"\boxed{3e}", r"3\pi"), ("X^2", "x^2"), (r"\boxed{0.5}", r"\frac{1}{2}"), (r"\boxed{\frac{1}{2}", "1")]
    assert exact_answer(*map(list, zip(*same, strict=True))) == [1.0] * 3
    assert exact_answer(*map(list, zip(*others, strict=True))) == [0.0] * 4


# Mathematics ---------------------------------------------------------------------------------------------------------

BOTH = [  # completion, right answer, reward: as in TRL
    (r"\boxed{\frac{2}{4}}", r"$\frac{1}{2}$", 1.0),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
    (r"so \boxed{\frac{1}{3}}", r"\frac{1}{2}", 0.0),
    (r"\boxed{3e}", r"$3\pi$", 0.0),
    (r"\boxed{1 + x^2}", r"\(x^2 + 1\)", 1.0),
    (r"the final answer is $46$", "46", 1.0),
    (r"46", "46", 0.0),
    (r"\boxed{46}", "so it is\n#### 46", 1.0),
    (r"\boxed{1,000}", "1000", 1.0),
    ("", "46", 0.0),
    (r"\boxed{Paris}", "Paris", None),
    (r"\boxed{1}", "", None),
]
OURS = [  # where the right answer has no delimiters (see the module)
    (r"\boxed{3}", r"3\pi", 0.0, 1.0),
    (r"\boxed{3\pi}", r"3\pi", 1.0, 0.0),
    (r"\boxed{1+x^2}", "x^2+1", 1.0, None),
    (r"\boxed{2}", "x^2+1", 0.0, None),
    (r"\boxed{(1,2)}", "(1,2)", 1.0, None),
    (r"\boxed{\text{Eve}}", r"\text{Evelyn}", 0.0, None),
    (r"\boxed{3}", r"The answer is 3\pi", None, 1.0),
]


def test_accuracy_reward_is_trls_but_where_it_says_so():
    trl = pytest.importorskip("trl.rewards").accuracy_reward
    pytest.importorskip("math_verify")
    texts, right = [c for c, *_ in BOTH + OURS], [r for _, r, *_ in BOTH + OURS]
    said = [[{"role": "assistant", "content": text}] for text in texts]
    assert accuracy_reward(said, solution=right) == [row[2] for row in BOTH + OURS]
    assert trl(said, right) == [row[-1] for row in BOTH + OURS]
    assert accuracy_reward(texts, answer=right, prompts=[]) == [row[2] for row in BOTH + OURS]


def test_solution_goes_before_answer_and_may_be_missing_in_a_row():
    pytest.importorskip("math_verify")
    assert accuracy_reward([r"\boxed{1}", r"\boxed{1}"], solution=[1, None], answer=[2, 1]) == [1.0, None]


def test_accuracy_reward_works_outside_the_main_thread():
    pytest.importorskip("math_verify")
    got = []
    thread = threading.Thread(target=lambda: got.extend(accuracy_reward([r"\boxed{1/2}"], solution=["0.5"])))
    thread.start()
    thread.join()
    assert got == [1.0]


def test_accuracy_reward_says_at_the_start_what_it_lacks(monkeypatch):
    with pytest.raises(UserError, match="'accuracy_reward' needs the column 'solution' or 'answer'"):
        load_rewards(["accuracy_reward"], ["level"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'accuracy_reward' needs math-verify: pip install 'math-verify>=0.9,<0.10'"):
        load_reward("accuracy_reward")
