"""One model over two ranks: the service computes what one process does, and the ranks end together.

The ranks are processes that talk by gloo, as on machines without a GPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from fednano.client.remote import RemoteLanguageModel
from fednano.lab.redis_server import free_port
from fednano.llm.ranks import Follower, LeadingLLM, Order, Ranks
from fednano.models.activations import Activations
from fednano.models.frozen import FrozenLLM
from fednano.models.language_model import LowRank, Sampling, Sequences

from tests.client.serving import PUBLIC, remote
from tests.llm.test_life import invoke
from tests.models.causal import HIDDEN, LENGTHS, build, packed, several_labels

WEIGHTS = torch.tensor([0.3, 0.1, 2.0])
WANTED = torch.tensor([4, 8, 19])
KEPT_TOKENS = 2 * sum(LENGTHS)
BIN = Path(sys.executable).parent
LAST = (63,)  # seldom written, so that answers are long


def fednano_llm(model: Path, directory: Path) -> list[str]:
    flags = {"model": model, "port": 0, "metrics-port": -1, "threads": 1, "log-json": None}
    flags |= {"ready-file": directory / "ready.json", "activation-tokens": KEPT_TOKENS}
    given = [f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items()]
    return [str(BIN / "fednano"), "llm", *given, "--tensor-parallel"]


def start(command: list[str], directory: Path, **environment: str) -> subprocess.Popen[bytes]:
    ours = {"FEDNANO_LLM_SESSION_PUBLIC_KEY": PUBLIC.decode(), "OMP_NUM_THREADS": "1"}
    with (directory / "log").open("ab") as log:
        return subprocess.Popen(
            command, env={**os.environ, **ours, **environment}, stdout=log, stderr=log
        )


def wait_for(found: Callable[[], bool], what: str, directory: Path) -> None:
    deadline = time.monotonic() + 100  # busy machines take long to import torch
    while not found():
        assert time.monotonic() < deadline, f"{what}:\n{(directory / 'log').read_text()[-3000:]}"
        time.sleep(0.05)


def port_of(directory: Path) -> int:
    ready = directory / "ready.json"
    wait_for(ready.exists, "ready", directory)
    return int(json.loads(ready.read_text())["port"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build(positions=4000).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def single(model: Path) -> FrozenLLM:
    return FrozenLLM.load(model, device="cpu")


@dataclass
class Service:
    torchrun: subprocess.Popen[bytes]
    port: int


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """As the documentation starts it."""
    directory = tmp_path_factory.mktemp("service")
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python"]
    with start([*torchrun, *fednano_llm(model, directory)], directory) as process:
        try:
            yield Service(process, port_of(directory))
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def llm(service: Service) -> Iterator[RemoteLanguageModel]:
    with remote(service.port) as client:
        yield client


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for fp32's rounding: sums over two ranks are added in another order."""
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * largest)


def test_a_step_on_two_ranks_is_that_of_one_process(llm, single):
    sequences, labels = packed(single), several_labels()
    found, expected = (m.step(sequences, labels, WEIGHTS) for m in (llm, single))
    near(found.loss_sums, expected.loss_sums)
    near(found.gradient, expected.gradient)
    assert found.token_counts.tolist() == [3, 1, 5]
    assert expected.gradient.abs().max() > 1


def test_scores_and_embeddings_on_two_ranks_are_those_of_one_process(llm, single):
    sequences, labels = packed(single), several_labels()
    found, expected = (m.score(sequences, labels) for m in (llm, single))
    near(found.loss_sums, expected.loss_sums)
    assert found.correct_counts.tolist() == expected.correct_counts.tolist()
    ids = torch.tensor([3, 63, 1])
    assert torch.equal(llm.embed(ids), single.embed(ids))


def test_activations_lie_on_both_ranks_until_the_first_lets_go(llm, single):
    """More are asked for than are kept: the oldest is computed again."""
    batches = [packed(single, seed=seed) for seed in range(4)]
    above = torch.randn(3, single.vocabulary, generator=torch.Generator().manual_seed(1))
    kept = [llm.forward(batch, WANTED) for batch in batches]
    for batch, found in zip(batches, kept, strict=True):
        expected = single.forward(batch, WANTED)
        near(found.logits, expected.logits)
        gradient = single.backward(expected.activation, above, batch, WANTED)
        near(llm.backward(found.activation, above, batch, WANTED), gradient)
    unkept = llm.forward(batches[0], WANTED, keep=False)
    near(unkept.logits, kept[0].logits)
    assert unkept.activation == ""


def ids_of(written: Iterator[list]) -> list[tuple[int, int]]:
    return [(token.sample, token.id) for tokens in written for token in tokens]


def adapter() -> LowRank:
    made = torch.Generator().manual_seed(3)
    return LowRank(
        torch.randn(4, HIDDEN, generator=made), torch.randn(HIDDEN, 4, generator=made), 0.3
    )


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_of_two_ranks_are_those_of_one_process(llm, single, temperature):
    sampling = Sampling(12, temperature=temperature, seed=5, stop_ids=LAST)
    sequences = packed(single)
    found, expected = (ids_of(m.generate(sequences, sampling, adapter())) for m in (llm, single))
    assert found == expected
    assert len(found) > 12


def test_the_ranks_stay_together_whatever_comes_between_two_tokens(llm, single):
    """Answers that are written at once, one that nobody reads to its end, and training."""
    sequences, labels = packed(single), several_labels()
    long = Sampling(40, temperature=1.0, seed=1, stop_ids=LAST)
    left = llm.generate(sequences, Sampling(1000, stop_ids=LAST))
    next(left)
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(lambda: ids_of(llm.generate(sequences, long, adapter()))) for _ in range(2)
        ]
        steps = [pool.submit(llm.step, sequences, labels, WEIGHTS) for _ in range(6)]
        left.close()
        expected = single.step(sequences, labels, WEIGHTS)
        for step in steps:
            near(step.result(60).gradient, expected.gradient)
        written = ids_of(single.generate(sequences, long, adapter()))
        assert [answer.result(60) for answer in answers] == [written, written]


@dataclass
class Pair:
    """Two ranks without torchrun, which would end the other when one ends."""

    leader: subprocess.Popen[bytes]
    follower: subprocess.Popen[bytes]
    directory: Path


@contextmanager
def pair(model: Path, directory: Path) -> Iterator[Pair]:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        start(fednano_llm(model, directory), directory, RANK=rank, LOCAL_RANK=rank, **meeting)
        for rank in ("0", "1")
    ]
    try:
        port_of(directory)
        yield Pair(*ranks, directory)
    finally:
        for process in ranks:
            process.kill()
            process.wait(30)


def test_terminated_ranks_finish_what_they_have_begun_and_end_well(model, single, tmp_path):
    """The signal reaches all, as torchrun passes it on."""
    sampling = Sampling(60, temperature=1.0, seed=2, stop_ids=LAST)
    with pair(model, tmp_path) as ranks, remote(port_of(tmp_path)) as llm:
        answer = llm.generate(packed(single), sampling)
        first = next(answer)
        for process in (ranks.follower, ranks.leader):
            process.send_signal(signal.SIGTERM)
        found = ids_of(iter([first, *answer]))
        assert (ranks.leader.wait(30), ranks.follower.wait(30)) == (0, 0)
    assert found == ids_of(single.generate(packed(single), sampling))


def carriers() -> int:
    """Threads of this process that carry what groups send."""
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith("pt_gloo") for name in names)


def test_closing_ends_the_threads_that_carry_orders(tmp_path):
    """One that still frees a tensor when Python ends would abort the process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    ranks = Ranks()
    ranks.tell(Order("embed", (torch.tensor([1]),)))
    carrying = carriers()
    ranks.close()
    assert carrying > 0
    assert carriers() == 0
    assert not dist.is_initialized()


def test_when_a_rank_is_killed_the_first_ends_within_seconds(model, tmp_path):
    """Nobody calls meanwhile, so that nobody's call finds out."""
    with pair(model, tmp_path) as ranks:
        ranks.follower.kill()
        assert ranks.leader.wait(10) == 1
    assert "rank lost" in (tmp_path / "log").read_text()


def test_when_the_first_rank_is_killed_nothing_of_the_service_is_left(service):
    """The last test of the service that the tests above asked."""
    ranks = psutil.Process(service.torchrun.pid).children(recursive=True)
    (first,) = [process for process in ranks if process.environ().get("RANK") == "0"]
    first.kill()
    assert service.torchrun.wait(20) == 1
    assert psutil.wait_procs(ranks, timeout=1)[1] == []


def test_without_torchrun_the_command_is_shown(tmp_path, keys):
    key = {"FEDNANO_LLM_SESSION_PUBLIC_KEY": keys[1].decode()}
    result = invoke("--model", tmp_path, "--tensor-parallel", env=key)
    assert result.exit_code == 2
    assert "torchrun --standalone --nproc-per-node N --no-python fednano llm" in result.output


class Straight(Ranks):
    """Orders go to a follower in this process."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower

    def tell(self, order: Order) -> None:
        self._follower.follow(order)


@pytest.fixture
def follower() -> Follower:
    return Follower(FrozenLLM(build(), "mark"))


def leading(follower: Follower, **kept: float) -> LeadingLLM:
    activations = Activations("here", **{"tokens": KEPT_TOKENS, "seconds": 600, **kept})
    return LeadingLLM(build(), "mark", "small", activations, ranks=Straight(follower))


def test_the_others_hold_as_many_activations_as_the_first(follower):
    leader = leading(follower)
    sequences: Sequences = packed(leader)
    names = [leader.forward(sequences, WANTED).activation for _ in range(5)]
    leader.rest()
    assert len(follower.held) == len(leader.activations) == 2
    leader.backward(names[-1], torch.zeros(3, leader.vocabulary))
    leader.rest()
    assert len(follower.held) == 1


def test_time_is_the_first_ranks_to_tell(follower):
    leader = leading(follower, seconds=0.01)
    leader.forward(packed(leader), WANTED)
    assert len(follower.held) == 1
    time.sleep(0.02)
    leader.activations.expire()
    leader.rest()
    assert not follower.held


def test_an_answer_that_nobody_reads_on_is_forgotten_by_all(follower):
    leader = leading(follower)
    answer = leader.generate(packed(leader), Sampling(20, stop_ids=LAST))
    next(answer)
    assert len(follower.held) == 1
    del answer
    leader.rest()
    assert not follower.held
