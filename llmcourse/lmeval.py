"""The course's models in lm-evaluation-harness, and the course's items as one of its tasks.

Hand-written; lm-eval is imported on first use (`pip install 'llmcourse[eval]'`). Chapter `nbs/05c_accuracy.ipynb`
builds the same scores by hand.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from llmcourse.accuracy import Item, Pair, check_items, token_loglikelihood
from llmcourse.data import separator_id
from llmcourse.modelfolder import positions_of
from llmcourse.runtime import Runtime, evaluating
from llmcourse.settings import BadInput, require, whole

__all__ = ["course_lm", "items_task", "run"]


def course_lm(
    model: Any, tokenizer: Any, *, batch_size: int = 8, context: int | None = None, rt: Runtime | None = None
) -> Any:
    """A model of the course (ours, of transformers, packed, or a function of ids) as an `LM` of lm-eval.

    Args:
        context: tokens that the model reads at once; None: its positions.
    Raises:
        BadInput: lm-eval is not installed.
    """
    return _lm_class()(model, tokenizer, batch_size, context, rt)


@functools.cache
def _lm_class() -> type:
    _check_installed()
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class CourseLM(TemplateLM):
        """Texts are cut by lm-eval, tokens are scored by the course."""

        def __init__(self, model: Any, tokenizer: Any, batch_size: int, context: int | None, rt: Runtime | None):
            super().__init__()
            self.model, self.tokenizer, self.rt = model, tokenizer, rt
            self.batch_size = whole("batch_size", batch_size, 1)
            known = positions_of(model) or 1024
            self.context = whole("context", known if context is None else context, 2)

        @property
        def eot_token_id(self) -> int:
            return separator_id(self.tokenizer)

        @property
        def tokenizer_name(self) -> str:
            return str(getattr(self.tokenizer, "name_or_path", type(self.tokenizer).__name__))

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            special = True if add_special_tokens is None else add_special_tokens
            return self.tokenizer(string, add_special_tokens=special)["input_ids"]

        def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            pairs = [Pair(list(before), list(after), True) for _, before, after in requests]
            found = token_loglikelihood(self.model, pairs, batch_size=self.batch_size, rt=self.rt)
            return [(x.value, x.greedy) for x in found]

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id, max_seq_len=self.context, context_len=1,
                )  # fmt: skip
                pairs = [(None, *make_disjoint_window(window)) for window in windows]
                totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)) if pairs else 0.0)
            return totals

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            return [self._continue(*request.args) for request in requests]

        def _continue(self, text: str, options: dict) -> str:
            """Greedy, one forward pass a token: any model can do that."""
            require(not options.get("do_sample"), "do_sample", True, "False: this adapter decodes greedily")
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            budget = int(options.get("max_gen_toks", 256))
            device = torch.device("cpu") if self.rt is None else self.rt.device
            parameter = next(self.model.parameters(), None) if hasattr(self.model, "parameters") else None
            device = device if parameter is None else parameter.device
            ids, new, said = self.tok_encode(text) or [self.prefix_token_id], [], ""
            with evaluating(self.model):
                while len(new) < budget and not any(stop in said for stop in stops):
                    out = self.model(torch.tensor([(ids + new)[-self.context :]], device=device))
                    token = int((out if torch.is_tensor(out) else out.logits)[0, -1].argmax())
                    if token == self.eot_token_id or token == self.tokenizer.eos_token_id:
                        break
                    new.append(token)
                    said = self.tokenizer.decode(new)
            return said[: min((said.index(stop) for stop in stops if stop in said), default=len(said))]

    return CourseLM


def items_task(items: Sequence[Item], *, name: str = "course_items", delimiter: str = " ") -> Any:
    """Items as a task of lm-eval, defined in Python: it reads no file and asks no hub."""
    _check_installed()
    check_items(items)
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    rows = [{"context": i.context, "choices": list(i.choices), "answer": i.answer} for i in items]
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: DatasetDict({"test": Dataset.from_list(rows)}),
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": lambda row: row["context"],
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["answer"],
            "target_delimiter": delimiter,
            "metric_list": metrics,
            "num_fewshot": 0,
        }
    )


def run(model: Any, tokenizer: Any, items: Sequence[Item], **options: Any) -> dict[str, Any]:
    """Score items with lm-eval: its results of the task, with `samples`; options of `course_lm`."""
    task = items_task(items)
    from lm_eval.evaluator import evaluate

    found = evaluate(course_lm(model, tokenizer, **options), {"course_items": task}, bootstrap_iters=0)
    return found["results"]["course_items"] | {"samples": found["samples"]["course_items"]}


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInput("lm-eval is not installed; allowed: after pip install 'llmcourse[eval]'.")
