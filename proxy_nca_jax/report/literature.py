"""Published results on the papers' datasets, each with its source.

Scores are fractions, as stated by the named public source. Where the source is
not the paper itself, it is a page that quotes the paper.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
  """A published result.

  Attributes:
    name: the method.
    network: the backbone and the embedding dimension.
    scores: {name: fraction}, with the names of `evaluate.scores.score`.
    source: where the scores are published.
  """

  name: str
  network: str
  scores: Mapping[str, float]
  source: str


_DICHOTOMIES = 'github.com/dichotomies/proxy-nca, README and logs'
_PROXYNCA_PP = 'arXiv 2004.01113, abstract'
_ANCHOR = 'github.com/tjddus9597/Proxy-Anchor-CVPR2020, README'
_BN_64, _RN_2048, _BN_512 = (
  'BN-Inception, 64',
  'ResNet-50, 2048',
  'BN-Inception, 512',
)


def _row(name, network, source, **percent):
  names = {'nmi': 'nmi'} | {
    f'r{k}': f'recall@{k}' for k in (1, 2, 4, 8, 10, 20, 100, 1000)
  }
  scores = {names[key]: value / 100 for key, value in percent.items()}
  return Published(name, network, scores, source)


PUBLISHED = {
  'cub200': (
    _row(
      'Proxy-NCA',
      _BN_64,
      'the paper, as quoted by ' + _DICHOTOMIES,
      r1=49.21,
      r2=61.90,
      r4=67.90,
      r8=72.40,
      nmi=59.53,
    ),
    _row(
      'Proxy-NCA by dichotomies, last epoch',
      _BN_64,
      _DICHOTOMIES,
      r1=50.95,
      nmi=58.99,
    ),
    _row('ProxyNCA++', _RN_2048, _PROXYNCA_PP, r1=72.2),
  ),
  'cars196': (
    _row(
      'Proxy-NCA',
      _BN_64,
      'the paper, as quoted by ' + _DICHOTOMIES,
      r1=73.22,
      r2=82.42,
      r4=86.36,
      r8=88.68,
      nmi=64.90,
    ),
    _row(
      'Proxy-NCA by dichotomies, last epoch',
      _BN_64,
      _DICHOTOMIES,
      r1=70.51,
      nmi=60.46,
    ),
    _row('ProxyNCA++', _RN_2048, _PROXYNCA_PP, r1=90.1),
  ),
  'sop': (
    _row(
      'Proxy-NCA', _BN_64, 'the paper, as quoted by ' + _DICHOTOMIES, r1=73.73
    ),
    _row(
      'Proxy-NCA by dichotomies, last epoch', _BN_64, _DICHOTOMIES, r1=73.38
    ),
    _row('ProxyNCA++', _RN_2048, _PROXYNCA_PP, r1=81.4),
    _row(
      'Proxy-Anchor', _BN_512, _ANCHOR, r1=79.2, r10=90.7, r100=96.2, r1000=98.6
    ),
  ),
  'inshop': (
    _row('ProxyNCA++', _RN_2048, _PROXYNCA_PP, r1=90.9),
    _row('Proxy-Anchor', _BN_512, _ANCHOR, r1=91.9, r10=98.1, r20=98.7),
  ),
}
