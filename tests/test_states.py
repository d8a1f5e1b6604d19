"""What is not listed as a transition raises."""

import itertools

import pytest

from dicomai.store.states import TRANSITIONS, check

STATES = {
    subject: {state for state in listed if state} | {s for after in listed.values() for s in after}
    for subject, listed in TRANSITIONS.items()
}
UNLISTED = [
    (subject, before, after)
    for subject, listed in TRANSITIONS.items()
    for before, after in itertools.product(
        [None, *sorted(STATES[subject])], sorted(STATES[subject])
    )
    if after not in listed.get(before, ())
]


@pytest.mark.parametrize(("subject", "before", "after"), UNLISTED)
def test_an_unlisted_transition_raises(subject: str, before: str | None, after: str) -> None:
    with pytest.raises(ValueError, match=f"a {subject} cannot go from {before} to {after}"):
        check(subject, before, after)


def test_a_listed_transition_passes() -> None:
    for subject, listed in TRANSITIONS.items():
        for before in listed:
            for after in listed[before]:
                check(subject, before, after)


def test_an_unknown_state_raises() -> None:
    with pytest.raises(ValueError, match="from lost to analyzing"):
        check("study", "lost", "analyzing")


@pytest.mark.parametrize("subject", TRANSITIONS)
def test_every_state_can_be_reached_and_says_what_may_follow(subject: str) -> None:
    listed = TRANSITIONS[subject]
    reached: set[str] = set()
    front = set(listed[None])
    while front - reached:
        reached |= front
        front = {after for state in front for after in listed[state]}
    assert reached == STATES[subject] == {state for state in listed if state}
