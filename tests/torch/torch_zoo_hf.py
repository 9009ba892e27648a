"""Models of the transformers library from small configurations, with random weights.

All sizes of a model differ where its architecture allows it, so that a mistaken axis shows. transformers is imported
when a model is built: the index stays quick to import.
"""

from __future__ import annotations

from typing import Any

import torch
from tests.torch.torch_zoo_base import BATCH, floats, images, register, tokens
from torch import Tensor, nn

VOCABULARY = 37
LABELS: dict[str, Any] = {"num_labels": 5}
IDS = tokens(VOCABULARY, 7)


def padded_tokens() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Token numbers with an attention mask by keyword: the second sentence is shorter."""
    (ids,), _ = IDS()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return (ids,), {"attention_mask": mask}


class TokenModel(nn.Module):
    """A language model that returns one field of its output."""

    def __init__(self, model: nn.Module, field: str) -> None:
        super().__init__()
        self.model, self.field = model, field

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[self.field]


class PixelModel(nn.Module):
    """A vision model that returns one field of its output."""

    def __init__(self, model: nn.Module, field: str) -> None:
        super().__init__()
        self.model, self.field = model, field

    def forward(self, pixel_values: Tensor) -> Any:
        return self.model(pixel_values=pixel_values)[self.field]


class AudioModel(nn.Module):
    """An audio encoder that returns its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor) -> Any:
        return self.model(input_features)["last_hidden_state"]


def bert_model(attention: str = "sdpa", pooler: bool = True) -> nn.Module:
    """A BertModel with two layers."""
    from transformers import BertConfig, BertModel

    options: dict[str, Any] = {"attn_implementation": attention}
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, type_vocab_size=2, **options,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=pooler)


@register("bert", "transformer", "hf", inputs=padded_tokens, symbolic=False)
def bert() -> nn.Module:
    """BERT with a padding mask."""
    return TokenModel(bert_model(pooler=False), "last_hidden_state")


@register("bert_eager", "transformer", "hf", inputs=padded_tokens, symbolic=False)
def bert_eager() -> nn.Module:
    """BERT with attention written out, its pooled output."""
    return TokenModel(bert_model("eager"), "pooler_output")


@register("bert_raw", "transformer", "hf", "raw", inputs=IDS, symbolic=False)
def bert_raw() -> nn.Module:
    """BERT as it is: a ModelOutput with two tensors."""
    return bert_model()


@register("bert_masked_lm", "transformer", "hf", "tied", inputs=IDS, symbolic=False)
def bert_masked_lm() -> nn.Module:
    """BertForMaskedLM: the decoder's weight is the embedding table, its bias is registered under two names."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16,
    )  # fmt: skip
    return TokenModel(BertForMaskedLM(config), "logits")


@register("distilbert", "transformer", "hf", inputs=IDS, symbolic=False)
def distilbert() -> nn.Module:
    """DistilBERT with its classification head."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_position_embeddings=16, **LABELS
    )
    return TokenModel(DistilBertForSequenceClassification(config), "logits")


@register("vit", "transformer", "hf", inputs=images(3, 24), symbolic=False)
def vit() -> nn.Module:
    """ViT with nine patches and a class token."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=24, patch_size=8,
        **LABELS,
    )  # fmt: skip
    return PixelModel(ViTForImageClassification(config), "logits")


@register("gpt2", "transformer", "hf", "causal", "tied", inputs=IDS, symbolic=False)
def gpt2() -> nn.Module:
    """GPT-2: transposed Linear weights, fused query-key-value, output head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=3, n_positions=16, use_cache=False, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return TokenModel(GPT2LMHeadModel(config), "logits")


def llama_model(use_cache: bool) -> nn.Module:
    """A LlamaForCausalLM with six query heads on two key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=16, use_cache=use_cache,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@register("llama", "transformer", "hf", "causal", inputs=IDS, symbolic=False)
def llama() -> nn.Module:
    """Llama with grouped queries and rotary positions."""
    return TokenModel(llama_model(False), "logits")


@register("llama_cache", "transformer", "hf", "causal", "raw", "needs_pytree", inputs=IDS, symbolic=False)
def llama_cache() -> nn.Module:
    """Llama as it is, returning logits and the key-value cache."""
    return llama_model(True)


class CacheModel(nn.Module):
    """A causal language model with the cache opened into tensors, as an exporter wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        result = self.model(input_ids=input_ids, use_cache=True)
        return result.logits, [(layer.keys, layer.values) for layer in result.past_key_values.layers]


@register("llama_cache_tensors", "transformer", "hf", "causal", inputs=IDS, symbolic=False)
def llama_cache_tensors() -> nn.Module:
    """Llama that returns logits, and keys and values of each layer: outputs in which head axes are seen."""
    return CacheModel(llama_model(True))


@register("qwen2", "transformer", "hf", "causal", "tied", inputs=IDS, symbolic=False)
def qwen2() -> nn.Module:
    """Qwen2: grouped queries with biases, head tied to the embedding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=16, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    return TokenModel(Qwen2ForCausalLM(config), "logits")


@register("t5_encoder", "transformer", "hf", inputs=padded_tokens, symbolic=False)
def t5_encoder() -> nn.Module:
    """T5's encoder: relative position bias shared by the layers, RMS norm, no biases, heads wider than the model."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=VOCABULARY, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_heads=3,
        relative_attention_num_buckets=8, relative_attention_max_distance=16,
    )  # fmt: skip
    return TokenModel(T5EncoderModel(config), "last_hidden_state")


@register("swin", "transformer", "hf", inputs=images(3, 32), symbolic=False)
def swin() -> nn.Module:
    """Swin: shifted windows, relative position bias, patch merging."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[2, 1], num_heads=[2, 3], window_size=4, mlp_ratio=2.5,
        **LABELS,
    )  # fmt: skip
    return PixelModel(SwinForImageClassification(config), "logits")


@register("hf_convnext", "cnn", "hf", inputs=images(3, 32), symbolic=False)
def hf_convnext() -> nn.Module:
    """The library's ConvNeXt with two stages."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(num_stages=2, hidden_sizes=[10, 18], depths=[2, 1], patch_size=4, **LABELS)
    return PixelModel(ConvNextForImageClassification(config), "logits")


@register("whisper_encoder", "transformer", "hf", inputs=floats((BATCH, 10, 18)), symbolic=False)
def whisper_encoder() -> nn.Module:
    """Whisper's audio encoder: two 1-D convolutions, attention without key bias."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=10, d_model=24, encoder_layers=2, encoder_attention_heads=3,
        encoder_ffn_dim=40, max_source_positions=9, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3,
    )  # fmt: skip
    return AudioModel(WhisperEncoder(config))


def mixtral_model(experts: str) -> nn.Module:
    """A MixtralForCausalLM with four experts, two for every token, chosen by a router."""
    from transformers import MixtralConfig, MixtralForCausalLM

    options: dict[str, Any] = {"experts_implementation": experts}
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=20, num_local_experts=4, max_position_embeddings=16, use_cache=False, **options,
    )  # fmt: skip
    return TokenModel(MixtralForCausalLM(config), "logits")


@register("mixtral", "transformer", "hf", "causal", "experts", inputs=IDS, symbolic=False)
def mixtral() -> nn.Module:
    """Mixtral with the grouped matrix product, which is the library's default and has no float64 kernel."""
    return mixtral_model("grouped_mm")


@register("mixtral_batched", "transformer", "hf", "causal", "experts", inputs=IDS, symbolic=False)
def mixtral_batched() -> nn.Module:
    """Mixtral with gathered weights and batched products."""
    return mixtral_model("batched_mm")


@register("mixtral_eager", "transformer", "hf", "causal", "experts", "no_export", inputs=IDS, symbolic=False)
def mixtral_eager() -> nn.Module:
    """Mixtral with a loop over those experts that have tokens."""
    return mixtral_model("eager")


@register("gpt_neox", "transformer", "hf", "causal", "failure", inputs=IDS, symbolic=False)
def gpt_neox() -> nn.Module:
    """GPT-NeoX: head-major query-key-value, rotary positions on a part of each head, parallel residual."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return TokenModel(GPTNeoXForCausalLM(config), "logits")
