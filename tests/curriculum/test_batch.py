"""Procedures as arrays are those that are drawn one by one, and so are their shortcuts' answers."""

import random
from collections import Counter

import numpy as np
import pytest

from isomorph.curriculum.tasks.batch import ANSWERS, fitted_weights, random_batch, unsolved
from isomorph.curriculum.tasks.longest_path import finish_times
from isomorph.curriculum.tasks.procedure import Difficulty, random_graph, random_procedure
from isomorph.curriculum.tasks.shortcuts import SHORTCUTS, BagOfNumbers, StepGraph, is_solved

SHUFFLED = Difficulty(min_steps=6, max_steps=6, max_predecessors=3, shuffled=True, units=("min", "hour"))


def test_the_shortcuts_of_a_batch_are_those_of_each_procedure() -> None:
    batch = random_batch(np.random.default_rng(0), SHUFFLED, 400, 6)
    answers = {name: answer(batch) for name, answer in ANSWERS.items()}
    assert set(answers) == set(SHORTCUTS)
    num_unsolved = 0
    for k in range(400):
        number = batch.number[k]
        amounts, before = [0] * 6, [()] * 6
        for j in range(6):
            amounts[number[j]] = int(batch.amounts[k, j])
            before[number[j]] = tuple(sorted(int(number[i]) for i in np.flatnonzero(batch.before[k, j])))
        graph = StepGraph.of(amounts, before)
        assert int(batch.finish[k].max()) == graph.total == max(finish_times(amounts, before))
        for name, shortcut in SHORTCUTS.items():
            assert shortcut(graph) == answers[name][k], (name, amounts, before)
        num_unsolved += not is_solved(graph)
    assert len(unsolved(batch).amounts) == num_unsolved > 5


@pytest.mark.parametrize("draw", ["procedure", "graph"])
def test_a_batch_has_the_distribution_of_procedures_drawn_one_by_one(draw: str) -> None:
    num = 4000
    batch = random_batch(np.random.default_rng(1), SHUFFLED, num, 6)
    rng = random.Random(2)
    if draw == "graph":
        drawn = [random_graph(rng, SHUFFLED, "train") for _ in range(num)]
        graphs = [one[1] for one in drawn if one is not None]
    else:
        graphs = [random_procedure(rng, SHUFFLED).graph for _ in range(num)]
    assert len(graphs) == num  # split_by = "procedure": a graph alone belongs to no split
    for of_batch, of_graphs in (
        (batch.before.sum((1, 2)), [sum(map(len, graph.predecessors)) for graph in graphs]),
        (batch.finish.max(1) // 20, [graph.total // 20 for graph in graphs]),
    ):
        one, other = Counter(of_batch.tolist()), Counter(of_graphs)
        values = [v for v in one | other if one[v] + other[v] >= 20]
        # two samples of one distribution: chi-squared with len(values) - 1 degrees of freedom
        statistic = sum((one[v] - other[v]) ** 2 / (one[v] + other[v]) for v in values)
        assert statistic < len(values) + 5 * (2 * len(values)) ** 0.5


def test_the_bag_of_numbers_is_exact_where_the_answer_is_linear_in_it() -> None:
    chains = Difficulty(min_steps=3, max_steps=4, edge_probability=1.0, max_predecessors=4)  # the sum
    bag = BagOfNumbers(fitted_weights(chains))
    assert bag(StepGraph.of([5, 2, 7], [(), (0,), (0, 1)])) == 14
    assert bag(StepGraph.of([5], [()])) == 0  # no such size
    assert bag.weights[3] == pytest.approx(fitted_weights(chains)[3], abs=0)
