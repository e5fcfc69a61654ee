"""Flows in several Python threads, with one kernel thread, and in forked data loader workers."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowkernels import testing
from flowkernels.models import IAF, MAF


def work(flow: Any) -> list[Tensor]:
    """Samples, their densities and the gradients of both."""
    x, log_prob = flow.sample_and_log_prob(200, seed=3)
    grads = torch.autograd.grad(x.square().mean() + log_prob.mean(), list(flow.parameters()))
    with torch.no_grad():
        return [x.detach(), log_prob.detach(), *grads, flow.log_prob(x.detach()), flow.sample(3, seed=1)]


def in_threads(calls: list[Callable[[], list[Tensor]]], repeats: int = 3) -> list[list[list[Tensor]]]:
    """What every call gives when all of them run at once."""
    results: list[list[list[Tensor]]] = [[] for _ in calls]
    errors: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def run(i: int) -> None:
        try:
            start.wait(60)
            for _ in range(repeats):
                results[i].append(calls[i]())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


def test_one_model_in_several_threads() -> None:
    flow = MAF(12, (40, 40), 2)
    expected = work(flow)
    for results in in_threads([lambda: work(flow)] * 4):
        for result in results:
            testing.assert_same_bits(result, expected)


def test_one_model_whose_first_calls_are_in_several_threads() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        flow = MAF(12, (40, 40), 2)
        results = [r for thread in in_threads([lambda f=flow: work(f)] * 4, repeats=1) for r in thread]
        expected = work(flow)
        for result in results:
            testing.assert_same_bits(result, expected)


def test_different_models_in_several_threads() -> None:
    flows = [MAF(12, (40, 40), 2), IAF(7, (30,), 2), MAF(5, (16, 16), 1, residual=True), IAF(9, (20,), 1, form="gate")]
    expected = [work(flow) for flow in flows]
    for results, right in zip(in_threads([lambda f=f: work(f) for f in flows]), expected, strict=True):
        for result in results:
            testing.assert_same_bits(result, right)


def test_each_thread_trains_its_own_model() -> None:
    def train() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        flow = MAF(5, (16,), 2)
        with torch.no_grad():
            for p in flow.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
        for step in range(5):
            optimizer.zero_grad()
            flow.rsample(20, seed=step).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in flow.parameters()]

    expected = train()
    for results in in_threads([train] * 3, repeats=2):
        for result in results:
            testing.assert_same_bits(result, expected)


def test_one_kernel_thread_gives_the_same_bits() -> None:
    flow = MAF(12, (40, 40), 2)
    expected = work(flow)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            testing.assert_same_bits(work(flow), expected)
    finally:
        torch.set_num_threads(before)


class Samples(Dataset[Tensor]):
    """Draws from a flow inside the worker, as simulation pipelines do."""

    def __init__(self, flow: MAF) -> None:
        self.flow = flow

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        x = self.flow.sample(40, seed=i)
        return torch.cat([x, self.flow.log_prob(x).detach()[:, None]], dim=1)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    flow = MAF(12, (40, 40), 2)
    data = Samples(flow)
    expected = torch.stack([data[i] for i in range(6)])  # the parent has used its threads before it forks
    if start == "fork":
        work(flow)
    loader = DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=start, timeout=120)
    got = torch.cat(list(loader))
    testing.assert_same_bits(got, expected)
    testing.assert_same_bits(data[0], expected[0])
