"""Operators without a rule, each with the reason: an operator of ONNX or onnxruntime is here or has a rule.

What reaches such a node is pinned. The reason is what a report shows.
"""

from __future__ import annotations

_GROUPS: tuple[tuple[str, str, str], ...] = (
    ("", "a body of its own is run", "If Loop Scan SequenceMap"),
    ("", "tensors in sequences and optional values carry no units", """
ConcatFromSequence Optional OptionalGetElement OptionalHasElement SequenceAt SequenceConstruct SequenceEmpty
SequenceErase SequenceInsert SequenceLength SplitToSequence"""),
    ("", "texts, images in files and counts of words carry no units", """
ImageDecoder RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer"""),
    ("", "a loss compares with classes whose order is fixed from outside", """
NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss"""),
    ("", "draws at random by position", "Multinomial"),
    ("", "indices count positions across the channels", "MaxUnpool"),
    ("", "two axes of positions in a plane or matrix are mixed", "AffineGrid Det"),
    ("", "entries are read as bits of another type", "BitCast"),
    ("", "positions of a cache are written at run time", "TensorScatter"),
    ("", "newer than the operators that onnxruntime runs, so that no rule could be checked", """
CausalConvWithState LinearAttention"""),
    ("ai.onnx.preview", "not final, and a body of its own is run", "FlexAttention"),
    ("ai.onnx.preview.training", "a step of training", "Adagrad Adam Gradient Momentum"),
    ("ai.onnx.ml", "features of a classical model, whose order is fixed from outside", """
ArrayFeatureExtractor Binarizer CastMap CategoryMapper DictVectorizer FeatureVectorizer Imputer LabelEncoder
LinearClassifier LinearRegressor Normalizer OneHotEncoder SVMClassifier SVMRegressor Scaler TreeEnsemble
TreeEnsembleClassifier TreeEnsembleRegressor ZipMap"""),
    ("com.microsoft", "onnxruntime has no kernel for the CPU, so that no rule could be checked", """
BiasAdd BiasDropout BiasSoftmax BiasSplitGelu BitmaskBiasDropout BitmaskDropout ComplexMul ComplexMulConj
DecoderAttention DecoderMaskedSelfAttention DequantizeBFP DequantizeWithOrder DynamicSparseAttention EPContext
FusedMatMulActivation GatedDeltaNet GatedRelativePositionBias GemmFastGelu GemmFloat8 GemmaRotaryEmbedding GroupNorm
Irfft IsAllFinite LongformerAttention MatMulBlockQuantizedFp4Weight MatMulBlockQuantizedFp8Weight MatMulNBitsMlp
MatMulNBitsQkv MulInteger NhwcConv NhwcFusedConv PackedAttention PackedMultiHeadAttention
PackedSparseAttentionIndexer PagedAttention QLinearReduceMean QOrderedAttention QOrderedGelu
QOrderedLayerNormalization QOrderedLongformerAttention QOrderedMatMul QuantizeBFP QuantizeWithOrder ReduceSumInteger
RelativePositionBias RemovePadding RestorePadding Rfft SkipGroupNorm Snpe SparseAttentionIndexer
SparsePagedAttention TorchEmbedding VarlenCausalConvWithState"""),
    ("com.microsoft", "a search that runs a body of its own", "BeamSearch GreedySearch Sampling WhisperBeamSearch"),
    ("com.microsoft", "a cache or a state from step to step", """
AttnLSTM CausalConvWithState DecoderMaskedMultiHeadAttention LinearAttention SparseAttention"""),
    ("com.microsoft", "several units are packed to a byte, in blocks of both axes", """
GatherBlockQuantized MatMulBnb4 MatMulFpQ4 MoE QMoE SparseToDenseMatMul"""),
    ("com.microsoft", "words and texts come from outside", """
MurmurHash3 NGramHashMapping NGramRepeatBlock Tokenizer VarlenNGramHashMapping WordConvEmbedding"""),
    ("com.microsoft", "positions matter", """
BifurcationDetector CropAndResize DynamicTimeWarping ExpandDims GatherND MaxpoolWithMask NhwcMaxPool Pad Range SampleOp
Trilu UnfoldTensor Unique"""),
    ("com.microsoft", "two axes of a matrix are mixed", "CDist Inverse"),
    ("com.microsoft", "rare, or quantized in a way that ONNX's operator of the name is not", """
BranchwiseRMSNorm ConvTransposeWithDynamicPads DequantizeLinear EngramGate GatedAdd GatedRMSNorm HyperConnectionPostMix
HyperConnectionPreMix LinearAttentionGate MRotaryEmbedding MatMulInteger16 QEmbedLayerNormalization QLinearWhere
QuantizeLinear ScaledSiLU"""),
)  # fmt: skip

REASONS: dict[tuple[str, str], str] = {
    (domain, name): reason for domain, reason, names in _GROUPS for name in names.split()
}
"""Why an operator has no rule, by domain and name."""


def reason_for(domain: str, name: str) -> str:
    """Return why an operator has no rule."""
    return REASONS.get((domain, name), "no rule for this operator")
