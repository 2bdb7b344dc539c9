"""How updates become the next adapter: pure functions of state and updates, in numpy.

A file per family: `means`, `robust`, `optimizers`, `low_rank`, `scaffold`, `buffered`. `state` says
what a strategy is, `updates` how it reads, `choice` which one a run gets.
"""

from fednano.coordinator.strategies.buffered import Buffered
from fednano.coordinator.strategies.choice import first_adapter, initial_adapter, strategy_of
from fednano.coordinator.strategies.low_rank import FrozenDown, ProductMean, Stack
from fednano.coordinator.strategies.means import FISHER, FedAvg, FisherMerging
from fednano.coordinator.strategies.optimizers import Adaptive, FedAvgM, ServerOptimizer
from fednano.coordinator.strategies.robust import Krum, Median, TrimmedMean
from fednano.coordinator.strategies.scaffold import Scaffold
from fednano.coordinator.strategies.state import CONTROL, Merging, State, Strategy
from fednano.coordinator.strategies.updates import (
    BLOCK,
    Doubles,
    Floats,
    Readable,
    Span,
    Update,
    blocks,
    mean_of,
    merging_threads,
)

__all__ = [
    "BLOCK",
    "CONTROL",
    "FISHER",
    "Adaptive",
    "Buffered",
    "Doubles",
    "FedAvg",
    "FedAvgM",
    "FisherMerging",
    "Floats",
    "FrozenDown",
    "Krum",
    "Median",
    "Merging",
    "ProductMean",
    "Readable",
    "Scaffold",
    "ServerOptimizer",
    "Span",
    "Stack",
    "State",
    "Strategy",
    "TrimmedMean",
    "Update",
    "blocks",
    "first_adapter",
    "initial_adapter",
    "mean_of",
    "merging_threads",
    "strategy_of",
]
