"""Tiny random models of many architectures, for the tests of the adapters and of everything that uses them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from llmcourse.data import TokenData

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
# architecture -> (class of its configuration, what differs from SIZES)
CAUSAL: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied, one head for all": ("LlamaConfig", dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "llama, biases": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "mistral, window": ("MistralConfig", dict(sliding_window=5)),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "granite": ("GraniteConfig", {}),
    "smollm3": ("SmolLM3Config", dict(no_rope_layer_interval=2)),
    "gemma": ("GemmaConfig", dict(head_dim=8)),
    "gemma2": ("Gemma2Config", dict(head_dim=8, sliding_window=5)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=8, sliding_window=5, sliding_window_pattern=2)),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "stablelm, parallel": ("StableLmConfig", dict(use_parallel_residual=True)),
    "olmo2": ("Olmo2Config", {}),
    "cohere": ("CohereConfig", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "gpt2": ("GPT2Config", dict(n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "opt": ("OPTConfig", dict(ffn_dim=48, word_embed_proj_dim=32)),
    "opt, norms after": ("OPTConfig", dict(ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False)),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-neox, in series": ("GPTNeoXConfig", dict(use_parallel_residual=False)),
    "gpt-j": ("GPTJConfig", dict(n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4)),
    "bloom": ("BloomConfig", dict(n_layer=3, n_head=4)),
    "falcon": ("FalconConfig", {}),
    "xglm": ("XGLMConfig", dict(d_model=32, ffn_dim=48, num_layers=3, attention_heads=4)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2-moe": ("Qwen2MoeConfig", MOE | dict(shared_expert_intermediate_size=24)),
    "qwen3-moe": ("Qwen3MoeConfig", MOE | dict(head_dim=8)),
    "olmoe": ("OlmoeConfig", dict(num_experts=4, num_experts_per_tok=2)),
    "granite-moe": ("GraniteMoeConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "deepseek-v3": (
        "DeepseekV3Config",
        dict(
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1,
            first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=8, num_key_value_heads=4, n_shared_experts=1,
        ),
    ),
    "gpt-oss": ("GptOssConfig", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=5)),
    "jetmoe": ("JetMoeConfig", dict(kv_channels=8, num_local_experts=4, num_experts_per_tok=2)),
    "llama4": (
        "Llama4TextConfig",
        dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=48, head_dim=8, attention_chunk_size=8,
             interleave_moe_layer_step=2),
    ),
}  # fmt: skip
OURS = {
    "ours": {},
    "ours, gelu, layer norm, learned positions": dict(ffn="gelu", norm="layer", position="learned", n_kv_heads=2),
    "ours, post-norm": dict(norm_position="post", tied=False),
    "ours, experts": dict(n_experts=4),
}
# what no adapter can treat: (class of the configuration, class of the model, settings, a piece of the sentence)
REFUSED = {
    "mamba": ("MambaConfig", "MambaForCausalLM", dict(num_hidden_layers=1), "carries a state"),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        dict(num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, n_groups=1),
        "carries a state",
    ),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", dict(attention_hidden_size=32), "carries a state"),
    "recurrent gemma": ("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", dict(head_dim=8), "carries a state"),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", dict(layer_types=["conv", "full_attention", "conv"]), "carries a state"),
    "bert": ("BertConfig", "BertForMaskedLM", {}, "does not predict the next token"),
    "bert as an encoder": ("BertConfig", "BertModel", {}, "does not predict the next token"),
    "bert with a head, not causal": ("BertConfig", "BertLMHeadModel", dict(is_decoder=False), "causal"),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM",
                   dict(dim=32, n_heads=4, n_layers=1, hidden_dim=48), "does not predict"),
    "t5": ("T5Config", "T5ForConditionalGeneration",
           dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4), "an encoder with a decoder"),
    "bart": ("BartConfig", "BartForConditionalGeneration",
             dict(d_model=32, encoder_layers=1, decoder_layers=1), "an encoder with a decoder"),
}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    """The tiny model of that name, in evaluation mode, with weights that are large enough to make a difference."""
    torch.manual_seed(seed)
    if name in OURS:
        from llmcourse.model import GPT, GPTConfig

        settings = dict(vocab_size=96, d_model=32, n_layers=3, n_heads=4, d_ff=48, context=64) | OURS[name]
        model = GPT(GPTConfig(**settings))
    elif name in CAUSAL:
        config_class, changes = CAUSAL[name]
        config = getattr(transformers, config_class)(**_settings(config_class, changes))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        config_class, model_class, changes, _ = REFUSED[name]
        model = getattr(transformers, model_class)(
            getattr(transformers, config_class)(**_settings(config_class, changes))
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():  # the usual initial weights are so small that every block is nearly the identity
            std = 1.5 * p.shape[-1] ** -0.5 if p.ndim >= 2 else 0.1
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return model.eval()


def _settings(config_class: str, changes: dict) -> dict:
    own = ("GPT2Config", "GPTJConfig", "BloomConfig", "XGLMConfig", "T5Config", "BartConfig", "DistilBertConfig")
    keep = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings")
    base = {k: v for k, v in SIZES.items() if config_class not in own or k in keep}
    if config_class == "BloomConfig":
        base["hidden_size"] = 32
    return base | changes


def ids(n: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (n, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens, use_cache=False)
    return getattr(out, "logits", out)


def random_text() -> TokenData:
    """Random tokens of the tiny models, 400 in each part."""
    dice = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(SIZES["vocab_size"], (n,), generator=dice)
    parts = {part: draw(400) for part in ("train", "val", "test", "calib")}
    sizes = {part: torch.ones_like(ids) for part, ids in parts.items()}
    return TokenData(**parts, bytes=sizes, separator=0, name="random", tokenizer="none")


def main() -> None:
    """Print the table of architectures: which adapter, which share of the matrices it treats, what it leaves."""
    from llmcourse.adapters import coverage
    from llmcourse.settings import BadInput

    transformers.logging.set_verbosity_error()
    print(f"{'architecture':<44}{'adapter':<9}{'of the model':>13}{'of the blocks':>15}  left inside the blocks")
    for name in [*OURS, *CAUSAL]:
        c = coverage(build(name))
        left = sorted({why for why in c.left.values() if why != "outside the blocks"})
        print(f"{name:<44}{c.adapter:<9}{c.share:>12.1%}{c.share_of_blocks:>15.1%}  {'; '.join(left) or 'nothing'}")
    for name in REFUSED:
        try:
            coverage(build(name))
        except BadInput as e:
            print(f"{name:<44}refused: {e}")


if __name__ == "__main__":
    main()
