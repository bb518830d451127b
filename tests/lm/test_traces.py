from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256

import pytest
from lm_eval.api.model import CachingLM

from genpoe_plugin.indexing.bm25_building import build_bm25
from genpoe_plugin.prompts import closed_book_prompt, knowledge_block
from genpoe_plugin.retrieval.loading import load_retriever


def test_a_line_for_every_sample(make_lm, docs, generation, choices, expected_row, tmp_path):
    path = tmp_path / "trace.jsonl"
    lm = make_lm(trace=str(path), num_passages=2)
    lm.generate_until(generation(docs))
    lm.loglikelihood(choices(docs))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["task"], line["doc_id"]) for line in lines] == [
        (task, number) for task in ("qa", "mc") for number in range(len(docs))
    ]
    for doc, line in zip(docs * 2, lines, strict=True):
        assert line["question"] == doc["question"]
        assert line["mode"] == "genpoe" and line["control"] == "retrieved"
        assert line["hypernetwork"] == lm.fingerprint["hypernetwork"]
        assert [entry["id"] for entry in line["retrieved"]] == [ctx["id"] for ctx in doc["ctxs"]]
        assert [entry["id"] for entry in line["passages"]] == [ctx["id"] for ctx in doc["ctxs"][:2]]
        assert [entry["gate"] for entry in line["passages"]] == pytest.approx(expected_row(doc, 2)[1])
        assert [entry["has_answer"] for entry in line["retrieved"]] == ["Pesaro" in ctx["text"] for ctx in doc["ctxs"]]


def test_closed_book_has_no_passages_to_trace(make_lm, docs, generation, tmp_path):
    make_lm("closed_book", trace=str(tmp_path / "t.jsonl")).generate_until(generation(docs[:1]))
    (line,) = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert line["passages"] == line["retrieved"] == []
    assert line["hypernetwork"] is None


def test_a_run_with_a_cache_keeps_the_lines_of_what_it_does_not_ask_again(make_lm, docs, generation, tmp_path):
    path = tmp_path / "trace.jsonl"
    before = None
    for _ in range(2):
        lm = CachingLM(make_lm(trace=str(path)), str(tmp_path / "cache.db"))
        lm.generate_until(generation(docs))
        lm.dbdict.close()
        assert before in (None, path.read_text(encoding="utf-8"))
        before = path.read_text(encoding="utf-8")
        path.unlink()
    assert len(before.splitlines()) == len(docs)
    make_lm(trace=str(path)).generate_until(generation(docs[:2]))
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2, "a run without a cache replaces"


def test_what_an_interrupted_run_left_in_its_cache_is_traced(make_lm, docs, generation, tmp_path, monkeypatch):
    path = tmp_path / "trace.jsonl"
    lm = make_lm(trace=str(path), batch_size=2)
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    generate, batches = lm._model_generate, []

    def interrupted(*args, **kwargs):
        batches.append(None)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(lm, "_model_generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached.generate_until(generation(docs))
    cached.dbdict.close()
    again = CachingLM(make_lm(trace=str(path)), str(tmp_path / "cache.db"))
    again.generate_until(generation(docs))
    again.dbdict.close()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(line["doc_id"] for line in lines) == list(range(len(docs)))


@pytest.mark.parametrize("mode", ["closed_book", "rag", "genpoe", "genpoe_rag"])
def test_the_prompt_is_the_one_that_the_llm_reads(make_lm, docs, generation, tmp_path, monkeypatch, mode):
    path = tmp_path / "trace.jsonl"
    lm = make_lm(mode, trace=str(path), batch_size=1)
    read = []
    encode = lm.tok_batch_encode

    def listening(strings, *args, **kwargs):
        ids, mask = encode(strings, *args, **kwargs)
        read.append(lm.tokenizer.decode(ids[0][mask[0].bool()], skip_special_tokens=True))
        return ids, mask

    monkeypatch.setattr(lm, "tok_batch_encode", listening)
    lm.generate_until(generation(docs))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len(docs)

    def squeezed(text: str) -> str:
        return "".join(text.split())

    assert {squeezed(line["prompt"]) for line in lines} == {squeezed(text) for text in read}
    assert any("Knowledge:" in line["prompt"] for line in lines) == (mode in ("rag", "genpoe_rag"))


def test_choices_are_read_after_their_passages(make_lm, docs, choices, expected_row, tmp_path):
    path = tmp_path / "trace.jsonl"
    make_lm("rag", trace=str(path)).loglikelihood(choices(docs))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [
        knowledge_block(expected_row(doc)[0]) + closed_book_prompt(doc["question"]) for doc in docs
    ]


def test_a_cache_keeps_the_lines_of_each_way_of_asking(make_lm, docs, generation, tmp_path):
    """Two runs with other prompts for the same docs share a cache; what the second asked is not what the first did."""
    path = tmp_path / "trace.jsonl"
    plain = generation(docs[:1])
    (request,) = generation(docs[:1])
    told = replace(request, arguments=(f"Be brief.\n{request.args[0]}", request.args[1]))
    for requests in (plain, [told], plain):
        lm = CachingLM(make_lm("rag", trace=str(path)), str(tmp_path / "cache.db"))
        lm.generate_until(requests)
        lm.dbdict.close()
    lines = {line["prompt_hash"]: line["prompt"] for line in map(json.loads, path.read_text().splitlines())}
    assert lines[sha256(plain[0].args[0].encode()).hexdigest()].startswith("Knowledge:\n")
    assert lines[sha256(told.args[0].encode()).hexdigest()].startswith("Be brief.\nKnowledge:\n")


def test_the_trace_says_what_retrieved(make_lm, docs, generation, index_dir, tmp_path):
    passages = load_retriever(index_dir).passages
    build_bm25([passages.passage(row) for row in range(len(passages))], tmp_path / "bm25", progress=False)
    asked = [{**doc, "ctxs": []} for doc in docs]
    settings, encoder = [], str(index_dir.parent / "encoder")
    for index, name in {
        str(index_dir): encoder,
        str(tmp_path / "bm25"): "BM25",
        f"{index_dir}+{tmp_path / 'bm25'}": f"{encoder}+BM25",
    }.items():
        path = tmp_path / "trace.jsonl"
        lm = make_lm(trace=str(path), index=index, num_retrieved=5, num_passages=2)
        lm.generate_until(generation(asked))
        retriever = load_retriever(index)
        assert lm.fingerprint["index"] == retriever.fingerprint
        found = retriever.retrieve([doc["question"] for doc in asked], 5)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == len(asked)
        for line, passages_found in zip(lines, found, strict=True):
            assert line["retriever"] == name
            assert [(e["id"], e["score"], e["rank"]) for e in line["retrieved"]] == [
                (e.passage.id, e.score, e.rank) for e in passages_found
            ]
            settings.append(line["settings"])
    assert len(set(settings)) == 3
