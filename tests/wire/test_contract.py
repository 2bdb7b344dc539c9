"""The contract may grow; what was promised stays."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from fednano.wire import coordinator_pb2, llm_pb2, tensor_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor

ROOT = Path(__file__).parents[2]
FROZEN = Path(__file__).parent / "contract.json"
FILES: list[FileDescriptor] = [m.DESCRIPTOR for m in (tensor_pb2, llm_pb2, coordinator_pb2)]


def _field(field: FieldDescriptor) -> str:
    kind = field.message_type or field.enum_type
    repeated = "repeated " if field.is_repeated else ""
    return f"{field.number}: {repeated}{kind.full_name if kind else f'type {field.type}'}"


def _messages(messages: list[Descriptor]) -> dict[str, dict[str, str]]:
    found = {}
    for message in messages:
        found[message.full_name] = {field.name: _field(field) for field in message.fields}
        found |= _messages(list(message.nested_types))
    return found


def contract() -> dict[str, dict[str, str]]:
    """Every message's fields, every enum's values, every method's types and streaming."""
    found: dict[str, dict[str, str]] = {}
    for file in FILES:
        found |= _messages(list(file.message_types_by_name.values()))
        for enum in file.enum_types_by_name.values():
            found[enum.full_name] = {v.name: str(v.number) for v in enum.values}
        for service in file.services_by_name.values():
            found[service.full_name] = {
                m.name: f"{'stream ' * m.client_streaming}{m.input_type.full_name} -> "
                f"{'stream ' * m.server_streaming}{m.output_type.full_name}"
                for m in service.methods
            }
    return found


FROZEN_CONTRACT: dict[str, dict[str, str]] = json.loads(FROZEN.read_text())


@pytest.mark.parametrize("name", FROZEN_CONTRACT)
def test_nothing_that_was_promised_has_changed(name: str) -> None:
    """On purpose? Raise PROTOCOL in wire/headers.py and run `make freeze-contract`."""
    now = contract().get(name)
    assert now is not None, f"{name} is gone"
    for entry, was in FROZEN_CONTRACT[name].items():
        assert now.get(entry) == was, f"{name}.{entry}"


def test_everything_that_exists_is_frozen() -> None:
    """Run `make freeze-contract` after adding to the contract."""
    assert contract() == FROZEN_CONTRACT


def test_generated_code_is_not_stale() -> None:
    """Run `make proto` after editing proto/."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "proto").glob("*.proto")):
        digest.update(path.read_bytes())
    recorded = (ROOT / "services/fednano/wire/proto.sha256").read_text().strip()
    assert recorded == digest.hexdigest()


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(contract(), indent=1, sort_keys=True) + "\n")
