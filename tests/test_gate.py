"""The gate: what is proven better passes; noise, chance and harm to a subgroup do not."""

import numpy as np
import pytest
from numpy.typing import NDArray

from dicomai.errors import Misuse
from dicomai.train.evaluate import Array
from dicomai.train.gate import Decision, Rule, decide

RULE = Rule(min_gain=0.0, margin=0.05, resamples=500, seed=1)
N = 400


def truth(seed: int = 0, labels: int = 1) -> NDArray[np.float32]:
    """Half of them positive, in random order."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.arange(N) % 2) for _ in range(labels)], 1).astype("f4")


def scores(targets: NDArray[np.float32], skill: float, seed: int) -> Array:
    """Probabilities that tell more the larger the skill is."""
    noise = np.random.default_rng(seed).normal(size=targets.shape)
    return 1 / (1 + np.exp(-(skill * (np.nan_to_num(targets, nan=0.5) * 2 - 1) + noise)))


def judge(
    targets: NDArray[np.float32],
    before: Array,
    after: Array,
    groups: dict[str, NDArray[np.bool_]] | None = None,
) -> Decision:
    """With two images a patient."""
    patients = np.array([f"p{n // 2}" for n in range(len(targets))])
    labels = [f"label{n}" for n in range(targets.shape[1])]
    return decide(labels, targets, before, after, patients, groups or {}, RULE)


def test_a_better_model_is_promoted_and_says_by_how_much() -> None:
    targets = truth()
    found = judge(targets, scores(targets, 0.5, 1), scores(targets, 1.5, 2))
    assert found.promoted
    assert found.gain.low > 0.05
    assert found.reasons[0].startswith("better: AUC +0.")


@pytest.mark.parametrize("seed", range(5))
def test_the_same_skill_with_other_noise_is_refused(seed: int) -> None:
    targets = truth(seed)
    found = judge(targets, scores(targets, 1, seed + 10), scores(targets, 1, seed + 20))
    assert not found.promoted
    assert found.reasons[0].startswith("not better by more than 0: AUC ")


def test_the_same_model_is_refused() -> None:
    targets = truth()
    same = scores(targets, 1, 1)
    found = judge(targets, same, same)
    assert not found.promoted
    assert found.gain.value == found.gain.low == found.gain.high == 0


def test_a_model_that_learnt_from_shuffled_labels_is_refused() -> None:
    targets = truth()
    assert not judge(targets, scores(targets, 1, 1), scores(truth(99), 2, 2)).promoted


def test_a_better_model_that_harms_a_subgroup_is_refused_and_names_it() -> None:
    targets = truth()
    women = np.arange(N) % 10 < 2
    before, after = scores(targets, 0.6, 1), scores(targets, 3, 2)
    after[women] = scores(targets, 0.2, 3)[women]
    found = judge(targets, before, after, {"sex F": women, "sex M": ~women})
    assert found.gain.low > 0
    assert not found.promoted
    assert len(found.reasons) == 1
    assert found.reasons[0].startswith("worse by more than 0.05: label0, sex F (80): AUC 0.")


def test_to_tell_the_hospital_is_no_gain() -> None:
    here = np.arange(N) < N // 2
    sick = np.random.default_rng(3).random(N) < np.where(here, 0.8, 0.2)
    targets = sick[:, None].astype("f4")
    before, after = scores(targets, 0.3, 1), scores(here[:, None].astype("f4"), 3, 2)
    groups = {"source here": here, "source there": ~here}
    assert judge(targets, before, after).promoted  # as if they were of one hospital
    found = judge(targets, before, after, groups)
    assert found.gain.high < 0.05
    assert not found.promoted


def test_a_label_that_only_the_candidate_knows_must_be_better_than_chance() -> None:
    targets = truth(labels=2)
    before, after = scores(targets, 0.5, 1), scores(targets, 3, 2)
    before[:, 1] = np.nan
    assert judge(targets, before, after).promoted
    after[:, 1] = scores(truth(9), 3, 3)[:, 0]
    (reason,) = judge(targets, before, after).reasons
    assert reason.startswith("not better than chance: label1, AUC 0.")
    before[:] = np.nan
    with pytest.raises(Misuse, match="knows none of the recipe's labels"):
        judge(targets, before, after)


def test_what_speaks_against_it_weighs_more_than_any_gain() -> None:
    targets = truth()
    patients = np.array([f"p{n}" for n in range(N)])
    before, after = scores(targets, 0.5, 1), scores(targets, 3, 2)
    found = decide(["a"], targets, before, after, patients, {}, RULE, ["it forgets a label"])
    assert not found.promoted
    assert found.reasons == ("it forgets a label",)


def test_a_subgroup_of_a_few_patients_decides_nothing() -> None:
    targets = truth()
    few = np.arange(N) < 8
    before, after = scores(targets, 0.5, 1), scores(targets, 3, 2)
    after[few] = 1 - after[few]
    found = judge(targets, before, after, {"view LL": few})
    assert found.promoted
    assert {item.group for item in found.comparisons} == {"all test images"}


def test_one_label_is_not_paid_for_with_another() -> None:
    targets = truth(labels=3)
    before, after = scores(targets, 0.5, 1), scores(targets, 3, 2)
    after[:, 1] = scores(targets, 0.1, 3)[:, 1]
    found = judge(targets, before, after)
    assert found.gain.low > 0
    assert [reason.split(",")[0] for reason in found.reasons] == ["worse by more than 0.05: label1"]


def test_what_is_not_known_counts_for_nobody() -> None:
    targets = truth()
    before, after = scores(targets, 0.5, 1), scores(targets, 1.5, 2)
    whole = judge(targets[:200], before[:200], after[:200])
    targets[200:] = np.nan
    after[200:] = 1 - after[200:]
    assert judge(targets, before, after).gain.value == whole.gain.value
