"""docs/llm.md names everything that there is to set and to watch."""

from __future__ import annotations

from pathlib import Path

import pytest
from fednano.llm.bases import BaseStore
from fednano.llm.metrics import Metrics
from fednano.llm.settings import LlmSettings
from fednano.wire import llm_pb2

PAGE = (Path(__file__).parents[2] / "docs" / "llm.md").read_text()


@pytest.mark.parametrize("setting", LlmSettings.model_fields)
def test_every_setting_is_explained(setting):
    assert f"`{setting}`" in PAGE


def test_every_metric_is_explained():
    metrics = Metrics()
    metrics.describe("1", "cpu", "float32", 1)
    metrics.hold(BaseStore(1, 1))
    metrics.watch(lambda: 0, lambda: 0)
    ours = [m.name for m in metrics.registry.collect() if m.name.startswith("fednano_")]
    assert len(ours) == 15
    assert [name for name in ours if f"`{name}" not in PAGE] == []


def test_every_call_is_explained():
    calls = llm_pb2.DESCRIPTOR.services_by_name["LanguageModel"].methods
    assert [call.name for call in calls if call.name not in PAGE] == []
