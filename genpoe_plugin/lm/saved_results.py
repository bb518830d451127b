"""What lm-eval saves of a run, and the trace beside it.

lm-eval's sample log holds the requests as the task made them, and its cache has its keys from the same; so the prompt
with passages in it cannot be there. It is in the trace, which for want of another place goes where the results go. A
model is not told where that is. lm-eval's `EvaluationTracker` knows, so that saves the trace too.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker

from genpoe_plugin.selection.trace import TRACE, Trace

_log = logging.getLogger(__name__)


class RunFacts(dict[str, Any]):
    """What a model says of its run in lm-eval's results, and the trace that is to be saved with them, if one is."""

    def __init__(self, facts: dict[str, Any], trace: Trace | None) -> None:
        super().__init__(facts)
        self.trace = trace


def save_traces() -> None:
    """From now on, whatever saves lm-eval's results saves the trace of their `RunFacts` beside them."""
    save_results = EvaluationTracker.save_results_aggregated
    if getattr(save_results, "of_genpoe", False):
        return

    @functools.wraps(save_results)
    def save_both(self: EvaluationTracker, results: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        save_results(self, results, *args, **kwargs)
        facts = results.get("config", {}).get("genpoe")
        date = getattr(self, "date_id", None)  # which it gets once the results are saved
        if isinstance(facts, RunFacts) and facts.trace is not None and self.output_path and date:
            path = Path(self.output_path)
            single = path.suffix == ".json"
            folder = path.parent if single else path / str(self.general_config_tracker.model_name_sanitized)
            try:
                facts.trace.write(folder / TRACE.format(date=date))
            except OSError as error:  # the samples are still to be saved
                _log.warning("%s: the trace cannot be written (%s)", folder, error.strerror or error)

    save_both.of_genpoe = True  # type: ignore[attr-defined]
    EvaluationTracker.save_results_aggregated = save_both
