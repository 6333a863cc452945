"""Grading: what counts as the same answer, and that gold answers count as themselves."""

import pytest

from eval.grading import check_golds, contains_all, final_answer, grade

RIGHT = [
    (r"so \boxed{25}", "025"),
    (r"so \boxed{025}", "25"),
    (r"\boxed{204\text{ minutes}}", "204"),
    (r"\boxed{1/2}", r"\frac{1}{2}"),
    (r"\boxed{\dfrac{1}{2}}", "0.5"),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{-2, 1}", "1,-2"),
    (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\boxed{Evelyn}", r"\text{Evelyn}"),
    (r"\boxed{32348}", r"\$32,348"),
    (r"\boxed{0.5}", "The final answer: $0.5$"),
    (r"\boxed{C+\ln(x)}", r"$\int \frac{1}{x} \, dx$ = $C+\ln(x)$"),
    (r"<think>\boxed{7}, no</think> \boxed{8}", "8"),
    (r"first \boxed{7}, then \boxed{8}", "8"),
    ("Working.\nThe answer is 42.", "42"),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}"),
]
WRONG = [
    (r"\boxed{26}", "25"),
    (r"<think>\boxed{8}</think> \boxed{7}", "8"),
    (r"first \boxed{8}, then \boxed{7}", "8"),
    (r"\boxed{1,2,3}", "2"),
    (r"\boxed{1}", "It is $1$ for a and $2$ for b"),
    (r"\boxed{2}", "1,2,3"),
    (r"\boxed{(2, 1)}", "(1, 2)"),
    (r"\boxed{}", "8"),
    ("", "8"),
    ("8 is what I thought.\nI do not know.", "8"),
    (r"\boxed{0.33}", r"\frac{1}{3}"),
]


@pytest.mark.parametrize(("text", "gold"), RIGHT)
def test_the_same_answer_in_another_form_is_right(text, gold):
    assert grade(text, gold)


@pytest.mark.parametrize(("text", "gold"), WRONG)
def test_another_answer_is_wrong(text, gold):
    assert not grade(text, gold)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{1}{2}} and more", r"\frac{1}{2}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{3} then \boxed{\frac{1}", "3"),  # cut off while writing: the last complete one
        (r"\fbox{ 4 }", "4"),
        (r"\boxed{a\\}", r"a\\"),
        ("none", None),
    ],
)
def test_the_final_answer_is_the_last_complete_box(text, answer):
    assert final_answer(text) == answer


def test_the_self_check_tells_answers_apart():
    golds = {
        "a": "025",
        "b": r"\frac{\sqrt{2}}{3}",
        "prose": "no such $f$ exists, since it would be even",
        "empty": " ",
    }
    golds["open"] = r"\frac{1}{2"
    check = check_golds(golds.items())
    assert set(check.failed) == {"empty"} | ({"open"} & set(check.failed))
    assert not {"a", "b"} & {*check.failed, *check.exact_only}


@pytest.mark.parametrize(
    ("text", "gold", "found"),
    [
        ("Oslo: 12345, Bern: 67890", "12345 67890", True),
        ("It is 12,345.", "12345", True),
        ("It is 123456.", "12345", False),
        ("Oslo: 12345", "12345 67890", False),
        ("12345", "", False),
    ],
)
def test_needles_are_compared_digit_by_digit(text, gold, found):
    assert contains_all(text, gold) is found
