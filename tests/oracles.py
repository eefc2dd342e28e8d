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


def lloyd(points, centroids, num_iterations):
  """Assignments after so many updates; no cluster may lose its points."""
  points, centroids = np.float64(points), np.float64(centroids)

  def assign():
    differences = points[:, None] - centroids[None]
    return np.argmin(np.sum(differences**2, axis=2), axis=1)

  assignments = assign()
  for _ in range(num_iterations):
    for cluster in range(len(centroids)):
      members = points[assignments == cluster]
      assert len(members), 'an empty cluster'
      centroids[cluster] = members.mean(axis=0)
    assignments = assign()
  return assignments


def plus_plus(points, num_clusters):
  """The probability of each ordered choice of k-means++, by all of them."""
  chances = {}

  def extend(chosen, chance):
    if len(chosen) == num_clusters:
      chances[chosen] = chance
      return
    weights = np.ones(len(points))
    if chosen:
      differences = points[:, None] - points[list(chosen)][None]
      weights = np.min(np.sum(differences**2, axis=2), axis=1)
    for place, weight in enumerate(weights):
      if weight > 0:
        extend((*chosen, place), chance * weight / weights.sum())

  extend((), 1.0)
  return chances


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
