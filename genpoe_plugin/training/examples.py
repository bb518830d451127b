"""Examples for the hypernetwork: a question, an answer, the passage that states it, and passages that do not."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.injection import RowExperts
from genpoe_plugin.prompts import cut_passages
from genpoe_plugin.selection.gates import softmax, uniform


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """A question and the answer as its passage has it.

    Attributes:
        passage: the string of the passage that states the answer.
        negatives: strings of the question's passages without an answer, best first.
        scores: rerank scores of ``passage`` and then of ``negatives``, if all of them have one.
    """

    question: str
    answer: str
    passage: str
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None


GIVEN, CONTINUED = 6, 24
"""Words of a passage that stand in the prompt, and that follow, where it is learned from without a question."""


@dataclass(frozen=True, slots=True)
class PassageExample:
    """A passage to learn from without a question: with its expert, the LLM goes on with it from some words on.

    It has what a `TrainingExample` has: its first words as ``question``, and those that follow as ``answer``.

    Attributes:
        passage: as its expert is made of it, title and all.
        text: of it, from which words are drawn.
    """

    passage: str
    text: str
    negatives: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        return " ".join(self.text.split()[:GIVEN])

    @property
    def answer(self) -> str:
        return " ".join(self.text.split()[GIVEN : GIVEN + CONTINUED])

    def draw(self, rng: random.Random) -> DrawnExample:
        """With words from anywhere in it."""
        words = self.text.split()
        begin = rng.randint(0, len(words) - GIVEN - CONTINUED)
        given, end = begin + GIVEN, begin + GIVEN + CONTINUED
        prompt, continuation = " ".join(words[begin:given]), " ".join(words[given:end])
        return DrawnExample(prompt, continuation, (self.passage,), (1.0,), continues=True)


@dataclass(frozen=True, slots=True)
class DrawnExample:
    """An example with the passages of one use of it, best first, and their gates, which add up to 1.

    Attributes:
        wrong: whether no passage states the answer, so that the LLM should say what it would say without any.
        continues: whether there is no question: ``question`` is the prompt as it stands, and ``answer`` what follows.
    """

    question: str
    answer: str
    passages: tuple[str, ...]
    gates: tuple[float, ...]
    wrong: bool = False
    continues: bool = False


def training_examples(questions: Iterable[Question], titles: bool = True) -> list[TrainingExample]:
    """An example for every question that has a passage with an answer in it: its best such passage.

    Passages that the file itself marks as having no answer are passed over. The target is the first accepted answer
    that the passage uses. Without ``titles`` passages are their texts alone, as the paper trains.
    """
    examples = []
    for question in questions:
        for retrieved in question.passages:
            if retrieved.has_answer is False:
                continue
            stated = [answer for answer in question.answers if has_answer(retrieved.passage.text, [answer])]
            if stated:
                examples.append(_example(question, stated[0], retrieved, titles))
                break
    return examples


def passage_examples(
    passages: Iterable[Passage], tokenizer: PreTrainedTokenizerBase, titles: bool = True
) -> list[PassageExample]:
    """An example for every passage that is long enough, of as much of it as its expert is made of."""
    examples = []
    for passage in passages:
        title = f"{passage.title}: " if titles and passage.title else ""
        (string,) = cut_passages([title + passage.text], tokenizer)
        text = string[len(title) :]
        if len(text.split()) >= GIVEN + CONTINUED:
            examples.append(PassageExample(string, text))
    return examples


def _example(question: Question, answer: str, own: RetrievedPassage, titles: bool) -> TrainingExample:
    def string(retrieved: RetrievedPassage) -> str:
        return retrieved.passage.string if titles else retrieved.passage.text

    others = [
        other
        for other in question.passages
        if other.passage.string != own.passage.string
        and not (has_answer(other.passage.text, question.answers) if other.has_answer is None else other.has_answer)
    ]
    scores = [item.rerank_score for item in (own, *others) if item.rerank_score is not None]
    return TrainingExample(
        question.question,
        answer,
        string(own),
        tuple(map(string, others)),
        tuple(scores) if len(scores) == 1 + len(others) else None,
    )


def draw_passages(examples: Sequence[TrainingExample], number: int, most: int, rng: random.Random) -> DrawnExample:
    """Use example ``number`` with its passage and up to ``most - 1`` others, any number of them alike.

    The others are the question's own negatives; where it has too few, passages of other examples. Gates are the
    softmax of the rerank scores, as at test time, if all the passages have one, and otherwise equal.
    """
    example = examples[number]
    count = rng.randint(1, most)
    chosen = sorted(rng.sample(range(len(example.negatives)), min(count - 1, len(example.negatives))))
    passages = [example.passage, *(example.negatives[place] for place in chosen)]
    scores = [example.scores[0], *(example.scores[1 + place] for place in chosen)] if example.scores else None
    # Twice as many draws as examples are enough for any but the smallest sets, whose passages may be one and the same.
    for _ in range(2 * len(examples)):
        if len(passages) == count:
            break
        scores = None
        other = rng.choice(examples)
        if other.passage not in passages and not has_answer(other.passage, [example.answer]):
            passages.append(other.passage)
    gates = softmax(scores) if scores else uniform(len(passages))
    order = list(range(len(passages)))
    rng.shuffle(order)
    order.sort(key=lambda place: -gates[place])
    return DrawnExample(
        example.question,
        example.answer,
        tuple(passages[place] for place in order),
        tuple(gates[place] for place in order),
    )


def draw_wrong_passages(
    examples: Sequence[TrainingExample], number: int, most: int, rng: random.Random
) -> DrawnExample:
    """As `draw_passages`, without the passage that states the answer, and with equal gates.

    Where no other passage is without the answer, it is `draw_passages`.
    """
    example = examples[number]
    count = rng.randint(1, most)
    passages = rng.sample(example.negatives, min(count, len(example.negatives)))
    for _ in range(2 * len(examples)):
        if len(passages) == count:
            break
        other = rng.choice(examples).passage
        if other not in (example.passage, *passages) and not has_answer(other, [example.answer]):
            passages.append(other)
    if not passages:
        return draw_passages(examples, number, most, rng)
    return DrawnExample(example.question, example.answer, tuple(passages), uniform(len(passages)), True)


def row_experts(generator: ExpertGenerator, examples: Sequence[DrawnExample], start: Sequence[int]) -> RowExperts:
    """The experts of a batch, with gradients; each distinct passage is made an expert once."""
    unique = list(dict.fromkeys(passage for example in examples for passage in example.passages))
    experts, places = generator.generate_units(unique)
    place = dict(zip(unique, places, strict=True))
    index = [[unit for passage in example.passages for unit in place[passage]] for example in examples]
    gates = [
        [gate for passage, gate in zip(example.passages, example.gates, strict=True) for _ in place[passage]]
        for example in examples
    ]
    most = max(map(len, index))
    # A row with fewer units points at any one with a gate of 0, which takes it out.
    padded = torch.tensor([own + [0] * (most - len(own)) for own in index], device=generator.device)
    weighted = torch.tensor([own + [0.0] * (most - len(own)) for own in gates], device=generator.device)
    return RowExperts(experts[padded], weighted, torch.tensor(list(start), device=generator.device))
