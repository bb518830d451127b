"""Training of the LLM and the bi-encoder of the demo's world.

Both see the train side of the world only, endlessly drawn, so neither can know a test entity by name.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from experiments.demo_models.documents import ANSWER, Document, Documents
from genpoe_plugin.demo.world import ask, entities_of, write_article, write_report
from genpoe_plugin.files import atomic_directory

# So few that names stay in the pieces that they are put together from: a larger vocabulary has a token of its own for
# every surname it saw, and the LLM has nothing to read the others by.
VOCABULARY = 2048
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
LLM_STEPS, LLM_RATE = 2400, 3e-3
BARE_STEPS = 800
UNFORESEEABLE = 0.15
"""Share of the tokens with little weight whose loss is computed; it then counts as much more."""
ENCODER_STEPS, ENCODER_BATCH, ENCODER_RATE = 600, 48, 2e-3


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that begins every text with BOS, trained on documents of the train side."""
    documents = Documents(seed)
    texts = ("".join(piece for piece, _ in documents.rag(1)) for _ in range(12_000))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=1024,
    )


def _curriculum(seed: int, steps: int) -> Iterator[list[Document]]:
    """A batch of documents a step, of about 3,000 tokens: barest facts first, whole passages later."""
    documents, rng = Documents(seed), random.Random(f"genpoe-curriculum-{seed}")
    for step in range(steps):
        draw = rng.random()
        if step < BARE_STEPS:
            if draw < 0.5:
                entities = rng.randint(2, 6)
                yield [documents.values(entities) for _ in range(110 // entities)]
            elif draw < 0.75:
                entities = rng.randint(2, 6)
                yield [documents.statements(entities) for _ in range(80 // entities)]
            else:
                entities = rng.choice((1, 1, 2, 3, 4))
                yield [documents.brief(entities) for _ in range(24 // entities)]
        elif draw < 0.05:
            yield [documents.closed_book(8) for _ in range(12)]
        elif draw < 0.20:
            entities = rng.randint(2, 6)
            yield [documents.statements(entities) for _ in range(80 // entities)]
        else:
            passages = rng.randint(1, 4)
            yield [documents.rag(passages) for _ in range(22 // passages)]


def _tokenise(batch: list[Document], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Right-padded ids ``[rows, tokens]`` and the loss weight of each; pieces are tokenised one by one."""
    rows = []
    for document in batch:
        row = [(tokenizer.bos_token_id, 0.0)]
        for piece, weight in document:
            row += [(token, weight) for token in tokenizer.encode(piece, add_special_tokens=False)]
        rows.append(torch.tensor(row, dtype=torch.float64))
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded[..., 0].long(), padded[..., 1].float()


def _prepare_attention(model: LlamaForCausalLM) -> None:
    """Start attention from what reading takes: near tokens belong together, and like looks for like.

    From the usual random start, a model and budget so small spend most of it before any head attends by content. As in
    mimetic initialisation (Trockman and Kolter, 2023), query and key matrices start equal, so that a token attends to
    those like itself, and output after value is close to a multiple of the identity, so that a head copies what it
    attends to. All heads of layer 0 and half of those of layer 1 instead average what is near: queries and keys read
    one coordinate that is the same for every token, and rotary embedding turns that into windows of several widths.
    """
    likeness, copy, nearness = 1.5, 0.15, 0.46
    model.model.embed_tokens.weight.data[:, 0] = 0.1
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        width, half, heads = attention.head_dim, attention.head_dim // 2, model.config.num_attention_heads
        projection, _ = torch.linalg.qr(torch.randn(heads * width, model.config.hidden_size))
        values, _ = torch.linalg.qr(torch.randn(heads * width, model.config.hidden_size))
        for head in range(heads):
            if number == 0 or (number == 1 and head < heads // 2):
                first, sharpness = head + 2 * number, 2.5 if number == 0 and head < heads // 2 else 1.0
                for matrix in (attention.q_proj.weight.data, attention.k_proj.weight.data):
                    matrix[head * width + first : head * width + first + 4, 0] = nearness * sharpness
            else:
                # The fastest rotations are left out: over them, likeness would depend on distance.
                rows = [head * width + row for row in range(width) if row % half >= half // 3]
                for matrix in (attention.q_proj.weight.data, attention.k_proj.weight.data):
                    matrix[rows] = likeness * projection[rows]
                    matrix[rows, 0] = 0
        values[:, 0] = 0
        attention.v_proj.weight.data.copy_(values)
        attention.o_proj.weight.data.copy_(copy * values.T)


def pretrain_llm(output: Path, seed: int) -> None:
    """Train the demo's LLM, a Llama of 1.3 million parameters, and write it with its tokenizer in float16."""
    tokenizer = train_tokenizer(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    _prepare_attention(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LLM_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    with tqdm(_curriculum(seed, LLM_STEPS), total=LLM_STEPS, desc="Training the LLM") as bar:
        for step, batch in enumerate(bar):
            _set_rate(optimizer, LLM_RATE, step, LLM_STEPS)
            loss = _language_loss(model, *_tokenise(batch, tokenizer))
            _update(optimizer, model, loss)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with atomic_directory(output) as temporary:
        model.half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _language_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy of the next token; logits are computed only where the loss is."""
    wanted = weights[:, 1:].flatten()
    drawn = torch.rand(wanted.shape) < UNFORESEEABLE
    places = ((wanted == ANSWER) | (drawn & (wanted > 0))).nonzero().squeeze(1)
    scale = torch.where(wanted[places] == ANSWER, 1.0, 1 / UNFORESEEABLE) * wanted[places]
    states = model.model(ids[:, :-1]).last_hidden_state.flatten(0, 1).index_select(0, places)
    losses = functional.cross_entropy(
        model.lm_head(states).float(), ids[:, 1:].flatten().index_select(0, places), reduction="none"
    )
    return (losses * scale).sum() / scale.sum()


def pretrain_encoder(output: Path, llm: Path, seed: int) -> None:
    """Train the demo's bi-encoder, a BERT with mean pooling, on questions and passages with the LLM's tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llm, padding_side="right")
    torch.manual_seed(seed)
    rng = random.Random(f"genpoe-encoder-{seed}")
    entities = entities_of(rng, "train", namesakes=0.5)
    encoder = _untrained_encoder(tokenizer, output)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=ENCODER_RATE, weight_decay=0.01)

    def embed(texts: list[str]) -> Tensor:
        return encoder(encoder.preprocess(texts))["sentence_embedding"]

    for step in tqdm(range(ENCODER_STEPS), desc="Training the encoder"):
        _set_rate(optimizer, ENCODER_RATE, step, ENCODER_STEPS)
        batch = [next(entities) for _ in range(ENCODER_BATCH)]
        questions = embed([ask(rng, entity, rng.choice(entity.facts), "0").question for entity in batch])
        articles = [write_article(rng, entity, "0").string for entity in batch]
        reports = [write_report(rng, entity, "0").string for entity in batch[: ENCODER_BATCH // 4]]
        passages = embed(articles + reports)
        own = torch.arange(len(batch))
        forward = functional.cross_entropy(25 * questions @ passages.T, own)
        backward = functional.cross_entropy(25 * passages[: len(batch)] @ questions.T, own)
        _update(optimizer, encoder, forward + 0.5 * backward)
    with atomic_directory(output) as temporary:
        encoder.save(str(temporary), create_model_card=False)


def _untrained_encoder(tokenizer: PreTrainedTokenizerFast, beside: Path) -> SentenceTransformer:
    width = 96
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=192,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    with atomic_directory(beside) as temporary:
        BertModel(config, add_pooling_layer=False).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        transformer = Transformer(str(temporary), max_seq_length=160)
    return SentenceTransformer(modules=[transformer, Pooling(width, pooling_mode="mean"), Normalize()], device="cpu")


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Warm up over 50 steps, hold, and decay linearly over the last two thirds."""
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, (step + 1) / 50, max(0.02, (1 - step / steps) * 1.5))


def _update(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the loss is {loss.item()}")
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
