"""Operators that are known to have no multiply-accumulates: declared, so that a new operator is not free by default.

What scales, normalizes, pools, resizes or adds up entries has products or sums, but no sums of products with weights or
with another value; by the usual convention it counts nothing.
"""

from __future__ import annotations

from cipm_ir.ops.costs import free

_ENTRYWISE = """
Abs Acos Acosh Add And Asin Asinh Atan Atanh BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike
Ceil Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity
IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu
Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum SwiGLU Swish Tan Tanh ThresholdedRelu Where Xor
QuantizeLinear DequantizeLinear DynamicQuantizeLinear RotaryEmbedding
"""
_MOVES = """
CenterCropPad Col2Im Compress Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather GatherElements
GatherND Im2Col OneHot Pad Range Reshape ReverseSequence Scatter ScatterElements ScatterND Shape Size Slice SpaceToDepth
Split Squeeze TensorScatter Tile Transpose Trilu Unsqueeze AffineGrid MaxUnpool
ConcatFromSequence Optional OptionalGetElement OptionalHasElement SequenceAt SequenceConstruct SequenceEmpty
SequenceErase SequenceInsert SequenceLength SplitToSequence
ImageDecoder RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer
Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike
BlackmanWindow HammingWindow HannWindow MelWeightMatrix
"""
_REDUCTIONS = """
ArgMax ArgMin AveragePool BatchNormalization CumProd CumSum GlobalAveragePool GlobalLpPool GlobalMaxPool
GroupNormalization Hardmax InstanceNormalization LRN LayerNormalization LogSoftmax LpNormalization LpPool MaxPool
MaxRoiPool MeanVarianceNormalization NegativeLogLikelihoodLoss NonMaxSuppression NonZero RMSNormalization ReduceL1
ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Resize
RoiAlign SimplifiedLayerNormalization Softmax SoftmaxCrossEntropyLoss TopK Unique Upsample
"""
_TREES = """
ArrayFeatureExtractor Binarizer CastMap CategoryMapper DictVectorizer FeatureVectorizer Imputer LabelEncoder Normalizer
OneHotEncoder Scaler TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor ZipMap
"""
_RUNTIME = """
BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu BitmaskDropout CropAndResize DynamicTimeWarping
EmbedLayerNormalization ExpandDims FastGelu GatherBlockQuantized GatherND Gelu GroupNorm IsAllFinite
MaxpoolWithMask MurmurHash3 NGramRepeatBlock NhwcMaxPool Pad QEmbedLayerNormalization QLinearAdd QLinearAveragePool
QLinearConcat QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax
QLinearWhere QuantizeLinear DequantizeLinear QuickGelu Range RelativePositionBias
RemovePadding RestorePadding RotaryEmbedding SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization
SampleOp Tokenizer TorchEmbedding Trilu Unique UnfoldTensor
"""

free(*_ENTRYWISE.split(), *_MOVES.split(), *_REDUCTIONS.split())
free(*_TREES.split(), domain="ai.onnx.ml")
free(*_RUNTIME.split(), domain="com.microsoft")
