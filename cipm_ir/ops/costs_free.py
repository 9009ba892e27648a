"""Operators without a label rule that are known to have no multiply-accumulates; the others say so in their entry.

What scales, normalizes, pools, resizes or adds up entries has products or sums, but no sums of products with weights or
with another value; by the usual convention it counts nothing.
"""

from __future__ import annotations

from cipm_ir.ops.costs import free

_ONNX = """
AffineGrid BitCast ConcatFromSequence Constant Im2Col ImageDecoder MaxUnpool Multinomial NegativeLogLikelihoodLoss
Optional OptionalGetElement OptionalHasElement RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase
SequenceInsert SequenceLength SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit
TensorScatter TfIdfVectorizer
"""
_TREES = """
ArrayFeatureExtractor Binarizer CastMap CategoryMapper DictVectorizer FeatureVectorizer Imputer LabelEncoder Normalizer
OneHotEncoder Scaler TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor ZipMap
"""
_RUNTIME = """
BiasAdd BiasDropout BiasSoftmax BiasSplitGelu BitmaskDropout CropAndResize DequantizeLinear DynamicTimeWarping
ExpandDims GatherBlockQuantized GatherND GroupNorm IsAllFinite MaxpoolWithMask MurmurHash3 NGramRepeatBlock NhwcMaxPool
Pad QEmbedLayerNormalization QLinearReduceMean QLinearWhere QuantizeLinear Range RelativePositionBias RemovePadding
RestorePadding SampleOp SkipGroupNorm Tokenizer TorchEmbedding Trilu UnfoldTensor Unique
"""

free(*_ONNX.split())
free(*_TREES.split(), domain="ai.onnx.ml")
free(*_RUNTIME.split(), domain="com.microsoft")
