"""Instruction tuning and preferences: descriptions of articles, interface texts in French, DPO with a known rule.

    python benchmarks/instructions.py                   # all of it: about two hours on one core; goes on where it was
    python benchmarks/instructions.py rates summaries   # some: also translation, preferences, real, collect
    python benchmarks/instructions.py --quick           # one seed and few steps: a smoke run, numbers without meaning

One small file for each run lies in build/instructions; `collect` puts what is there into a file that the chapter on
instructions reads, nbs/_results/instructions.json. The learning rates are those that did best in `rates`, on the
validation part and with a seed of their own. `preferences` starts from the models of `summaries` (arm full).
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import torch
import transformers
from shared import machine, save

from llmcourse.checkpoints import digest
from llmcourse.data import load_records
from llmcourse.finetuning import add_lora, merge
from llmcourse.instructions import (
    COURSE_TEMPLATE,
    Chats,
    Pair,
    Pairs,
    answer_kl,
    answer_log_p,
    chat_batch,
    grounded,
    mean_rouge,
    nearest,
    pair_scores,
    prefer,
    preference_loss,
    reply,
    summaries,
    translations,
    tune,
    turns,
    with_reference,
)
from llmcourse.metrics import chrf, corpus_bleu
from llmcourse.model import GPT
from llmcourse.runtime import evaluating
from llmcourse.settings import BadInput
from llmcourse.store import write_atomic
from llmcourse.training import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
HOW: dict = {"steps": 300, "batch": 16, "rank": 16, "alpha": 32, "layers": "blocks.*"}
HOW |= {"words": 12, "answer": 32, "test": 400, "rate_steps": 100, "fr_steps": 150}
RATES = {"full": (1e-3, 2e-3, 4e-3), "lora": (3e-3, 1e-2, 3e-2)}
PREFER = {"steps": 60, "batch": 8, "lr": 3e-4, "beta": 0.1, "prompts": 600, "test": 200}
REAL = {"steps": 40, "batch": 8, "rank": 16, "alpha": 32, "lr": 1e-3, "test": 100, "layers": "blocks.*"}
ASK = "Describe in a few words what this is about, as under the title of an encyclopedia's article: "


@functools.cache
def tokenizer_of(name: str = "course-3m"):
    from llmcourse.data import locate_model
    from llmcourse.settings import load_settings

    return transformers.AutoTokenizer.from_pretrained(locate_model(name, load_settings()))


@functools.cache
def task(name: str) -> dict[str, list[tuple[str, str]]]:
    if name == "summaries":
        return summaries(load_records("wikipedia"), words=HOW["words"])
    return translations(load_records("en-fr"))


def tested(name: str, part: str, n: int) -> tuple[list[str], list[str]]:
    """Sources and targets of a part; at most n of them, which the order of the records has made random."""
    return tuple(list(x) for x in zip(*task(name)[part][:n], strict=True))


def shuffled(pairs, seed: int):
    """Every source with the target of another: same texts, nothing to learn but how targets look."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed + 1000)).tolist()
    return [(source, pairs[i][1]) for (source, _), i in zip(pairs, order, strict=True)]


@functools.cache
def chats(name: str, null_seed: int | None = None, learn: str = "answers") -> Chats:
    pairs = task(name)["train"]
    pairs = pairs if null_seed is None else shuffled(pairs, null_seed)
    return Chats(tokenizer_of(), [turns(*p) for p in pairs], template=COURSE_TEMPLATE, learn=learn)


def config(seed: int, steps: int, batch: int, lr: float) -> TrainConfig:
    settings = dict(steps=steps, batch_size=batch, seq_len=1, lr=lr, weight_decay=0.0, seed=seed)
    return TrainConfig(**settings, warmup=max(1, steps // 10), schedule="linear", final_lr=0.05)


def trained(kind: str, data: Chats, seed: int, steps: int, lr: float) -> GPT:
    model = GPT.from_pretrained("course-3m")
    if kind == "lora":
        model = add_lora(model, layers=HOW["layers"], rank=HOW["rank"], alpha=HOW["alpha"], seed=seed)
    tune(model, data, config(seed, steps, HOW["batch"], lr))
    return merge(model) if kind == "lora" else model


@torch.no_grad()
def nats(model: GPT, name: str, part: str, n: int) -> float:
    """Mean of -ln p over the tokens of the answers that people wrote."""
    data = Chats(tokenizer_of(), [turns(*p) for p in task(name)[part][:n]], template=COURSE_TEMPLATE)
    sums = [answer_log_p(model, chat_batch(data.examples[i : i + 50])) for i in range(0, len(data), 50)]
    return float(-sum(s.sum() for s, _ in sums) / sum(c.sum() for _, c in sums))


def scores(name: str, said: list[str], wanted: list[str], sources: list[str]) -> dict:
    """The scores of a task for answers of any origin."""
    words = sum(len(text.split()) for text in said) / len(said)
    if name == "translation":
        found = {"bleu": corpus_bleu(said, wanted).value, "chrf": chrf(said, wanted).value}
        return found | {"exact": sum(a == b for a, b in zip(said, wanted, strict=True)) / len(said), "words": words}
    found = {kind: mean_rouge(said, wanted, kind) for kind in ("rouge1", "rougeL")}
    items = [round(x, 4) for x in found["rougeL"].items().tolist()]
    found = {kind: score.value for kind, score in found.items()} | {"items": items}
    return found | {"grounded": sum(map(grounded, said, sources)) / len(said), "words": words}


def judged(model: GPT, name: str, part: str = "test", n: int | None = None) -> dict:
    n = n or HOW["test"]
    sources, wanted = tested(name, part, n)
    replies = reply(model, tokenizer_of(), [turns(s) for s in sources], max_new_tokens=HOW["answer"],
                    template=COURSE_TEMPLATE)  # fmt: skip
    said = [r.text for r in replies]
    found = scores(name, said, wanted, sources) | {"nats": nats(model, name, part, n)}
    return found | {"ended": sum(r.ended for r in replies) / len(replies), "answers": said[:12]}


def rates(seeds):
    for kind, tried in RATES.items():
        for rate in tried:
            go = lambda kind=kind, rate=rate: trained(kind, chats("summaries"), 100, HOW["rate_steps"], rate)
            yield f"rate-{kind}-{rate:g} 100", lambda go=go: judged(go(), "summaries", "val", 200)


def rate_of(kind: str) -> float:
    """The rate with the smallest loss on the validation part."""
    files = [kept() / f"rate-{kind}-{rate:g}_100.json" for rate in RATES[kind]]
    if not all(file.exists() for file in files):
        raise BadInput(f"rates of {kind} is 'not measured'; allowed: those of the part rates, which comes first.")
    return min(zip(files, RATES[kind], strict=True), key=lambda pair: json.loads(pair[0].read_text("utf8"))["nats"])[1]


def policy_file(seed: int) -> Path:
    return kept() / f"policy-{seed}"


def run_summary(arm: str, seed: int) -> dict:
    data = chats("summaries", seed) if arm == "shuffled" else chats("summaries")
    if arm == "everything":
        data = chats("summaries", learn="everything")
    kind = "lora" if arm == "lora" else "full"
    model = trained(kind, data, seed, HOW["steps"], rate_of(kind))
    if arm == "full":
        model.save_pretrained(policy_file(seed))
    return judged(model, "summaries")


def baseline(name: str, arm: str) -> dict:
    """What costs nothing: the text itself, the target of the training text that is most alike, one target for all."""
    sources, wanted = tested(name, "test", HOW["test"])
    known, targets = (list(x) for x in zip(*task(name)["train"], strict=True))
    if arm == "copy":
        said = sources
    elif arm == "nearest":
        said = [targets[i] for i in nearest(known, sources)]
    elif arm == "after-is":
        said = [after_is(text) for text in sources]
    else:
        often = max(sorted(set(targets)), key=targets.count)
        said = [often] * len(sources)
    return scores(name, said, wanted, sources) | {"answers": said[:12]}


def after_is(text: str) -> str:
    """What follows the first "is a", "was the" and the like; the whole text where there is none."""
    words = text.split()
    verbs = [i for i, w in enumerate(words[:-1]) if w in ("is", "was", "are", "were")]
    rest = words[verbs[0] + 1 :] if verbs else words
    rest = rest[1:] if len(rest) > 1 and rest[0] in ("a", "an", "the") else rest
    return " ".join(rest)


def summary_runs(seeds):
    for arm in ("copy", "after-is", "nearest", "one-for-all"):
        yield f"sum-{arm} 0", functools.partial(baseline, "summaries", arm)
    for arm in ("full", "shuffled", "lora", "everything"):
        for seed in seeds:
            yield f"sum-{arm} {seed}", functools.partial(run_summary, arm, seed)


def translation_runs(seeds):
    for arm in ("copy", "nearest", "one-for-all"):
        yield f"fr-{arm} 0", functools.partial(baseline, "translation", arm)
    for seed in seeds:
        for arm in ("full", "lora", "shuffled"):
            data = functools.partial(chats, "translation", seed if arm == "shuffled" else None)
            kind = "lora" if arm == "lora" else "full"
            yield (
                f"fr-{arm} {seed}",
                lambda kind=kind, data=data, seed=seed: judged(
                    trained(kind, data(), seed, HOW["fr_steps"], rate_of(kind)), "translation"
                ),
            )


# ------------------------------------------------------------------------------------------ preferences


@functools.cache
def policy(seed: int) -> GPT:
    if not policy_file(seed).exists():
        trained("full", chats("summaries"), seed, HOW["steps"], rate_of("full")).save_pretrained(policy_file(seed))
    model = GPT.from_pretrained(policy_file(seed))
    model.stop = (0,)
    return model


def drawn(model: GPT, texts: list[str], seed: int) -> list[str]:
    dice = torch.Generator().manual_seed(seed)
    found = reply(model, tokenizer_of(), [turns(t) for t in texts], max_new_tokens=HOW["answer"], temperature=1.0,
                  template=COURSE_TEMPLATE, generator=dice)  # fmt: skip
    return [r.text if r.ended else "" for r in found]


def preferences_of(model: GPT, texts: list[str], seed: int) -> list[Pair]:
    """Two answers that the model has drawn for each text; the one with the larger share of words from the text."""
    pairs = []
    for text, a, b in zip(texts, drawn(model, texts, 2 * seed), drawn(model, texts, 2 * seed + 1), strict=True):
        if a and b and (x := grounded(a, text)) != (y := grounded(b, text)):
            pairs.append(Pair(turns(text), *((a, b) if x > y else (b, a))))
    return pairs


@functools.cache
def pairs_for(seed: int) -> tuple[list[Pair], Pairs]:
    """Training pairs, and held-out ones with the reference's ln p."""
    texts = [s for s, _ in task("summaries")["train"]]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    train = preferences_of(policy(seed), [texts[i] for i in order[: PREFER["prompts"]]], seed)
    held = preferences_of(policy(seed), tested("summaries", "test", PREFER["test"])[0], 50 + seed)
    held = Pairs(tokenizer_of(), held, template=COURSE_TEMPLATE)
    return train, with_reference(policy(seed), held)


def flipped(pairs: list[Pair], seed: int) -> list[Pair]:
    coin = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed + 2000)) < 0.5
    return [Pair(c, b, a) if turn else Pair(c, a, b) for (c, a, b), turn in zip(pairs, coin.tolist(), strict=True)]


def behavior(model: GPT, seed: int) -> dict:
    """What a policy writes for texts that it was not trained on, and what the change has cost."""
    sources, wanted = tested("summaries", "test", PREFER["test"])
    said = drawn(model, sources, 900 + seed)
    kept_answers = [turns(s, a) for s, a in zip(sources, said, strict=True) if a]
    found = scores("summaries", said, wanted, sources)
    greedy = judged(model, "summaries", "test", PREFER["test"])
    found.pop("items"), greedy.pop("items")
    data = Chats(tokenizer_of(), kept_answers, template=COURSE_TEMPLATE)
    kl = [answer_kl(model, policy(seed), chat_batch(data.examples[i : i + 50])) for i in range(0, len(data), 50)]
    held = pairs_for(seed)[1]
    now, counts = pair_scores(model, held)
    change = (now - held.reference).double()
    return {
        "drawn": found, "kl": float(torch.cat(kl).mean()), "ended": len(kept_answers) / len(said),
        "right": float((change[:, 0] > change[:, 1]).double().mean()), "pairs": len(held),
        "chosen": float(change[:, 0].mean()), "rejected": float(change[:, 1].mean()),
        "tokens": counts.double().mean(0).tolist(), "greedy": greedy,
        "examples": said[:12],
    }  # fmt: skip


def run_preferences(arm: str, seed: int) -> dict:
    pairs, _ = pairs_for(seed)
    pairs = flipped(pairs, seed) if arm == "flipped" else pairs
    options = {"beta": PREFER["beta"]}
    options |= {"per-token": {"per_token": True, "beta": 10 * PREFER["beta"]}, "keep": {"keep": 1.0}}.get(arm, {})
    if arm.startswith("beta-"):
        options["beta"] = float(arm.removeprefix("beta-"))
    data = with_reference(policy(seed), Pairs(tokenizer_of(), pairs, template=COURSE_TEMPLATE))
    model = GPT.from_pretrained(policy_file(seed))
    model.stop = (0,)
    loss = functools.partial(preference_loss, **options)
    run = prefer(model, data, config(seed, PREFER["steps"], PREFER["batch"], PREFER["lr"]), loss_fn=loss)
    every = max(1, len(run.losses) // 20)
    return behavior(model, seed) | {"options": options, "losses": run.losses[::every], "n": len(data)}


def preference_runs(seeds):
    for arms in (("dpo", "flipped"), ("per-token", "keep"), ("beta-0.03", "beta-0.5")):
        for seed in seeds:
            if arms[0] == "dpo":
                yield f"pref-start {seed}", lambda seed=seed: behavior(policy(seed), seed)
            for arm in arms:
                yield f"pref-{arm} {seed}", functools.partial(run_preferences, arm, seed)


# ------------------------------------------------------------------------------------------ a real model


def run_real(arm: str, seed: int) -> dict:
    name = "smollm2-135m"
    model, tokenizer = GPT.from_pretrained(name), tokenizer_of(name)
    ask = lambda *said: turns(ASK + said[0], *said[1:])
    if arm == "lora":
        order = torch.randperm(len(task("summaries")["train"]), generator=torch.Generator().manual_seed(seed))
        some = [task("summaries")["train"][i] for i in order[: REAL["steps"] * REAL["batch"]].tolist()]
        model = add_lora(model, layers=REAL["layers"], rank=REAL["rank"], alpha=REAL["alpha"], seed=seed)
        tune(model, Chats(tokenizer, [ask(*p) for p in some]), config(seed, REAL["steps"], REAL["batch"], REAL["lr"]))
        model = merge(model)
        model.stop = GPT.from_pretrained(name).stop
    sources, wanted = tested("summaries", "test", REAL["test"])
    with evaluating(model):
        found = reply(model, tokenizer, [ask(s) for s in sources], max_new_tokens=HOW["answer"], batch_size=20)
    said = [r.text for r in found]
    ended = sum(r.ended for r in found) / len(found)
    return scores("summaries", said, wanted, sources) | {"ended": ended, "answers": said[:12]}


def real_runs(seeds):
    yield "real-prompt 0", functools.partial(run_real, "prompt", 0)
    for seed in seeds:
        yield f"real-lora {seed}", functools.partial(run_real, "lora", seed)


PARTS = {
    "rates": rates,
    "summaries": summary_runs,
    "translation": translation_runs,
    "preferences": preference_runs,
    "real": real_runs,
    "collect": lambda seeds: (),
}


def kept() -> Path:
    """Where the runs of these settings lie: runs of other settings are other runs."""
    folder = ROOT / "build" / "instructions" / digest([HOW, PREFER, REAL, RATES, ASK, COURSE_TEMPLATE])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[p for p in PARTS if p != "collect"], help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="only these, in this order")
    parser.add_argument("--arms", nargs="+", help="only these, such as pref-dpo (default: all of the parts)")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: a smoke run")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs" / "_results" / "instructions.json")
    args = parser.parse_args()
    if unknown := [p for p in args.parts if p not in PARTS]:
        raise BadInput(f"part is {unknown[0]!r}; allowed: {', '.join(PARTS)}.")
    if args.quick:
        (
            HOW.update(steps=24, rate_steps=6, fr_steps=6, batch=4, test=8),
            PREFER.update(steps=2, prompts=60, test=40, batch=4),
        )
        REAL.update(steps=1, batch=2, test=2)
        args.seeds = args.seeds[:1]
        if args.out.parent == ROOT / "nbs" / "_results":
            args.out = kept() / "all" / "all.json"
    for part in args.parts:
        for name, go in PARTS[part](args.seeds):
            file = kept() / f"{name.replace(' ', '_')}.json"
            if not file.exists() and (args.arms is None or name.split()[0] in args.arms):
                start = time.perf_counter()
                found = {"name": name, **go(), "seconds": time.perf_counter() - start}
                write_atomic(file, json.dumps(found, ensure_ascii=False))
                shown = {k: round(v, 3) for k, v in found.items() if isinstance(v, float)}
                print(f"{name:<24}{shown}", flush=True)
    rows: dict[str, list] = {}
    for file in sorted(kept().glob("*_*.json")):
        found = json.loads(file.read_text(encoding="utf8"))
        arm, seed = found.pop("name").split()
        rows.setdefault(arm, []).append({"seed": int(seed), **found})
    how = HOW | {kind: rate_of(kind) for kind in RATES}
    report = {"how": how, "prefer": PREFER, "real": REAL, "ask": ASK, "rows": rows}
    report["sizes"] = {name: {part: len(found) for part, found in task(name).items()}
                       for name in ("summaries", "translation")}  # fmt: skip
    sources, wanted = tested("summaries", "test", 12)
    french, meant = tested("translation", "test", 12)
    report["shown"] = {"summaries": [sources, wanted], "translation": [french, meant]}
    save(report | {"machine": machine()}, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
