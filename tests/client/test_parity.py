"""The split system computes what the stock model computes with the adapters hooked into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.losses import client_side_step
from fednano.client.trainer import Trainer
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import IGNORED, Modality, Sampling
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from tests.tiny import no_adapters


@contextmanager
def hooked(model: LlavaForConditionalGeneration, adapters: NanoAdapters) -> Iterator[None]:
    """a_image after the connector, a_text after the embedding table."""
    image, text = adapters.of(Modality.IMAGE), adapters.of(Modality.TEXT)
    assert image is not None
    assert text is not None
    hooks = [
        model.model.multi_modal_projector.register_forward_hook(lambda m, i, out: out + image(out)),
        model.get_input_embeddings().register_forward_hook(lambda m, i, out: out + text(out)),
    ]
    yield
    for hook in hooks:
        hook.remove()


def stock_losses(
    model: LlavaForConditionalGeneration, edge: EdgeHalf, examples: list[Example]
) -> torch.Tensor:
    """Each example's loss sum by the stock processor and forward, with padding on the right."""
    prompts = [prompt_of(edge, e) + " " + e.answer + edge.tokenizer.eos_token for e in examples]
    images = [image for e in examples for image in e.images]
    edge.tokenizer.padding_side = "right"
    inputs = edge.processor(text=prompts, images=images, padding=True, return_tensors="pt")
    logits = model(**inputs).logits[:, :-1]
    labels = inputs["input_ids"][:, 1:].clone()
    for row, example in enumerate(examples):
        answer = len(edge.tokenizer(example.answer, add_special_tokens=False)["input_ids"]) + 1
        length = int(inputs["attention_mask"][row].sum()) - 1
        labels[row, : length - answer] = IGNORED
        labels[row, length:] = IGNORED
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return losses.sum(1)


def prompt_of(edge: EdgeHalf, example: Example) -> str:
    content = [{"type": "image"} for _ in example.images]
    content.append({"type": "text", "text": example.question})
    text: str = edge.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return text


def gradients(adapters: NanoAdapters) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in adapters.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["server", "client"])
def test_the_split_step_is_the_whole_models_step(
    side: str,
    stock: LlavaForConditionalGeneration,
    edge: EdgeHalf,
    frozen: FrozenLLM,
    adapters: NanoAdapters,
    examples: list[Example],
) -> None:
    whole = copy.deepcopy(adapters)
    with hooked(stock, whole):
        expected = stock_losses(stock, edge, examples)
    weights = torch.tensor([0.5, 0.3, 0.2])
    (expected * weights).sum().backward()

    batch = Batch.of([edge.prepare(example) for example in examples])
    hidden = NanoEdge(adapters)(batch)
    step = client_side_step if side == "client" else FrozenLLM.step
    reply = step(frozen, batch.sequences(hidden.detach()), batch.labels, weights)
    hidden.backward(reply.gradient)

    unadapted = stock_losses(stock, edge, examples)
    assert (unadapted - expected).abs().min() > 0.05
    torch.testing.assert_close(reply.loss_sums, expected.detach(), rtol=1e-4, atol=1e-5)
    found, wanted = gradients(adapters), gradients(whole)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)


def test_both_loss_modes_agree_to_rounding(
    edge: EdgeHalf, frozen: FrozenLLM, adapters: NanoAdapters, examples: list[Example]
) -> None:
    batch = Batch.of([edge.prepare(example) for example in examples])
    sequences = batch.sequences(NanoEdge(adapters)(batch).detach())
    weights = torch.tensor([0.5, 0.3, 0.2])
    server = frozen.step(sequences, batch.labels, weights)
    client = client_side_step(frozen, sequences, batch.labels, weights)
    torch.testing.assert_close(client.loss_sums, server.loss_sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(client.gradient, server.gradient, rtol=1e-4, atol=1e-7)
    assert client.token_counts.tolist() == server.token_counts.tolist()


def test_prompts_have_the_tokens_of_the_stock_processor(
    edge: EdgeHalf, examples: list[Example]
) -> None:
    for example in examples:
        images = list(example.images) or None
        stock = edge.processor(text=prompt_of(edge, example), images=images)["input_ids"][0]
        prepared = edge.prepare(example, with_answer=False)
        assert len(prepared.base) == len(stock)
        of_image = [
            s.start + i
            for s in prepared.segments
            if s.modality is Modality.IMAGE
            for i in range(s.length)
        ]
        assert of_image == [i for i, t in enumerate(stock) if t == edge.processor.image_token_id]


def test_generated_answers_are_those_of_the_hooked_stock_model(
    stock: LlavaForConditionalGeneration,
    trainer: Trainer,
    adapters: NanoAdapters,
    examples: list[Example],
) -> None:
    edge, sampling = trainer.edge, Sampling(max_new_tokens=12)
    found = trainer.answers(adapters, examples, sampling)
    assert found != trainer.answers(no_adapters(), examples, sampling)
    assert any(len(answer.split()) > 2 for answer in found)
    edge.tokenizer.padding_side = "left"
    inputs = edge.processor(
        text=[prompt_of(edge, e) for e in examples],
        images=[image for e in examples for image in e.images],
        padding=True,
        return_tensors="pt",
    )
    with hooked(stock, adapters), torch.no_grad():
        ids = stock.generate(**inputs, max_new_tokens=12, do_sample=False)
    wanted = [edge.answer_text(row.tolist()) for row in ids[:, inputs["input_ids"].shape[1] :]]
    assert found == wanted
