"""Federated LoRA in Flower's simulation: a script for Flower's environment, which imports nothing of
ours. Reads a job and writes a result, both JSON; the result says its versions.

Clients run in Ray's actors. Each notes what it received, sent and took in a file, so that what is
measured is not itself sent.
"""

# mypy: ignore-errors

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

_LOADED = {}  # of this process: an actor keeps its model between rounds


def main(job_file, result_file):
    started = time.time()
    job = json.loads(Path(job_file).read_text())
    found = {name: version(name) for name in ("flwr", "ray", "peft", "torch", "transformers")}
    run_simulation(
        server_app(job, found),
        client_app(job),
        num_supernodes=job["clients"],
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    found["start-up"] = found.pop("trained from") - started
    notes = [json.loads(path.read_text()) for path in Path(job["folder"]).glob("note-*.json")]
    Path(result_file).write_text(json.dumps({**found, "notes": notes}))


def client_app(job):
    """Its functions name nothing but the job and this module: Ray sends them to its actors, and a
    model that this process has loaded must not go with them."""
    app = ClientApp()

    @app.query()
    def load(message: Message, context):
        _loaded(job)
        return Message(RecordDict(), reply_to=message)

    @app.train()
    def train(message: Message, context):
        return _train(job, message, context.node_config["partition-id"])

    return app


def _train(job, message, shard):
    begun = time.perf_counter()
    whole, examples = _loaded(job)
    number = message.content["config"]["round"]
    whole.lora = message.content["arrays"].to_torch_state_dict()
    epochs = [examples[f"{number}/{shard}/{epoch}"] for epoch in range(job["epochs"])]
    loss = whole.train(epochs, *(job[key] for key in ("learning_rate", "batch", "clip")))
    metrics = MetricRecord({"num-examples": len(epochs[-1]), "loss": loss})
    reply = RecordDict({"arrays": ArrayRecord(whole.lora), "metrics": metrics})
    note = {
        "round": number,
        "client": shard,
        "received": recorddict_to_proto(message.content).ByteSize(),
        "sent": recorddict_to_proto(reply).ByteSize(),
        "seconds": time.perf_counter() - begun,
        "before": _LOADED["before"],
        "peak": _memory("VmHWM"),
    }
    (Path(job["folder"]) / f"note-{number}-{shard}.json").write_text(json.dumps(note))
    return Message(reply, reply_to=message)


def server_app(job, found):
    app = ServerApp()

    @app.main()
    def run(grid, context):
        whole, examples = _loaded(job)
        arrays = ArrayRecord(whole.lora)
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=job["clients"])
        found["parameters"] = sum(tensor.numel() for tensor in whole.lora.values())
        found["accuracy"] = [whole.accuracy(examples["test"], job["max_new_tokens"])]
        found["seconds"] = []
        _warm(grid, job["clients"])
        found["trained from"] = time.time()
        for number in range(1, job["rounds"] + 1):
            begun = time.perf_counter()
            config = ConfigRecord({"round": number})
            arrays = strategy.start(grid, arrays, num_rounds=1, train_config=config).arrays
            found["seconds"].append(time.perf_counter() - begun)
            whole.lora = arrays.to_torch_state_dict()
            found["accuracy"].append(whole.accuracy(examples["test"], job["max_new_tokens"]))
            if found["accuracy"][-1] >= job["target"]:
                return

    return app


def _warm(grid, clients):
    """Every actor imports torch and loads the model before any time is taken."""
    while len(nodes := list(grid.get_node_ids())) < clients:
        time.sleep(0.1)
    asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    replies = list(grid.send_and_receive(asked))
    if any(reply.has_error() for reply in replies):
        raise RuntimeError(f"a client could not load its model: {replies[0].error}")


def _loaded(job):
    """The model and the examples, once in each process."""
    if not _LOADED:
        _LOADED["before"] = _memory("VmRSS")  # of Python, Flower and Ray, without torch
        from flower_lora import Examples, WholeModel

        _LOADED["examples"] = Examples(job["folder"])
        _LOADED["model"] = WholeModel(job["model"], job["rank"], job["alpha"], job["seed"])
    return _LOADED["model"], _LOADED["examples"]


def _memory(name):
    """Bytes, of this process; ru_maxrss would start with its parent's."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    # By its name, so that actors import this file and each has a _LOADED of its own.
    from flower_federation import main as run

    run(*sys.argv[1:])
