"""One report: quantile intervals, metrics by name, energy counters, the command line."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmcourse import evaluator as ev
from llmcourse.accuracy import Item, multiple_choice, reliability
from llmcourse.data import windows
from llmcourse.evaluation import Bootstrap, Text, perplexity
from llmcourse.model import GPT, GPTConfig
from llmcourse.settings import BadInput

CUT = lambda prompt: {"input_ids": [1, 2]}
V, N = 31, 200
WINDOW = {"context": 32, "stride": 24}
FAST = {"prompt": 8, "repeats": 6}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=64, **shape)).eval()


@pytest.fixture(scope="module")
def text():
    tokens = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    return Text(tokens=tokens, token_bytes=torch.full((N,), 3), separator=0)


def gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=V, d_model=16, n_layers=1, n_heads=2, context=64)).eval()


# ------------------------------------------------------------------------------------------- quantiles


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("n", [5, 6, 20, 36, 37, 100])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_level_of_a_quantile_interval_is_exact_and_reached_in_simulation(q, n, level):
    rng = np.random.default_rng(0)
    first = ev.quantile_interval(rng.random(n), q, level=level)
    assert (first is None) == (n < ev.values_needed(q, level=level))
    if first is None:
        return
    exact = lambda k: math.comb(n, k) * q**k * (1 - q) ** (n - k)
    place = np.sort(rng.random(n))
    found = ev.quantile_interval(place, q, level=level)
    low, high = np.searchsorted(place, [found.low, found.high]) + 1  # places, counted from 1
    assert found.level == pytest.approx(sum(exact(k) for k in range(low, high)), abs=1e-9)
    assert found.level >= level and sum(exact(k) for k in range(low)) <= (1 - level) / 2 + 1e-12
    # the next narrower pair would miss the level on that side
    assert sum(exact(k) for k in range(low + 1)) > (1 - level) / 2
    assert sum(exact(k) for k in range(high - 1, n + 1)) > (1 - level) / 2
    draws = np.sort(rng.random((4000, n)), axis=1)
    share = np.mean((draws[:, low - 1] <= q) & (q <= draws[:, high - 1]))
    assert abs(share - found.level) < 4 * math.sqrt(found.level * (1 - found.level) / 4000) + 1e-3


def test_how_many_values_an_interval_needs():
    assert [ev.values_needed(q) for q in (0.5, 0.9, 0.99, 0.1)] == [6, 36, 368, 36]
    assert ev.quantile_interval(range(35), 0.9) is None and ev.quantile_interval(range(36), 0.9).high == 35


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, math.nan]])
def test_values_without_a_quantile(values):
    with pytest.raises(BadInput, match="finite numbers"):
        ev.quantile_interval(values, 0.5)


# ------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("make", [lambda llama: llama, lambda llama: gpt()], ids=["llama", "gpt"])
def test_every_metric_gives_rows_that_say_where_they_come_from(llama, text, make, tmp_path):
    llama.save_pretrained(tmp_path)
    tasks = {"items", "questions"}
    names = [name for name, metric in ev.METRICS.items() if not tasks & set(metric.needs)]
    report = ev.evaluate(make(llama), text, names, **WINDOW, **FAST, folder=tmp_path)
    for row in report.rows:
        assert row.protocol and row.counts
        if row.low is not None:
            assert row.low <= row.value <= row.high and 0.8 < row.level < 1
        else:
            assert row.note
    again = json.loads(report.to_json())
    assert [r["name"] for r in again["rows"]] == [r.name for r in report.rows]
    page = report._repr_html_()
    for row in report.rows:
        assert row.name in str(report) and row.name in page and row.shown(row.value) in str(report)


def test_the_numbers_are_those_of_the_functions_that_measure_one(llama, text, tmp_path):
    report = ev.evaluate(llama, text, ["token_accuracy", "bits_per_byte", "perplexity"], **WINDOW)
    p = perplexity(llama, text, **WINDOW)
    assert [r.name for r in report.rows] == ["token_accuracy", "bits_per_byte", "perplexity"]
    assert (report["perplexity"].value, report["perplexity"].low) == (p.value, p.low)
    assert (report["bits_per_byte"].value, report["bits_per_byte"].high) == (p.bits_per_byte, p.bits_per_byte_high)
    assert torch.equal(report.perplexity.nll, p.nll)
    hits = []
    for w in windows(N, **WINDOW):
        choice = llama(text.tokens[None, w.start : w.stop]).logits[0].argmax(-1)
        hits += (choice[w.first - 1 - w.start : -1] == text.tokens[w.first : w.stop]).tolist()
    assert report["token_accuracy"].value == np.mean(hits) and len(hits) == N - 1


@pytest.mark.parametrize("separator", [0, None])
def test_the_level_of_a_row_is_the_one_that_can_be_kept(llama, text, separator):
    names = ["perplexity", "bits_per_byte", "token_accuracy", "calibration_error"]
    many = replace(text, tokens=text.tokens.repeat(12), token_bytes=text.token_bytes.repeat(12), separator=separator)
    rows = ev.evaluate(llama, many, names, **WINDOW)
    p = perplexity(llama, many, **WINDOW)
    assert rows["perplexity"].level == rows["bits_per_byte"].level == p.held
    hits = rows["token_accuracy"]
    assert all(0.85 < row.level < 0.95 for row in (rows["perplexity"], hits, rows["overconfidence"]))
    # the documents here are unlike each other, and each number sees that in its own way; the blocks are alike
    assert separator is None or len({row.level for row in (rows["perplexity"], hits, rows["overconfidence"])}) == 3


def test_too_few_units_are_said_and_no_interval_is_computed(llama, text):
    few = replace(text, tokens=text.tokens[:60], token_bytes=text.token_bytes[:60], separator=None)
    report = ev.evaluate(llama, few, ["perplexity", "token_accuracy"], **WINDOW, bootstrap=Bootstrap(block=20))
    for row in report.rows:
        assert row.low is row.high is row.level is None
        assert row.note == "no interval: of 3 blocks of 20 tokens, too few carry the result, or too skewed ones"


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_what_is_watched_belongs_to_its_token(llama, text, batch_size):
    watched = ev.Watched(llama)
    nll = perplexity(watched, text, **WINDOW, batch_size=batch_size).nll
    token, p = watched.choices(N, **WINDOW)
    right = token == text.tokens[1:]
    assert right.any() and torch.allclose(p[right].double(), (-nll[right]).exp(), rtol=1e-5)
    assert (p[~right] >= (-nll[~right]).exp().float()).all()


def test_calibration_is_that_of_the_chapter_before(llama, text):
    report = ev.evaluate(llama, text, "calibration_error", **WINDOW)
    watched = ev.Watched(llama)
    perplexity(watched, text, **WINDOW)
    token, p = watched.choices(N, **WINDOW)
    hits = (token == text.tokens[1:]).numpy()
    assert report["calibration_error"].value == reliability(p, hits).ece
    assert report["calibration_error"].low is None and "calibrated, it would be" in report["calibration_error"].note
    assert report["overconfidence"].value == pytest.approx(float(p.mean()) - hits.mean())
    assert report["overconfidence"].low < report["overconfidence"].value < report["overconfidence"].high


def test_multiple_choice_is_that_of_the_chapter_before(tiny_model):
    model = LlamaForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    items = [Item(context=f"ka lo {i} mi", choices=("ne ru", "sa", "to vi qu"), answer=i % 3) for i in range(24)]
    rows = ev.evaluate(model, None, "accuracy", items=items, tokenizer=tokenizer)
    for name, norm in (("accuracy", "none"), ("accuracy_per_byte", "bytes")):
        own = multiple_choice(model, tokenizer, items, norm=norm)
        assert (rows[name].value, (rows[name].low, rows[name].high)) == (own.value, own.interval)
    few = ev.evaluate(model, None, "accuracy", items=items[:5], tokenizer=tokenizer)["accuracy"]
    assert few.low is None and "too few items" in few.note


QUESTIONS = [ev.Question(f"ka lo {i} mi", ("ne ru", f"sa to {i}")) for i in range(24)]
WRITTEN = ("bleu", "chrf", "token_f1", "rouge1", "rougeL", "exact_match")


def test_what_is_written_is_compared_with_the_references(tiny_model, monkeypatch):
    """The scores are those of the chapter on metrics, of what `generate` of transformers writes, with their levels."""
    from llmcourse import metrics

    model = LlamaForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    given = {"questions": QUESTIONS, "tokenizer": tokenizer, "new_tokens": 6}
    answers = []
    for q in QUESTIONS:
        ids = torch.tensor([tokenizer(q.prompt)["input_ids"]])
        new = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip().split("\n")[0].strip())
    wanted = [list(q.references) for q in QUESTIONS]
    report = ev.evaluate(model, None, WRITTEN, **given)
    assert report["bleu"].value == metrics.corpus_bleu(answers, wanted).value
    assert report["chrf"].value == metrics.chrf(answers, wanted).value
    assert report["rougeL"].value == np.mean([metrics.rouge(a, w)["rougeL"].f1 for a, w in zip(answers, wanted)])
    for row in report.rows:
        assert row.n == 24 and row.counts == "questions" and "24 questions" in row.protocol
        assert (row.low is None and "no interval" in row.note) or row.low <= row.value <= row.high
    assert report["exact_match"].level == 0.95 and report["exact_match"].low == 0 < report["exact_match"].high

    right = iter([*[q.references[1] for q in QUESTIONS[:12]], *["ka"] * 12])
    monkeypatch.setattr(ev, "write_answer", lambda *_: next(right) + "\nand more that is not asked for")
    half = ev.evaluate(model, None, WRITTEN, **given)
    assert half["exact_match"].value == 0.5 == half["token_f1"].value == half["rougeL"].value
    f1 = half["token_f1"]
    assert f1.low < 0.5 < f1.high and 0.85 < f1.level < 0.95 and "24 questions" in f1.protocol
    monkeypatch.undo()
    few = ev.evaluate(model, None, "exact_match", **given | {"questions": QUESTIONS[:3]})
    assert few["exact_match"].low is None and "too few" in few["exact_match"].note


def test_brier_is_that_of_the_likelihoods(tiny_model):
    from llmcourse.accuracy import brier, score_choices

    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)
    items = [Item(context=f"ka lo {i} mi", choices=("ne ru", "sa", "to vi qu"), answer=i % 3) for i in range(24)]
    row = ev.evaluate(model, None, "brier", items=items, tokenizer=tokenizer)["brier"]
    log_p = torch.from_numpy(score_choices(model, tokenizer, items).log_p)
    assert row.value == pytest.approx(brier(log_p.softmax(-1).numpy(), np.arange(24) % 3)) and 0 <= row.value <= 2
    assert row.level is None or row.low < row.value < row.high


def test_the_model_is_as_it_was(llama, text):
    llama.train()
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    ev.evaluate(llama, text, ["perplexity", "token_accuracy", "next_token", "peak_memory"], **WINDOW, **FAST)
    assert llama.training and all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())
    assert not any(p.grad is not None for p in llama.parameters())
    llama.eval()


def test_few_runs_give_no_interval_of_the_90th_percentile(llama):
    rows = {n: ev.evaluate(llama, None, "next_token", prompt=8, repeats=n) for n in (5, 35, 36)}
    assert rows[5]["next_token_median"].low is None and "6 runs" in rows[5]["next_token_median"].note
    assert rows[35]["next_token_median"].low is not None
    assert rows[35]["next_token_p90"].low is None and "36 runs" in rows[35]["next_token_p90"].note
    assert rows[36]["next_token_p90"].low is not None


def test_a_step_is_taken_back(llama):
    rt = ev.Runtime.of(None, llama)
    with torch.no_grad():
        first, following = ev.prefill_and_decode(llama, 8, rt)
        cache = following.__closure__[[c for c in following.__code__.co_freevars].index("cache")].cell_contents
        for _ in range(3):
            first(), following()
            assert cache.get_seq_length() == 8


def test_a_row_without_interval_says_why():
    about = {"name": "x", "n": 1, "counts": "runs", "protocol": "none"}
    with pytest.raises(BadInput, match="note of 'x'"):
        ev.Row(value=1.0, **about)
    with pytest.raises(BadInput, match="finite"):
        ev.Row(value=math.nan, note="a", **about)
    assert ev.Row(value=None, note="unknown", **about).shown(None) == "unknown"


def test_names_from_outside_are_text_on_a_page(llama, text):
    report = ev.evaluate(llama, text, "perplexity", **WINDOW, name="<script>alert(1)</script>")
    assert "<script" not in report._repr_html_()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrics": ["perplexity", "beauty"]}, "metric is 'beauty'; allowed: perplexity"),
        ({"metrics": []}, "metrics is"),
        ({"data": None}, "metric is 'perplexity'; allowed: only with data"),
        ({"data": "a sentence"}, "data is 'str'"),
        ({"model": "smollm2"}, "model is 'str'"),
        ({"data": torch.zeros(N, dtype=torch.long), "metrics": ["bits_per_byte"]}, "bytes of each token"),
        ({"data": torch.zeros(31, dtype=torch.long)}, "at least one window of 32"),
        ({"context": 65}, "at most 64"),
        ({"stride": 32}, "stride is 32"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"metrics": ["first_token"], "model": lambda ids: torch.zeros(*ids.shape, V)}, "key-value cache"),
        ({"metrics": ["memory_bytes"], "model": lambda ids: torch.zeros(*ids.shape, V)}, "torch module"),
        ({"metrics": ["next_token"], "prompt": 64}, "prompt and one more token is 65"),
        ({"metrics": ["next_token"], "prompt": 0}, "prompt is 0"),
        ({"metrics": ["next_token"], "prompt": 8, "repeats": 1}, "repeats is 1"),
        ({"metrics": ["accuracy"]}, "only with items"),
        ({"metrics": ["accuracy"], "items": [], "tokenizer": object()}, "items is"),
        ({"metrics": ["bleu"]}, "only with questions that have references"),
        ({"metrics": ["brier"]}, "only with items"),
        ({"metrics": ["bleu"], "questions": [], "tokenizer": object()}, "questions is"),
        ({"metrics": ["rouge1"], "questions": ["ka"], "tokenizer": object()}, "a Question with a prompt"),
        ({"metrics": ["chrf"], "questions": [ev.Question("ka", ())], "tokenizer": object()}, "none empty"),
        ({"metrics": ["chrf"], "questions": [ev.Question("ka", ("",))], "tokenizer": object()}, "none empty"),
        ({"metrics": ["chrf"], "questions": [ev.Question("ka", ("lo",))], "tokenizer": CUT, "new_tokens": 63}, "is 65"),
        ({"metrics": ["disk_bytes"]}, "only with folder"),
        ({"metrics": ["disk_bytes"], "folder": "nowhere"}, "no weights"),
    ],
)
def test_what_cannot_be_served_is_one_sentence_before_any_work(llama, text, change, words, monkeypatch):
    def measured(*_, **__):
        raise AssertionError("measured something first")

    for name in ("perplexity", "compare", "peak_memory"):
        monkeypatch.setattr(ev, name, measured)
    given = {"model": llama, "data": text, "metrics": ["perplexity"], **WINDOW} | change
    with pytest.raises(BadInput, match=words) as e:
        ev.evaluate(given.pop("model"), given.pop("data"), given.pop("metrics"), **given)
    assert str(e.value).count("\n") == 0 and str(e.value).endswith(".")


# ------------------------------------------------------------------------------------------- energy


def counters(root, *values, end=10_000_000):
    for i, value in enumerate(values):
        package = root / f"intel-rapl:{i}"
        (package / f"intel-rapl:{i}:0").mkdir(parents=True, exist_ok=True)
        (package / f"intel-rapl:{i}:0" / "energy_uj").write_text("5\n")
        (package / "energy_uj").write_text(f"{value}\n")
        (package / "max_energy_range_uj").write_text(f"{end - 1}\n")


def test_energy_of_two_packages_over_an_overflow(tmp_path):
    counters(tmp_path, 1_000_000, 9_500_000)
    counter = ev.energy_counter(tmp_path)
    before = counter.read()
    counters(tmp_path, 3_000_000, 500_000)
    assert counter.joules_since(before) == pytest.approx(3.0) and not counter.why_not


@pytest.mark.parametrize("harm", ["nothing", "no range", "no number"])
def test_energy_that_cannot_be_read_is_unknown_with_the_reason(tmp_path, llama, monkeypatch, harm):
    if harm != "nothing":
        counters(tmp_path, 5)
        file = tmp_path / "intel-rapl:0" / ("max_energy_range_uj" if harm == "no range" else "energy_uj")
        file.unlink() if harm == "no range" else file.write_text("much")
    found = ev.energy_counter(tmp_path)
    assert found.files == () and found.why_not
    monkeypatch.setattr(ev, "energy_counter", lambda: found)
    row = ev.evaluate(llama, None, ["energy_per_token"], prompt=8)["energy_per_token"]
    assert row.value is None and found.why_not in row.note and row.shown(row.value) == "unknown"


def test_energy_is_reported_with_an_exact_level(tmp_path, llama, monkeypatch):
    counters(tmp_path, 5)
    monkeypatch.setattr(ev, "energy_counter", lambda real=ev.energy_counter: real(tmp_path))
    row = ev.evaluate(llama, None, ["energy_per_token"], prompt=8)["energy_per_token"]
    assert row.value == 0 and row.n == 10 and row.level > 0.95


# ------------------------------------------------------------------------------------------- by name


def test_a_folder_on_a_file_of_ones_own(tiny_model, corpus, small_settings):
    from llmcourse.measure import measure

    report = measure(str(tiny_model), metrics=["perplexity", "bits_per_byte", "disk_bytes"], settings=small_settings)
    assert "part all" in report.data and report["perplexity"].n == int(SMALL["LLMCOURSE_EVAL_TOKENS"]) - 1
    assert report["disk_bytes"].value == (tiny_model / "model.safetensors").stat().st_size
    part = measure(str(tiny_model), metrics=["perplexity"], part="test", settings=small_settings)
    assert "part test" in part.data and part["perplexity"].value != report["perplexity"].value
    from llmcourse.data import load_model, token_data

    model, tokenizer, _ = load_model(str(tiny_model), settings=small_settings)
    data = token_data(tokenizer, corpus, limits={"test": 512}, settings=small_settings)
    same = perplexity(model, data, context=64, stride=48, batch_size=4, bootstrap=Bootstrap())
    assert part["perplexity"].value == same.value
    assert part["perplexity"].low == (same.low if same.held else None)


def test_a_packed_folder_is_measured_as_it_is_stored(tiny_model, small_settings, tmp_path):
    from llmcourse import RTN, compress, load_student, save_student
    from llmcourse.data import load_model, token_data
    from llmcourse.measure import measure
    from llmcourse.runtime import Runtime

    model, tokenizer, _ = load_model(str(tiny_model), settings=small_settings)
    rt = Runtime.auto("cpu", "float32")
    data = token_data(tokenizer, limits={"test": 64}, settings=small_settings)
    student, _ = compress(model, [RTN(bits=4, group_size=32)], data, rt)
    save_student(student, tokenizer, tmp_path / "small")
    asked = ["perplexity", "memory_bytes", "disk_bytes", "next_token"]
    dense = measure(str(tiny_model), metrics=asked, settings=small_settings)
    # the kernels of a processor would hold bytes of their own
    portable = replace(small_settings, kernels="portable")
    packed = measure(str(tmp_path / "small"), metrics=asked, settings=portable)
    assert packed["disk_bytes"].value < dense["disk_bytes"].value
    stored = load_student(tmp_path / "small").model
    assert packed["memory_bytes"].value == ev.weight_bytes(stored) < dense["memory_bytes"].value
    own = perplexity(stored, packed_text(tokenizer, small_settings), context=64, stride=48)
    assert packed["perplexity"].value == pytest.approx(own.value, rel=1e-4)
    assert packed.machine.endswith("; packed weights, unpacked at every step")
    assert dense.machine.endswith("; dense, no kernels of ours")


def test_which_kernels_measure_is_asked_for_and_said(tiny_model, small_settings, tmp_path, cli, corpus):
    from llmcourse import RTN, compress, save_student
    from llmcourse.data import load_model

    model, tokenizer, _ = load_model(str(tiny_model), settings=small_settings)
    student, _ = compress(model, [RTN(bits=4, group_size=32)], None, None)
    save_student(student, tokenizer, tmp_path / "small")
    given = ("evaluate", tmp_path / "small", "--data", corpus, "--metrics", "memory_bytes", "--json")
    said = {}
    for kernels in ("auto", "portable"):
        code, out, err = cli(*given, "--kernels", kernels)
        assert code == 0, err
        said[kernels] = json.loads(out)["machine"]
    assert said["portable"].endswith("unpacked at every step") and said["auto"] != said["portable"]
    code, _, err = cli(*given, "--kernels", "fast")
    assert code == 2 and "kernels is 'fast'; allowed: auto, int4, portable" in err


def packed_text(tokenizer, settings):
    from llmcourse.data import encode, load_records

    ids, _ = encode(tokenizer, [r["text"] for r in load_records(settings.data, settings=settings)], limit=512)
    return ids


def test_json_is_alone_on_standard_output(cli, tiny_model, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("\n\n".join(f"The {i}th sentence, of a text that is mine. " * 12 for i in range(40)), "utf8")
    given = ("evaluate", tiny_model, "--data", mine, "--metrics", "perplexity, token_accuracy", "--scale", "test")
    code, out, err = cli(*given, "--json")
    assert code == 0, err
    rows = {r["name"]: r for r in json.loads(out)["rows"]}
    assert rows["perplexity"]["low"] is None and "too few carry the result" in rows["perplexity"]["note"]
    code, out, _ = cli(*given)
    assert code == 0 and "token_accuracy" in out and "[1]" in out and "part all" in out


def test_a_file_with_references_is_answered_and_scored(cli, tiny_model, tmp_path):
    mine = tmp_path / "mine.jsonl"
    rows = [{"text": f"ka lo {i} mi", "references": ["ne ru", "sa"]} for i in range(24)]
    mine.write_text("\n".join(map(json.dumps, rows)), "utf8")
    given = ("evaluate", tiny_model, "--scale", "test", "--metrics", "bleu, exact_match", "--json")
    code, out, err = cli(*given, "--data", mine)
    assert code == 0, err
    found = {r["name"]: r for r in json.loads(out)["rows"]}
    assert found["exact_match"]["n"] == 24 and found["bleu"]["counts"] == "questions"
    mine.write_text("\n".join(json.dumps({"text": r["text"]}) for r in rows), "utf8")
    code, out, err = cli(*given, "--data", mine)
    assert code == 2 and "data with references" in err and not out and err.count("\n") == 1


def test_a_hub_id_is_read_from_the_hubs_own_cache(cli, tiny_model, tmp_path, monkeypatch, no_network):
    """A model that the hub's library has fetched before: by its id, with the numbers of the same files in a folder."""
    from huggingface_hub import constants

    commit, repository = "0" * 40, tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    given = ("--metrics", "perplexity", "--scale", "test", "--json")
    code, out, err = cli("evaluate", "somebody/tiny", *given, LLMCOURSE_OFFLINE="false")
    assert code == 0, err
    found, folder = json.loads(out), json.loads(cli("evaluate", tiny_model, *given)[1])
    assert found["model"] == "somebody/tiny" and found["rows"][0]["value"] == folder["rows"][0]["value"]
    code, out, err = cli("evaluate", "somebody/else", *given, LLMCOURSE_OFFLINE="false")
    assert code == 2 and not out and "somebody/else" in err and "Traceback" not in err
    code, out, err = cli("evaluate", "somebody/tiny", *given, LLMCOURSE_OFFLINE="true")
    assert code == 2 and "the course is offline" in err


@pytest.mark.parametrize(
    ("content", "words"), [(b"caf\xe9 " * 900, "not UTF-8"), (b"too short", "at least one window"), (b"", "with text")]
)
def test_a_text_that_is_none(cli, tiny_model, tmp_path, content, words):
    mine = tmp_path / "mine.txt"
    mine.write_bytes(content)
    code, out, err = cli("evaluate", tiny_model, "--data", mine, "--scale", "test")
    assert code == 2 and words in err and not out and err.count("\n") == 1 and "Traceback" not in err
