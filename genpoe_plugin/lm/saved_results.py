"""Save the trace in the directory of lm-eval's results.

lm-eval's sample log and response cache contain the prompts as the task made them. Only the trace contains the prompts
with passages. A model does not know where lm-eval saves its results, but lm-eval's `EvaluationTracker` does. Therefore
`save_traces` makes it save the trace as well.
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
    """The facts about a run for lm-eval's results.

    Attributes:
        trace: the trace to save beside the results; None if it is saved elsewhere.
    """

    def __init__(self, facts: dict[str, Any], trace: Trace | None) -> None:
        super().__init__(facts)
        self.trace = trace


def save_traces() -> None:
    """Make `EvaluationTracker` save the trace of the results' `RunFacts` beside the results."""
    save_results = EvaluationTracker.save_results_aggregated
    if getattr(save_results, "of_genpoe", False):
        return

    @functools.wraps(save_results)
    def save_with_trace(self: EvaluationTracker, results: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        save_results(self, results, *args, **kwargs)
        facts = results.get("config", {}).get("genpoe")
        date = getattr(self, "date_id", None)  # set when the results are saved
        if isinstance(facts, RunFacts) and facts.trace is not None and self.output_path and date:
            path = Path(self.output_path)
            single = path.suffix == ".json"
            folder = path.parent if single else path / str(self.general_config_tracker.model_name_sanitized)
            try:
                facts.trace.write(folder / TRACE.format(date=date))
            except OSError as error:  # lm-eval still has to save the samples
                _log.warning("%s: the trace cannot be written (%s)", folder, error.strerror or error)

    save_with_trace.of_genpoe = True  # type: ignore[attr-defined]
    EvaluationTracker.save_results_aggregated = save_with_trace
