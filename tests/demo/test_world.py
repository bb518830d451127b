from __future__ import annotations

from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.demo.world import MAX_WORDS, MIN_WORDS, make_world, side_of


def test_a_seed_makes_one_world_and_another_seed_another():
    assert make_world(3, 40, 10) == make_world(3, 40, 10)
    assert make_world(3, 40, 10) != make_world(4, 40, 10)


def test_no_entity_of_one_side_is_ever_on_the_other():
    """Whatever the seeds: the demo's LLM was trained on other worlds than the one that it is tested on."""
    sides = {"train": set(), "test": set()}
    for seed in (0, 1):
        world = make_world(seed, 60, 30)
        for side, questions in world.questions.items():
            sides[side] |= {question.entity for question in questions}
    assert not sides["train"] & sides["test"]
    assert all(side_of(name) == side for side, names in sides.items() for name in names)


def test_each_passage_states_its_answers_within_its_length():
    world = make_world(0, 200, 50)
    passages = {passage.id: passage for passage in world.passages}
    assert len(passages) == len(world.passages)
    for questions in world.questions.values():
        for question in questions:
            assert has_answer(passages[question.passage_id].text, [question.value])
            assert question.value in question.answers
            assert all(1 <= len(answer.split()) <= 3 for answer in question.answers)
    lengths = [len(passage.text.split()) for passage in world.passages]
    assert min(lengths) >= MIN_WORDS - 10
    assert max(lengths) <= MAX_WORDS


def test_reports_answer_nothing_and_some_answers_have_several_forms():
    world = make_world(0, 200, 0)
    articles = {question.passage_id for question in world.questions["train"]}
    assert 0.2 < 1 - len(articles) / len(world.passages) < 0.3
    assert any(len(question.answers) > 1 for question in world.questions["train"])
