"""The baseline of the evaluation benchmark: the paper's method, one question at a time.

It is written from the paper's description and reads only the weights of a checkpoint; it shares no code with our
experts, injection, store or batching. It has a KV cache, no gradients, one pass of the hypernetwork per passage into
full float32 matrices, and greedy decoding by transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Expert = tuple[Tensor, Tensor, Tensor, Tensor]


class NaiveFlow:
    """Answers of an LLM with experts of the paper's form.

    Args:
        model, tokenizer: a Llama in float32.
        checkpoint: directory of a hypernetwork of the preset ``paper``.
        layer: the layer with experts.
        num_passages: maximum number of experts per question.
        new_tokens: maximum number of tokens per answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        checkpoint: Path,
        layer: int,
        num_passages: int,
        new_tokens: int,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mlp: nn.Module = model.model.layers[layer].mlp
        self.num_passages, self.new_tokens = num_passages, new_tokens
        weights = load_file(checkpoint / "model.safetensors")
        self.project = weights["encoder.project.weight"], weights["encoder.project.bias"]
        self.generate = weights["head.generate.weight"], weights["head.generate.bias"]
        self.base = [weights[f"head.base{number}"] for number in (1, 2, 3, 4)]

    def answer_all(self, docs: Sequence[Mapping[str, Any]]) -> list[str]:
        return [self.answer(doc) for doc in docs]

    @torch.inference_mode()
    def answer(self, doc: Mapping[str, Any]) -> str:
        """Answer one question with the best of its passages (``ctxs`` with ``rerank_score``)."""
        best = sorted(doc["ctxs"], key=lambda ctx: -ctx["rerank_score"])[: self.num_passages]
        gates = torch.tensor([ctx["rerank_score"] for ctx in best]).softmax(0).tolist()
        experts = [self.expert(ctx["text"]) for ctx in best]

        def add_experts(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            for gate, (w1, w2, w3, w4) in zip(gates, experts, strict=True):
                hidden = torch.relu(functional.linear(functional.linear(inputs[0], w1), w2))
                output = output + gate * functional.linear(functional.linear(hidden, w3), w4)
            return output

        prompt = self.tokenizer(f"Question: {doc['question']}\nAnswer:", return_tensors="pt")
        hook = self.mlp.register_forward_hook(add_experts)
        try:
            tokens = self.model.generate(
                input_ids=prompt["input_ids"],
                attention_mask=prompt["attention_mask"],
                max_new_tokens=self.new_tokens,
                do_sample=False,
            )
        finally:
            hook.remove()
        return self.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    def expert(self, passage: str) -> Expert:
        """The four matrices of one passage: the base plus the output of the hypernetwork."""
        ids = self.tokenizer(passage, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :256]
        mean = self.model.get_input_embeddings()(ids).mean(1)
        code = torch.relu(functional.linear(mean, *self.project))
        numbers = functional.linear(code, *self.generate)[0]
        parts = numbers.split([base.numel() for base in self.base])
        w1, w2, w3, w4 = (base + part.view_as(base) for part, base in zip(parts, self.base, strict=True))
        return w1, w2, w3, w4
