"""A judge of answers that is one of lm_eval's model classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model

from genpoe_plugin.errors import InputError


class LMJudge:
    """An LLM behind a model class of lm_eval that has log-likelihoods. It is loaded when it first judges.

    Args:
        pretrained: directory or hub name of the LLM.
        model: name of the model class, such as ``hf`` or ``vllm``.
        model_args: further arguments of the model class, as in lm_eval's ``--model_args``.

    Attributes:
        name: class and arguments, as they stand beside each judgement.
    """

    def __init__(self, pretrained: str, model: str = "hf", model_args: str = "") -> None:
        self._pretrained, self._model = pretrained, model
        self._arguments = f"pretrained={pretrained}{',' if model_args else ''}{model_args}"
        self.name = f"{model}:{self._arguments}"

    @cached_property
    def _lm(self) -> LM:
        try:
            return get_model(self._model).create_from_arg_string(self._arguments)
        except Exception as error:  # each model class has its own errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"--judge {self._pretrained}: cannot be loaded ({reason}); give a directory or a hub name, and "
                f"arguments of lm_eval's model class {self._model}"
            ) from error

    def log_likelihoods(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[list[float]]:
        """The log-likelihood, in nats, of every continuation after every prompt, ``[prompts, continuations]``.

        Raises:
            InputError: there is no such model class, or it cannot be loaded.
        """
        requests = [
            Instance("loglikelihood", {}, (prompt, continuation), index, ("judge", number, 1))
            for number, prompt in enumerate(prompts)
            for index, continuation in enumerate(continuations)
        ]
        values = [float(value) for value, _ in self._lm.loglikelihood(requests, disable_tqdm=True)]
        width = len(continuations)
        return [values[start : start + width] for start in range(0, len(values), width)]
