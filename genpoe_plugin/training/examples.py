"""Training examples of the hypernetwork: question, answer, the passage that states it, and passages that do not."""

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
from genpoe_plugin.experts.injection import RowExperts, unit_rows
from genpoe_plugin.prompts import cut_passages
from genpoe_plugin.selection.gates import softmax, uniform


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """A question with an answer and passages.

    Attributes:
        question: the question.
        answer: the answer, as its passage states it.
        passage: string of the passage that states the answer.
        negatives: strings of the question's passages without an answer, best first.
        scores: rerank scores of ``passage`` and then of ``negatives``; None if one of them has no score.
    """

    question: str
    answer: str
    passage: str
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None


PROMPT_WORDS, TARGET_WORDS = 6, 24
"""Number of a passage's words in the prompt, and in the target, for training without a question."""


@dataclass(frozen=True, slots=True)
class PassageExample:
    """A passage to train on without a question: given its expert and some of its words, the LLM continues the text.

    It has the interface of a `TrainingExample`: ``question`` is its first words, ``answer`` the words that follow.

    Attributes:
        passage: the passage's string, with title; the expert is made from it.
        text: the part of the string without title, from which words are drawn.
        negatives: always empty.
    """

    passage: str
    text: str
    negatives: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The first words of the text."""
        return " ".join(self.text.split()[:PROMPT_WORDS])

    @property
    def answer(self) -> str:
        """The words that follow ``question``."""
        return " ".join(self.text.split()[PROMPT_WORDS : PROMPT_WORDS + TARGET_WORDS])

    def draw(self, rng: random.Random) -> DrawnExample:
        """Draw prompt and target from a random place in the text."""
        words = self.text.split()
        begin = rng.randint(0, len(words) - PROMPT_WORDS - TARGET_WORDS)
        middle, end = begin + PROMPT_WORDS, begin + PROMPT_WORDS + TARGET_WORDS
        prompt, continuation = " ".join(words[begin:middle]), " ".join(words[middle:end])
        return DrawnExample(prompt, continuation, (self.passage,), (1.0,), continues=True)


@dataclass(frozen=True, slots=True)
class DrawnExample:
    """One use of an example, with its passages and gates.

    Attributes:
        question, answer: as in `TrainingExample`.
        passages: passage strings, best first.
        gates: one gate per passage; they add up to 1.
        wrong: whether no passage states the answer, so that the target is the LLM's distribution without experts.
        continues: whether there is no question: ``question`` is the whole prompt, and ``answer`` its continuation.
    """

    question: str
    answer: str
    passages: tuple[str, ...]
    gates: tuple[float, ...]
    wrong: bool = False
    continues: bool = False


def training_examples(questions: Iterable[Question], titles: bool = True) -> list[TrainingExample]:
    """One example per question with an answer in a passage, with its best such passage.

    Passages that the input marks as without answer are skipped. The target is the first accepted answer that the
    passage contains.

    Args:
        questions: questions with passages.
        titles: whether passage strings include titles; the paper trains without.
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
    """One example per passage that has enough words after it is cut for its expert."""
    examples = []
    for passage in passages:
        title = f"{passage.title}: " if titles and passage.title else ""
        (string,) = cut_passages([title + passage.text], tokenizer)
        text = string[len(title) :]
        if len(text.split()) >= PROMPT_WORDS + TARGET_WORDS:
            examples.append(PassageExample(string, text))
    return examples


def _example(question: Question, answer: str, positive: RetrievedPassage, titles: bool) -> TrainingExample:
    def string(retrieved: RetrievedPassage) -> str:
        return retrieved.passage.string if titles else retrieved.passage.text

    others = [
        other
        for other in question.passages
        if other.passage.string != positive.passage.string
        and not (has_answer(other.passage.text, question.answers) if other.has_answer is None else other.has_answer)
    ]
    scores = [item.rerank_score for item in (positive, *others) if item.rerank_score is not None]
    return TrainingExample(
        question.question,
        answer,
        string(positive),
        tuple(map(string, others)),
        tuple(scores) if len(scores) == 1 + len(others) else None,
    )


def draw_passages(examples: Sequence[TrainingExample], number: int, most: int, rng: random.Random) -> DrawnExample:
    """Draw example ``number`` with its passage and up to ``most - 1`` distractors.

    Each number of distractors is equally likely. They are the question's negatives and, if these are too few, passages
    of other examples. Gates are the softmax of the rerank scores, as at test time, or equal if a score is missing.
    """
    example = examples[number]
    count = rng.randint(1, most)
    chosen = sorted(rng.sample(range(len(example.negatives)), min(count - 1, len(example.negatives))))
    passages = [example.passage, *(example.negatives[place] for place in chosen)]
    scores = [example.scores[0], *(example.scores[1 + place] for place in chosen)] if example.scores else None
    # The number of draws is bounded, because the passages of a small data set may all be the same.
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
    """As `draw_passages`, but without the passage that states the answer, and with equal gates.

    If no passage without the answer is available, it returns `draw_passages`.
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
    """The experts of a batch, with gradients; the expert of each distinct passage is generated once.

    Args:
        generator: generates the experts.
        examples: the rows of the batch.
        start: for each row, the first position that its experts act on.
    """
    unique = list(dict.fromkeys(passage for example in examples for passage in example.passages))
    experts, unit_lists = generator.generate_units(unique)
    units_of = dict(zip(unique, unit_lists, strict=True))
    index, gates, _ = unit_rows([row.passages for row in examples], [row.gates for row in examples], units_of)
    device = generator.device
    return RowExperts(experts[index.to(device)], gates.to(device), torch.tensor(list(start), device=device))
