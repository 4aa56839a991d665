"""What a seed changes in the sheets: stated numbers, and cases for exercises whose data are not random.

See `llmcourse.practice.yearly`. A new exercise needs nothing here: its random data are drawn anew by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

# ------------------------------------------------------------------------------- stated numbers
# For each exercise rows of fragments: what the book says, then what a year may say. The same column of all rows is
# taken. A fragment is replaced in the statement, the answer cell, the solution, the cases and the wrong answers.

_SPREADS = ("1.96", "2.58", "1.64", "2.33")

STATED: dict[str, tuple[tuple[str, ...], ...]] = {
    "attention.alibi": (
        ("2^{-8(h+1)/H}$.", *(f"2^{{-{n}(h+1)/H}}$ (the paper has an 8 there)." for n in (4, 16, 2))),
        (
            r"\tfrac1{16}$ and $\tfrac1{256}",
            *(rf"\tfrac1{{{2 ** (n // 2)}}}$ and $\tfrac1{{{2**n}}}" for n in (4, 16, 2)),
        ),
        (r"-\tfrac1{16} & 0", *(rf"-\tfrac1{{{2 ** (n // 2)}}} & 0" for n in (4, 16, 2))),
        ("(-8 * ", "(-4 * ", "(-16 * ", "(-2 * "),
        ("2^(-8/H)", "2^(-4/H)", "2^(-16/H)", "2^(-2/H)"),
        (
            "That is right for eight heads only",
            *(f"That is right for {n} heads only" for n in ("four", "sixteen", "two")),
        ),
        ("in steps of 8/H and ends at -8", *(f"in steps of {n}/H and ends at -{n}" for n in (4, 16, 2))),
    ),
    "attention.rope_half": (
        ("10000.0", "500000.0", "100000.0", "1000000.0"),
        ("the base 10000.", "the base 500000.", "the base 100000.", "the base 1000000."),
    ),
    "evaluation.paired_ratio": (_SPREADS,),
    "evaluation.document_interval": (
        ("iddle 95 %", "iddle 90 %", "iddle 80 %", "iddle 98 %"),
        ("the 2.5 % and the 97.5 %", "the 5 % and the 95 %", "the 10 % and the 90 %", "the 1 % and the 99 %"),
        ("0.025", "0.05", "0.1", "0.01"),
        ("0.975", "0.95", "0.9", "0.99"),
        ("(0.05, 0.95))", "(0.1, 0.9))", "(0.2, 0.8))", "(0.02, 0.98))"),
        (
            "at 5 % and 95 %. That is the middle 90 %; for 95 %, two and a half percent are left out",
            "at 10 % and 90 %. That is the middle 80 %; for 90 %, five percent are left out",
            "at 20 % and 80 %. That is the middle 60 %; for 80 %, ten percent are left out",
            "at 2 % and 98 %. That is the middle 96 %; for 98 %, one percent is left out",
        ),
        ("1.96", "1.64", "1.28", "2.33"),
    ),
    "evaluation.documents_needed": (
        _SPREADS,
        ("96.04$: 97", "166.41$: 167", "67.24$: 68", "135.7$: 136"),
        ("not 95 %", "not 99 %", "not 90 %", "not 98 %"),
    ),
    "optimizers.state_bytes": (
        ("SmolLM2-135M", "SmolLM2-360M", "Qwen2.5-1.5B", "Qwen2.5-0.5B"),
        ("134,515,008", "361,821,120", "1,543,714,304", "494,032,768"),
        ("134_515_008", "361_821_120", "1_543_714_304", "494_032_768"),
        (r"49,152 × 576", r"49,152 × 960", r"151,936 × 1,536", r"151,936 × 896"),
        ("49_152 * 576", "49_152 * 960", "151_936 * 1_536", "151_936 * 896"),
    ),
    "pruning.step_reaching": (
        (
            "The schedule of Zhu and Gupta removes",
            *(
                f"The schedule of Zhu and Gupta has a cube; with the power {n} in its place it removes"
                for n in (2, 4, 5)
            ),
        ),
        (r"\right)^3", r"\right)^2", r"\right)^4", r"\right)^5"),
        (
            "0.875 · (1 − 1/8) = 0.765625",
            "0.875 · (1 − 1/4) = 0.65625",
            "0.875 · (1 − 1/16) = 0.8203125",
            "0.875 · (1 − 1/32) = 0.84765625",
        ),
        ("0.765625", "0.65625", "0.8203125", "0.84765625"),
        ("one of 0.77 at step 5", "one of 0.66 at step 5", "one of 0.83 at step 5", "one of 0.85 at step 5"),
        ('a little more", 0.77', 'a little more", 0.66', 'a little more", 0.83', 'a little more", 0.85'),
        ("** 3", "** 2", "** 4", "** 5"),
        ("** 2,", "** 3,", "** 3,", "** 3,"),
        (
            "You took a square. The schedule has a cube.",
            *(f"You took a cube, as in the paper. The schedule here has the power {n}." for n in (2, 4, 5)),
        ),
        ("seven eighths", "three quarters", "fifteen sixteenths", "31 of 32 parts"),
        ("cubic schedule", "schedule", "schedule", "schedule"),
        ("You took the cube of the time", *(f"You took the power {n} of the time" for n in (2, 4, 5))),
        ("*left* that has a cube", *(f"*left* that has the power {n}" for n in (2, 4, 5))),
        ("(1 / 3)", "(1 / 2)", "(1 / 4)", "(1 / 5)"),
    ),
    "pruning.cut_channels": (
        (".square()", ".pow(4)", ".abs().pow(3)", ".pow(6)"),
        (
            "sum of the squares",
            *(f"sum of the {n}" for n in ("fourth powers", "cubes of the magnitudes", "sixth powers")),
        ),
        ("sums of squares", *(f"sums of {n}" for n in ("fourth powers", "cubed magnitudes", "sixth powers"))),
        ("Add the squares", *(f"Add the {n}" for n in ("fourth powers", "cubed magnitudes", "sixth powers"))),
        ("instead of the squares", *(f"instead of the {n}" for n in ("fourth powers", "cubes", "sixth powers"))),
        ("instead of squares", *(f"instead of {n}" for n in ("fourth powers", "cubes", "sixth powers"))),
        (
            "The squares overflow in half precision: 300² is",
            *(
                f"The {n} overflow in half precision: 300{p} is"
                for n, p in (("powers", "⁴"), ("cubes", "³"), ("powers", "⁶"))
            ),
        ),
        ("before you square", "before you take the power", "before you take the cube", "before you take the power"),
        ("9 + 0 + 1 = 10", "81 + 0 + 1 = 82", "27 + 0 + 1 = 28", "729 + 0 + 1 = 730"),
        ("0 + 1 + 4 = 5", "0 + 1 + 16 = 17", "0 + 1 + 8 = 9", "0 + 1 + 64 = 65"),
    ),
    "quantization.bits_per_weight": (
        ("a scale in `float16`", "a scale in `float32`", "a scale of one byte", "a scale in `float64`"),
        (
            "A scale in float16 has two bytes",
            "A scale in float32 has four bytes",
            "A scale has one byte",
            "A scale in float64 has eight bytes",
        ),
        ("2 * groups", "4 * groups", "1 * groups", "8 * groups"),
        ("16 * groups", "32 * groups", "8 * groups", "64 * groups"),
        ("(16 + (0", "(32 + (0", "(8 + (0", "(64 + (0"),
        ("b + 16/g", "b + 32/g", "b + 8/g", "b + 64/g"),
        ("This is the formula of the papers", *("This is the formula for rows that come out even",) * 3),
        ("4 bytes of scales", "8 bytes of scales", "2 bytes of scales", "16 bytes of scales"),
        ("37 bytes, 4.625 bits", "41 bytes, 5.125 bits", "35 bytes, 4.375 bits", "49 bytes, 6.125 bits"),
        (
            "You gave each scale four bytes. In float16 it has two.",
            "You gave each scale two bytes. In float32 it has four.",
            "You gave each scale two bytes. Here it has one.",
            "You gave each scale two bytes. In float64 it has eight.",
        ),
        ("symmetric) + 16 *", "symmetric) - 16 *", "symmetric) + 8 *", "symmetric) - 48 *"),
    ),
    "quantization.codes_used": (
        ("2,540", "5,080", "1,270", "1,905"),
        ("2540", "5080", "1270", "1905"),
        ("[1, 9, 255]", "[1, 7, 255]", "[1, 13, 255]", "[1, 11, 255]"),
        ("[0, 4, 127]", "[0, 3, 127]", "[0, 6, 127]", "[0, 5, 127]"),
        (
            "the step is 15.94 / 127, and the quotient 3.98 is nearest to 4",
            "the step is 22.54 / 127, and the quotient 2.82 is nearest to 3",
            "the step is 11.27 / 127, and the quotient 5.63 is nearest to 6",
            "the step is 13.80 / 127, and the quotient 4.60 is nearest to 5",
        ),
        ("[1, 7, 255]", "[1, 5, 255]", "[1, 11, 255]", "[1, 9, 255]"),
        ("[1, 41, 255]", "[1, 29, 255]", "[1, 57, 255]", "[1, 47, 255]"),
        ("a thousand times", "two thousand times", "five hundred times", "nearly eight hundred times"),
        ("divided by 159", "divided by 225", "divided by 113", "divided by 138"),
        ("[1, 9, 256]", "[1, 7, 256]", "[1, 13, 256]", "[1, 11, 256]"),
        ("[1, 9, 1]", "[1, 7, 1]", "[1, 13, 1]", "[1, 11, 1]"),
        ("A step of 20 rounds", "A step of 40 rounds", "A step of 10 rounds", "A step of 15 rounds"),
        ("[0, 9, 255]", "[0, 7, 255]", "[0, 13, 255]", "[0, 11, 255]"),
        ("[1, 5, 255]", "[1, 4, 255]", "[1, 7, 255]", "[1, 6, 255]"),
    ),
    "distributed.zero_bytes": (
        (
            "Mixed precision with Adam keeps",
            "Mixed precision with momentum keeps",
            "Mixed precision with AMSGrad keeps",
            "Mixed precision with Adam in 8 bits keeps",
        ),
        (
            "a copy of the weight and two running means: 16 bytes",
            "a copy of the weight and one running mean: 12 bytes",
            "a copy of the weight, two running means and a maximum: 20 bytes",
            "a copy of the weight, besides two running means of one byte each: 10 bytes",
        ),
        ("16 * n", "12 * n", "20 * n", "10 * n"),
        ("12 * n // R", "8 * n // R", "16 * n // R", "6 * n // R"),
        ("14 * n // R", "10 * n // R", "18 * n // R", "8 * n // R"),
        (
            "40 + 36 = 76 bytes, in stage 3 it is 48",
            "40 + 24 = 64 bytes, in stage 3 it is 36",
            "40 + 48 = 88 bytes, in stage 3 it is 60",
            "40 + 18 = 58 bytes, in stage 3 it is 30",
        ),
        ("(2, 2, 12)", "(2, 2, 8)", "(2, 2, 16)", "(2, 2, 6)"),
        ("(2, 2, 8) if", "(2, 2, 4) if", "(2, 2, 12) if", "(2, 2, 2) if"),
        ("(4, 4, 8)", "(4, 4, 4)", "(4, 4, 12)", "(4, 4, 2)"),
        ("(4, 4, 12)", "(4, 4, 8)", "(4, 4, 16)", "(4, 4, 6)"),
        (
            "bytes are 2, 2, 12, or 4, 4, 8",
            "bytes are 2, 2, 8, or 4, 4, 4",
            "bytes are 2, 2, 16, or 4, 4, 12",
            "bytes are 2, 2, 6, or 4, 4, 2",
        ),
        ("the state has 12 bytes", "the state has 8 bytes", "the state has 16 bytes", "the state has 6 bytes"),
        ("4 + 4 + 8 bytes", "4 + 4 + 4 bytes", "4 + 4 + 12 bytes", "4 + 4 + 2 bytes"),
        (
            "4 bytes each, and the state 8",
            "4 bytes each, and the state 4",
            "4 bytes each, and the state 12",
            "4 bytes each, and the state 2",
        ),
    ),
    "distributed.kilograms": (
        (
            "($C = 6ND$)",
            "that keep no activations and run the forward pass again ($C = 8ND$)",
            "that run half of the forward pass again ($C = 7ND$)",
            "that run a quarter of the forward pass again ($C = 6.5ND$)",
        ),
        ("6 N D FLOPs", "8 N D FLOPs", "7 N D FLOPs", "6.5 N D FLOPs"),
        ("6 * n", "8 * n", "7 * n", "6.5 * n"),
        ("flops=6,", "flops=8,", "flops=7,", "flops=6.5,"),
        ("6 n tokens", "8 n tokens", "7 n tokens", "6.5 n tokens"),
        (
            "Training takes three times that.",
            *(f"Training takes {n} times that here." for n in ("four", "3.5", "3.25")),
        ),
        (
            r"$6 \cdot 10^6 \cdot 6 \cdot 10^8 = 3.6 \cdot 10^{15}$",
            r"$8 \cdot 10^6 \cdot 6 \cdot 10^8 = 4.8 \cdot 10^{15}$",
            r"$7 \cdot 10^6 \cdot 6 \cdot 10^8 = 4.2 \cdot 10^{15}$",
            r"$6.5 \cdot 10^6 \cdot 6 \cdot 10^8 = 3.9 \cdot 10^{15}$",
        ),
        (
            "are 7200 seconds, 2 hours. 500 W are 1 kWh, with a PUE of 1.2 1.2 kWh, and 400 g each make 0.48 kg",
            "are 9600 seconds, 2⅔ hours. 500 W are 1⅓ kWh, with a PUE of 1.2 1.6 kWh, and 400 g each make 0.64 kg",
            "are 8400 seconds, 2⅓ hours. 500 W are 1⅙ kWh, with a PUE of 1.2 1.4 kWh, and 400 g each make 0.56 kg",
            "are 7800 seconds, 2⅙ hours. 500 W are 1¹⁄₁₂ kWh, with a PUE of 1.2 1.3 kWh, and 400 g each make 0.52 kg",
        ),
    ),
}

SAME_DATA: dict[str, str] = {}
"""exercise -> why its random data stay those of the book"""


# ------------------------------------------------------------------------------------ more cases
# For each exercise a function that draws the arguments of one call. They have to be what the statement allows, because
# the solution says what is right.


def _some(r: Random, low: int, high: int, draw: Callable) -> list:
    return [draw() for _ in range(r.randint(low, high))]


def _words(r: Random, low: int, high: int, letters: str = "abcd") -> list[str]:
    return _some(r, low, high, lambda: r.choice(letters))


def _text(r: Random, low: int, high: int) -> str:
    return " ".join(_some(r, low, high, lambda: r.choice(("the", "cat", "a", "dog", "sat", "on", "ä", "化", "mat"))))


def _real(r: Random, low: float, high: float) -> float:
    return round(r.uniform(low, high), 6)


def _numbers(r: Random, low: int, high: int, a: float, b: float) -> list[float]:
    return _some(r, low, high, lambda: _real(r, a, b))


def _whole(r: Random, low: int, high: int, a: int, b: int) -> list[int]:
    return _some(r, low, high, lambda: r.randint(a, b))


def _merges(r: Random) -> list[tuple[str, str]]:
    known, made = ["a", "b", "c"], []
    for _ in range(5):
        left, right = r.choice(known), r.choice(known)
        if left + right not in known:
            known.append(left + right)
            made.append((left, right))
    return made


def _windows(r: Random, n: int) -> list[tuple[int, int, int]]:
    def one():
        start = r.randint(0, n - 1)
        stop = r.randint(start + 1, n)
        return start, stop, r.randint(start, stop - 1)

    return _some(r, 1, 5, one)


def _items(r: Random) -> tuple:
    n = r.randint(3, 6)
    log_p, choices, answers = [], [], []
    for _ in range(n):
        k = r.randint(2, 4)
        log_p.append([_real(r, -20, -0.5) for _ in range(k)])
        choices.append([_text(r, 1, 4) for _ in range(k)])
        answers.append(r.randrange(k))
    return log_p, choices, answers


def _shown(r: Random) -> tuple:
    k, n = r.randint(2, 4), r.randint(2, 5)
    return [[r.randrange(k) for _ in range(k)] for _ in range(n)], [r.randrange(k) for _ in range(n)], k


def _counters(r: Random) -> tuple:
    largest = _whole(r, 1, 3, 1000, 9_999_999)
    return [r.randint(0, m) for m in largest], [r.randint(0, m) for m in largest], largest, r.randint(1, 50)


def _by_unit(r: Random) -> tuple:
    units = ["a", "b", *(r.choice("abc") for _ in range(r.randint(2, 8)))]
    r.shuffle(units)
    return [_real(r, 0, 9) for _ in units], units


def _runs(r: Random, rows: int, columns: int) -> list[list[float]]:
    return [[_real(r, 1, 9) for _ in range(columns)] for _ in range(rows)]


def _signs(r: Random) -> tuple:
    k = r.randint(2, 3)
    rows = [[1 if i >> j & 1 else -1 for j in range(k)] for i in range(2**k)]
    r.shuffle(rows)
    return rows, [_real(r, 1, 4) for _ in rows], sorted(r.sample(range(k), r.randint(1, k)))


def _square(r: Random) -> tuple:
    k = r.randint(3, 5)
    shift = r.sample(range(k), k)
    y: list = [[_real(r, 1, 4) for _ in range(k)] for _ in range(k)]
    y[r.randrange(k)][r.randrange(k)] = None
    return [[(s + p) % k for p in range(k)] for s in shift], y


def _tensor(values: list, kind: str = "float32"):
    import torch

    return torch.tensor(values, dtype=getattr(torch, kind))


def _packed(r: Random) -> tuple:
    length, n = r.randint(2, 4), r.randint(2, 5)
    stream = [0, *(r.randint(0, 4) for _ in range(length * n - 1))]
    return _tensor([stream[i * length : (i + 1) * length] for i in range(n)], "int64"), 0


def _channels(r: Random) -> tuple:
    """Wide enough that each power of the weights chooses other channels."""
    F, D = 24, 6
    draw = lambda rows, columns: _tensor([[r.gauss(0, 1) for _ in range(columns)] for _ in range(rows)])
    return draw(F, D), draw(F, D), draw(D, F), F // 2


def _ragged(r: Random) -> tuple:
    n = r.randint(2, 4)
    return [_numbers(r, 1, 4, 0, 9) for _ in range(n)], [_numbers(r, 1, 4, 0, 9) for _ in range(n)]


MORE: dict[str, Callable[[Random], tuple]] = {
    "data.context_seen": lambda r: (r.randint(12, 40), c := r.randint(3, 9), r.randint(1, c - 1)),
    "data.stride_for": lambda r: (r.randint(25, 60), c := r.randint(4, 10), _real(r, 0.2, 0.5) * c),
    "data.assign_parts": lambda r: (_some(r, 4, 9, lambda: _text(r, 1, 4)), {"a": 0.25, "b": 0.5, "c": 0.25}),
    "data.leak_share": lambda r: (
        _some(r, 1, 3, lambda: _text(r, 3, 8)),
        _some(r, 2, 5, lambda: _text(r, 1, 6)),
        r.randint(1, 3),
    ),
    "tokenization.merge_pair": lambda r: (_whole(r, 4, 12, 1, 2), (r.randint(1, 2), r.randint(1, 2)), 9),
    "tokenization.best_pair": lambda r: ({" ".join(_words(r, 2, 6)): r.randint(1, 9) for _ in range(r.randint(2, 5))},),
    "tokenization.encode_word": lambda r: ("".join(_words(r, 5, 14, "abc")), _merges(r)),
    "tokenization.bytes_per_token": lambda r: (
        texts := _some(r, 1, 4, lambda: _text(r, 1, 6)),
        [[r.randint(1, 9) for _ in range(r.randint(1, 5))] for _ in texts],
    ),
    "tokenization.pack_stream": lambda r: (_some(r, 2, 6, lambda: _whole(r, 0, 6, 1, 9)), 0, r.randint(2, 5)),
    "tokenization.unpack_stream": _packed,
    "tokenization.best_fit": lambda r: (_whole(r, 4, 12, 1, 9), r.randint(9, 14)),
    "attention.causal_bias": lambda r: (t := r.randint(2, 5), t + r.randint(1, 4)),
    "attention.alibi": lambda r: (2 ** r.randint(0, 4), r.randint(2, 6)),
    "attention.decoder_mask": lambda r: (
        _tensor([[r.randint(0, 3) for _ in range(5)] for _ in range(3)], "int64"),
        r.randint(0, 3),
    ),
    "attention.longformer_mask": lambda r: (n := r.randint(4, 8), r.randint(0, 2), r.sample(range(n), r.randint(1, 2))),
    "attention.longest_text": lambda r: (r.randint(1, 10**12), r.randint(1, 10**5)),
    "model.most_layers": lambda r: (
        r.randint(10**6, 10**7),
        r.randint(100, 900),
        8 * r.randint(2, 8),
        4,
        r.choice((1, 2, 4)),
        r.randint(50, 300),
        r.random() < 0.5,
    ),
    "model.positions_of": lambda r: (
        _tensor([[i >= k for i in range(6)] for k in (r.randint(0, 6) for _ in range(4))], "bool"),
    ),
    "evaluation.window_faults": lambda r: (_windows(r, n := r.randint(4, 12)), n),
    "evaluation.corpus_perplexity": lambda r: (_some(r, 2, 5, lambda: _numbers(r, 1, 6, 0, 6)),),
    "evaluation.bits_per_byte": lambda r: (_real(r, 2, 90), r.randint(3, 30), _text(r, 3, 12)),
    "evaluation.one_bad_token": lambda r: (_real(r, 2, 90), r.randint(2, 500), _real(r, 0.000001, 0.5)),
    "evaluation.documents_needed": lambda r: (_real(r, 1.01, 1.4), _real(r, 0.05, 1.0)),
    "metrics.clipped": lambda r: (
        _words(r, 4, 9, "abc"),
        _some(r, 1, 3, lambda: _words(r, 2, 8, "abc")),
        r.randint(1, 3),
    ),
    "metrics.brevity_penalty": lambda r: (
        lengths := _whole(r, 2, 4, 1, 9),
        [[r.randint(1, 15) for _ in range(r.randint(1, 3))] for _ in lengths],
    ),
    "metrics.bleu2": lambda r: (
        found := _some(r, 2, 4, lambda: _words(r, 2, 8, "abc")),
        [_words(r, 2, 8, "abc") for _ in found],
    ),
    "metrics.rouge_l": lambda r: (_words(r, 5, 20), _words(r, 5, 20)),
    "metrics.mean_f1": lambda r: (_some(r, 2, 5, lambda: (_words(r, 0, 5), _words(r, 0, 5))),),
    "metrics.shortest_prefix": lambda r: (r.randint(4, 400), _real(r, 1, 99)),
    "metrics.swap_p": lambda r: (a := _whole(r, 3, 9, 0, 6), [r.randint(0, 6) for _ in a]),
    "accuracy.acc_norm_bytes": _items,
    "accuracy.ece": lambda r: (c := _numbers(r, 4, 12, 0, 1), [r.random() < 0.6 for _ in c], r.randint(2, 9)),
    "accuracy.mcnemar_p": lambda r: ([[r.randint(5, 90), r.randint(1, 15)], [r.randint(1, 15), r.randint(5, 90)]],),
    "accuracy.wins_needed": lambda r: (r.randint(0, 30), _real(r, 0.001, 0.2)),
    "accuracy.turned": _shown,
    "accuracy.order_p": lambda r: (
        r.choice((1.5, 2.0, 2.5)),
        _some(r, 3, 12, lambda: r.choice((1.0, 1.5, 2.0, 2.5, 3.0))),
    ),
    "report.runs_needed": lambda r: (_real(r, 0.05, 0.97), _real(r, 0.5, 0.999)),
    "report.split_times": lambda r: (n := [1, 9, *_whole(r, 1, 5, 1, 40)], [_real(r, 0.5, 9) for _ in n]),
    "report.throughput": lambda r: (_some(r, 4, 8, lambda: (r.randint(1, 90), _real(r, 0.5, 9))), r.randint(0, 3)),
    "report.millijoules_per_token": _counters,
    "report.expected_best": lambda r: (_numbers(r, 2, 7, 1, 9), r.randint(1, 9)),
    "report.standard_error": _by_unit,
    "search.runs_needed": lambda r: (_real(r, 0.01, 0.9), _real(r, 0.3, 0.999)),
    "search.improvement": lambda r: (_real(r, 1, 3), _real(r, 0.05, 1), _real(r, 1, 3)),
    "search.halving": lambda r: (_runs(r, r.randint(4, 12), r.randint(2, 4)), r.randint(2, 3)),
    "search.affordable": lambda r: (_real(r, 2, 40), [0.125, 0.25, 0.5, 1][r.randint(0, 2) :], r.randint(2, 3)),
    "search.curse": lambda r: (_runs(r, r.randint(2, 5), r.randint(2, 5)),),
    "search.seed_t": _ragged,
    "search.whole_lines": lambda r: (
        "".join(_some(r, 3, 8, lambda: r.choice(('{"a": 1}', '{"b": [2]}', '{"c"', "[1]", "\n", "\n")))),
    ),
    "experiments.effect": _signs,
    "experiments.missing": _square,
    "experiments.seeds_needed": lambda r: (_real(r, 0.8, 1), _real(r, 0.02, 0.2), _real(r, 0.3, 0.8)),
    "experiments.pairs_worth": lambda r: (a := _numbers(r, 3, 6, 1, 9), [_real(r, 1, 9) for _ in a]),
    "experiments.called_real": lambda r: (
        {f"e{i}": _real(r, 0, 0.1) for i in range(r.randint(2, 6))},
        _real(r, 0.02, 0.3),
    ),
    "experiments.false_alarm": lambda r: (sorted(r.sample(range(1, 13), r.randint(1, 4))), _real(r, 0.05, 0.6)),
    "experiments.next_error": lambda r: (_runs(r, r.randint(2, 5), r.randint(2, 4)), r.randint(1, 9), r.randint(1, 9)),
    "optimizers.first_step": lambda r: (
        _tensor(_numbers(r, 3, 3, -2, 2)),
        _tensor(_numbers(r, 3, 3, -2, 2)),
        0.1,
        1e-8,
        _real(r, 0.01, 0.5),
        r.random() < 0.5,
    ),
    "optimizers.resting_weight": lambda r: (_real(r, -4, 4), _real(r, 0.01, 0.9), r.random() < 0.5),
    "optimizers.learning_rates": lambda r: (r.randint(8, 30), r.randint(0, 6), _real(r, 0.001, 2), _real(r, 0, 0.5)),
    "optimizers.clip_together": lambda r: (
        [_tensor(_numbers(r, 2, 5, -3, 3)), None, _tensor(_numbers(r, 1, 4, -3, 3))],
        _real(r, 0.1, 8),
    ),
    "optimizers.lowest_loss": lambda r: (r.randint(2, 900), _real(r, 0.01, 0.9)),
    "pruning.cut_channels": _channels,
    "pruning.step_reaching": lambda r: (
        _real(r, 0.1, 0.45),
        s := r.randint(0, 40),
        s + r.randint(5, 90),
        _real(r, 0, 0.2),
        0.5,
    ),
    "quantization.affine_grid": lambda r: (_real(r, -9, 2), _real(r, 2, 9), r.randint(2, 8)),
    "quantization.bits_per_weight": lambda r: (r.randint(5, 700), r.randint(2, 8), r.randint(3, 130), r.random() < 0.5),
    "distributed.ring_sent": lambda r: (r.randint(0, 60), r.randint(1, 9)),
    "distributed.zero_bytes": lambda r: (r.randint(1, 900), r.randint(1, 12), r.randint(0, 3), r.random() < 0.5),
    "distributed.enough_pieces": lambda r: (
        r.randint(1, 9),
        (r.randint(0, 5), r.randint(5, 12)),
        r.choice((24, 36, 60, 64)),
    ),
    "distributed.kilograms": lambda r: (
        _real(r, 1e6, 1e9),
        _real(r, 1e8, 1e12),
        1e14,
        _real(r, 0.1, 0.6),
        _real(r, 100, 900),
        _real(r, 1, 2),
        _real(r, 0, 900),
    ),
}
