"""How like its reference an answer is: by hand, beside the public implementations, and for any text at all."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from sftdist.core.errors import ConfigError, DataError
from sftdist.data.message import Message
from sftdist.evals.probes.number import number_of, reference_number
from sftdist.evals.probes.task import chrf, exact_match, rouge_l, same_answer, task_probe, token_f1
from sftdist.evals.prompts import Answer, Prompt


def prompt(reference: str | None = None, **checks: object) -> Prompt:
    return Prompt("s/1", "s", (Message("user", "Hi"),), reference, checks=checks)


def said(text: str) -> Answer:
    return Answer(text, 1, True)


# --- text ------------------------------------------------------------------------------------------------


def test_an_exact_match_differs_in_white_space_around_it_at_most() -> None:
    assert exact_match(" LAMP\n", "LAMP") == 1.0
    assert exact_match("lamp", "LAMP") == 0.0
    assert exact_match("a  b", "a b") == 0.0
    assert exact_match("LAMP.", "LAMP") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The lamp!", "lamp", 1.0),
        ("Hello  Ana,\nyes", "hello Ana yes.", 1.0),
        ("1,000", "1000", 1.0),
        ("3.5", "35", 0.0),  # SQuAD's own script calls these equal
        ("-5", "5", 0.0),
        ("\u22125 degrees", "5 degrees", 0.0),
        ("10-15", "1015", 1.0),  # a hyphen between words or numbers is punctuation
        ("\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u4f60\u597d\u4e16\u754c", 1.0),
        ("\u00bfQu\u00e9 tal?", "qu\u00e9 tal", 1.0),
        ("a theatre", "theatre", 1.0),
        ("theatre", "atre", 0.0),
    ],
)
def test_what_the_same_answer_may_differ_in(answer: str, reference: str, same: float) -> None:
    assert same_answer(answer, reference) == same


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("the cat sat", "a cat sat down", Fraction(4, 5)),  # cat sat of 2 words and of 3
        ("cat cat cat", "cat", Fraction(1, 2)),  # a word counts as often as the reference has it
        ("dog", "cat", Fraction(0)),
        ("", "", Fraction(1)),
        ("the", "!", Fraction(1)),  # neither says anything
        ("", "cat", Fraction(0)),
        ("\u597d\u4eba", "\u4f60\u597d", Fraction(1, 2)),  # characters are words
    ],
)
def test_token_f1_by_hand(answer: str, reference: str, f1: Fraction) -> None:
    assert token_f1(answer, reference) == pytest.approx(float(f1))


def test_rouge_l_by_hand() -> None:
    # "the cat sat" is in "the cat on the mat sat": 3 of 3 words and 3 of 6
    assert rouge_l("the cat sat", "the cat on the mat sat") == pytest.approx(2 / 3)
    assert rouge_l("sat cat the", "the cat sat") == pytest.approx(1 / 3)
    assert rouge_l("\u4f60\u597d\u5417", "\u4f60\u597d") == pytest.approx(4 / 5)


def test_chrf_by_hand() -> None:
    # abc beside abd: 2 of 3 letters, 1 of 2 pairs, 0 of 1 triples; precision and recall are the same
    assert chrf("abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert chrf("a b c", "abc") == pytest.approx(1.0)  # white space does not count


# --- beside public implementations -------------------------------------------------------------------------

PAIRS = [
    ("The quick brown fox jumps over the lazy dog.", "The quick brown dog jumps on the log."),
    ("It is 42, I think", "42"),
    ("An answer: yes!", "yes"),
    ("well-known facts & figures", "well known facts and figures"),
    ("", "something"),
    ("cat the the", "the cat cat"),
    ("Paris is the capital of France, a country in Europe.", "France's capital is Paris."),
]
ASCII = st.text(st.sampled_from("abc THE the a an.,!?'\"-_\n"), max_size=60)


@pytest.fixture(scope="module")
def squad() -> ModuleType:
    return pytest.importorskip("lm_eval.tasks.qasper.metrics", reason="lm-eval is not installed")


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_squad_as_lm_eval_counts_it(squad: ModuleType, answer: str, reference: str) -> None:
    assert token_f1(answer, reference) == pytest.approx(squad.f1_abstractive([answer], [reference]))
    assert same_answer(answer, reference) == (squad.normalize_answer(answer) == squad.normalize_answer(reference))


@settings(max_examples=200, deadline=None)
@given(ASCII, ASCII)
def test_squad_as_lm_eval_counts_any_text_without_numbers(squad: ModuleType, answer: str, reference: str) -> None:
    assert same_answer(answer, reference) == (squad.normalize_answer(answer) == squad.normalize_answer(reference))
    if squad.normalize_answer(answer) and squad.normalize_answer(reference):
        assert token_f1(answer, reference) == pytest.approx(squad.f1_abstractive([answer], [reference]))


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_exact_match_as_evaluate_counts_it(answer: str, reference: str) -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm-eval is not installed")
    for given_answer in (answer, reference):
        theirs = metrics.exact_match_hf_evaluate(predictions=[given_answer], references=[reference])["exact_match"]
        assert exact_match(given_answer, reference) == theirs


@settings(max_examples=100, deadline=None)
@given(ASCII, ASCII)
def test_rouge_l_is_that_of_rouge_score_in_ascii(answer: str, reference: str) -> None:
    theirs = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, reference) == pytest.approx(theirs)


@pytest.mark.parametrize(("answer", "reference"), [*PAIRS, ("\u00fcber \u4f60\u597d", "\u00fcber \u4f60\u4e0d\u597d")])
def test_rouge_l_and_chrf_as_the_libraries_have_them(answer: str, reference: str) -> None:
    assert chrf(answer, reference) == pytest.approx(sacrebleu.sentence_chrf(answer, [reference]).score / 100)
    if answer.isascii():
        theirs = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(answer, reference) == pytest.approx(theirs)


def test_rouge_score_alone_is_blind_to_other_scripts() -> None:
    """Why its tokenizer is not used."""
    text = "\u4f60\u597d\u4e16\u754c"
    assert RougeScorer(["rougeL"]).score(text, text)["rougeL"].fmeasure == 0.0
    assert rouge_l(text, text) == 1.0


# --- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("48/2 = 24, so 48+24 = 72.\n#### 72", "72"),
        ("#### $1,000.00", "1000"),
        ("#### -3\n", "-3"),
        ("First 1 then #### 2, not 3", "2"),
        ("#### Step 1\nall in all 7", "7"),  # a headline is no answer
        ("#### 1\n#### 2", "2"),
        ("between 10-15", "15"),
        ("x = 5-3", "3"),
        ("x = -3", "-3"),
        ("it is \u2212$5", "-5"),
        ("$-5", "-5"),
        ("1,2,3", None),
        ("12,34", None),  # a decimal comma or a list
        ("0,500", None),
        ("1,000,50", None),
        ("1234,567", None),
        ("1,23,456", None),
        ("#### 12,34", None),
        ("1.2.3", None),
        ("1/2", None),
        ("it is 1 / 2.", None),
        ("on 05/17/2024", None),
        ("1,234", "1234"),
        ("$1,234.50", "1234.50"),
        ("#### 42", "42"),
        ("3%", "3"),
        ("42.", "42"),
        ("1.000,50", "1000.50"),
        ("1 000", "1000"),
        ("1\u202f234\u202f567,5", "1234567.5"),
        ("1 2 3 100", "100"),
        ("12 345 6", "6"),
        ("5, 6", "6"),
        ("1.5e3", "1500"),
        ("...42", "42"),
        (".5", "0.5"),
        ("\u517142\u4e2a", "42"),
        ("H2O", None),
        ("v1.5", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(answer: str, number: str | None) -> None:
    found = number_of(answer)
    assert found == (None if number is None else pytest.approx(float(number), abs=0)) or str(found) == number


def test_a_number_is_asked_for_where_the_reference_is_about_one() -> None:
    assert reference_number("3 + 4 = 7\n#### 7") == 7
    assert reference_number(" $7. ") == 7
    assert reference_number("Your order 7 ships tomorrow") is None
    assert reference_number("1/2") is None
    assert reference_number("1.000,50") == 1000.5
    score = task_probe().score
    assert score(prompt("so\n#### 1,000"), said("It is 1000.0"))["numeric_match"] == 1.0
    assert score(prompt("so\n#### 1,000"), said("1000 or 2000"))["numeric_match"] == 0.0
    assert score(prompt("#### 7"), said("no idea"))["numeric_match"] == 0.0
    assert score(prompt("#### 34"), said("12,34"))["numeric_match"] == 0.0
    assert "numeric_match" not in score(prompt("Your order 7 ships"), said("7"))


@pytest.mark.parametrize(
    "answer", ["so\n#### 72", "#### 1,000", "#### -3", "I say 72", "#### 73", "#### 2.50", "It costs 5 and 18"]
)
def test_numbers_as_lm_eval_reads_gsm8k(answer: str) -> None:
    """Its strict-match and flexible-extract filters, where an answer ends without a mark behind the number."""
    extraction = pytest.importorskip("lm_eval.filters.extraction", reason="lm-eval is not installed")
    strict = extraction.RegexFilter(r"#### (\-?[0-9\.\,]+)", fallback="")
    flexible = extraction.RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    text = strict.apply([[answer]], [{}])[0][0] or flexible.apply([[answer]], [{}])[0][0]
    assert number_of(answer) == number_of(text)
    assert float(re.sub(r"[,$]", "", text)) == pytest.approx(float(number_of(answer) or 0))


# --- choices -----------------------------------------------------------------------------------------------

CITIES = {"A": "Paris", "B": "Rome"}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", 1.0),
        ("b", 1.0),
        ("(B)", 1.0),
        ("**B**", 1.0),
        ("B) Rome", 1.0),
        ("B. Not A, since that is Paris", 1.0),
        ("Rome", 1.0),
        ("It is rome.", 1.0),
        ("The answer is B because A is Paris", 1.0),
        ("A dog lives in Rome", 1.0),  # an article is no choice
        ("A", 0.0),
        ("Paris or Rome", 0.0),
        ("I do not know", 0.0),
        ("Romeo", 0.0),
        ("", 0.0),
    ],
)
def test_accuracy_over_choices(answer: str, right: float) -> None:
    assert task_probe().score(prompt("B", choices=CITIES), said(answer))["accuracy"] == right


def test_the_longest_choice_is_the_one_that_is_named() -> None:
    score = task_probe().score
    wanted = prompt("not spam", choices=["spam", "not spam"])
    assert score(wanted, said("This is not spam"))["accuracy"] == 1.0
    assert score(wanted, said("This is spam"))["accuracy"] == 0.0
    chinese = prompt("\u6b63\u9762", choices=["\u6b63\u9762", "\u8d1f\u9762"])
    assert score(chinese, said("\u8fd9\u662f\u6b63\u9762\u7684\u3002"))["accuracy"] == 1.0


@pytest.mark.parametrize("choices", ["AB", [], ["A"], ["A", 1], {"A": ""}, {"A": "Paris"}])
def test_choices_that_are_none_are_refused_before_anybody_is_asked(choices: object) -> None:
    with pytest.raises(DataError, match=r"s/1: checks\.choices: given .*, required a list"):
        task_probe().check(prompt("A", choices=choices))


@pytest.mark.parametrize("reference", [None, "C", "Paris and Rome"])
def test_the_reference_names_one_of_the_choices(reference: str | None) -> None:
    with pytest.raises(DataError, match=r"required one of checks\.choices: A, B"):
        task_probe().check(prompt(reference, choices=CITIES))


# --- which metrics apply --------------------------------------------------------------------------------------


def test_nothing_applies_without_a_reference_or_beside_calls_of_tools() -> None:
    assert task_probe().score(prompt(None), said("x")) == {}
    assert task_probe().score(prompt("[]", tool_calls=[]), said("x")) == {}
    assert "rouge_l" not in task_probe().score(prompt("!?"), said("!?"))  # no word that could be found again


@settings(max_examples=150, deadline=None)
@given(st.text(), st.text())
def test_any_two_texts_have_scores_within_their_bounds(answer: str, reference: str) -> None:
    probe = task_probe()
    bounds = {metric.name: metric for metric in probe.metrics}
    for name, value in probe.score(prompt(reference), said(answer)).items():
        assert 0.0 <= value <= 1.0, bounds[name]
    perfect = probe.score(prompt(reference), said(reference))
    assert all(value == pytest.approx(1.0) for value in perfect.values())


# --- a user's functions -----------------------------------------------------------------------------------------


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        """
def polite(messages, answer, reference, checks):
    return "please" in answer and messages[-1] == {"role": "user", "content": "Hi"}

def sometimes(messages, answer, reference, checks):
    return None if reference is None else 0.5

def several(messages, answer, reference, checks):
    return {"tone": len(answer), "haste": checks.get("haste", 0)}
several.metrics = {"tone": {"meaning": "letters", "high": None, "higher_is_better": None}, "haste": {"low": -1}}

def too_much(messages, answer, reference, checks):
    return 2

def undeclared(messages, answer, reference, checks):
    return {"other": 1}

def raises(messages, answer, reference, checks):
    raise KeyError("x")

def exact_match(messages, answer, reference, checks):
    return 1

def words(messages, answer, reference, checks):
    return "good"

def wrong_facts(messages, answer, reference, checks):
    return 1
wrong_facts.metrics = {"a.b": {}}
"""
    )
    return name


def test_a_users_own_metrics(functions: str) -> None:
    probe = task_probe([f"{functions}:polite", f"{functions}:sometimes", f"{functions}:several"])
    known = {metric.name: metric for metric in probe.metrics}
    assert probe.score(prompt(), said("please")) == {"polite": 1.0, "tone": 6.0, "haste": 0.0}
    assert (
        probe.score(prompt("x", haste=-1), said("no")).items()
        >= {"polite": 0.0, "sometimes": 0.5, "haste": -1.0}.items()
    )
    assert (known["polite"].low, known["polite"].high, known["polite"].higher_is_better) == (0.0, 1.0, True)
    assert (known["tone"].high, known["tone"].higher_is_better, known["tone"].meaning) == (None, None, "letters")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_much", "given 2 for too_much, required a number of 0 to 1; state other bounds"),
        ("undeclared", 'given the metric "other", required it in the function\'s own `metrics`'),
        ("raises", "at s/1: given KeyError: 'x', required a number"),
        ("words", 'given "good" for words, required a number'),
    ],
)
def test_a_function_that_gives_no_score_is_an_error(functions: str, function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        task_probe([f"{functions}:{function}"]).score(prompt(), said("x"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("exact_match", "given the metric exact_match twice"),
        ("wrong_facts", 'given "a.b": {}, required a name of letters'),
        ("absent", "evals.functions: given"),
    ],
)
def test_a_function_that_cannot_be_had_is_an_error_at_once(functions: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        task_probe([f"{functions}:{path}"])
