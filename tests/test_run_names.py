"""What the positions of a request receive, by name; how many received what; and the identities of phases."""

import random
from collections import Counter

import pytest

from trimtab.program import EMPTY, PhaseProgram, ResolvedSteering, Spans, Term
from trimtab.program.counting import received, steered_tokens
from trimtab.program.run_names import NamedRuns
from trimtab.program.run_names import named_runs as runs_of
from trimtab.program.spans import Atom, Between, IdSet
from trimtab.sites import HookPoint, Phase, Site
from trimtab.vectors.vector import SteeringVector
from work import calls

P, D = Phase.PREFILL, Phase.DECODE
VECTOR = SteeringVector({Site(0, HookPoint.POST_BLOCK): [1.0, 2.0]})
ONE, TWO = (PhaseProgram.of([Term(VECTOR, scale)]) for scale in (1.0, 2.0))
THINKING = Between(opens=((7, 8),), closes=((9,),), looks_back=True)


def named_runs(spans: Spans, identities: list[str], phase: Phase | None = None) -> NamedRuns:
    return runs_of(spans, [(identity, False) for identity in identities], phase)


def of_answer(choice: tuple[int, ...], *atoms: Atom, prompt: int = 4) -> Spans:
    """A prompt that receives program 0, and an answer of one run; programs 1 to 3 are for the answer."""
    return Spans(prompt, (0, prompt), (0, 1), ((0,), choice), (P, D, D, D), atoms)


def test_runs_that_receive_the_same_are_one_and_a_first_one_of_nothing_is_none() -> None:
    spans = Spans(4, (0, 2, 3, 4, 6), (0, 1, 2, 3, 4), ((0,), (1,), (2,), (3,), (4,)), (P, P, P, D, D))
    assert named_runs(spans, ["", "a", "a", "a", ""]) == ((2, "a"), (6, "-"))
    assert named_runs(spans, ["", "", "", "", ""]) == ()
    assert named_runs(spans, ["", "a", "a", "a", ""], D) == ((4, "a"), (6, "-"))


def test_a_run_that_tokens_decide_is_named_by_what_makes_a_difference_and_where_the_answer_begins() -> None:
    some, more = IdSet(((3, 5),)), IdSet(((8, 9),))
    identities = ["", "", "a", "a"]
    (named,) = {
        named_runs(spans, identities)
        for spans in (
            of_answer((1, 2), some),
            of_answer((1, 3), some),
            of_answer((1, 2, 1, 2), some, more),
            of_answer((1, 1, 2, 2), more, some),
            of_answer((1, 2, 1, 2), some, some),
        )
    }
    assert [start for start, _ in named] == [4]
    assert named[0][1].endswith("#0")
    others = [of_answer((2, 1), some), of_answer((1, 2), more), of_answer((1, 1, 1, 2), some, more)]
    others += [of_answer((1, 2), Between(((3,),))), of_answer((1, 2), Between(((3,),), is_open=True))]
    others += [of_answer((1, 2), Between(((3,),), looks_back=True)), of_answer((1, 2), Between((), ((3,),)))]
    names = [named_runs(spans, identities) for spans in others]
    assert len({named, *names}) == 1 + len(others)
    assert named_runs(of_answer((2, 3), some), identities) == ((4, "a"),), "whatever they say, it is the same"
    late = Spans(4, (0, 4, 9), (0, 1, 2), ((0,), (1,), (1, 2)), (P, D, D, D), (some,))
    assert named_runs(late, identities)[-1] == (9, named[0][1].replace("#0", "#5"))


def test_equal_atoms_say_the_same_so_what_they_cannot_say_together_is_no_part_of_a_name() -> None:
    some, identities = IdSet(((3, 5),)), ["", "", "a", "b"]
    assert named_runs(of_answer((1, 2, 3, 1), some, some), identities) == ()
    assert named_runs(of_answer((1, 3, 3, 2), some, some), identities) == named_runs(
        of_answer((1, 2), some), identities
    )


def test_phases_have_the_identity_of_their_program_where_they_receive_one() -> None:
    spans = of_answer((1,))
    steering = ResolvedSteering((ONE, TWO, EMPTY, EMPTY), spans=spans)
    assert (steering.identity(P), steering.identity(D)) == (ONE.identity, TWO.identity)
    nothing = ResolvedSteering((EMPTY, EMPTY, ONE, ONE), spans=spans)
    assert nothing.identity(P) == nothing.identity(D) == ""
    some = [ResolvedSteering((ONE, EMPTY, TWO, TWO), spans=of_answer((1, 2), THINKING, prompt=n)) for n in (4, 6)]
    assert some[0].identity(D) == some[1].identity(D) != TWO.identity, "counted from where the answer begins"
    assert some[0].programs_of(D) == (EMPTY, TWO, TWO)
    with pytest.raises(ValueError, match="no one program"):
        assert some[0].decode


def test_each_position_is_counted_under_what_it_received() -> None:
    generator = random.Random(0)
    for _ in range(300):
        prompt, answer = generator.randrange(1, 9), generator.randrange(0, 30)
        tokens = [generator.choice((7, 8, 9, 3)) for _ in range(prompt + answer)]
        starts = sorted({0, prompt, *(generator.randrange(prompt + 20) for _ in range(4))})
        kinds = tuple(0 if start < prompt else generator.choice((1, 2)) for start in starts)
        spans = Spans(prompt, tuple(starts), kinds, ((0,), (1,), (1, 2)), (P, D, D), (THINKING,))
        steering = ResolvedSteering((ONE, EMPTY, TWO), spans=spans)
        fed = prompt + max(answer - 1, 0)
        found = Counter([*spans.decided(tokens)][:fed])
        assert received(steering, prompt, answer, tokens) == [found[place] for place in range(3)]
        assert [*spans.decided(tokens, first=prompt)] == [*spans.decided(tokens)][prompt:]
        assert steered_tokens(steering, prompt, answer, tokens) == {P: prompt, D: found[2]}


def test_long_answers_are_counted_all_at_once() -> None:
    """A server counts where it serves everyone: no work in Python for each token."""
    tokens = [7, 8, 9, 3] * 8192
    spans = Spans(4, (0, 4), (0, 1), ((0,), (1, 2, 1, 2)), (P, D, D), (THINKING, IdSet(((3, 4),))))
    steering = ResolvedSteering((ONE, EMPTY, TWO), spans=spans)
    assert calls(lambda: received(steering, 4, len(tokens) - 3, tokens)) < 1000


def test_counting_asks_for_the_tokens_that_decide() -> None:
    steering = ResolvedSteering((ONE, EMPTY, TWO, EMPTY), spans=of_answer((1, 2), THINKING))
    assert received(steering, 0, 0) == [0, 0, 0, 0]
    assert received(steering, 4, 1) == [4, 0, 0, 0]
    with pytest.raises(ValueError, match="not given"):
        received(steering, 4, 2)
    steering = ResolvedSteering((ONE, TWO, EMPTY, EMPTY), spans=of_answer((1,), THINKING))
    assert received(steering, 3, 12) == [3, 11, 0, 0]
