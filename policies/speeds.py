"""How fast a backend is, learnt from what it does: two straight lines, each by recursive least squares.

A step of an engine takes alpha + beta * decodes + gamma * context + delta * prompt tokens (`sim/engine.py`). So the
time to a first token grows with the prompt tokens to compute before it and with the requests that are being
answered meanwhile, and the time for each token after it with the requests in the batch:

    TTFT = a + b * prompt tokens + c * others that have their first token
    TPOT = p + q * others in flight

Recursive least squares with exponential forgetting (Ljung, "System Identification", section 11.2): each sample
moves the coefficients by its surprise times a gain, and one that is `MEMORY` samples old counts 1/e. Each is
weighted by what was expected, so that an error of a tenth counts the same in a short time and in a long one.
Coefficients begin at `TTFT` and `TPOT`, which are as certain as a sample or two: a backend that nobody has tried
looks usual, not free.

A sample that took more than `MOST` times what was expected counts as `MOST` times: a stall is no speed, and taken
as it is, one of a minute would be remembered for thousands of samples, since those after it would weigh little
beside so much. Who really is slower than that is believed by and by.

Where directions are not excited (every prompt alike, never two at once) forgetting would make the gain grow without
bound; it pauses while the gain is at `MOST_GAIN`.
"""

from __future__ import annotations

from typing import Final

from policies.values import BackendView, RequestFacts

MEMORY: Final = 100
"""Samples."""
NOISE: Final = 0.1**2
"""Variance of a sample, as a share of its expected value squared: times vary by a tenth and more."""
MOST_GAIN: Final = 100.0
"""Largest sum of the covariance's diagonal, in units of `SPREAD` squared."""
MOST: Final = 10.0
"""Most that a sample counts as, as a multiple of its expected value ..."""
KNOWN: Final = 20
"""... once there are so many samples to expect it by."""
TTFT: Final[tuple[float, ...]] = (0.05, 1e-4, 1e-3)
"""Coefficients before anything is known: seconds, seconds a token, seconds a request."""
TPOT: Final[tuple[float, ...]] = (0.03, 3e-4)
TPOT_FLOOR_S: Final = 0.001
TTFT_FLOOR_S: Final = 0.01
"""What is expected to take less is weighted as if it took this long."""
FASTEST_S: Final = 1e-6
"""That a request takes at least: all coefficients of who answers at once may be 0."""


class Line:
    """Coefficients of a linear model of two or three inputs, from samples one by one."""

    __slots__ = ("_covariance", "_floor", "_forget", "_scale", "samples", "theta")

    def __init__(self, prior: tuple[float, ...], floor: float) -> None:
        """`prior`: where the coefficients begin; each is taken to be off by as much as it is. `floor`: the shortest
        time that a sample is weighted by, seconds."""
        size = len(prior)
        self.theta = list(prior)
        self._covariance = [[prior[i] ** 2 if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._scale = [1.0 / one**2 for one in prior]
        self._floor = floor
        self._forget = 1.0 - 1.0 / MEMORY
        self.samples = 0

    def expected(self, inputs: tuple[float, ...]) -> float:
        total = 0.0
        for one, value in zip(self.theta, inputs, strict=True):
            total += one * value
        return total

    def note(self, inputs: tuple[float, ...], seconds: float) -> None:
        """A sample: with these inputs it took so long."""
        size = len(self.theta)
        covariance = self._covariance
        direction = [0.0] * size
        spread = 0.0
        for i in range(size):
            total = 0.0
            row = covariance[i]
            for j in range(size):
                total += row[j] * inputs[j]
            direction[i] = total
            spread += inputs[i] * total
        expected = self.expected(inputs)
        usual = max(expected, self._floor)
        if self.samples >= KNOWN:
            seconds = min(seconds, MOST * usual)
        variance = NOISE * usual**2
        gain = 1.0 / (self._forget * variance + spread)
        surprise = seconds - expected
        trace = 0.0
        for i in range(size):
            self.theta[i] += direction[i] * gain * surprise
            row = covariance[i]
            for j in range(i, size):
                row[j] -= direction[i] * gain * direction[j]
                covariance[j][i] = row[j]  # the same to the last bit: forgetting makes any difference grow
            trace += row[i] * self._scale[i]
        if trace < MOST_GAIN:
            for row in covariance:
                for j in range(size):
                    row[j] /= self._forget
        self.samples += 1

    @property
    def coefficients(self) -> tuple[float, ...]:
        """None below zero: more work never takes less time."""
        return tuple([max(one, 0.0) for one in self.theta])


class Speed:
    """What is learnt of one backend."""

    __slots__ = ("tpot", "ttft")

    def __init__(self) -> None:
        self.ttft = Line(TTFT, TTFT_FLOOR_S)
        self.tpot = Line(TPOT, TPOT_FLOOR_S)


def ttft_s(backend: BackendView, request: RequestFacts) -> float:
    """Expected seconds to the first token if the request were sent there now."""
    fit = backend.ttft_fit or TTFT
    tokens = backend.prefill_tokens + request.new_tokens(backend.name)
    return fit[0] + fit[1] * tokens + fit[2] * (backend.in_flight - backend.prefilling)


def tpot_s(backend: BackendView, in_flight: float | None = None) -> float:
    """Expected seconds for each token after the first beside so many others; None: those that it has now."""
    fit = backend.tpot_fit or TPOT
    return fit[0] + fit[1] * (backend.in_flight if in_flight is None else in_flight)


def capacity_rps(backend: BackendView, prompt_tokens: float, output_tokens: float) -> float:
    """Requests a second that it serves with all slots taken: slots over the time that one takes then.

    `prompt_tokens` and `output_tokens`: of the usual request. Each first token then waits for one other prompt at
    least now and then; that is left out.
    """
    fit = backend.ttft_fit or TTFT
    others = max(backend.slots - 1, 0)
    first = fit[0] + fit[1] * prompt_tokens + fit[2] * others
    seconds = first + tpot_s(backend, others) * max(output_tokens - 1.0, 0.0)
    return backend.slots / max(seconds, FASTEST_S)
