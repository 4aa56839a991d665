"""Pretraining a language model from nothing: recipe, tokenizer, training, measurement, model folder with its card.

Hand-written: what is learned here is told in `nbs/07_training.ipynb`; this puts the pieces together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmcourse.data import SPLITS, TokenData, load_records, token_data
from llmcourse.evaluation import KneserNey, compare_perplexity, perplexity
from llmcourse.launch import check_machine
from llmcourse.llama import check_llama
from llmcourse.model import GPT, GPTConfig
from llmcourse.optim import make_optimizer
from llmcourse.runfolder import is_made, run_folder
from llmcourse.runtime import Runtime
from llmcourse.schema import parse, read_toml
from llmcourse.settings import Settings, load_settings, one_of, read_text, require, whole
from llmcourse.store import CATALOG, atomic_folder, sha256, write_manifest
from llmcourse.tokenizer import BPE
from llmcourse.training import TrainConfig, TrainResult, train, training_curve

__all__ = ["PretrainRecipe", "load_pretrain_recipe", "pretrain"]

SCALES = ("test", "cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """What `pretrain` makes: one scale of a recipe file."""

    name: str
    data: tuple[str, ...]
    vocab_size: int
    model: GPTConfig
    train: TrainConfig
    dtype: str
    """number format of matrix products: float32, bfloat16, or float16 on a GPU"""
    license: str
    limits: str
    """what a reader of the card should know about such texts"""
    text: str
    """the file itself, which goes into the card"""
    scale: str


# ---------------------------------------------------------------------------------------------- reading a recipe


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What stands in a recipe file for one scale."""

    name: str
    data: tuple[str, ...]
    vocab_size: int
    model: dict[str, Any]
    train: dict[str, Any]
    license: str
    limits: str
    dtype: str = "float32"

    def __post_init__(self):
        # it becomes a heading of the card: no markup, no control characters
        named = self.name.isprintable() and 0 < len(self.name.strip()) <= 60 and not set(self.name) & set("<>&`/\\")
        require(
            named, "name", self.name, "a text of 1 to 60 characters without control characters, <, >, &, ` and slashes"
        )
        require(len(self.data) > 0, "data", [], "a list of names of data sets")
        require(len(set(self.data)) == len(self.data), "data", list(self.data), "each data set once")
        for key in ("license", "limits"):
            require(bool(getattr(self, key).strip()), key, getattr(self, key), "a text")
        one_of("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        whole("vocab_size", self.vocab_size, 257)  # 256 bytes and the separator


def load_pretrain_recipe(path: str | Path, scale: str) -> PretrainRecipe:
    """Read the part of a recipe file that belongs to a scale (`test`, `cpu` or `gpu`), and check all of it.

    Raises:
        BadInput: not TOML, a key that is missing or unknown, a value that is not allowed, or a model that could not be
            saved at the end.
    """
    path = Path(path)
    raw = read_toml(path)
    scales = {k: v for k, v in raw.items() if isinstance(v, dict)}
    for key in scales:
        one_of(f"part of {path.name}", key, SCALES)
    require(scale in scales, "scale", scale, ", ".join(scales) + f", the parts of {path.name}")
    part = parse(_Part, {k: v for k, v in raw.items() if k not in scales} | scales[scale], path.name)
    config = parse(GPTConfig, part.model, f"[{scale}.model]", given={"vocab_size": part.vocab_size})
    cfg = parse(TrainConfig, part.train, f"[{scale}.train]")
    values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)} | {"model": config, "train": cfg}
    recipe = PretrainRecipe(**values, text=read_text(path, "recipe"), scale=scale)
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: PretrainRecipe) -> None:
    """Everything that can be known before the work: that the result can be saved, and the training can begin.

    Raises:
        BadInput: one sentence with the key, its value and what is allowed.
    """
    config, cfg = recipe.model, recipe.train
    check_llama(config)
    require(cfg.seq_len <= config.context, "seq_len", cfg.seq_len, f"at most {config.context}, the model's context")
    require(cfg.world_size in (None, 1), "world_size", cfg.world_size, "1: pretrain runs in one process")
    with torch.device("meta"):  # no memory: only to see whether the optimizer takes this model and these options
        shell = GPT(config)
    make_optimizer(shell, cfg.optimizer, lr=cfg.lr, weight_decay=cfg.weight_decay, **cfg.optimizer_options)


# ---------------------------------------------------------------------------------------------- the work


def pretrain(
    recipe: PretrainRecipe,
    out: str | Path,
    *,
    settings: Settings | None = None,
    rt: Runtime | None = None,
    say: Callable[[str], None] = print,
    command: str = "",
) -> Path:
    """A tokenizer and a language model from nothing: learn merges, encode, train, measure, write a model folder.

    Everything goes into `out`: `tokenizer/`, `checkpoints/`, and at the end `model/` with its card. A run that was
    stopped goes on where it was when the same command is given again.

    Args:
        rt: the device; the number format is the recipe's.
        command: what the card says it was made by.
    Returns:
        The model folder; `load_model` and transformers read it.
    Raises:
        BadInput: a recipe, text or machine that cannot work (before anything is written), a folder of another run, or
            one in which another process is at work.
    """
    settings = settings or load_settings()
    rt = Runtime.of(rt, settings=settings)
    rt = dataclasses.replace(rt, dtype=getattr(torch, recipe.dtype))
    require(rt.world_size == 1, "WORLD_SIZE", rt.world_size, "1: pretrain runs in one process (train takes several)")
    check_recipe(recipe)
    check_machine(recipe.train, rt)
    texts = _texts(recipe, settings)
    inputs = {"recipe": dataclasses.asdict(recipe), "texts": texts.digest}
    same = f"a folder of this recipe at scale {recipe.scale} and of these texts"
    with run_folder(out, inputs, same=same, target="model", command="pretrain") as folder:
        return _pretrain(recipe, texts, folder, settings, rt, say, command)


@dataclass(frozen=True)
class _Texts:
    """The documents of a recipe by part, and a digest of all of them."""

    train: list[str]
    digest: str


def _texts(recipe: PretrainRecipe, settings: Settings) -> _Texts:
    """Read the texts, and refuse those that could not be trained on or measured."""
    found, cfg = {part: [] for part in SPLITS}, recipe.train
    digest = hashlib.sha256()
    for name in recipe.data:
        for record in load_records(name, settings=settings):
            found[record["split"]].append(record["text"])
            digest.update(f"{name} {record['split']} {len(record['text'])} ".encode() + record["text"].encode())
    # a token is at least one byte, and each document begins with a separator
    for part, tokens in (("train", cfg.seq_len + 1), ("val", cfg.seq_len + 1 if cfg.eval_every else 0), ("test", 2)):
        most = sum(len(text.encode()) + 1 for text in found[part])
        few = f"{len(found[part])} documents with at most {most} tokens in its {part} part"
        enough = f"texts with at least {tokens} there (documents are dealt out whole: take more of them)"
        require(
            most >= tokens and (not tokens or bool(found[part])), "data", f"{', '.join(recipe.data)}: {few}", enough
        )
    return _Texts(found["train"], digest.hexdigest()[:16])


def _pretrain(
    recipe: PretrainRecipe,
    texts: _Texts,
    out: Path,
    settings: Settings,
    rt: Runtime,
    say: Callable[[str], None],
    command: str,
) -> Path:
    """The steps of `pretrain`, each of which is kept."""
    from transformers import AutoTokenizer

    target = out / "model"
    if is_made(target):
        say(f"{target} is there")
        return target
    if not (out / "tokenizer").is_dir():
        say(f"tokenizer: {recipe.vocab_size} tokens from {len(texts.train)} documents")
        bpe = BPE.train(texts.train, recipe.vocab_size)
        full = f"at most {len(bpe.vocab)}: these texts have no more pairs to merge"
        require(len(bpe.vocab) == recipe.vocab_size, "vocab_size", recipe.vocab_size, full)
        with atomic_folder(out / "tokenizer") as partial:
            bpe.save_pretrained(partial)

    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    data = _encoded(recipe, tokenizer, settings)
    size = int(data.bytes["train"].sum()) / len(data.train)
    say(f"{data.name}: {len(data.train):,} training tokens, {size:.2f} bytes each")

    torch.manual_seed(recipe.train.seed)
    model = rt.move(GPT(recipe.model))
    result = train(model, data, recipe.train, rt=rt, out=out / "checkpoints", say=say)
    measured = _measured(recipe, model, data, say)
    return _write_model(recipe, target, model, out / "tokenizer", data, result, measured, command, rt)


def _encoded(recipe: PretrainRecipe, tokenizer: Any, settings: Settings) -> TokenData:
    """All data sets of the recipe as one; refused when a part is too short for what will be done with it."""
    parts = [token_data(tokenizer, name, settings=settings) for name in recipe.data]
    joined = {part: torch.cat([getattr(p, part) for p in parts]) for part in SPLITS}
    sizes = {part: torch.cat([p.bytes[part] for p in parts]) for part in SPLITS}
    cfg = recipe.train
    for part, least in (("train", cfg.seq_len + 1), ("val", cfg.seq_len + 1 if cfg.eval_every else 0), ("test", 4)):
        found = f"{', '.join(recipe.data)}: {len(joined[part])} tokens in its {part} part"
        require(len(joined[part]) >= least, "data", found, f"texts with at least {least} there")
    name, separator = " + ".join(recipe.data), parts[0].separator
    return TokenData(**joined, bytes=sizes, name=name, tokenizer=recipe.name, separator=separator)


def _measured(recipe: PretrainRecipe, model: GPT, data: TokenData, say: Callable[[str], None]) -> dict[str, Any]:
    """Perplexity on the test part: of the model, and of counting."""
    order = KneserNey.longest(recipe.vocab_size, 5)
    say(f"measuring on the test part, beside an interpolated Kneser–Ney {order}-gram over the same tokens")
    counted = KneserNey(data.train, recipe.vocab_size, order=order)
    context = max(2, min(recipe.model.context, len(data.test) // 2))
    window = {"context": context, "stride": max(1, context * 3 // 4), "batch_size": 8}
    measured = {}
    for what, lm in ((recipe.name, model), (f"Kneser–Ney {order}-gram", counted)):
        measured[what] = perplexity(lm, data, model=what, **window)
        say(f"{what}: {measured[what]}")
    return measured


# ---------------------------------------------------------------------------------------------- the model folder


def _card(
    recipe: PretrainRecipe, data: TokenData, result: TrainResult, measured: dict[str, Any], command: str, rt: Runtime
) -> str:
    import transformers

    (own, counted), (_, floor) = measured.values(), measured
    ratio, cfg = compare_perplexity(counted, own), recipe.train
    epochs = result.targets / max(1, len(data.train))
    sources = [CATALOG[name] for name in recipe.data if name in CATALOG]
    texts = "; ".join(f"{a.what} ({a.license}; {a.origin})" for a in sources) or data.name
    interval = lambda value, low, high, digits: f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
    level = "interval" if own.held is None else f"{100 * own.held:.3g} %"
    rows = "\n".join(
        f"| {name} | {interval(p.value, p.low, p.high, 2)} "
        f"| {interval(p.bits_per_byte, p.bits_per_byte_low, p.bits_per_byte_high, 3)} |"
        for name, p in measured.items()
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    seen = f"{result.targets:,} tokens seen, {epochs:.1f} passes over the text"
    where = f"in {result.seconds / 60:.0f} minutes on {rt.describe().split(', ')[0]}"
    rule = f"{cfg.optimizer}, peak learning rate {cfg.lr:g}"
    return f"""---
language: en
license: other
license_name: {recipe.license}
library_name: transformers
---

# {recipe.name}

A language model of {sum(recipe.model.parameters().values()):,} parameters, trained from nothing by the course \
llmcourse. Its weights were never quantized: they are the float32 numbers that the optimizer wrote.

- **Made by** `{command or "llmcourse.pretraining.pretrain"}` (scale {recipe.scale}), seed {cfg.seed}, {versions}.
- **Architecture** Llama: {dataclasses.asdict(recipe.model)}.
- **Data** {texts}. Split by document, {len(data.train):,} training tokens.
- **Tokenizer** byte-level BPE of {recipe.vocab_size} tokens, learned from the training part.
- **Training** {result.steps:,} steps of {cfg.batch_size} × {cfg.seq_len} tokens: {seen}, {where}; {rule}, \
matrix products in {recipe.dtype}, weights in float32.
- **License** {recipe.license}.

| on the test part | perplexity ({level}) | bits per byte ({level}) |
|---|---|---|
{rows}

{recipe.name} has {ratio.value:.3f} times the perplexity of the {floor}, on the same tokens \
({ratio.ends(".3f")}). Protocol:

```
{own.protocol}
```

![Loss against the step](loss.svg)

## Limits

It has read the texts named above and nothing else. It knows no facts that can be relied on and follows no \
instructions. {recipe.limits} It is made for measuring what a method does to a model, not for its text.

## Recipe

```toml
{recipe.text.strip()}
```
"""


def _write_model(
    recipe: PretrainRecipe,
    target: Path,
    model: GPT,
    tokenizer: Path,
    data: TokenData,
    result: TrainResult,
    measured: dict[str, Any],
    command: str,
    rt: Runtime,
) -> Path:
    """Weights, tokenizer, card, loss curve and the digests of all of them."""
    from llmcourse.plotting import save

    history = {
        "val": result.val,
        "losses": [round(v, 5) for v in result.losses],
        "grad_norms": [round(v, 5) for v in result.grad_norms],
        "seconds": result.seconds,
        "resumed": result.resumed,
    }
    with atomic_folder(target) as partial:
        model.stop = (data.separator,)  # a text ends where the next one begins
        model.save_pretrained(partial)
        for file in tokenizer.iterdir():
            shutil.copyfile(file, partial / file.name)
        (partial / "history.json").write_text(json.dumps(history) + "\n", encoding="utf8")
        card = _card(recipe, data, result, measured, command, rt)
        (partial / "README.md").write_text(card, encoding="utf8")
        save(training_curve(result), partial / "loss.svg")
        write_card_manifest(partial, recipe.name, recipe.license)
    return target


def write_card_manifest(folder: Path, name: str, license: str) -> None:
    """Size and SHA-256 of every file of a model folder that the course made, in the form of the catalog."""
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner only, and a package is read by everybody
    about = {"requirement": "comes with llmcourse", "license": license, "origin": "trained by the course"}
    write_manifest(folder, name=name, revision=1, carrier=sha256(folder / "model.safetensors"), **about)
