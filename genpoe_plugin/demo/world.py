"""An invented world in plain English: entities, passages about them, and questions with answers.

The side of an entity (train or test) is a function of its name alone. So no test entity of any seed was ever seen in
training: neither by the demo's LLM and encoder, nor by the reranker and the hypernetwork that the demo trains.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.demo import lexicon

Side = Literal["train", "test"]
MIN_WORDS, MAX_WORDS = 30, 90


def side_of(name: str) -> Side:
    """``test`` for about one name in six, whatever the world's seed."""
    return "test" if hashlib.sha256(name.encode()).digest()[0] < 43 else "train"


@dataclass(frozen=True)
class Fact:
    """One attribute of an entity: the form that its passage uses, and every accepted form."""

    attribute: str
    value: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Entity:
    """A person, place or organisation and what is true of it."""

    kind: str
    name: str
    short: str
    facts: tuple[Fact, ...]

    @property
    def side(self) -> Side:
        return side_of(self.name)


@dataclass(frozen=True)
class WorldQuestion:
    """A question about one fact of one entity; ``passage_id`` is the passage that states it."""

    question: str
    answers: tuple[str, ...]
    value: str
    entity: str
    passage_id: str


@dataclass(frozen=True)
class World:
    """All passages of a world (both sides, articles and reports) and its questions by side."""

    passages: tuple[Passage, ...]
    questions: dict[Side, tuple[WorldQuestion, ...]]


def _person_name(rng: random.Random) -> tuple[str, str]:
    surname = rng.choice(lexicon.SURNAME_STARTS) + rng.choice(lexicon.SURNAME_ENDS)
    return f"{rng.choice(lexicon.FIRST_NAMES)} {surname}", surname


def _place_name(rng: random.Random) -> tuple[str, str]:
    qualifier = rng.choice(lexicon.PLACE_QUALIFIERS) if rng.random() < 0.5 else ""
    name = qualifier + rng.choice(lexicon.PLACE_STARTS) + rng.choice(lexicon.PLACE_ENDS)
    return name, name


def _organisation_name(rng: random.Random) -> tuple[str, str]:
    stem = rng.choice(lexicon.SURNAME_STARTS) + rng.choice(lexicon.SURNAME_ENDS)
    name = f"{stem} {rng.choice(lexicon.ORGANISATION_TYPES)}"
    return f"the {name}", f"the {name}"


_NAMERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "person": _person_name,
    "place": _place_name,
    "organisation": _organisation_name,
}


def draw_entity(rng: random.Random, kind: str, name: tuple[str, str] | None = None) -> Entity:
    """An entity of ``kind`` with one value for each of its attributes, named ``name`` or at random."""
    full, short = name or _NAMERS[kind](rng)
    facts = []
    for attribute, spec in lexicon.KINDS[kind].items():
        forms = rng.choice(spec.values)
        facts.append(Fact(attribute, rng.choice(forms), forms))
    return Entity(kind, full, short, tuple(facts))


def namesake(rng: random.Random, entity: Entity) -> Entity:
    """Another entity whose name shares a word with that of ``entity``, so that a retriever may confuse them."""
    if entity.kind == "person":
        name = (f"{rng.choice(lexicon.FIRST_NAMES)} {entity.short}", entity.short)
    elif entity.kind == "place":
        stem = entity.name.split()[-1]
        full = rng.choice(lexicon.PLACE_QUALIFIERS) + stem
        name = (full, full)
    else:
        full = f"{entity.name.rsplit(' ', 1)[0]} {rng.choice(lexicon.ORGANISATION_TYPES)}"
        name = (full, full)
    return draw_entity(rng, entity.kind, name)


def _article(value: str) -> str:
    return "an" if value[0].lower() in "aeio" else "a"


def _sentence(template: str, **fields: str) -> str:
    text = template.format(**fields)
    return text[0].upper() + text[1:]


def title_of(entity: Entity) -> str:
    """The title of the article about ``entity``: its name without the article."""
    return entity.name.removeprefix("the ")


def _fill(rng: random.Random, sentences: list[str], filler: tuple[str, ...], target_words: int) -> str:
    """Insert sentences of ``filler`` between ``sentences`` until ``target_words`` is reached."""
    spare = rng.sample(filler, len(filler))
    words = sum(len(sentence.split()) for sentence in sentences)
    while spare and words < target_words and words + len(spare[-1].split()) <= MAX_WORDS:
        sentence = spare.pop()
        words += len(sentence.split())
        sentences.insert(rng.randint(1, len(sentences)), sentence)
    return " ".join(sentences)


def state(rng: random.Random, entity: Entity, fact: Fact, wordings: int | None = None) -> str:
    """A sentence that states ``fact`` of ``entity``, in one of its first ``wordings`` wordings (all by default)."""
    article = _article(fact.value)
    return _sentence(
        rng.choice(lexicon.KINDS[entity.kind][fact.attribute].statements[:wordings]),
        name=entity.name,
        short=entity.short,
        value=fact.value,
        a=article,
        a_cap=article.capitalize(),
    )


def write_article(rng: random.Random, entity: Entity, passage_id: str) -> Passage:
    """The passage that states every fact of ``entity``, in any order, wording and length."""
    sentences = [state(rng, entity, fact) for fact in rng.sample(entity.facts, len(entity.facts))]
    text = _fill(rng, sentences, lexicon.FILLER[entity.kind], rng.randint(MIN_WORDS, MAX_WORDS))
    return Passage(passage_id, title_of(entity), text)


def write_report(rng: random.Random, entity: Entity, passage_id: str) -> Passage:
    """A passage that names ``entity`` and states none of its facts."""
    title = rng.choice(lexicon.REPORT_TITLES).format(name=entity.name)
    sentences = [_sentence(rng.choice(lexicon.REPORTS[entity.kind]), name=entity.name)]
    return Passage(passage_id, title, _fill(rng, sentences, lexicon.REPORT_FILLER, rng.randint(MIN_WORDS, MAX_WORDS)))


def ask(rng: random.Random, entity: Entity, fact: Fact, passage_id: str, wordings: int | None = None) -> WorldQuestion:
    """A question for ``fact`` in one of its first ``wordings`` wordings (all by default)."""
    template = rng.choice(lexicon.KINDS[entity.kind][fact.attribute].questions[:wordings])
    return WorldQuestion(template.format(name=entity.name), fact.answers, fact.value, entity.name, passage_id)


def entities_of(rng: random.Random, side: Side, namesakes: float = 0.3) -> Iterator[Entity]:
    """Endless distinct entities of one side; a ``namesakes`` share of them is confusable with an earlier one."""
    seen: set[str] = set()
    recent: list[Entity] = []
    kinds = tuple(lexicon.KINDS)
    while True:
        if recent and rng.random() < namesakes:
            entity = namesake(rng, rng.choice(recent))
        else:
            entity = draw_entity(rng, rng.choice(kinds))
        if entity.name in seen or entity.side != side:
            continue
        seen.add(entity.name)
        recent = [*recent[-499:], entity]
        yield entity


def make_world(seed: int, train_entities: int, test_entities: int, reports: float = 0.3) -> World:
    """Draw a world.

    Args:
        seed: random seed of the world.
        train_entities, test_entities: entities of each side, one article each.
        reports: share of entities that also have a report, which names them and answers nothing.
    """
    rng = random.Random(f"genpoe-world-{seed}")
    passages: list[Passage] = []
    questions: dict[Side, tuple[WorldQuestion, ...]] = {}
    sides: tuple[tuple[Side, int], ...] = (("train", train_entities), ("test", test_entities))
    for side, count in sides:
        asked: list[WorldQuestion] = []
        stream = entities_of(rng, side)
        for _ in range(count):
            entity = next(stream)
            passage = write_article(rng, entity, str(len(passages)))
            passages.append(passage)
            asked.extend(ask(rng, entity, fact, passage.id) for fact in entity.facts)
            if rng.random() < reports:
                passages.append(write_report(rng, entity, str(len(passages))))
        questions[side] = tuple(asked)
    rng.shuffle(passages)
    return World(tuple(passages), questions)
