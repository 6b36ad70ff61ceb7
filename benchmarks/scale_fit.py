"""Fits the parameters of scale_model.py to measured times: relative least squares, by Gauss-Newton with numpy alone.

Parameters are fitted as logarithms, so they stay positive, and within a factor of where they start, since points that
know nothing of one would have it vanish. What is reported beside the fit: the standard error of each,
and for each point the errors of two fits that did not see it: of one to all other points, and of one to those of all
other cases (the same sizes in another way or run are not seen either). A parameter about which the rest says nothing
stays as it was there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.scale_model import Machine
from benchmarks.scale_points import HOSTS, START, START_AGREED, START_SLABS, STARTS, STEPS_ON, Point, Setting

ROUNDS = 30
# of a logarithm, for numeric derivatives
STEP = 1e-4
# GiB that a job can have of each card
ROOM_GIB = {"H100": 79, "H200": 139}
# a step of Gauss-Newton changes no parameter by more than this factor's logarithm, and all of them no more than that;
# where nothing changes by more than the third, it ends
LARGEST, FARTHEST, SMALLEST = 0.7, np.log(30), 1e-6


@dataclass(frozen=True)
class Parameter:
    name: str
    unit: str
    scale: float  # SI units in one of these
    start: float
    meaning: str


ATTENTION = "rate of causal attention, forward and backward, half of the square"

PARAMETERS = (
    Parameter("products", "TFLOP/s", 1e12, 700, "rate of matrix products in a head that is measured alone, on H100"),
    *(Parameter(f"products {name}", "TFLOP/s", 1e12, 700, "in steps; of H200 in heads as well") for name in STEPS_ON),
    *(Parameter(f"attention {name}", "TFLOP/s", 1e12, 400, ATTENTION) for name in STEPS_ON),
    Parameter("memory H100", "TB/s", 1e12, 3.0, "bytes that element-wise kernels read and write"),
    Parameter("memory H200", "TB/s", 1e12, 3.0, "the same"),
    Parameter("delay", "GB/s", 1e9, 400, "bytes over NVLink for each second by which transfers delay products"),
    Parameter("collective", "us", 1e-6, 50, "by how much each delays them beside its bytes"),
    *(
        Parameter(f"hook {name}", "us", 1e-6, 2000, "host time of a module's gather and release under ZeRO-3, a pass")
        for name in HOSTS
    ),
    # it has one hook, but each of its weights is looked for, waited for and let go by itself
    Parameter("leaf", "hooks", 1, 7, "what a decoder layer that is gathered as one takes the host, a pass"),
    Parameter("wait", "ms", 1e-3, 15, "of a whole step: the host's way to its first product and to the optimizer"),
    Parameter(START, "ms", 1e-3, 3, "host time before the first product of a head that is measured alone"),
    Parameter(START_SLABS, "ms", 1e-3, 3, "the same in mode stream, since it has 18 small kernels for 166"),
    Parameter(START_AGREED, "ms", 1e-3, 3, "the same in modes stationary and auto, where hosts agree on tokens first"),
)


def setting(values: Sequence[float]) -> Setting:
    """Of values in the units of PARAMETERS."""
    of = {parameter.name: value * parameter.scale for value, parameter in zip(values, PARAMETERS, strict=True)}

    def machine(card: str, gemm: str, host: str, attention: str) -> Machine:
        names = (gemm, attention, f"memory {card}", "delay", "collective", f"hook {host}", "leaf", "wait")
        return Machine(*(of[name] for name in names), ROOM_GIB[card] * 2**30)

    def of_steps(name: str, host: str) -> Machine:
        return machine(name.split()[-1], f"products {name}", host, f"attention {name}")

    # no step of one GPU was of ZeRO-3
    machines = {name: of_steps(name, name if name in HOSTS else "2 x H100") for name in STEPS_ON}
    # a head alone waits for no hook, and has no attention
    machines |= {"H100": machine("H100", "products", "2 x H100", "attention 2 x H100"), "H200": machines["4 x H200"]}
    return Setting(machines, {name: of[name] for name in STARTS})


@dataclass(frozen=True)
class Fit:
    values: np.ndarray  # in the units of PARAMETERS
    errors: np.ndarray  # standard errors of the same, relative; infinite where it is not determined
    points: Sequence[Point]

    @property
    def setting(self) -> Setting:
        return setting(self.values)

    # a fit for each point and for each case, which take far longer than the one to all: made when they are asked for
    @cached_property
    def left_out(self) -> np.ndarray:
        """Of each point: relative error of the fit to the others."""
        return np.array([residuals(self._without([point]), [point])[0] for point in self.points])

    @cached_property
    def case_left_out(self) -> np.ndarray:
        """Of each point: relative error of the fit to other cases."""
        without = {
            case: self._without([point for point in self.points if point.case == case])
            for case in dict.fromkeys(point.case for point in self.points)
        }
        return np.array([residuals(without[point.case], [point])[0] for point in self.points])

    def _without(self, some: Sequence[Point]) -> np.ndarray:
        unseen = set(map(id, some))
        return solve([point for point in self.points if id(point) not in unseen], np.log(self.values))


def residuals(logs: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    """Relative errors."""
    there = setting(np.exp(logs))
    return np.array([point.model(there) / point.measured - 1 for point in points])


def _slopes(logs: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    columns = []
    for i in range(len(logs)):
        step = np.zeros_like(logs)
        step[i] = STEP
        columns.append((residuals(logs + step, points) - residuals(logs - step, points)) / (2 * STEP))
    return np.stack(columns, axis=1)


def _starts() -> np.ndarray:
    return np.log([parameter.start for parameter in PARAMETERS])


def at_bounds(logs: np.ndarray) -> np.ndarray:
    """Which parameters are as far from their start as they may be: the points don't determine them."""
    return np.abs(logs - _starts()) >= FARTHEST - 1e-9


def solve(points: Sequence[Point], logs: np.ndarray | None = None) -> np.ndarray:
    logs = _starts() if logs is None else logs
    errors = residuals(logs, points)
    for _ in range(ROUNDS):
        slopes = _slopes(logs, points)
        step = np.linalg.lstsq(slopes, -errors, rcond=None)[0]
        # those at their bounds that would go on stay, and the others are solved for without them
        held = at_bounds(logs) & (step * (logs - _starts()) > 0)
        step = np.zeros_like(logs)
        step[~held] = np.linalg.lstsq(slopes[:, ~held], -errors, rcond=None)[0]
        step = np.clip(step, -LARGEST, LARGEST)
        # where a step begins to wait for the host slopes change: one that goes beyond that may lead away
        while True:
            tried = np.clip(logs + step, _starts() - FARTHEST, _starts() + FARTHEST)
            tried_errors = residuals(tried, points)
            if tried_errors @ tried_errors < errors @ errors:
                break
            step /= 2
            if np.abs(step).max() < SMALLEST:
                return logs
        before, logs, errors = logs, tried, tried_errors
        if np.abs(logs - before).max() < SMALLEST:
            break
    return logs


def fit(points: Sequence[Point]) -> Fit:
    """Of times; the points that are to be explained, all of them."""
    if len(points) <= len(PARAMETERS):
        raise ValueError(f"scale: {len(points)} points can't fix {len(PARAMETERS)} parameters")
    logs = solve(points)
    slopes, errors = _slopes(logs, points), residuals(logs, points)
    variance = errors @ errors / (len(points) - len(PARAMETERS))
    told = ~at_bounds(logs) & np.any(slopes != 0, axis=0)
    deviations = np.full(len(logs), np.inf)
    deviations[told] = np.sqrt(variance * np.square(np.linalg.pinv(slopes[:, told])).sum(axis=1))
    return Fit(np.exp(logs), deviations, points)
