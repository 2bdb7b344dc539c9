"""The metrics listener, and what it counts."""

from __future__ import annotations

import asyncio
import urllib.request

from fednano.models.language_model import Sampling
from fednano.wire import llm_pb2
from prometheus_client.parser import text_string_to_metric_families

from tests.llm.caller import Caller, generate_request, score_request
from tests.models.causal import packed, several_labels

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def read(llm: Caller) -> Samples:
    url = f"http://127.0.0.1:{llm.metrics_port}/metrics"

    def fetch() -> str:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.read().decode()

    families = text_string_to_metric_families(await asyncio.to_thread(fetch))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


async def test_calls_move_the_metrics(start, engine):
    llm = await start(metrics_port=0)
    sequences = packed(engine)
    request = score_request(llm.header(), sequences, several_labels())
    await llm.stream("Score", request)
    request[0].head.ClearField("labels")
    await llm.failure("Score", request)
    await llm.step(sequences, several_labels(), several_labels()[:3].float())
    await llm.stream(
        "Generate", generate_request(llm.header(), sequences, Sampling(2, stop_ids=(1,)))
    )
    found = await read(llm)
    size = sequences.values.numel() * 4
    assert found[key("fednano_llm_requests_total", rpc="Score", status="OK")] == 1
    assert found[key("fednano_llm_requests_total", rpc="Score", status="INVALID_ARGUMENT")] == 1
    assert found[key("fednano_llm_step_seconds_count", rpc="Score")] == 1
    assert found[key("fednano_llm_step_seconds_sum", rpc="ForwardBackward")] > 0
    assert found[key("fednano_llm_queue_seconds_count")] == 3
    assert found[key("fednano_llm_tokens_total", rpc="Score")] == 21
    assert found[key("fednano_llm_tokens_total", rpc="Generate")] >= 21 + 3
    assert found[key("fednano_bytes_total", kind="embeddings", direction="received")] == 3 * size
    assert found[key("fednano_bytes_total", kind="gradients", direction="sent")] == size
    assert found[key("fednano_bytes_total", kind="control", direction="sent")] > 0
    assert found[key("fednano_llm_queue_depth")] == 0
    assert key("fednano_llm_activations") in found
    assert found[key("fednano_llm_model_parameters")] == engine.parameters
    build = [dict(labels) for name, labels in found if name == "fednano_build_info"]
    assert build[0]["device"] == "cpu"


async def test_no_label_takes_a_value_from_a_request(start):
    llm = await start(metrics_port=0)
    await llm.unary("Describe", llm_pb2.DescribeRequest(header=llm.header()))
    found = await read(llm)
    ours = [labels for name, labels in found if name.startswith("fednano_")]
    assert {name for labels in ours for name, _ in labels} <= {
        "rpc", "status", "kind", "direction", "le", "service", "version", "device", "dtype",
        "result",
    }  # fmt: skip
    assert "hospital" not in str(found)
