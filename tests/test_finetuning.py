"""Fine-tuning: LoRA against peft, adapters as files, classifiers on padded rows, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import ROOT
from torch import nn

from llmcourse import finetuning
from llmcourse.compression import compress
from llmcourse.finetuning import (
    CONFIG,
    WEIGHTS,
    Classifier,
    Labeled,
    LoRALinear,
    adapted,
    add_lora,
    base_fingerprint,
    draw_labels,
    finetune,
    frozen_features,
    head_only,
    last_token,
    load_adapter,
    logistic_regression,
    majority,
    merge,
    predict,
    save_adapter,
    share_right,
    tf_idf,
    topic_texts,
    trainable,
)
from llmcourse.model import GPT, GPTConfig
from llmcourse.packed import pack_model
from llmcourse.pruning import Magnitude
from llmcourse.quantization import RTN
from llmcourse.runtime import Runtime
from llmcourse.settings import BadInput
from llmcourse.training import TrainConfig

IDS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def llama(seed: int = 0, **more) -> nn.Module:
    torch.manual_seed(seed)
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(**shape, max_position_embeddings=64, **more)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=2, context=64)).eval()


def packed() -> nn.Module:
    return pack_model(compress(llama(), [RTN(bits=4, group_size=32)], None, None)[0])


MODELS = {
    "llama": (llama, "*.q_proj, *.down_proj"),
    "gpt2": (gpt2, "*.c_attn, *.c_proj"),
    "gpt": (gpt, "blocks.*"),
    "packed": (packed, "*.q_proj, *.down_proj"),
}


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """As after training: B is not zero any more."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_B.weight.normal_(std=0.1, generator=dice)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


# ---------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("name", MODELS)
def test_an_untrained_adapter_changes_no_bit_and_the_input_model_stays(name):
    make, layers = MODELS[name]
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    new = add_lora(model, rank=2, alpha=4, layers=layers, seed=0)
    assert torch.equal(logits(new), logits(model))
    trained(new)
    assert not torch.allclose(logits(new), logits(model), atol=1e-3)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()) and not adapted(model)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    names = {n for n, p in new.named_parameters() if p.requires_grad}
    assert names == {f"{n}.lora_{x}.weight" for n in adapted(new) for x in "AB"}
    assert trainable(new)[0] == sum(2 * (m.in_features + m.out_features) for m in adapted(new).values())


@pytest.mark.parametrize("name", MODELS)
def test_merging_is_exact(name):
    make, layers = MODELS[name]
    new = trained(add_lora(make(), rank=3, alpha=5, layers=layers, seed=0))
    state = {k: v.clone() for k, v in new.state_dict().items()}
    single = merge(new, dense=name == "packed")
    assert not adapted(single) and adapted(new)
    torch.testing.assert_close(logits(single), logits(new), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in state.items())
    assert all(p.requires_grad for p in single.parameters() if p.is_floating_point())
    if name != "packed":
        assert single.state_dict().keys() == make().state_dict().keys()


def test_the_gradients_through_a_packed_base_are_those_through_its_dense_twin():
    base = packed()
    new = trained(add_lora(base, rank=2, alpha=4, layers="*_proj", seed=0))
    twin = trained(add_lora(llama(), rank=2, alpha=4, layers="*_proj", seed=0))
    for name, layer in adapted(twin).items():  # the same rounded weights, dense
        with torch.no_grad():
            layer.base.weight.copy_(base.get_submodule(name).dequantized())
    twin.model.embed_tokens.load_state_dict(new.model.embed_tokens.state_dict())
    grads = []
    for model in (new, twin):
        model.lm_head.load_state_dict(llama().lm_head.state_dict())
        model(IDS).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) == 2 * len(adapted(new))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_a_packed_base_is_not_kept_unpacked_for_the_backward_pass():
    layer = LoRALinear(next(m for m in packed().modules() if hasattr(m, "dequantized")), rank=1, alpha=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, layer.in_features, requires_grad=True))
    assert kept and max(t.numel() for t in kept) < layer.in_features * layer.out_features


def test_a_half_precision_base_keeps_its_format_and_the_adapter_is_float32():
    new = trained(add_lora(llama().to(torch.bfloat16), rank=2, alpha=4, layers="*.q_proj", seed=0))
    layer = next(iter(adapted(new).values()))
    assert layer.lora_A.weight.dtype == torch.float32 and layer.base.weight.dtype == torch.bfloat16
    assert logits(new).dtype == torch.bfloat16 and logits(merge(new)).dtype == torch.bfloat16


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    base = nn.Linear(8, 8)
    layer = LoRALinear(base, rank=2, alpha=2, dropout=0.5).train()
    nn.init.ones_(layer.lora_B.weight)
    x = torch.randn(4, 8)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer(x) - base(x), x @ layer.delta().T, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------- peft


def in_peft(model: nn.Module, **how):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(**how))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_seed_gives_pefts_adapter_outputs_and_gradients(name):
    make, _ = MODELS[name]
    names = ["q_proj", "down_proj"] if name == "llama" else ["c_attn", "c_proj"]
    model = make()
    torch.manual_seed(7)
    theirs = in_peft(model, r=3, lora_alpha=6, target_modules=names, fan_in_fan_out=name == "gpt2")
    ours = add_lora(make(), rank=3, alpha=6, layers=",".join(f"*.{n}" for n in names), seed=7)
    weights = {k.removeprefix("base_model.model.").replace(".default", ""): v for k, v in theirs.state_dict().items()}
    keys = [k for k in ours.state_dict() if "lora_" in k]
    assert len(keys) == 2 * len(adapted(ours)) > 0
    assert all(torch.equal(ours.state_dict()[k], weights[k]) for k in keys)
    with torch.no_grad():
        for k in keys:
            if "lora_B" in k:
                new = torch.randn(weights[k].shape, generator=torch.Generator().manual_seed(1))
                ours.state_dict()[k].copy_(new), weights[k].copy_(new)
    a, b = ours(IDS).logits, theirs(IDS).logits
    assert torch.equal(a, b)
    a.square().mean().backward(), b.square().mean().backward()
    grads = {k.removeprefix("base_model.model.").replace(".default", ""): p.grad for k, p in theirs.named_parameters()}
    assert all(torch.equal(p.grad, grads[k]) for k, p in ours.named_parameters() if p.grad is not None)
    torch.testing.assert_close(logits(merge(ours)), logits(theirs.merge_and_unload()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_loads_what_we_save(name, tmp_path):
    peft = pytest.importorskip("peft")
    make, layers = MODELS[name]
    ours = trained(add_lora(make(), rank=3, alpha=6, layers=layers, also="lm_head" if name == "llama" else None))
    if name == "llama":
        with torch.no_grad():
            ours.lm_head.weight.mul_(1.5)
    save_adapter(ours, tmp_path / "a", base="tiny")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "a")
    assert torch.equal(logits(theirs), logits(ours))


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_peft_saves(rslora, tmp_path):
    theirs = in_peft(llama(), r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=rslora)
    with torch.no_grad():
        for k, v in theirs.state_dict().items():
            if "lora_B" in k:
                v.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "a")
    ours = load_adapter(llama(), tmp_path / "a")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-6, atol=1e-6)
    save_adapter(ours, tmp_path / "b", base="tiny")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "b")), logits(ours))


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_adapter_comes_back(name, tmp_path):
    make, layers = MODELS[name]
    new = trained(add_lora(make(), rank=2, alpha=4, layers=layers, dropout=0.1, seed=0)).eval()
    save_adapter(new, tmp_path / "a", base=name)
    back = load_adapter(make(), tmp_path / "a").eval()
    assert torch.equal(logits(back), logits(new))
    assert [(m.rank, m.alpha, m.dropout.p) for m in adapted(back).values()] == [(2, 4, 0.1)] * len(adapted(new))
    assert base_fingerprint(new) == base_fingerprint(make()) == base_fingerprint(back)


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path):
    save_adapter(trained(add_lora(llama(), rank=2, alpha=4, layers="*.q_proj")), tmp_path / "a", base="tiny-llama")
    with pytest.raises(BadInput, match="'tiny-llama' with fingerprint"):
        load_adapter(llama(seed=1), tmp_path / "a")
    load_adapter(llama(seed=1), tmp_path / "a", check_base=False)
    with pytest.raises(BadInput, match=r"fingerprint"):
        load_adapter(packed(), tmp_path / "a")
    with pytest.raises(BadInput, match=r"'tiny-llama'.*q_proj"):
        load_adapter(gpt2(), tmp_path / "a")
    with pytest.raises(BadInput, match=r"'tiny-llama'.*lora_B"):
        load_adapter(llama(head_dim=8), tmp_path / "a", check_base=False)


def test_a_damaged_or_partial_folder_is_refused(tmp_path):
    new = trained(add_lora(llama(), rank=2, alpha=4, layers="*.q_proj"))
    for i, damage in enumerate((
        lambda f: (f / WEIGHTS).unlink(),
        lambda f: (f / CONFIG).unlink(),
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]),
        lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace('"r": 2', '"r": 3')),
        lambda f: (f / "MANIFEST.json").write_text("{"),
    )):  # fmt: skip
        save_adapter(new, folder := tmp_path / str(i), base="tiny")
        damage(folder)
        with pytest.raises(BadInput):
            load_adapter(llama(), folder)


def test_nothing_is_left_of_a_save_that_fails(tmp_path, monkeypatch):
    new = trained(add_lora(llama(), rank=2, alpha=4, layers="*.q_proj"))
    wrong = lambda path: {k: v + 1 for k, v in load(path).items()}
    load = finetuning.load_file
    monkeypatch.setattr("llmcourse.finetuning.load_file", wrong)
    with pytest.raises(BadInput, match="read back"):
        save_adapter(new, tmp_path / "a", base="tiny")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("kept")
    with pytest.raises(BadInput):
        save_adapter(new, tmp_path / "a", base="tiny")
    assert (tmp_path / "a" / "mine").read_text() == "kept"


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("bias", "all"), ("rank_pattern", {"q": 1}), ("r", 0)])
def test_what_is_not_built_here_is_refused(key, value, tmp_path):
    save_adapter(add_lora(llama(), rank=2, alpha=4, layers="*.q_proj"), tmp_path / "a", base="tiny")
    (tmp_path / "a" / "MANIFEST.json").unlink()  # as a folder of peft
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | {key: value}))
    with pytest.raises(BadInput, match=key):
        load_adapter(llama(), tmp_path / "a")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"layers": "*.nowhere"}, r"\*\.down_proj.*\*\.q_proj"),
        ({"rank": 0}, "rank"),
        ({"rank": 33}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"layers": "lm_head"}, "shares its weight"),
        ({"also": "score"}, "also"),
        ({"layers": 3}, "layers"),
    ],
)
def test_bad_arguments_are_named(how, says):
    with pytest.raises(BadInput, match=says):
        add_lora(llama(tie_word_embeddings=True), **({"rank": 2, "alpha": 4, "layers": "*.q_proj"} | how))


def test_adapters_on_adapters_and_merging_into_computed_weights_are_refused():
    new = add_lora(llama(), rank=2, alpha=4, layers="*.q_proj")
    with pytest.raises(BadInput, match="merge them first"):
        add_lora(new, rank=2, alpha=4, layers="*.q_proj")
    with pytest.raises(BadInput, match="without adapters"):
        merge(llama())
    with pytest.raises(BadInput, match="dense=True"):
        merge(add_lora(packed(), rank=2, alpha=4, layers="*.q_proj"))
    for method in (RTN(bits=4, group_size=32), Magnitude(sparsity=0.5)):
        held = add_lora(compress(llama(), [method], None, None)[0], rank=2, alpha=4, layers="*.q_proj")
        with pytest.raises(BadInput, match="before you prune or round"):
            merge(held)


# ---------------------------------------------------------------------------------------------- classifiers


def batch(side: str = "right") -> dict[str, torch.Tensor]:
    rows = [IDS[0, :9], IDS[1, :4], IDS[0, 3:9]]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(9 - len(row), 9)
        ids[i, at], mask[i, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt"])
def test_a_text_is_classified_as_if_it_were_alone(name, pool):
    model = Classifier(MODELS[name][0](), 3, pool=pool).eval()
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in (IDS[0, :9], IDS[1, :4], IDS[0, 3:9])])
        torch.testing.assert_close(model(batch()), alone, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model(batch("left")), alone, rtol=1e-4, atol=1e-5)
        wrong = model.score(model.model.base_model(IDS)[0][:, -1]) if name == "llama" else None
        assert wrong is None or not torch.allclose(wrong[1], alone[1], atol=1e-3)


def test_the_last_real_token_on_both_sides_and_with_a_hole():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0]])
    assert last_token(mask).tolist() == [1, 3, 1, 2]
    with pytest.raises(BadInput, match="only padding"):
        last_token(torch.tensor([[1, 1], [0, 0]]))


class Letters:
    """A tokenizer: a token for each letter."""

    def __call__(self, texts, add_special_tokens=False):
        return {"input_ids": [[ord(c) % 61 for c in text] for text in texts]}


def letters(n: int = 24, n_classes: int = 2) -> Labeled:
    dice = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 9, (n,), generator=dice).tolist()
    return Labeled(Letters(), [("a", "b", "c")[i % n_classes] * k for i, k in enumerate(lengths)],
                   [i % n_classes for i in range(n)], n_classes=n_classes)  # fmt: skip


def two(texts: list[str], classes: list[int]) -> None:
    finetune(Classifier(llama(), 2), Labeled(Letters(), texts, classes, n_classes=2), CFG)


CFG = TrainConfig(steps=30, batch_size=8, seq_len=1, lr=1e-2, weight_decay=0.0, seed=0)


@pytest.mark.parametrize("kind", ["full", "head", "lora"])
def test_each_arm_learns_and_trains_only_what_it_should(kind):
    data = letters()
    model = Classifier(llama(), 2, pool="last")
    model = {
        "full": lambda: model,
        "head": lambda: head_only(model),
        "lora": lambda: add_lora(model, rank=2, alpha=4, layers="model.*_proj", also="score", seed=0),
    }[kind]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    finetune(model, data, CFG)
    assert share_right(predict(model, data), data) == 1.0
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved <= trains and "score.weight" in moved
    assert trains - moved <= {"model.lm_head.weight"}  # the language model's own head is not used


def test_a_classifiers_adapter_is_saved_with_its_head(tmp_path):
    data, fresh = letters(), Classifier(llama(), 2, seed=5)
    model = add_lora(Classifier(llama(), 2), rank=2, alpha=4, layers="model.*_proj", also="score", seed=0)
    finetune(model, data, CFG)
    save_adapter(model, tmp_path / "a", base="tiny")
    back = load_adapter(fresh, tmp_path / "a")
    assert torch.equal(predict(back, data), predict(model, data))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(Classifier(llama(), 2, seed=5), tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(theirs(batch()), model.eval()(batch()), rtol=1e-5, atol=1e-6)


def test_predictions_do_not_depend_on_the_batch_and_keep_the_order():
    data, model = letters(11), Classifier(llama(), 2)
    one = predict(model, data, batch_size=1)
    torch.testing.assert_close(predict(model, data, batch_size=4), one, rtol=1e-4, atol=1e-5)
    features = frozen_features(model, data, batch_size=3)
    with torch.no_grad():
        torch.testing.assert_close(model.score(features).log_softmax(-1), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (lambda: Labeled(Letters(), ["ab", "c"], [0, 2], n_classes=2), "class of text 1 is 2"),
        (lambda: Labeled(Letters(), ["ab"], [0, 1], n_classes=2), "one class a text"),
        (lambda: Labeled(Letters(), ["ab", ""], [0, 1], n_classes=2), "without a token"),
        (lambda: Classifier(llama(), 1), "n_classes"),
        (lambda: Classifier(llama(), 2, pool="first"), "pool"),
        (lambda: finetune(Classifier(llama(), 3), letters(), CFG), "classes of data is 2"),
        (lambda: two(["a", "b"], [1, 1]), "one class"),
        (lambda: two(["a" * 65, "b"], [0, 1]), "65"),
        (lambda: Classifier(llama(), 2)(torch.zeros(1, 65, dtype=torch.long)), "tokens of a text is 65"),
        (lambda: finetune(Classifier(llama(), 2).requires_grad_(False), letters(), CFG), "frozen as a whole"),
    ],
)  # fmt: skip
def test_bad_data_is_named(do, says):
    with pytest.raises(BadInput, match=says):
        do()


# ---------------------------------------------------------------------------------------------- baselines


TRAIN = ["The cat sat on the mat.", "A dog and a cat", "stocks fell; the bank lost", "the bank lent money"]
TEST = ["the cat lent money", "a new word", "bank bank bank"]


def test_counted_words_are_those_of_scikit_learn():
    found = tf_idf(TRAIN, TEST)
    text = pytest.importorskip("sklearn.feature_extraction.text")
    theirs = text.TfidfVectorizer(token_pattern=r"\w+").fit(TRAIN)
    assert sorted(theirs.vocabulary_, key=theirs.vocabulary_.get) == sorted(theirs.vocabulary_)
    torch.testing.assert_close(found, torch.from_numpy(theirs.transform(TEST).toarray()))


def test_counted_words_by_hand():
    found = tf_idf(["a b", "a c"], ["a a b", "d"])
    a, b = 1.0, 1 + torch.tensor(3 / 2, dtype=torch.float64).log()
    row = torch.stack((torch.tensor(2 * a, dtype=torch.float64), b, torch.tensor(0.0, dtype=torch.float64)))
    torch.testing.assert_close(found[0], row / row.norm())
    assert found[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_logistic_regression_is_at_its_minimum(C):
    dice = torch.Generator().manual_seed(0)
    x, classes = torch.randn(40, 6, generator=dice, dtype=torch.float64), [i % 3 for i in range(40)]
    W, b = (t.requires_grad_() for t in logistic_regression(x, classes, n_classes=3, C=C))
    losses = nn.functional.cross_entropy(x @ W.T + b, torch.tensor(classes), reduction="sum")
    (losses + W.square().sum() / (2 * C)).backward()
    assert max(W.grad.abs().max(), b.grad.abs().max()) < 1e-4
    linear = pytest.importorskip("sklearn.linear_model")
    theirs = linear.LogisticRegression(C=C, tol=1e-9, max_iter=2000).fit(x.numpy(), classes)
    p = (x @ W.T + b).softmax(-1).detach()
    torch.testing.assert_close(p, torch.from_numpy(theirs.predict_proba(x.numpy())), rtol=1e-3, atol=1e-5)


def test_the_most_frequent_class():
    assert majority([2, 1, 1, 2], [1, 1, 2, 0]) == 0.5  # a tie: the smaller number
    assert majority([0, 2, 2], [0, 2]) == 0.5


RECORDS = [
    {"topic": t, "split": s, "text": f"{t} {s} {i} one two three", "description": f"{t} {i}"}
    for t, n in (("A", 9), ("B", 6), ("C", 3), ("Uncategorized", 20))
    for s in ("train", "test")
    for i in range(n)
]


def test_topics_are_the_most_frequent_ones_and_the_test_is_balanced():
    found = topic_texts(RECORDS, n_topics=2, test_per_topic=4, words=3)
    assert found.names == ["A", "B"] and len(found.train) == 15
    assert sorted(c for _, c in found.test) == [0] * 4 + [1] * 4
    assert found.train[0] == ("A train 0", 0)
    assert topic_texts(RECORDS, n_topics=2, test_per_topic=1, field="description").train[0][0] == "A 0"
    with pytest.raises(BadInput, match="test_per_topic"):
        topic_texts(RECORDS, n_topics=2, test_per_topic=7)
    with pytest.raises(BadInput, match="topics of the records"):
        topic_texts(RECORDS, n_topics=4)


def test_a_smaller_draw_is_part_of_a_larger_one():
    pairs = [(f"text {i}", i % 3) for i in range(60)]
    for seed in range(3):
        small, large = draw_labels(pairs, 2, seed), draw_labels(pairs, 8, seed)
        assert set(small) < set(large) and [c for _, c in small] == [0, 0, 1, 1, 2, 2]
    assert draw_labels(pairs, 2, 0) != draw_labels(pairs, 2, 1)
    with pytest.raises(BadInput, match="at most 20"):
        draw_labels(pairs, 21, 0)


def test_quick_benchmark(home, monkeypatch):
    """Beside peft: the same numbers are trained, the same is computed, and each candidate is timed."""
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import finetune as bench

    assert bench.assert_same_work(bench.QUICK) > 0
    found = bench.measure(bench.QUICK, 1, Runtime.auto("cpu", "float32"))
    assert found.keys() == bench.CANDIDATES.keys() and all(len(s) == 1 and s[0] > 0 for s in found.values())
