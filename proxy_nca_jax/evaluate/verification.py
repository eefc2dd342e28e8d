"""Verification of embeddings: error rates and distance thresholds."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from proxy_nca_jax import retrieval
from proxy_nca_jax.evaluate import scores

FMR = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# Points of the curve that are kept: at these FMR and these FNMR.
_KEPT_FMR = np.geomspace(1, 1e-9, 400)
_KEPT_FNMR = np.linspace(0, 1, 200)


def verify(
  embeddings: np.ndarray, labels: np.ndarray, *, fmr: Sequence[float] = FMR
) -> dict:
  """Computes exact error rates of verification over all pairs of items.

  A pair is accepted as one of one class if its Euclidean distance on the unit
  sphere, from 0 to 2, is at most a threshold. FMR, the false match rate, is the
  fraction of accepted pairs among those of two classes; FNMR, the false
  non-match rate, is the fraction of rejected pairs among those of one class.

  Args:
    embeddings: float [num_items, dim].
    labels: int or text [num_items].
    fmr: false match rates in (0, 1).

  Returns:
    'eer', the equal error rate, and 'eer_distance', its threshold;
    'operating_points', for each FMR that these pairs can tell from 0 a dict of
    'fmr', 'fnmr' and 'distance', the largest threshold that keeps the FMR;
    'num_genuine' and 'num_impostor', the numbers of pairs; and 'curve', rows of
    (distance, FMR, FNMR), exact points of the whole curve.

  Raises:
    ValueError: if shapes or types do not fit, a rate is out of range, an
      embedding is not finite, or there is no pair of one kind.
  """
  if not all(0 < rate < 1 for rate in fmr):
    raise ValueError(f'The rates fmr ({tuple(fmr)}) must be between 0 and 1.')
  points, labels, _ = scores.prepare(embeddings, labels)
  result = retrieval.verification(points, labels, fmr=fmr)
  return {
    'eer': result.eer,
    'eer_distance': _distance(result.eer_threshold),
    'operating_points': [
      {
        'fmr': rate,
        'fnmr': result.fnmr[rate],
        'distance': _distance(result.thresholds[rate]),
      }
      for rate in result.fnmr
    ],
    'num_genuine': result.num_genuine,
    'num_impostor': result.num_impostor,
    'curve': [
      [_distance(similarity), *rates]
      for similarity, *rates in _thin(result.curve).tolist()
    ],
  }


def _distance(similarity: float) -> float:
  return math.sqrt(min(max(2 - 2 * similarity, 0), 4))


def _thin(curve: np.ndarray) -> np.ndarray:
  """Returns some points of a curve, dense in log FMR and in FNMR."""
  _, fmr, fnmr = curve.T
  kept = np.concatenate(
    [np.searchsorted(-fmr, -_KEPT_FMR), np.searchsorted(fnmr, _KEPT_FNMR)]
  )
  return curve[np.unique(np.minimum(kept, len(curve) - 1))]


def format_table(result: Mapping) -> str:
  """Formats a result of `verify`: rates in percent, and their thresholds."""
  rows = [('FMR', 'FNMR', 'distance')] + [
    (
      f'{100 * point["fmr"]:g}%',
      f'{100 * point["fnmr"]:.2f}%',
      f'{point["distance"]:.4f}',
    )
    for point in result['operating_points']
  ]
  eer = f'{100 * result["eer"]:.2f}%'
  rows.append((eer, eer, f'{result["eer_distance"]:.4f}'))
  lines = [f'{fmr:>10}{fnmr:>10}{distance:>10}' for fmr, fnmr, distance in rows]
  lines[-1] += '  (equal error rate)'
  return '\n'.join(lines)
