"""A small exercise sheet with one exercise of each kind, for tests of the machine. Built in a temporary folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import nbformat

ROOT = Path(__file__).resolve().parent.parent

CELLS = r'''
# %% [markdown]
# # Exercises: example

# %%
#| export: true
import math

import torch
from torch import Tensor, nn

# %%
from llmcourse.practice import check, hint, progress, reveal

# %%
#| checker: true
from llmcourse.practice.checking import case, exercise, rng

# %% [markdown]
# ## Scaled dot-product attention
#
# Write `attend(q, k, v)`. Sizes that do not fit: a `ValueError`.

# %%
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v."""
    ### BEGIN SOLUTION
    if q.shape[-1] != k.shape[-1]:
        raise ValueError("sizes")
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
    ### END SOLUTION

# %%
check("example.attend", attend)

# %%
#| checker: true
ex = exercise(
    "example.attend", title="Scaled dot-product attention", minutes=10, difficulty=2, points=4,
    hints=("Two matrix products and a softmax.", "Which axis has to sum to one?",
           "Divide by the root of the last size of q."),
)


@ex.cases
def _():
    eye = torch.eye(2)
    yield case("two by two", eye, eye, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, d, generator=g) for n, d in ((3, 4), (5, 4), (5, 6)))
    yield case("more keys than queries", q, k, v)
    yield case("gradient", q, k, v).gradients(0, 1, 2)
    yield case("large scores", 100 * q, k, v)
    yield case("sizes that do not fit", q, k[..., :3], v).raises(ValueError)


@ex.wrong("This is what you get when the scores are not divided by √D.")
def no_scale(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


@ex.wrong("You divided by D; the standard deviation of a score is √D.")
def scale_by_d(q, k, v):
    return (q @ k.mT / q.shape[-1]).softmax(-1) @ v


@ex.wrong("Your softmax runs over the queries: every row over the keys has to sum to one.")
def wrong_axis(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-2) @ v


@ex.wrong("The result carries no gradient to its inputs: something was detached.")
def detached(q, k, v):
    return attend(q, k, v).detach()


@ex.wrong("You changed q in place: whoever called you still needs it as it was.")
def changes_q(q, k, v):
    out = attend(q, k, v)
    with torch.no_grad():
        q /= math.sqrt(q.shape[-1])
    return out

# %% [markdown]
# ## RMSNorm
#
# Write a class.

# %%
class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        ### BEGIN SOLUTION
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        ### END SOLUTION

# %%
check("example.RMSNorm", RMSNorm)

# %%
#| checker: true
def use_norm(answer, width, x, weight):
    layer = answer(width, eps=0.25)
    layer.weight.data.copy_(weight)
    return layer(x), dict(layer.named_parameters())


ex = exercise(
    "example.RMSNorm", title="RMSNorm", minutes=12, difficulty=3, points=3,
    hints=("Root, mean, square: read it backwards.", "The mean runs over the last axis.",
           "Add eps before you take the root."),
)


@ex.cases
def _():
    yield case("two by two", 2, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([1.0, 2.0])).through(use_norm)
    yield case("three axes", 4, torch.arange(24.0).reshape(2, 3, 4), torch.arange(4.0)).through(use_norm).gradients(1)


class Variant(nn.Module):
    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))


@ex.wrong("Your ε is added after the root; it belongs to the mean square.")
class eps_outside(Variant):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


@ex.wrong("You subtract the mean first: that is LayerNorm's step, RMSNorm has none.")
class subtracts_mean(Variant):
    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


@ex.wrong("You take the mean over the whole tensor, not over the last axis.")
class whole_tensor(Variant):
    def forward(self, x):
        return x * (x.square().mean() + self.eps).rsqrt() * self.weight


@ex.wrong("You take the sum of the squares where the mean is meant.")
class sum_of_squares(Variant):
    def forward(self, x):
        return x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt() * self.weight


@ex.wrong("The weight is not used: it starts at one, so that you only see it after training.")
class no_weight(Variant):
    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()

# %% [markdown]
# ## Count parameters
#
# How many parameters has `nn.Linear(3, 5)`?

# %%
n_parameters = None  # your number
### BEGIN SOLUTION
n_parameters = 3 * 5 + 5
### END SOLUTION

# %%
check("example.n_parameters", n_parameters)

# %%
#| checker: true
ex = exercise(
    "example.n_parameters", title="Count parameters", minutes=2, difficulty=1, points=1,
    hints=("There is a matrix, and something else.", "Every output has an entry of its own.",
           "Weights: outputs times inputs; biases: outputs."),
)
ex.wrong("You counted the weights and forgot the biases, one per output.", name="no_bias", value=15)
ex.wrong("There is one bias per output, not per input.", name="bias_per_input", value=18)
ex.wrong("That is the number of outputs; each has one weight per input.", name="outputs_only", value=5)
ex.wrong("You added the two sizes; a matrix has their product.", name="added", value=8)
ex.wrong("You counted the biases twice, once for each direction.", name="bias_twice", value=25)

# %% [markdown]
# ## Sample
#
# Draw one token with the given generator.

# %%
def sample(logits: Tensor, temperature: float = 1.0, *, generator: torch.Generator) -> int:
    """One index, drawn from softmax(logits / temperature)."""
    ### BEGIN SOLUTION
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).item()
    ### END SOLUTION

# %%
check("example.sample", sample)

# %%
#| checker: true
ex = exercise(
    "example.sample", title="Sample", minutes=5, difficulty=2, points=2,
    hints=("First probabilities, then a draw.", "A high temperature makes all tokens alike.",
           "Divide the logits by the temperature, then softmax."),
)


@ex.cases
def _():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    for seed in range(6):
        yield case(f"seed {seed}", logits, generator=rng(seed))
        yield case(f"hot, seed {seed}", logits, 3.0, generator=rng(seed))


@ex.wrong("You always take the largest: that is greedy decoding, not sampling.")
def greedy(logits, temperature=1.0, *, generator):
    return int(logits.argmax())


@ex.wrong("You multiplied by the temperature: a high one then makes the distribution sharper.")
def multiplied(logits, temperature=1.0, *, generator):
    return sample(logits, 1 / temperature, generator=generator)


@ex.wrong("The temperature is not used, so every value of it gives the same text.")
def no_temperature(logits, temperature=1.0, *, generator):
    return sample(logits, 1.0, generator=generator)


@ex.wrong("You return a tensor where a whole number is asked for: take its item.")
def a_tensor(logits, temperature=1.0, *, generator):
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


@ex.wrong("You drew uniformly: the logits do not count at all in your answer.")
def uniform(logits, temperature=1.0, *, generator):
    return int(torch.randint(len(logits), (1,), generator=generator))
'''


def tool() -> ModuleType:
    """tools/make_exercises.py as a module."""
    if "make_exercises" not in sys.modules:
        spec = importlib.util.spec_from_file_location("make_exercises", ROOT / "tools" / "make_exercises.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["make_exercises"] = module
        spec.loader.exec_module(module)
    return sys.modules["make_exercises"]


def notebook(text: str = CELLS) -> nbformat.NotebookNode:
    """A percent script as a notebook without any metadata."""
    nb = nbformat.v4.new_notebook()
    for part in text.split("\n# %%")[1:]:
        head, _, body = part.partition("\n")
        body = body.strip("\n")
        if "[markdown]" in head:
            body = "\n".join(line[1:].removeprefix(" ") for line in body.split("\n"))
            nb.cells.append(nbformat.v4.new_markdown_cell(body))
        else:
            nb.cells.append(nbformat.v4.new_code_cell(body))
    return nb


def build(root: Path, text: str = CELLS, chapter: str = "03_example", sheet: str = "example") -> dict[str, Path]:
    """Write the master and everything made from it below `root`; returns master, module and learner."""
    master = root / "solutions" / chapter / f"{sheet}.ipynb"
    master.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook(text), master)
    for path, content in tool().make(master, root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf8")
    return {
        "master": master,
        "module": root / "llmcourse" / "practice" / "sheets" / f"{sheet}.py",
        "learner": root / "exercises" / chapter / f"{sheet}.ipynb",
    }


def as_typed(ex) -> tuple[str, str, str]:
    """A wrong answer and the right one as a learner would type them, and the wrong one's sentence."""
    import inspect
    import re
    import textwrap

    for name, (sentence, answer) in ex.wrong_answers.items():
        if inspect.isfunction(answer):
            source = textwrap.dedent(inspect.getsource(answer))
            source = source[re.search(r"^def ", source, re.M).start() :]
            if not re.search(rf"\b{ex.name}\b", source):
                return re.sub(rf"\b{name}\b", ex.name, source).strip(), ex.section("solution"), sentence
    raise LookupError(ex.id)
