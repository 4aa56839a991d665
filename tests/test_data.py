"""Data: models that are refused, files in every state, the split, leaks, streams of tokens, windows."""

import csv
import dataclasses
import random
import shutil

import pytest
import torch

from llmcourse import data
from llmcourse.settings import BadInput, load_settings


def prose(n, rng, n_words=120):
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(2000)]
    return [" ".join(rng.choices(vocabulary, k=n_words)) for _ in range(n)]


def edited(text, rng, share=0.02):
    return " ".join("edited" if rng.random() < share else w for w in text.split())


# --- leaks


@pytest.mark.parametrize("n", [8, 13])
def test_a_planted_leak_is_found_and_shuffled_words_are_not(n):
    rng = random.Random(2)
    train, test = prose(80, rng), prose(20, rng)
    assert data.leak_test(test, train, n=n).share == 0
    planted = [
        *train,
        edited(test[3], rng),
        test[7].upper() + "!",
        "new words " + " ".join(test[11].split()[20 : 20 + n]),
    ]
    leak = data.leak_test(test, planted, n=n)
    assert leak.flagged == [3, 7, 11] and leak.share == 3 / 20 and leak.shares[7] == 1.0
    assert leak.examples[11] == " ".join(test[11].split()[20 : 20 + n])
    shuffled = [" ".join(rng.sample(t.split(), len(t.split()))) for t in test]
    assert data.leak_test(shuffled, planted, n=n).flagged == []
    short = data.leak_test(["too short"], ["too short"], n=n)
    assert short.tested == 0 and short.share != short.share


@pytest.mark.parametrize(
    "call",
    [
        lambda: data.leak_test(["a"], "one string"),
        lambda: data.leak_test(["a"], ["a"], n=0),
        lambda: data.leak_test(["a"], ["a"], n=1.0),
        lambda: data.windows(10, 1, 1),
        lambda: data.windows(10, 4, 4),
        lambda: data.windows(3, 4, 1),
        lambda: data.windows(10.0, 4, 1),
        lambda: data.windows(10, True, 1),
    ],
)
def test_bad_input_is_one_sentence(call):
    with pytest.raises(BadInput, match=r"allowed: .*\.?$"):
        call()


# --- own files


def test_every_kind_of_file_is_read(tmp_path):
    long = "word " * 40_000  # above the 131,072 characters that a CSV field has by default
    (tmp_path / "bom.csv").write_text("text,n\none,1\n", encoding="utf-8-sig")
    with open(tmp_path / "long.csv", "w", newline="", encoding="utf8") as f:
        csv.writer(f).writerows([["text"], [long], ['a "quoted", text']])
    (tmp_path / "bom.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n', encoding="utf-8-sig")
    folder = tmp_path / "folder.txt"
    (folder / "inner.txt").mkdir(parents=True)  # folders that are called like files
    (folder / "inner.txt" / "a.txt").write_text("\ufeffone", encoding="utf8")
    texts = lambda name: sorted(r["text"] for r in data.load_records(tmp_path / name))
    limit = csv.field_size_limit()
    assert texts("bom.csv") == ["one"] and texts("bom.jsonl") == ["one", "two"] and texts("folder.txt") == ["one"]
    assert texts("long.csv") == ['a "quoted", text', long] and csv.field_size_limit() == limit
    assert data.load_data(tmp_path / "bom.csv")["n"] == ["1"]


def test_one_text_file_is_many_documents(tmp_path):
    """A .txt on its own is cut at blank lines, so that each part has some of it; in a folder it is whole."""
    paragraphs = [f"paragraph {i} " + "word " * 30 for i in range(400)]
    path = tmp_path / "my.txt"
    path.write_bytes("\ufeff".encode() + "\n \n".join(paragraphs).encode())
    records = data.load_records(path)
    assert {r["split"] for r in records} == {"train", "val", "test", "calib"}
    assert sorted(p.split(" word")[0] for r in records for p in r["text"].split("\n\n")) == sorted(
        p.split(" word")[0] for p in paragraphs
    )
    assert sum(len(r["text"]) < 500 for r in records) <= 1
    assert len(data.load_records(tmp_path)) == 1


def test_documents_that_are_kept_in_a_process_are_nobody_s_and_their_files_are_still_compared(home, tmp_path):
    """A data set of the catalog is read once; what a caller does to its records stays there, and damage is noticed."""
    shutil.copytree(home / "data" / "banking", tmp_path / "data" / "banking")
    settings = dataclasses.replace(load_settings(), home=tmp_path)
    first = data.load_records("banking", settings=settings)
    before = [dict(r) for r in first]
    for record in first:
        record["text"] = "changed"
    first.clear()
    assert data.load_records("banking", settings=settings) == before
    parts = [data.load_records("banking", part, settings=settings) for part in data.SPLITS]
    assert sorted(r["title"] for part in parts for r in part) == sorted(r["title"] for r in before)
    content = tmp_path / "data" / "banking" / "documents.json"
    content.write_bytes(content.read_bytes()[:-1] + b" ")
    with pytest.raises(BadInput, match="banking"):
        data.load_records("banking", settings=settings)


def test_a_file_of_one_s_own_is_read_again(tmp_path):
    mine = tmp_path / "mine.txt"
    for words in ("the first text", "the second text"):
        mine.write_text(words, encoding="utf8")
        assert [r["text"] for r in data.load_records(mine)] == [words]


BROKEN_FILES = {
    "surrogate.jsonl": ('{"text": "fine"}\n{"text": "half \\ud83d of it"}\n', "line 2"),
    "not_json.jsonl": ('{"text": "fine"}\n\n{"text": \n', "line 3"),
    "deep.jsonl": ("[" * 100_000 + "]" * 100_000, "line 1"),
    "digits.jsonl": ('{"text": ' + "1" * 10_000 + "}", "line 1"),
    "list.jsonl": ('["text"]', "line 1"),
    "number.jsonl": ('{"text": 1}', "line 1"),
    "comma.csv": ("text,n\nfine,1\nnot quoted, so cut,2\n", "line 3"),
    "short.csv": ("n,text\n1,fine\n2\n", "line 3"),
    "no_text.csv": ("body\nfine\n", "line 2"),
    "quote.csv": ('text\n"never closed\n', "could not be read"),
    "latin.txt": (b"caf\xe9", "UTF-8"),
    "empty.txt": ("", "documents with text"),
    "name.pdf": ("text", ".txt, .jsonl or .csv"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
@pytest.mark.parametrize("read", [data.load_records, data.load_data])
def test_a_broken_file_is_refused_with_its_line(name, read, tmp_path):
    content, words = BROKEN_FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as e:
        read(tmp_path / name)
    assert words in str(e.value) and "allowed: " in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name", ["no/such", "nothing", "~nobody-of-that-name/x.txt", "a\0b", "x" * 5000, "", ".", "../.."]
)
def test_a_name_that_is_nothing_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (data.load_records, data.load_data, data.load_model):
        with pytest.raises(BadInput, match="allowed"):
            read(name)


def test_the_split_does_not_move():
    """Models were trained on `train`: another rule would test them on what they have read."""
    known = {"The cat sat.": 0.4654, "量化": 0.0243, "x = a - b": 0.2846, "दिन": 0.4109}
    assert {t: round(data.document_hash(t), 4) for t in known} == known
    assert data.document_hash("The Cat,  sat.") == data.document_hash("the cat sat")


# --- models


def test_a_folder_is_loaded_as_the_class_that_it_names(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "m")
    fast().save_pretrained(tmp_path / "m")
    model, _, card = data.load_model(tmp_path / "m")
    assert type(model) is BertForSequenceClassification and not model.training
    assert (card.source, card.name) == ("folder", "m") and data.load_model("course-3m").card.license


# --- streams


def fast(post=None, **special):
    """A small tokenizer of transformers; `post` is put in front of each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    from llmcourse.tokenizer import BPE

    made = BPE([], special_tokens=("<s>", "</s>")).to_tokenizers()
    if post:
        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", **special)


def test_bos_follows_the_tokenizer(tmp_path):
    for i, text in enumerate(prose(40, random.Random(0), 20)):
        (tmp_path / f"{i}.txt").write_text(text)
    plain, begins = fast(), fast("<s>", bos_token="<s>")
    limits = {"train": 100}
    assert data.separator_id(plain) == 1 and data.separator_id(begins) == 0
    stream = data.token_data(begins, tmp_path, limits=limits)
    assert stream.bos and stream.separator == 0 == stream.train[0] and "BOS" in stream.protocol
    ended = data.token_data(begins, tmp_path, limits=limits, bos=False)
    assert not ended.bos and ended.train[0] == 1 and "BOS" not in ended.protocol
    assert torch.equal(stream.train[1:], ended.train[1:].masked_fill(ended.train[1:] == 1, 0))
    with pytest.raises(BadInput, match="BOS"):
        data.token_data(plain, tmp_path, limits=limits, bos=True)


def test_a_tokenizer_without_positions_is_refused(tmp_path):
    class Slow:
        is_fast = False

        def __call__(self, *args, **kwargs):
            raise NotImplementedError

    for bad in (Slow(), None, "gpt2"):
        with pytest.raises(BadInput, match="fast tokenizer"):
            data.token_data(bad, "wikipedia", limits={"test": 8})


@pytest.mark.parametrize("limits", [{"tset": 1}, {"test": -1}, {"test": 1.5}, {"test": True}, {"test": "8"}, {1: 1}])
def test_limits_are_whole_numbers_of_known_parts(limits, tmp_path):
    with pytest.raises(BadInput, match="limits"):
        data.token_data(fast(), tmp_path, limits=limits)


@pytest.mark.parametrize(
    "n, length, seed", [(0, 4, 0), (-1, 4, 0), (1, 0, 0), (1, 4, -1), (1.0, 4, 0), (10**9, 4, 0), (1, 10**9, 0)]
)
def test_calibration_batches_refuse_what_is_not_there(n, length, seed):
    none = torch.empty(0, dtype=torch.long)
    streams = dict(train=none, val=none, test=none, calib=torch.arange(100), bytes={})
    some = data.TokenData(**streams, name="n", tokenizer="t", separator=0)
    assert some.calib_batch(2, 4, 0).shape == (2, 4)
    with pytest.raises(BadInput, match="allowed"):
        some.calib_batch(n, length, seed)


def test_bytes_add_up_and_limits_cut():
    tokenizer = data.load_model("course-3m").tokenizer
    texts = ["plain words", "naïve café — “quotes”", "量化 困惑度", "🙂 the end 🧪", "tabs\tand\nlines\n", "दिन"]
    ids, sizes = data.encode(tokenizer, texts)
    assert int(sizes.sum()) == sum(len(t.encode()) for t in texts) and int(sizes.min()) >= 0
    assert (ids == data.separator_id(tokenizer)).sum() == len(texts)
    for n in (0, 1, 7):
        assert torch.equal(data.encode(tokenizer, texts, limit=n)[0], ids[:n])
