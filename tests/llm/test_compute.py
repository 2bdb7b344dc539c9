"""What the service is told of how to compute reaches the model, and callers learn what matters."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from fednano.llm.server import load
from fednano.llm.settings import LlmSettings
from fednano.models.compute import unquantised
from fednano.models.frozen import FrozenLLM
from fednano.wire import llm_pb2
from fednano.wire.errors import WrongModel
from fednano.wire.headers import make_header

from tests.llm.caller import CLIENT, RUN, score_request
from tests.llm.test_life import invoke
from tests.models.causal import build, packed, several_labels


@pytest.fixture
def loaded(keys: tuple[bytes, bytes], tmp_path: Path) -> Any:
    build().save_pretrained(tmp_path)

    def begin(**given: Any) -> FrozenLLM:
        settings = LlmSettings(
            model=tmp_path, session_public_key=keys[1].decode(), device="cpu", **given
        )
        return load(FrozenLLM, settings, "here")

    return begin


def test_settings_choose_how_the_model_computes(loaded, monkeypatch):
    monkeypatch.setenv("FEDNANO_LLM_ATTENTION", "eager")
    engine = loaded(gradient_checkpointing="on")
    assert engine._model.config._attn_implementation == "eager"
    assert engine._recompute == "on"


@pytest.mark.parametrize("flag", ["--attention", "--weights", "--gradient-checkpointing"])
def test_a_choice_that_there_is_not_is_refused_with_those_that_there_are(keys, tmp_path, flag):
    key = {"FEDNANO_LLM_SESSION_PUBLIC_KEY": keys[1].decode()}
    result = invoke("--model", tmp_path, flag, "other", env=key)
    assert result.exit_code == 2
    assert "expected 'auto'" in result.output


@pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: fednano[quantised]"
)
async def test_a_caller_of_other_weights_is_refused(start, loaded):
    engine = loaded(weights="nf4")
    llm = await start(engine)
    card = await llm.unary("Describe", llm_pb2.DescribeRequest(header=llm.header()))
    assert card.fingerprint == f"{unquantised(card.fingerprint)}+nf4"
    header = make_header(CLIENT, run=RUN, fingerprint=unquantised(card.fingerprint))
    refused = await llm.failure("Score", score_request(header, packed(engine), several_labels()))
    assert isinstance(refused, WrongModel)
