"""Slow NumPy definitions, in float64 and loops, to compare with."""

import itertools

import numpy as np


def proxy_nca_loss(
    embeddings, proxies, labels, *, temperature=1 / 9,
    positive_in_denominator=False, normalize=True, label_smoothing=0.0,
):
  """The loss from squared distances, example by example."""
  embeddings = np.asarray(embeddings, np.float64)
  proxies = np.asarray(proxies, np.float64)
  if normalize:
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1)[:, None]
    proxies = proxies / np.linalg.norm(proxies, axis=1)[:, None]
  losses = []
  for x, label in zip(embeddings, labels):
    scores = [-np.sum((x - p) ** 2) / temperature for p in proxies]
    others = [s for i, s in enumerate(scores) if i != label]
    total = scores if positive_in_denominator else others
    # The largest score is taken out of the sum of exponentials.
    top = max(total)
    log_sum = top + np.log(sum(np.exp(s - top) for s in total))
    target = [
      1 - label_smoothing if i == label
      else label_smoothing / max(len(proxies) - 1, 1)
      for i in range(len(proxies))
    ]
    losses.append(sum(t * (log_sum - s) for t, s in zip(target, scores)))
  return np.array(losses)


def unit(x):
  x = np.asarray(x, np.float64)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def proxy_anchor_loss(embeddings, proxies, labels, *, alpha=32, margin=0.1):
  """The two sums over proxies, each over the batch, term by term."""
  x, p = unit(embeddings), unit(proxies)
  pulls, pushes = [], []
  for index, proxy in enumerate(p):
    own = [v @ proxy for v, label in zip(x, labels) if label == index]
    others = [v @ proxy for v, label in zip(x, labels) if label != index]
    pulls.append(np.log1p(sum(np.exp(-alpha * (s - margin)) for s in own)))
    pushes.append(np.log1p(sum(np.exp(alpha * (s + margin)) for s in others)))
  return sum(pulls) / len(set(labels)) + np.mean(pushes)


def _squared(x, y):
  return np.sum((x - y) ** 2)


def _log_sum(scores):
  top = max(scores)
  return top + np.log(sum(np.exp(s - top) for s in scores))


def proxy_nca_pp_loss(embeddings, proxies, labels, *, temperature=1 / 9):
  losses = []
  for x, label in zip(unit(embeddings), labels):
    scores = [-_squared(x, p) / temperature for p in unit(proxies)]
    losses.append(_log_sum(scores) - scores[label])
  return np.array(losses)


def fractional_proxy_nca_loss(
    embeddings, proxies, labels, *, assignment, temperature=1 / 9
):
  losses = []
  for x, label in zip(unit(embeddings), labels):
    scores = [-_squared(x, p) / temperature for p in unit(proxies)]
    own = set(assignment[label].tolist())
    others = [s for i, s in enumerate(scores) if i not in own]
    losses.append(_log_sum(others) - max(scores[i] for i in own))
  return np.array(losses)


def dynamic_proxy_nca_loss(embeddings, proxies, labels, *, temperature=1 / 9):
  x, p = unit(embeddings), unit(proxies)
  nearest = [min(p, key=lambda proxy, v=v: _squared(v, proxy)) for v in x]
  losses = []
  for i, anchor in enumerate(x):
    scores = [-_squared(anchor, proxy) / temperature for proxy in nearest]
    others = [s for s, label in zip(scores, labels) if label != labels[i]]
    alike = [
      scores[j] for j in range(len(x)) if labels[j] == labels[i] and j != i
    ]
    has_both = alike and others
    losses.append(_log_sum(others) - np.mean(alike) if has_both else 0)
  return np.array(losses)


def proxy_triplet_loss(embeddings, proxies, labels, *, margin=0.2):
  losses = []
  for x, label in zip(unit(embeddings), labels):
    d = [_squared(x, p) for p in unit(proxies)]
    others = [i for i in range(len(d)) if i != label]
    losses.append(np.mean([max(d[label] + margin - d[i], 0) for i in others]))
  return np.array(losses)


def _cross_entropy(logits, labels, margin=0):
  losses = []
  for scores, label in zip(logits, labels):
    scores = list(scores)
    scores[label] -= margin
    losses.append(_log_sum(scores) - scores[label])
  return np.array(losses)


def normalized_softmax_loss(embeddings, proxies, labels, *, temperature=0.05):
  cosines = unit(embeddings) @ unit(proxies).T
  return _cross_entropy(cosines / temperature, labels)


def cosface_loss(embeddings, proxies, labels, *, scale=64, margin=0.35):
  logits = scale * unit(embeddings) @ unit(proxies).T
  return _cross_entropy(logits, labels, scale * margin)


def arcface_loss(embeddings, proxies, labels, *, scale=64, margin=0.5):
  return subcenter_arcface_loss(
    embeddings, np.asarray(proxies)[:, None], labels, scale=scale, margin=margin
  )


def subcenter_arcface_loss(
    embeddings, proxies, labels, *, scale=64, margin=0.5
):
  logits = []
  for x, label in zip(unit(embeddings), labels):
    angles = [np.arccos(max(w @ x for w in row)) for row in unit(proxies)]
    scores = np.cos(angles)
    scores[label] = np.cos(angles[label] + margin)
    if angles[label] + margin > np.pi:
      scores[label] = np.cos(angles[label]) - margin * np.sin(margin)
    logits.append(scale * scores)
  return _cross_entropy(logits, labels)


def soft_triple_loss(
    embeddings, proxies, labels, *, scale=20, margin=0.01, gamma=0.1, tau=0.2
):
  centers = unit(proxies)
  num_classes, num_centers = centers.shape[:2]
  logits = []
  for x in unit(embeddings):
    weights = [np.exp(row @ x / gamma) for row in centers]
    logits.append([
      scale * (w / w.sum()) @ (row @ x) for w, row in zip(weights, centers)
    ])
  spread = sum(
    np.linalg.norm(a - b)
    for row in centers
    for a, b in itertools.combinations(row, 2)
  ) / (num_classes * num_centers * (num_centers - 1))
  return _cross_entropy(logits, labels, scale * margin) + tau * spread


def gradient(function, x, step=1e-5):
  """Central differences of a scalar function of a float64 array."""
  x = np.array(x, np.float64)
  result = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    ahead, behind = x.copy(), x.copy()
    ahead[index] += step
    behind[index] -= step
    result[index] = (function(ahead) - function(behind)) / (2 * step)
  return result


def ranking(similarities, labels, query, is_query=None, cameras=None):
  """True where the items before, nearest first, are positives of the query.

  Among equally near items negatives come first: ties count against the query.
  """

  def is_searched(item):
    if cameras is not None and (labels[item], cameras[item]) == (
      labels[query], cameras[query]
    ):
      return False
    return item != query if is_query is None else not is_query[item]

  items = [i for i in range(len(labels)) if is_searched(i)]
  items.sort(
    key=lambda i: (-similarities[query, i], labels[i] == labels[query])
  )
  return [labels[i] == labels[query] for i in items]


def retrieval_scores(
    similarities, labels, recall_at, is_query=None, cameras=None
):
  """The means over queries that have a positive, by walking each ranking."""
  scores = {f'recall@{k}': [] for k in recall_at}
  scores |= {'map@r': [], 'r_precision': [], 'map': []}
  for query in range(len(labels)):
    if is_query is not None and not is_query[query]:
      continue
    hits = ranking(similarities, labels, query, is_query, cameras)
    num_positives = sum(hits)
    if not num_positives:
      continue
    for k in recall_at:
      scores[f'recall@{k}'].append(float(any(hits[:k])))
    top = hits[:num_positives]
    precisions = [sum(top[: i + 1]) / (i + 1) for i in range(len(top))]
    scores['map@r'].append(
      sum(p for p, hit in zip(precisions, top) if hit) / num_positives
    )
    scores['r_precision'].append(sum(top) / num_positives)
    places = [place for place, hit in enumerate(hits, 1) if hit]
    scores['map'].append(
      sum(i / place for i, place in enumerate(places, 1)) / num_positives
    )
  return {name: float(np.mean(values)) for name, values in scores.items()}


def entropy(values):
  shares = [list(values).count(v) / len(values) for v in set(values)]
  return -sum(p * np.log(p) for p in shares)


def information(labels, clusters):
  """I from the probabilities of each pair of values."""
  labels, clusters = list(labels), list(clusters)
  n = len(labels)
  total = 0.0
  for a in set(labels):
    for b in set(clusters):
      both = sum(x == a and y == b for x, y in zip(labels, clusters)) / n
      if both:
        expected = labels.count(a) / n * clusters.count(b) / n
        total += both * np.log(both / expected)
  return total


def normalized_mutual_information(labels, clusters):
  """2 I / (H + H)."""
  total = entropy(labels) + entropy(clusters)
  return 2 * information(labels, clusters) / total if total else 1.0


def expected_information(labels, clusters):
  """The mean of I over all distinct orders of the clusters."""
  orders = set(itertools.permutations(clusters))
  return sum(information(labels, order) for order in orders) / len(orders)


def pair_counts(labels, clusters):
  """Pairs alike in (both, labels, clusters), and all pairs."""
  pairs = list(itertools.combinations(range(len(labels)), 2))
  in_labels = [labels[i] == labels[j] for i, j in pairs]
  in_clusters = [clusters[i] == clusters[j] for i, j in pairs]
  both = [a and b for a, b in zip(in_labels, in_clusters)]
  return sum(both), sum(in_labels), sum(in_clusters), len(pairs)
