"""`llmcourse finetune`: what it writes is read back, what cannot work is refused before, what was stopped goes on."""

from __future__ import annotations

import dataclasses
import json
import random
import tomllib

import pytest
import torch
from conftest import ROOT
from transformers import LlamaForCausalLM

from llmcourse.compression import compress
from llmcourse.data import load_model, load_records, split_of
from llmcourse.finetuning import adapted, load_adapter
from llmcourse.instructions import COURSE_TEMPLATE, Chats, chat_batch, example_loss, turns
from llmcourse.packed import save_student
from llmcourse.quantization import RTN
from llmcourse.recipes import find_recipe
from llmcourse.settings import BadInput
from llmcourse.tuning import _dealt, finetune_recipe, load_finetune_recipe, load_tuned

TRAIN = {"steps": 4, "batch_size": 4, "lr": 0.01, "weight_decay": 0.0, "warmup": 1}
COMMON = {"license": "none", "limits": "Made for a test."}
READ = {"name": "reads", "task": "language", **COMMON, "lora": {"rank": 2, "alpha": 4.0}}
TALK = {"name": "talks", "task": "chat", **COMMON, "lora": {"rank": 2, "alpha": 4.0}}
SORT = {"name": "sorts", "task": "classify", "label": "kind", **COMMON, "lora": {"rank": 2, "alpha": 4.0}}
quiet = lambda line: None


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """Texts about two things, which a word tells apart, and some without a label."""
    dice, file = random.Random(0), tmp_path_factory.mktemp("labels") / "kinds.jsonl"
    words = {"sea": ["ship", "wave", "salt"], "hill": ["stone", "goat", "slope"]}
    rows = []
    for i in range(420):
        kind = dice.choice([*words, "sea"])
        text = " ".join(dice.choice(words[kind] + ["the", "a", "of", "old"]) for _ in range(9)) + f" {i}"
        rows.append({"text": text, "kind": kind if i % 20 else dice.choice(["", None, 0.5])})
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    return file


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Chats of two turns, some with a system's turn before or another question behind; two long ones."""
    file, dice = tmp_path_factory.mktemp("talks") / "talks.jsonl", random.Random(1)
    rows = []
    for i in range(360):
        a, b = dice.choice("abcd"), dice.choice("wxyz")
        more, system = ([f"and {i}", a] if i % 3 == 0 else []), ("be" if i % 5 else None)
        chat = turns(f"say {a} {i}", f"{a} {b}", *more, system=system)
        rows.append({"messages": chat, "asked": a, "said": b, "n": i})
    for n in (1, 2):
        long = f"{n} long " * 300
        rows.append({"messages": turns(long, "yes"), "asked": long, "said": "yes", "n": n})
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    return file


@pytest.fixture
def recipe(tmp_path, tiny_model, corpus, labeled, talks):
    """A recipe out of one of the tables, with changes; None takes a key away."""

    def make(table=READ, **changes):
        read = table["task"] == "language"
        texts = {"language": corpus, "classify": labeled, "chat": talks}[table["task"]]
        data = {"data": str(texts), "model": str(tiny_model)}
        own = changes.pop("train", {})
        train = own if own is None else TRAIN | ({"seq_len": 32} if read else {}) | own
        whole = {k: v for k, v in (table | data | {"train": train} | changes).items() if v is not None}
        file = tmp_path / "recipe.toml"
        file.write_text(_toml(whole), encoding="utf8")
        return load_finetune_recipe(file)

    return make


def _toml(table, head=""):
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    text = (f"[{head}]\n" if head else "") + "".join(f"{k} = {json.dumps(v)}\n" for k, v in plain.items())
    return text + "".join(_toml(v, k) for k, v in table.items() if isinstance(v, dict))


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_language_model_reads_on(method, recipe, tmp_path, tiny_model, small_settings):
    lora = {"lora": None} if method == "full" else {}
    result = finetune_recipe(recipe(method=method, **lora), tmp_path / "o", settings=small_settings, say=quiet)
    assert (result / "adapter").is_dir() == (method == "lora")
    base = load_model(tiny_model, settings=small_settings).model
    tuned = load_tuned(result, settings=small_settings)
    assert tuned.labels == [] and not equal(weights(base), weights(tuned.model))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        got = tuned.model(ids).logits
        if method == "lora":
            theirs = load_adapter(base, result / "adapter")(ids).logits
            torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got, LlamaForCausalLM.from_pretrained(result / "model")(ids).logits)
    row = json.loads((result / "result.json").read_text(encoding="utf8"))["rows"][0]
    assert row["ratio"] == pytest.approx(row["after"] / row["before"]) and row["low"] <= row["ratio"] <= row["high"]
    card = (result / "README.md").read_text(encoding="utf8")
    assert f"{row['after']:.2f}" in card and "share 13 words in a row" in card and 'task = "language"' in card


def test_what_is_forgotten_is_measured_beside(recipe, tmp_path, small_settings, labeled, corpus):
    made = recipe(beside=[str(labeled)])
    rows = json.loads(
        (finetune_recipe(made, tmp_path / "o", settings=small_settings, say=quiet) / "result.json").read_text("utf8")
    )["rows"]
    assert [r["data"] for r in rows] == [str(corpus), str(labeled)]
    assert f"data       {labeled}" in rows[1]["protocol"]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "fields", [{}, {"question": "say {asked} {n}", "answer": "{said}!"}], ids=["messages", "fields"]
)
def test_a_model_learns_to_answer(method, fields, recipe, tmp_path, small_settings, corpus):
    lora = {"lora": None} if method == "full" else {}
    made = recipe(TALK, method=method, beside=[str(corpus)], longest=120, train={"steps": 12}, **lora, **fields)
    result = finetune_recipe(made, tmp_path / "o", settings=small_settings, say=quiet)
    about = json.loads((result / "result.json").read_text(encoding="utf8"))
    rows = about["rows"]
    assert [r.get("what", r["data"]) for r in rows] == ["answers", "answers to other questions", str(corpus)]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["after"] / row["before"]) and row["low"] <= row["ratio"] <= row["high"]
    assert rows[0]["high"] < 1  # it has learned what answers look like
    card = (result / "README.md").read_text(encoding="utf8")
    assert "2 longer ones left out; the course's template" in card and 'task = "chat"' in card
    tuned = load_tuned(result, settings=small_settings)
    assert tuned.labels == [] and tuned.tokenizer.chat_template == COURSE_TEMPLATE == about["template"]
    again = load_model(result / "model", settings=small_settings)
    assert again.tokenizer.chat_template == COURSE_TEMPLATE  # what `llmcourse serve` asks for
    # by hand: the mean over chats of the mean loss of their answers
    pattern = lambda r: turns(f"say {r['asked']} {r['n']}", f"{r['said']}!") if fields else r["messages"]
    chats = [pattern(r) for r in load_records(made.data, "test")]
    some = [e for e in Chats(tuned.tokenizer, chats).examples if len(e.ids) <= 120]
    with torch.no_grad():
        losses = torch.cat([example_loss(tuned.model, chat_batch([e])) for e in some])
    assert rows[0]["after"] == pytest.approx(losses.mean().exp().item(), rel=1e-4)


def test_the_control_of_answers_keeps_every_answer_and_no_pair():
    chats = [turns(f"q{i}", f"a{i}", "more", f"b{i}") for i in range(5)]
    dealt = _dealt(chats)
    assert [c[:3] for c in dealt] == [c[:3] for c in chats]
    assert [c[3]["content"] for c in dealt] == ["b1", "b2", "b3", "b4", "b0"]
    with_end = [[*c, {"role": "user", "content": "bye"}] for c in chats]  # the last word is not the assistant's
    assert [c[3]["content"] for c in _dealt(with_end)] == ["b1", "b2", "b3", "b4", "b0"]


def test_a_packed_model_learns_to_answer(recipe, tmp_path, tiny_model, small_settings):
    dense = load_model(tiny_model, settings=small_settings)
    small, _ = compress(dense.model, [RTN(bits=4, group_size=32)], None, None)
    save_student(small, dense.tokenizer, tmp_path / "packed")
    made = recipe(TALK, model=str(tmp_path / "packed"), longest=120)
    result = finetune_recipe(made, tmp_path / "o", settings=small_settings, say=quiet)
    assert not (result / "model").exists()
    assert load_tuned(result, settings=small_settings).tokenizer.chat_template == COURSE_TEMPLATE


def test_a_packed_model_gets_an_adapter_and_nothing_else(recipe, tmp_path, tiny_model, small_settings):
    dense = load_model(tiny_model, settings=small_settings)
    small, _ = compress(dense.model, [RTN(bits=4, group_size=32)], None, None)
    save_student(small, dense.tokenizer, tmp_path / "packed")
    packed = {"model": str(tmp_path / "packed")}
    with pytest.raises(BadInput, match="method is 'full'; allowed: lora or head for a packed model"):
        finetune_recipe(recipe(**packed, method="full", lora=None), tmp_path / "o", settings=small_settings)
    result = finetune_recipe(recipe(**packed), tmp_path / "o", settings=small_settings, say=quiet)
    assert (result / "adapter").is_dir() and not (result / "model").exists()
    assert adapted(load_tuned(result, settings=small_settings).model)


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_a_classifier_is_read_back(method, pool, recipe, tmp_path, small_settings, labeled):
    lora = {} if method == "lora" else {"lora": None}
    made = recipe(SORT, method=method, pool=pool, cut=12, per_class=40, train={"steps": 12, "batch_size": 8}, **lora)
    result = finetune_recipe(made, tmp_path / "o", settings=small_settings, say=quiet)
    told = json.loads((result / "result.json").read_text(encoding="utf8"))
    tuned = load_tuned(result, settings=small_settings)
    assert tuned.labels == told["labels"] == ["hill", "sea"] and tuned.cut == 12
    rows = [json.loads(line) for line in labeled.read_text(encoding="utf8").splitlines()]
    test = [r for r in rows if split_of(r["text"]) == "test" and r["kind"] in ("hill", "sea")]
    right = [got == r["kind"] for got, r in zip(tuned.classify([r["text"] for r in test]), test)]
    shares = {r["method"]: r["right"] for r in told["rows"]}
    assert sum(right) / len(right) == shares["finetuned"]
    often = sum(r["kind"] == "sea" for r in test) / len(test)  # of the whole training part, not of the equal draw
    assert shares["most frequent class"] == often
    assert shares["counted words (TF-IDF), logistic regression"] > 0.8  # some texts are cut before the word
    assert len(told["losses"]) == 12
    with pytest.raises(BadInput, match="allowed: a classifier"):
        tuned._replace(labels=[]).classify(["a"])


@pytest.mark.parametrize("method", ["lora", "head"])
def test_a_base_with_other_weights_is_refused(method, recipe, tmp_path, tiny_model, small_settings):
    other = tmp_path / "base"
    dense = load_model(tiny_model, settings=small_settings)
    dense.model.save_pretrained(other)
    dense.tokenizer.save_pretrained(other)
    made = recipe(SORT, method=method, model=str(other), cut=12, per_class=8, lora=None)
    result = finetune_recipe(made, tmp_path / "o", settings=small_settings, say=quiet)
    load_tuned(result, settings=small_settings)
    with torch.no_grad():
        dense.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    dense.model.save_pretrained(other)
    with pytest.raises(BadInput, match="fingerprint"):
        load_tuned(result, settings=small_settings)


def test_a_run_that_was_stopped_ends_as_if_it_was_not(recipe, tmp_path, small_settings):
    made = recipe(train={"save_every": 1, "steps": 6})
    whole = finetune_recipe(made, tmp_path / "whole", settings=small_settings, say=quiet)

    def stop(line):
        if list((tmp_path / "cut" / "checkpoints").glob("step-*3")):
            raise KeyboardInterrupt

    import llmcourse.training

    class Stops(llmcourse.training.Checkpoints):
        def after_step(self, run):
            super().after_step(run)
            stop("")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llmcourse.training, "Checkpoints", Stops)
        finetune_recipe(made, tmp_path / "cut", settings=small_settings, say=quiet)
    assert not (tmp_path / "cut" / "result").exists()
    said = []
    cut = finetune_recipe(made, tmp_path / "cut", settings=small_settings, say=said.append)
    assert any("step 3" in line for line in said)
    a, b = (load_tuned(folder, settings=small_settings).model for folder in (whole, cut))
    assert equal(weights(a), weights(b))


def test_a_finished_run_is_known_again_and_another_one_refused(
    recipe, tmp_path, small_settings, tiny_model, corpus, labeled
):
    made, out = recipe(), tmp_path / "o"
    result = finetune_recipe(made, out, settings=small_settings, say=quiet)
    said = []
    assert finetune_recipe(made, out, settings=small_settings, say=said.append) == result
    assert said == [f"{result} is there"]
    more = tmp_path / "more.jsonl"
    more.write_text(corpus.read_text(encoding="utf8") + '{"text": "one more of them"}\n', encoding="utf8")
    scale = dataclasses.replace(small_settings.scale, eval_tokens=small_settings.scale.eval_tokens - 1)
    others = {
        "recipe": (recipe(train={"lr": 0.02}), small_settings),
        "text": (recipe(data=str(more)), small_settings),
        "task": (recipe(SORT), small_settings),
        "scale": (made, dataclasses.replace(small_settings, scale=scale)),
    }
    for name, (other, settings) in others.items():
        with pytest.raises(BadInput, match=r"out is .* a folder of this recipe with this model, these texts"):
            finetune_recipe(other, out, settings=settings, say=quiet)
        assert load_tuned(result, settings=small_settings), name
    (result / "result.json").write_text("{}", encoding="utf8")
    for act in (lambda: load_tuned(result), lambda: finetune_recipe(made, out, settings=small_settings)):
        with pytest.raises(BadInput, match=r"result\.json of 2 bytes"):
            act()


REFUSED = [  # table, changes, words of the sentence
    (READ, {"task": "sort"}, "task is 'sort'; allowed: language, classify, chat"),
    (READ, {"method": "head", "lora": None}, "method is 'head'; allowed: lora or full for the task 'language'"),
    (READ, {"method": "ia3"}, "method is 'ia3'; allowed: lora, full, head"),
    (READ, {"label": "kind"}, "label is 'kind'; allowed: no such key for the task 'language'"),
    (READ, {"cut": 3}, "cut is 3; allowed: no such key for the task 'language'"),
    (READ, {"per_class": 3}, "per_class is 3; allowed: no such key"),
    (READ, {"without": ["x"]}, "without is ('x',); allowed: no such key"),
    (READ, {"beside": ["wikipedia", "wikipedia"]}, "allowed: other data sets than data, each once"),
    (READ, {"name": "a`b"}, "name is 'a`b'; allowed: a text of 1 to 60 characters"),
    (READ, {"limits": " "}, "limits is ' '; allowed: a text"),
    (READ, {"most": 19}, "most is 19; allowed: a whole number of at least 20"),
    (READ, {"colour": 1}, "key in recipe.toml is 'colour'; allowed: name, task"),
    (READ, {"license": None}, "license (missing)"),
    (READ, {"lora": {"rank": 0}}, "[lora]: rank is 0; allowed"),
    (READ, {"lora": {"rank": 1.5}}, "rank in [lora] is 1.5; allowed: a whole number"),
    (READ, {"lora": {"ranks": 1}}, "key in [lora] is 'ranks'; allowed: rank, alpha, layers, dropout"),
    (READ, {"method": "full"}, "[lora] is {'rank': 2, 'alpha': 4.0}; allowed: no such table for the method 'full'"),
    (READ, {"train": {"lr": -1.0}}, "lr is -1.0; allowed"),
    (READ, {"train": None}, "[train] in recipe.toml is None; allowed: a table with steps"),
    (READ, {"train": {"step": 1}}, "key in [train] is 'step'; allowed: steps"),
    (SORT, {"label": None}, "label is None; allowed: the field that holds the label of a document"),
    (SORT, {"beside": ["wikipedia"]}, "beside is ['wikipedia']; allowed: no list for the task 'classify'"),
    (SORT, {"pool": "max"}, "pool is 'max'; allowed: mean, last"),
    (SORT, {"classes": 1}, "classes is 1; allowed: a whole number of at least 2"),
    (SORT, {"train": {"seq_len": 8}}, "seq_len is 8; allowed: no such key for the task 'classify'"),
    (SORT, {"question": "{text}", "answer": "{kind}"}, "question is '{text}'; allowed: no such key for the task 'cl"),
    (READ, {"longest": 8}, "longest is 8; allowed: no such key for the task 'language'"),
    (TALK, {"train": {"seq_len": 8}}, "seq_len is 8; allowed: no such key for the task 'chat': a chat is read whole"),
    (TALK, {"question": "{asked}"}, "answer is None; allowed: a text where question is one, and none where it is none"),
    (TALK, {"answer": "{asked}"}, "answer is '{asked}'; allowed: a text where question is one"),
    (TALK, {"question": "a", "answer": "{said}"}, "question is 'a'; allowed: a text with names of fields in braces"),
    (TALK, {"question": "{", "answer": "{said}"}, "question is '{'; allowed: a text with names of fields in braces"),
    (TALK, {"question": "{a.b}", "answer": "{said}"}, "question is '{a.b}'; allowed: a text with names of fields"),
    (TALK, {"question": "{n:>9}", "answer": "{said}"}, "question is '{n:>9}'; allowed: a text with names of fields"),
    (TALK, {"longest": 1}, "longest is 1; allowed: a whole number of at least 2"),
    (TALK, {"method": "head", "lora": None}, "method is 'head'; allowed: lora or full for the task 'chat'"),
    (TALK, {"cut": 3}, "cut is 3; allowed: no such key for the task 'chat'"),
    (TALK, {"label": "asked"}, "label is 'asked'; allowed: no such key for the task 'chat'"),
    # what only the model or the texts can tell
    (READ, {"lora": {"layers": "*.nothing"}}, "layers is '*.nothing'; allowed"),
    (READ, {"train": {"seq_len": 257}}, "seq_len is 257; allowed: at most 256"),
    (READ, {"train": {"seq_len": 256}, "data": "{two}"}, "tokens in its train part; allowed: at least 257"),
    (READ, {"data": "nowhere"}, "data is 'nowhere'; allowed"),
    (READ, {"model": "nowhere"}, "model is 'nowhere'; allowed"),
    (SORT, {"label": "sort"}, "0 labels in the field 'sort' that have 1 or more texts to train on"),
    (SORT, {"classes": 3}, "2 labels in the field 'kind' that have 1 or more texts to train on; allowed: at least 3"),
    (SORT, {"without": ["sea"]}, "1 labels in the field 'kind'"),
    (SORT, {"per_class": 10_000}, "0 labels in the field 'kind' that have 10000 or more texts to train on"),
    (TALK, {"longest": 4}, "with 0 chats of at most 4 tokens in its train part; allowed: at least 1"),
    (TALK, {"data": "{two}"}, "has no messages of an assistant; allowed: rows with a list"),
    (TALK, {"question": "{who}", "answer": "{said}"}, "has no field 'who'; allowed: one that holds a text or a number"),
    (SORT, {"data": "{two}"}, "with 0 labeled texts in its test part; allowed: at least 20: fewer say nothing"),
]


@pytest.mark.parametrize("table, changes, words", REFUSED, ids=[str(c)[:50] for _, c, _ in REFUSED])
def test_what_cannot_work_is_refused_before_anything_is_written(
    table, changes, words, recipe, tmp_path, small_settings
):
    two = tmp_path / "two.jsonl"
    two.write_text("".join(json.dumps({"text": f"{w} one two", "kind": w}) + "\n" for w in "abcdefgh"), "utf8")
    changes = {k: str(two) if v == "{two}" else v for k, v in changes.items()}
    with pytest.raises(BadInput) as e:
        finetune_recipe(recipe(table, **changes), tmp_path / "o", settings=small_settings, say=quiet)
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "o").exists()


def test_two_at_once_and_folders_of_others_are_refused(recipe, tmp_path, small_settings):
    from filelock import FileLock

    made = recipe()
    with FileLock(tmp_path / ".o.lock"), pytest.raises(BadInput, match="another finetune is at work; allowed"):
        finetune_recipe(made, tmp_path / "o", settings=small_settings, say=quiet)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").write_text("keep", encoding="utf8")
    with pytest.raises(BadInput, match="or an empty one"):
        finetune_recipe(made, tmp_path / "p", settings=small_settings, say=quiet)
    assert (tmp_path / "p" / "mine.txt").read_text(encoding="utf8") == "keep"


def test_the_recipes_of_the_course_and_the_command(cli, tmp_path, tiny_model, corpus):
    names = sorted(p.stem for p in (ROOT / "recipes" / "finetune").glob("*.toml"))
    assert names == ["finance", "topics", "translate"]
    for name in names:
        found = load_finetune_recipe(find_recipe(name, "finetune"))
        assert found.name == name and found.text == find_recipe(name, "finetune").read_text(encoding="utf8")
    file = tmp_path / "mine.toml"
    table = READ | {"data": "banking", "train": TRAIN | {"seq_len": 32}}
    file.write_text(_toml(table), encoding="utf8")
    assert tomllib.loads(file.read_text(encoding="utf8")) == table
    given = ("finetune", file, "--out", tmp_path / "o", "--model", tiny_model, "--data", corpus)
    code, out, err = cli(*given)
    assert code == 0, err
    card = (tmp_path / "o" / "result" / "README.md").read_text(encoding="utf8")
    assert f"--model {tiny_model} --data {corpus}`" in card and "result: " in out
    assert "**License** for those to say who have the rights to the model and the text given" in card
    code, out, _ = cli(*given)
    assert code == 0 and "is there" in out
    code, _, err = cli("finetune", "topic", "--out", tmp_path / "p")
    assert code == 2 and "allowed: the path of a .toml file, or one of finance, topics, translate." in err
