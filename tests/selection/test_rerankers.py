"""Rerankers of every kind: recognised by their checkpoints, and scored as their authors do, one pair at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3ForSequenceClassification,
)

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_header, read_questions, write_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.selection.cross_encoder import CrossEncoderReranker
from genpoe_plugin.selection.late_interaction import LateInteractionReranker
from genpoe_plugin.selection.recognition import recognise
from genpoe_plugin.selection.reranker_format import BGE, QWEN3, read_format
from genpoe_plugin.selection.rerankers import load_reranker
from genpoe_plugin.selection.reranking import Reranker
from tests.selection.conftest import QWEN_INSTRUCTION, QWEN_SYSTEM
from tests.selection.test_reranking import PAIRS, by_hand
from train_cli.main import main


def qwen_by_hand(
    directory: Path, pairs: list[tuple[str, str]], max_length: int = 8192, instruction: str = QWEN_INSTRUCTION
) -> list[float]:
    """P(yes), as the model card of Qwen3-Reranker computes it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prefix = ids(f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n<|im_start|>user\n")
    suffix = ids("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    room = max_length - len(prefix) - len(suffix)
    probabilities = []
    for query, passage in pairs:
        middle = ids(f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}")[:room]
        with torch.no_grad():
            logits = model(torch.tensor([prefix + middle + suffix])).logits[0, -1]
        answers = logits[[tokenizer.convert_tokens_to_ids("no"), tokenizer.convert_tokens_to_ids("yes")]]
        probabilities.append(answers.softmax(0)[1].item())
    return probabilities


def sigmoid(scores: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-scores.astype(np.float64)))


def copied(directory: Path, target: Path) -> Path:
    """A copy under a name that says nothing."""
    return Path(shutil.copytree(directory, target / "model"))


def test_qwen3_reranker_scores_are_those_of_the_model_card(qwen_dir: Path) -> None:
    reranker = load_reranker(str(qwen_dir))
    assert isinstance(reranker, Reranker) and reranker.format == QWEN3
    scores = reranker.score(PAIRS)
    np.testing.assert_allclose(sigmoid(scores), qwen_by_hand(qwen_dir, PAIRS), atol=1e-5)
    assert scores.std() > 0.01


def test_qwen3_question_mark_and_line_break_are_one_token(qwen_tokenizer: PreTrainedTokenizerFast) -> None:
    """So the pair cannot be tokenised in pieces."""
    assert len(qwen_tokenizer("?\n")["input_ids"]) == 1


def test_of_a_qwen3_pair_only_the_document_is_cut(qwen_dir: Path) -> None:
    reranker = Reranker.load(qwen_dir, max_length=230)
    rows = [row.ids for row in reranker.encode(PAIRS)]
    assert max(len(row) for row in rows) == 230 and len({len(row) for row in rows}) > 1
    suffix = reranker.tokenizer("</think>\n\n")["input_ids"]
    assert all(row[-len(suffix) :] == suffix for row in rows)
    np.testing.assert_allclose(sigmoid(reranker.score(PAIRS)), qwen_by_hand(qwen_dir, PAIRS, 230), atol=1e-5)


def test_qwen3_instruction(qwen_dir: Path) -> None:
    scores = Reranker.load(qwen_dir, prompt="Find fossils").score(PAIRS)
    expected = qwen_by_hand(qwen_dir, PAIRS, instruction="Find fossils")
    np.testing.assert_allclose(sigmoid(scores), expected, atol=1e-5)


def test_a_qwen3_reranker_with_a_classification_head(qwen_dir: Path, tmp_path: Path) -> None:
    """The conversion of the hub: the head is the difference of two rows of the output embeddings."""
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(qwen_dir), AutoTokenizer.from_pretrained(qwen_dir)
    classifier = Qwen3ForSequenceClassification(
        type(llm.config)(**{**llm.config.to_dict(), "num_labels": 1, "pad_token_id": None, "architectures": None})
    )
    classifier.model.load_state_dict(llm.model.state_dict())
    yes, no = (llm.lm_head.weight[tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no"))
    classifier.score.weight.data = (yes - no).detach()[None]
    directory = tmp_path / "Qwen3-Reranker-0.6B-seq-cls"
    classifier.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    reranker = load_reranker(str(directory))
    np.testing.assert_allclose(sigmoid(reranker.score(PAIRS)), qwen_by_hand(qwen_dir, PAIRS), atol=1e-5)
    plain = copied(directory, tmp_path)
    np.testing.assert_allclose(load_reranker(str(plain), format="qwen3").score(PAIRS), reranker.score(PAIRS), atol=1e-5)
    with pytest.raises(InputError, match="unknown format"):  # a decoder's tokenizer puts nothing between two texts
        load_reranker(str(plain))
    # Versions of sentence-transformers before 5.4 left only this note, and trained such models on bare pairs.
    config = json.loads((plain / "config.json").read_text())
    config["sentence_transformers"] = {"version": "4.1.0"}
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"cannot be loaded as a cross-encoder: .*no padding token"):
        load_reranker(str(plain))
    (plain / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    expected = []
    for query, passage in PAIRS:
        with torch.no_grad():
            inputs = tokenizer(query, passage, return_tensors="pt")
            expected.append(classifier.eval()(inputs["input_ids"]).logits[0, 0].item())
    np.testing.assert_allclose(load_reranker(str(plain)).score(PAIRS), expected, atol=1e-5)


def test_a_template_file(
    make_llm: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, llm_dir: Path, tmp_path: Path
) -> None:
    template = tmp_path / "format.json"
    pieces = ["<s>system\n", "Text {passage}", "\nSearch {query}", " Relevant?"]
    content = {"pieces": pieces, "yes": "Yes", "no": "No", "max_length": 40, "bos": False}
    template.write_text(json.dumps(content))
    llm = make_llm("llama")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    expected = []
    fixed = sum(len(ids(text)) for text in (pieces[0], "Text ", "\nSearch ", pieces[3]))
    for query, passage in PAIRS:
        head, tail = ids(pieces[0]), ids(f"\nSearch {query}")[: (40 - fixed) * 3 // 4] + ids(pieces[3])
        row = head + ids(f"Text {passage}")[: 40 - len(head) - len(tail)] + tail
        with torch.no_grad():
            logits = llm(torch.tensor([row])).logits[0, -1]
        expected.append((logits[ids("Yes")[0]] - logits[ids("No")[0]]).item())
    reranker = load_reranker(str(llm_dir), format=str(template))
    np.testing.assert_allclose(reranker.score(PAIRS), expected, atol=1e-5)
    # What is saved scores as before, without the file.
    assert isinstance(reranker, Reranker)
    reranker.save(tmp_path / "saved")
    again = load_reranker(str(tmp_path / "saved"))
    np.testing.assert_array_equal(again.score(PAIRS), reranker.score(PAIRS))
    template.write_text(json.dumps(content | {"no": "Never"}))
    others = [load_reranker(str(llm_dir), format=form).fingerprint for form in (str(template), "bge")]
    assert again.fingerprint == reranker.fingerprint and len({reranker.fingerprint, *others}) == 3


def test_the_documented_template_is_the_format_of_qwen3_with_another_instruction(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "evaluating.md").read_text(encoding="utf-8")
    (content,) = re.findall(r"```json\n(.*?)```", docs, re.DOTALL)
    (tmp_path / "format.json").write_text(content)
    documented = read_format(str(tmp_path / "format.json"))
    filled = tuple(piece.replace("{prompt}", "Find passages that support the claim") for piece in QWEN3.pieces)
    assert documented == replace(QWEN3, pieces=filled, prompt="", name=None)


def test_braces_in_texts_are_texts(qwen_dir: Path) -> None:
    pairs = [("{passage} {prompt}?", "{query} {0}")]
    np.testing.assert_allclose(sigmoid(Reranker.load(qwen_dir).score(pairs)), qwen_by_hand(qwen_dir, pairs), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_cross_encoders_give_the_logit_of_the_pair(make_cross_encoder: Callable[..., Path], family: str) -> None:
    directory = make_cross_encoder(family)
    reranker = load_reranker(str(directory))
    assert isinstance(reranker, CrossEncoderReranker)
    reranker.batch_size = 2
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    expected = []
    for query, passage in PAIRS:
        inputs = tokenizer(query, passage, truncation="longest_first", max_length=128, return_tensors="pt")
        with torch.no_grad():
            expected.append(model(inputs["input_ids"]).logits[0, 0].item())
    scores = reranker.score(PAIRS)
    assert scores.dtype == np.float32 and scores.std() > 0.01
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert reranker.score([]).shape == (0,)


def test_cross_encoder_batches_are_of_like_length(make_cross_encoder: Callable[..., Path]) -> None:
    reranker = load_reranker(str(make_cross_encoder("bert")))
    assert isinstance(reranker, CrossEncoderReranker)
    reranker.batch_size = 4
    widths: list[int] = []
    embeddings = reranker.model.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _m, inputs, _o: widths.append(inputs[0].shape[1]))
    reranker.score([("where?", "radium " * (1 if index % 2 else 30)) for index in range(8)])
    assert len(widths) == 2 and widths[1] < widths[0] - 20


def test_fingerprint_of_a_cross_encoder_is_of_content(make_cross_encoder: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_cross_encoder("bert")
    fingerprint = load_reranker(str(directory)).fingerprint
    copy = copied(directory, tmp_path)
    assert load_reranker(str(copy)).fingerprint == fingerprint
    changed = load_reranker(str(copy))
    assert isinstance(changed, CrossEncoderReranker)
    with torch.no_grad():
        next(changed.model.parameters()).view(-1)[0] += 1e-3
    assert changed.fingerprint != fingerprint


TEMPLATE = (
    "A: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "B: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }} Well?"
)
CHAT = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"


@pytest.fixture
def saved_causal(llm_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[[str], Path]:
    """``saved_causal(template)``: a causal LM that sentence-transformers saved as a reranker, with its template."""

    def make(template: str) -> Path:
        transformer = Transformer(
            str(llm_dir), transformer_task="text-generation", processor_kwargs={"chat_template": template}
        )
        yes = tokenizer("Yes", add_special_tokens=False)["input_ids"][0]
        CrossEncoder(modules=[transformer, LogitScore(yes)], device="cpu").save_pretrained(str(tmp_path / "causal"))
        return tmp_path / "causal"

    return make


def test_a_causal_llm_that_sentence_transformers_saved(
    saved_causal: Callable[[str], Path], make_llm: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    reranker = load_reranker(str(saved_causal(TEMPLATE)))
    llm, expected = make_llm("llama"), []
    yes = tokenizer("Yes", add_special_tokens=False)["input_ids"][0]
    for query, passage in PAIRS:
        row = tokenizer(f"A: {query}\nB: {passage} Well?", add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(llm(row).logits[0, -1, yes].item())
    np.testing.assert_allclose(reranker.score(PAIRS), expected, atol=1e-5)


# Recognition


def test_bge_is_recognised_by_its_name_its_card_or_what_we_saved(
    llm_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    expected = by_hand(AutoModelForCausalLM.from_pretrained(llm_dir), tokenizer, PAIRS, BGE.prompt)
    named = Path(shutil.copytree(llm_dir, tmp_path / "bge-reranker-v2-gemma"))
    cached = Path(shutil.copytree(llm_dir, tmp_path / "models--BAAI--bge-reranker-v2-gemma/snapshots/0123"))
    described = copied(llm_dir, tmp_path)
    (described / "README.md").write_text("---\nbase_model:\n- BAAI/bge-reranker-v2-gemma\n---\nMine.\n")
    configured = copied(llm_dir, tmp_path / "configured")
    config = json.loads((configured / "config.json").read_text())
    (configured / "config.json").write_text(json.dumps(config | {"_name_or_path": "BAAI/bge-reranker-v2-gemma"}))
    ours = tmp_path / "ours"
    Reranker.load(llm_dir, format="bge").save(ours)
    assert json.loads((ours / "reranker.json").read_text())["format"] == "bge"
    before = copied(ours, tmp_path / "before")  # as version 0.1 wrote it
    (before / "reranker.json").write_text(json.dumps({"prompt": BGE.prompt, "max_length": 512}))
    for directory in (named, cached, described, configured, ours, before):
        np.testing.assert_allclose(load_reranker(str(directory)).score(PAIRS), expected, atol=1e-5)


def test_an_adapter_is_recognised_by_its_base_model(llm_dir: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llm_dir, tmp_path / "bge-reranker-v2-gemma")
    llm = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(llm, peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(llm_dir).save_pretrained(tmp_path / "adapter")
    assert recognise(str(tmp_path / "adapter")).format == BGE


def test_what_a_checkpoint_says_comes_before_its_name(
    qwen_dir: Path, make_cross_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    trained = Path(shutil.copytree(qwen_dir, tmp_path / "my-qwen3-reranker-0.6B"))
    assert recognise(str(trained)).format == QWEN3
    (trained / "reranker.json").write_text(json.dumps({"format": "bge", "prompt": "Well?", "max_length": 99}))
    found = recognise(str(trained))
    assert (found.format, found.settings) == (BGE, {"prompt": "Well?", "max_length": 99})
    # Prompt and length belong to the format that they were saved with.
    assert recognise(str(trained), "qwen3").settings == {}
    saved = tmp_path / "Qwen3-Reranker-of-mine"
    CrossEncoder(str(make_cross_encoder("bert")), device="cpu").save_pretrained(str(saved))
    assert (saved / "modules.json").is_file() and recognise(str(saved)).format is None


def sentence_encoder(target: Path, bert: Path) -> Path:
    SentenceTransformer(str(bert), device="cpu").save(str(target))
    return target


BAD_TEMPLATES = [
    ("{", "must be a JSON file"),
    ("[]", "has the key pieces"),
    ('{"yes": "Yes"}', "has the key pieces"),
    ('{"pieces": ["{query}{passage}"]}', "without yes, the score is the likelihood of the last piece"),
    ('{"pieces": ["{query}", "{passage}"]}', "without yes, the score is the likelihood of the last piece"),
    ('{"pieces": ["{passage}", "{query}"], "no": "No"}', "without yes, the score is the likelihood of the last piece"),
    ('{"pieces": ["{query}{passage}"], "yes": "Yes", "prefix": "A"}', "has the key pieces"),
    ('{"pieces": "{query}{passage}", "yes": "Yes"}', "a wrong value of pieces"),
    ('{"pieces": [], "yes": "Yes"}', "a wrong value of pieces"),
    ('{"pieces": ["{query}{passage}", 3], "yes": "Yes"}', "a wrong value of pieces"),
    ('{"pieces": ["{query}{passage}"], "yes": ""}', "a wrong value of yes"),
    ('{"pieces": ["{query}{passage}"], "yes": "Yes", "max_length": "9"}', "a wrong value of max_length"),
    ('{"pieces": ["{passage}"], "yes": "Yes"}', "pieces must contain {query}"),
    ('{"pieces": ["{query}{passage}", "{passage}"], "yes": "Yes"}', "{passage} once"),
    ('{"pieces": ["{passage} for {query}"], "yes": "Yes"}', "at the end of a piece"),
    ('{"pieces": ["{query}{passage}"], "yes": "Yes", "no": "Yes, but"}', "begin with the same token"),
    ('{"pieces": ["{query}{passage}", "a b c"], "yes": "Yes", "max_length": 3}', "leaves no room"),
]


@pytest.mark.parametrize(("content", "message"), BAD_TEMPLATES)
def test_a_bad_template_is_one_line(llm_dir: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "format.json").write_text(content)
    refused(tmp_path, message, llm_dir, "--reranker-format", tmp_path / "format.json")


def test_what_is_no_reranker_is_one_line(
    llm_dir: Path,
    make_cross_encoder: Callable[..., Path],
    saved_causal: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    bert = make_cross_encoder("bert")
    refused(tmp_path, "a reranker of unknown format (LlamaForCausalLM); give the one", llm_dir)
    refused(tmp_path, "bge, qwen3, likelihood or a template file (JSON); likelihood is for any LLM", llm_dir)
    refused(tmp_path, "reranker format bgee: no such file; give bge, qwen3", llm_dir, "--reranker-format", "bgee")
    refused(tmp_path, "3 scores of each pair instead of one", make_cross_encoder("bert", num_labels=3))
    refused(tmp_path, "not a causal language model but an encoder", bert, "--reranker-format", "qwen3")
    refused(tmp_path, "a SentenceTransformer of sentence-transformers", sentence_encoder(tmp_path / "st", bert))
    refused(tmp_path, "cannot be loaded as a cross-encoder: The chat template", saved_causal(CHAT))
    refused(tmp_path, "no such directory, and no such model on the hub", "no-such/reranker")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "not a model (no config.json)", tmp_path / "empty")
    weights = copied(bert, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(tmp_path, "cannot be loaded as a cross-encoder", weights.parent)


def test_a_cross_encoder_is_not_loaded_as_a_decoder(make_cross_encoder: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"not a decoder LLM; load it with .*load_reranker"):
        Reranker.load(make_cross_encoder("bert"))


# The command


def run(directory: Path, reranker: object, *options: object) -> object:
    passages = tuple(
        RetrievedPassage(Passage(str(row), "", text), 9.0 - row, row + 1) for row, (_, text) in enumerate(PAIRS)
    )
    write_questions(directory / "results.jsonl", [Question("where?", ("radium",), passages)])
    arguments = [directory / "results.jsonl", "--reranker", reranker, "--out", directory / "out.jsonl", *options]
    return CliRunner().invoke(main, ["rerank", *map(str, arguments)])


def refused(directory: Path, message: str, reranker: object, *options: object) -> None:
    result = run(directory, reranker, *options)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1], result.stderr
    assert not (directory / "out.jsonl").exists()


def test_the_command_takes_every_kind(
    llm_dir: Path, qwen_dir: Path, make_cross_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    pairs = [("where?", passage) for _, passage in PAIRS]
    cases = [(llm_dir, "bge"), (copied(qwen_dir, tmp_path), "qwen3"), (make_cross_encoder("modernbert"), None)]
    for reranker, form in cases:
        options = ["--reranker-format", form] if form else []
        result = run(tmp_path, reranker, *options)
        assert result.exit_code == 0, result.output
        (question,) = read_questions(tmp_path / "out.jsonl")
        expected = load_reranker(str(reranker), format=form).score(pairs)
        found = {item.passage.id: item.rerank_score for item in question.passages}
        np.testing.assert_allclose([found[str(row)] for row in range(len(pairs))], expected, atol=1e-5)
        assert read_header(tmp_path / "out.jsonl").get("reranker_format") == form
        (tmp_path / "out.jsonl").unlink()


@pytest.fixture
def late_interaction(make_cross_encoder: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny ColBERT: BERT's hidden states, projected and normalised."""
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6")
    model = sentence_transformers.MultiVectorEncoder(str(make_cross_encoder("bert")), device="cpu")
    model.prompts = {"query": "who ", "document": "the "}
    model.save_pretrained(str(tmp_path / "colbert"))
    return tmp_path / "colbert"


def test_late_interaction_scores_are_maxsim_by_hand(late_interaction: Path) -> None:
    reranker = load_reranker(str(late_interaction))
    assert isinstance(reranker, LateInteractionReranker)
    bert, tokenizer = AutoModel.from_pretrained(late_interaction), AutoTokenizer.from_pretrained(late_interaction)
    (projection,) = load_file(late_interaction / "1_Dense" / "model.safetensors").values()

    def vectors(text: str) -> torch.Tensor:
        with torch.no_grad():
            states = bert(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0]
            states = (states @ projection.T).double()
        return states / states.norm(dim=1, keepdim=True)

    expected = [(vectors(f"who {q}") @ vectors(f"the {p}").T).max(dim=1).values.sum().item() for q, p in PAIRS]
    scores = reranker.score(PAIRS)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert scores.dtype == np.float32 and scores.std() > 0.01
    np.testing.assert_allclose(np.concatenate([reranker.score([pair]) for pair in PAIRS]), scores, rtol=1e-4)
    assert reranker.score([]).shape == (0,)
    other = load_reranker(str(late_interaction))
    assert other.fingerprint == reranker.fingerprint
    other.model.prompts = {"query": "", "document": ""}
    del other.fingerprint
    assert other.fingerprint != reranker.fingerprint
