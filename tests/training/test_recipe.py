import pytest
from pydantic import ValidationError

from backbone import TowerDims
from training.recipe import InvalidRecipe, Recipe

DIMS = TowerDims(192, 6, 128, 4)


def test_a_recipe_survives_its_json() -> None:
    recipe = Recipe.of({"rank": 4, "learning_rate": 1, "scope": "text", "steps": 7})
    assert Recipe.of(recipe.to_json()) == recipe
    assert recipe.learning_rate == 1.0


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rnak": 4}, "rnak"),
        ({"rank": "4"}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": 4.5}, "rank"),
        ({"rank": 0}, "rank"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"batch_size": 1}, "batch_size"),
        ({"steps": 0}, "steps"),
        ({"scope": "audio"}, "scope"),
        ({"scope": 3}, "scope"),
        ({"validation": 1.0}, "validation"),
        ({"learning_rate": 10**400}, "learning_rate"),
        ({"preset": ["paper"]}, "preset"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], name: str) -> None:
    with pytest.raises(InvalidRecipe, match=name):
        Recipe.of(fields)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().rank = 4  # type: ignore[misc]


def test_one_tower_shares_nothing() -> None:
    assert Recipe(scope="text").shape(DIMS).shared == 0
    assert Recipe(scope="both").shape(DIMS).shared == 16


def test_more_shared_rows_than_the_narrower_tower_has_are_refused() -> None:
    with pytest.raises(InvalidRecipe, match="shared"):
        Recipe(shared=129).shape(DIMS)


def test_a_small_collection_still_gets_enough_steps() -> None:
    assert Recipe().total_steps(20) == 300
    assert Recipe(epochs=5, batch_size=32).total_steps(32_000) == 5000
    assert Recipe(steps=3).total_steps(20) == 3


def test_epochs_that_are_asked_for_are_what_is_trained() -> None:
    """The least number of steps is a default for those who ask for nothing."""
    assert Recipe.of({"epochs": 2}).total_steps(320) == 20
    assert Recipe.of({"epochs": 2, "minimum_steps": 50}).total_steps(320) == 50
    assert Recipe.of({}).total_steps(20) == 300
    assert Recipe.of(Recipe.of({"epochs": 2}).to_json()) == Recipe.of({"epochs": 2})


def test_words_that_are_asked_for_need_the_text_tower() -> None:
    with pytest.raises(InvalidRecipe, match="vocabulary is 5, but an adapter of scope vision"):
        Recipe(scope="vision", vocabulary=5).shape(DIMS)
    assert not Recipe(scope="vision").shape(DIMS).vocabulary
