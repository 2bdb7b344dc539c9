"""The engine computes what the stock model computes, sample by sample and without padding."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fednano.models.activations import Activations
from fednano.models.devices import pick_device
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import IGNORED, LowRank, NewToken, Sampling, Sequences
from fednano.wire.errors import InvalidRequest, UnknownActivation
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tests.models.causal import FAMILIES, HIDDEN, LENGTHS, POSITIONS, build, packed, several_labels

WEIGHTS = torch.tensor([0.3, 0.1, 2.0])
NEVER = (-1,)


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


@pytest.fixture
def engine(stock: PreTrainedModel) -> FrozenLLM:
    return FrozenLLM(stock, "mark")


def alone(values: torch.Tensor, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    return [part[None] for part in values.split(lengths)]


def whole_loss(model: PreTrainedModel, values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each sample's loss sum, one unpadded sample at a time, labels shifted by hand."""
    sums = []
    for part, wanted in zip(alone(values), labels.split(LENGTHS), strict=True):
        logits = model(inputs_embeds=part).logits[0, :-1]
        sums.append(cross_entropy(logits, wanted[1:], reduction="sum", ignore_index=IGNORED))
    return torch.stack(sums)


def test_a_step_is_the_whole_models_autograd(engine, stock):
    sequences, labels = packed(engine), several_labels()
    leaf = sequences.values.clone().requires_grad_()
    sums = whole_loss(stock, leaf, labels)
    (expected,) = torch.autograd.grad(sums @ WEIGHTS, leaf)
    found = engine.step(sequences, labels, WEIGHTS)
    torch.testing.assert_close(found.gradient, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss_sums, sums.detach())
    assert found.token_counts.tolist() == [3, 1, 5]
    assert found.loss_sums.dtype == torch.float32


def test_no_weight_ever_has_a_gradient(engine, stock):
    engine.step(packed(engine), several_labels(), WEIGHTS)
    assert not any(p.requires_grad or p.grad is not None for p in stock.parameters())


def test_a_sample_without_labels_has_no_loss_and_no_gradient(engine):
    labels = several_labels()
    labels[: LENGTHS[0]] = IGNORED
    labels[0] = 5  # a first token is predicted by nothing
    found = engine.step(packed(engine), labels, WEIGHTS)
    assert found.token_counts.tolist() == [0, 1, 5]
    assert found.loss_sums[0] == 0
    assert not found.gradient[: LENGTHS[0]].any()
    assert found.gradient[LENGTHS[0] :].any()


def test_a_score_counts_the_labels_that_the_model_ranks_first(engine, stock):
    sequences, labels = packed(engine), several_labels()
    best = [stock(inputs_embeds=part).logits[0].argmax(-1) for part in alone(sequences.values)]
    labels[6], labels[9], labels[-1] = best[0][5], best[1][1], best[2][9]
    found = engine.score(sequences, labels)
    assert found.token_counts.tolist() == [3, 1, 5]
    assert (found.correct_counts >= 1).all()
    torch.testing.assert_close(found.loss_sums, whole_loss(stock, sequences.values, labels))


def test_forward_and_backward_make_a_step(engine):
    sequences, labels = packed(engine), several_labels()
    positions = (labels != IGNORED).nonzero()[:, 0] - 1
    kept = engine.forward(sequences, positions)
    logits = kept.logits.clone().requires_grad_()
    losses = cross_entropy(logits, labels[labels != IGNORED], reduction="none")
    weights = WEIGHTS.repeat_interleave(torch.tensor([3, 1, 5]))
    (above,) = torch.autograd.grad(losses @ weights, logits)
    gradient = engine.backward(kept.activation, above, sequences, positions)
    torch.testing.assert_close(gradient, engine.step(sequences, labels, WEIGHTS).gradient)


def test_logits_come_in_the_order_asked_for_and_only_there(engine, stock):
    sequences = packed(engine)
    logits = [stock(inputs_embeds=part).logits[0] for part in alone(sequences.values)]
    positions = torch.tensor([20, 0, 8, 0])
    found = engine.forward(sequences, positions, keep=False)
    expected = torch.stack([logits[2][10], logits[0][0], logits[1][1], logits[0][0]])
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    assert found.activation == ""
    assert not len(engine.activations)


def test_a_lost_activation_is_computed_again(engine):
    sequences, positions = packed(engine), torch.tensor([4, 8, 19])
    above = torch.randn(3, engine.vocabulary)
    kept = engine.forward(sequences, positions)
    first = engine.backward(kept.activation, above, sequences, positions)
    again = engine.backward(kept.activation, above, sequences, positions)
    assert torch.equal(first, again)
    with pytest.raises(UnknownActivation):
        engine.backward(kept.activation, above)


def test_a_gradient_of_the_wrong_shape_does_not_use_the_activation_up(engine):
    kept = engine.forward(packed(engine), torch.tensor([4, 8]))
    with pytest.raises(InvalidRequest, match=r"logits_gradient: expected \[2, 64\], got \[3, 64\]"):
        engine.backward(kept.activation, torch.zeros(3, engine.vocabulary))
    engine.backward(kept.activation, torch.zeros(2, engine.vocabulary))


def test_activations_are_few_and_short_lived(stock):
    activations = Activations("here", tokens=2 * sum(LENGTHS), seconds=0.05)
    engine = FrozenLLM(stock, "mark", activations=activations)
    names = [engine.forward(packed(engine), torch.tensor([4])).activation for _ in range(3)]
    assert all(name.startswith("here/") for name in names)
    assert len(activations) == 2
    assert activations.get(names[0]) is None
    time.sleep(0.06)
    activations.expire()
    assert not len(activations)


def test_the_same_request_gives_the_same_bytes(engine):
    sequences, labels = packed(engine), several_labels()
    first = engine.step(sequences, labels, WEIGHTS)
    second = engine.step(sequences, labels, WEIGHTS)
    assert torch.equal(first.gradient, second.gradient)
    assert torch.equal(first.loss_sums, second.loss_sums)


def answers(engine: FrozenLLM, sequences: Sequences, sampling: Sampling, adapter=None):
    """Each sample's ids, and all tokens in the order in which they came."""
    came = list(engine.generate(sequences, sampling, adapter))
    by_sample: dict[int, list[int]] = {i: [] for i in range(len(sequences.lengths))}
    for tokens in came:
        for token in tokens:
            by_sample[token.sample].append(token.id)
    return list(by_sample.values()), came


def test_greedy_answers_are_those_of_stock_generate(engine, stock):
    sequences = packed(engine)
    found, _ = answers(engine, sequences, Sampling(max_new_tokens=12))
    for part, answer in zip(alone(sequences.values), found, strict=True):
        mask = torch.ones(part.shape[:2], dtype=torch.long)
        expected = stock.generate(
            inputs_embeds=part, attention_mask=mask, max_new_tokens=12, do_sample=False
        )
        assert answer == expected[0].tolist()


def test_written_tokens_pass_the_text_adapter(engine, stock):
    """Against a loop that runs the whole sequence again for every token."""
    sequences = packed(engine)
    made = torch.Generator().manual_seed(3)
    adapter = LowRank(
        torch.randn(4, HIDDEN, generator=made), torch.randn(HIDDEN, 4, generator=made), 0.5
    )
    found, _ = answers(engine, sequences, Sampling(max_new_tokens=8, stop_ids=NEVER), adapter)
    plain, _ = answers(engine, sequences, Sampling(max_new_tokens=8, stop_ids=NEVER))
    assert found != plain
    for part, answer in zip(alone(sequences.values), found, strict=True):
        fed, expected = part, []
        while len(expected) < 8:
            expected.append(int(stock(inputs_embeds=fed).logits[0, -1].argmax()))
            token = stock.get_input_embeddings()(torch.tensor([[expected[-1]]]))
            fed = torch.cat([fed, adapter(token)], dim=1)
        assert answer == expected


def test_finished_samples_drop_out_and_the_others_go_on(engine):
    sequences = packed(engine)
    plain, _ = answers(engine, sequences, Sampling(max_new_tokens=10, stop_ids=NEVER))
    stop = plain[1][2]
    found, came = answers(engine, sequences, Sampling(max_new_tokens=10, stop_ids=(stop,)))
    for answer, whole in zip(found, plain, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 10
        assert answer == whole[:end]
    ends = [token for tokens in came for token in tokens if token.end]
    assert sorted(token.sample for token in ends) == [0, 1, 2]
    assert all(len(later) <= len(earlier) for earlier, later in pairwise(came))


def test_sampling_is_a_function_of_the_seed(engine):
    sequences = packed(engine)
    first, _ = answers(engine, sequences, Sampling(8, temperature=1.5, seed=1))
    assert first == answers(engine, sequences, Sampling(8, temperature=1.5, seed=1))[0]
    assert first != answers(engine, sequences, Sampling(8, temperature=1.5, seed=2))[0]


def test_a_tiny_nucleus_is_greedy(engine):
    sequences = packed(engine)
    found, _ = answers(engine, sequences, Sampling(8, temperature=1.0, top_p=1e-6))
    assert found == answers(engine, sequences, Sampling(8))[0]


def test_answers_end_where_the_model_has_no_more_positions(engine):
    sequences = packed(engine, (POSITIONS - 2, 5))
    found, came = answers(engine, sequences, Sampling(max_new_tokens=6, stop_ids=NEVER))
    assert len(found[0]) == 3  # two are fed back, the third can't be
    assert came[2][0] == NewToken(0, found[0][2], end=True)
    assert len(found[1]) == 6


def test_embeddings_are_what_the_model_feeds_itself(engine, stock):
    ids = torch.tensor([3, 1, 4, 1, 5])
    logits = stock(inputs_embeds=engine.embed(ids)[None]).logits
    torch.testing.assert_close(logits, stock(input_ids=ids[None]).logits)


def test_a_stock_directory_is_loaded_with_a_fingerprint_of_its_bytes(tmp_path: Path):
    build().save_pretrained(tmp_path)
    engine = FrozenLLM.load(tmp_path, device="cpu")
    assert len(engine.fingerprint) == 64
    assert engine.name == tmp_path.name
    assert engine.dtype == torch.float32
    assert (engine.hidden_size, engine.vocabulary, engine.max_positions) == (32, 64, 48)
    assert engine.stop_ids == (2,)
    half = FrozenLLM.load(tmp_path, device="cpu", dtype="bf16", fingerprint="given")
    assert (half.dtype, half.fingerprint) == (torch.bfloat16, "given")


def test_half_precision_stays_near_full_precision(tmp_path: Path):
    build().save_pretrained(tmp_path)
    full = FrozenLLM.load(tmp_path, device="cpu")
    half = FrozenLLM.load(tmp_path, device="cpu", dtype="bf16")
    sequences, labels = packed(full), several_labels()
    losses = [engine.step(sequences, labels, WEIGHTS).loss_sums for engine in (full, half)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.1, atol=0.5)


def test_what_is_no_model_is_refused_with_a_sentence(tmp_path: Path):
    with pytest.raises(InvalidRequest, match="is no Hugging Face checkpoint"):
        FrozenLLM.load(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(InvalidRequest, match="device: expected a CUDA device"):
            pick_device("cuda")
