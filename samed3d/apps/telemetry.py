"""What the server counts, as Prometheus text: requests, durations, sessions, waiting jobs, memory. No library is needed
for it.
"""

from __future__ import annotations

import resource
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Telemetry:
    """Counters of one server; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._buckets: Counter[float] = Counter()
        self._predictions, self._seconds = 0, 0.0

    def request(self, method: str, route: str, status: int) -> None:
        """Count an answered request; ``route`` is the pattern, so that ids do not become labels."""
        with self._lock:
            self._requests[method, route, status] += 1

    def prediction(self, seconds: float) -> None:
        """Count a prompt that was answered with a mask."""
        with self._lock:
            self._predictions += 1
            self._seconds += seconds
            self._buckets.update(bucket for bucket in BUCKETS_S if seconds <= bucket)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """The page of ``/metrics``.

        Args:
            gauges: Name to (help, value) of what is measured at this moment.
        """
        with self._lock:
            requests, buckets = sorted(self._requests.items()), dict(self._buckets)
            predictions, seconds = self._predictions, self._seconds
        lines = ["# HELP samed3d_requests_total Answered requests.", "# TYPE samed3d_requests_total counter"]
        lines += [f'samed3d_requests_total{{method="{m}",route="{r}",status="{s}"}} {n}' for (m, r, s), n in requests]
        lines += [
            "# HELP samed3d_prediction_seconds Time from a prompt's turn to its mask.",
            "# TYPE samed3d_prediction_seconds histogram",
        ]
        lines += [
            f'samed3d_prediction_seconds_bucket{{le="{bucket:g}"}} {buckets.get(bucket, 0)}' for bucket in BUCKETS_S
        ]
        lines += [
            f'samed3d_prediction_seconds_bucket{{le="+Inf"}} {predictions}',
            f"samed3d_prediction_seconds_sum {seconds:.6f}",
            f"samed3d_prediction_seconds_count {predictions}",
        ]
        for name, (meaning, value) in gauges.items():
            lines += [f"# HELP samed3d_{name} {meaning}", f"# TYPE samed3d_{name} gauge", f"samed3d_{name} {value:g}"]
        return "\n".join(lines) + "\n"


def resident_bytes() -> int:
    """Memory of this process now; its peak where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()
