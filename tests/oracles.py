"""Slow NumPy definitions, in float64 and loops, to compare with."""

import itertools

import numpy as np


def proxy_nca_loss(
  embeddings,
  proxies,
  labels,
  *,
  temperature=1 / 9,
  positive_in_denominator=False,
  normalize=True,
  label_smoothing=0.0,
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
      1 - label_smoothing
      if i == label
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
    logits.append(
      [scale * (w / w.sum()) @ (row @ x) for w, row in zip(weights, centers)]
    )
  spread = sum(
    np.linalg.norm(a - b)
    for row in centers
    for a, b in itertools.combinations(row, 2)
  ) / (num_classes * num_centers * (num_centers - 1))
  return _cross_entropy(logits, labels, scale * margin) + tau * spread


def _pairs(labels):
  """The positive and the negative pairs of a batch, each in both orders."""
  ordered = list(itertools.permutations(range(len(labels)), 2))
  positives = [(i, j) for i, j in ordered if labels[i] == labels[j]]
  negatives = [(i, j) for i, j in ordered if labels[i] != labels[j]]
  return positives, negatives


def _lengths(x):
  x = np.asarray(x, np.float64)
  return np.array([[np.linalg.norm(a - b) for b in x] for a in x])


def _mean(values):
  return np.mean(values) if len(values) else 0.0


def contrastive_loss(embeddings, labels, *, margin=1.0):
  d = _lengths(embeddings)
  positives, negatives = _pairs(labels)
  return _mean(
    [d[pair] ** 2 / 2 for pair in positives]
    + [max(margin - d[pair], 0) ** 2 / 2 for pair in negatives]
  )


def triplet_loss(embeddings, labels, *, margin=0.2, mining='semi_hard'):
  d = _lengths(embeddings) ** 2
  pairs, _ = _pairs(labels)
  hinges = []
  if mining == 'batch_hard':
    for a in sorted({a for a, _ in pairs}):
      others = [d[a, n] for n in range(len(d)) if labels[n] != labels[a]]
      farthest = max(d[a, p] for b, p in pairs if b == a)
      hinges += [max(farthest + margin - min(others), 0)] if others else []
    return _mean(hinges)
  for a, p in pairs:
    others = [d[a, n] for n in range(len(d)) if labels[n] != labels[a]]
    if mining == 'semi_hard' and others:
      others = [min([n for n in others if n > d[a, p]], default=max(others))]
    hinges += [max(d[a, p] + margin - n, 0) for n in others]
  if mining == 'batch_all':
    hinges = [h for h in hinges if h > 0]
  return _mean(hinges)


def n_pairs_loss(embeddings, labels, *, regularization=0.0):
  x = np.asarray(embeddings, np.float64)
  pairs = []
  for label in sorted(set(labels.tolist())):
    members = [i for i in range(len(x)) if labels[i] == label]
    pairs += [members[:2]] if len(members) > 1 else []
  losses = []
  for a, p in pairs:
    others = [x[a] @ x[q] - x[a] @ x[p] for _, q in pairs if q != p]
    norms = (x[a] @ x[a] + x[p] @ x[p]) / 2
    losses.append(np.log1p(sum(np.exp(others))) + regularization * norms)
  return _mean(losses)


def lifted_structure_loss(embeddings, labels, *, margin=1.0):
  d = _lengths(embeddings)
  positives, negatives = _pairs(labels)
  losses = []
  for i, j in positives:
    pushes = [np.exp(margin - d[a, k]) for a, k in negatives if a in (i, j)]
    if pushes:
      losses.append(max(np.log(sum(pushes)) + d[i, j], 0) ** 2 / 2)
    else:
      losses.append(0)
  return _mean(losses)


def multi_similarity_loss(
  embeddings, labels, *, alpha=2, beta=50, base=0.5, epsilon=0.1
):
  s = unit(embeddings) @ unit(embeddings).T
  positives, negatives = _pairs(labels)
  losses = []
  for i in range(len(s)):
    own = [s[pair] for pair in positives if pair[0] == i]
    others = [s[pair] for pair in negatives if pair[0] == i]
    if not own or not others:
      losses.append(0)
      continue
    pulls = [p for p in own if p < max(others) + epsilon]
    pushes = [n for n in others if n > min(own) - epsilon]
    losses.append(
      np.log1p(sum(np.exp(-alpha * (p - base)) for p in pulls)) / alpha
      + np.log1p(sum(np.exp(beta * (n - base)) for n in pushes)) / beta
    )
  return np.array(losses)


def facility_location_loss(
  embeddings, labels, *, margin_multiplier=1.0, num_refinements=5
):
  """The greedy search over lists of medoids, then exchanges in order."""
  d = _lengths(embeddings)
  points = range(len(d))
  classes = sorted(set(labels.tolist()))

  def score(medoids):
    medoids = sorted(medoids)
    clusters = [min(medoids, key=lambda j, i=i: d[i, j]) for i in points]
    facility = -sum(d[i, j] for i, j in zip(points, clusters))
    norm = np.sqrt(entropy(labels) * entropy(clusters))
    alike = information(labels, clusters) / norm if norm else len(classes) == 1
    return facility + margin_multiplier * (1 - alike), clusters

  medoids = []
  for _ in classes:
    free = [j for j in points if j not in medoids]
    medoids.append(max(free, key=lambda j: score([*medoids, j])[0]))
  for _ in range(num_refinements):
    _, clusters = score(medoids)
    for k in sorted(medoids):
      rest = [j for j in medoids if j != k]
      members = [j for j in points if clusters[j] == k]
      best = max(members, key=lambda j, rest=rest: score([*rest, j])[0])
      medoids = [*rest, best]
  truth = 0
  for label in classes:
    members = [i for i in points if labels[i] == label]
    truth += max(-sum(d[i, j] for i in members) for j in members)
  return max(score(medoids)[0] - truth, 0)


def center_loss(embeddings, labels, *, centers):
  return np.array(
    [
      np.sum((np.asarray(x, np.float64) - centers[label]) ** 2) / 2
      for x, label in zip(embeddings, labels)
    ]
  )


def center_softmax_loss(embeddings, proxies, labels, *, centers, weight=0.003):
  logits = np.asarray(embeddings, np.float64) @ np.asarray(proxies).T
  center = center_loss(embeddings, labels, centers=centers)
  return _cross_entropy(logits, labels) + weight * center


def magnet_loss(embeddings, labels, *, centers, alpha=1.0):
  x = np.asarray(embeddings, np.float64)
  own = [
    min(_squared(v, c) for c in centers[label]) for v, label in zip(x, labels)
  ]
  variance = sum(own) / (len(x) - 1)
  losses = []
  for v, label, d in zip(x, labels, own):
    others = [
      np.exp(-_squared(v, c) / (2 * variance))
      for k, row in enumerate(centers)
      for c in row
      if k != label
    ]
    own_term = np.exp(-d / (2 * variance) - alpha)
    losses.append(max(-np.log(own_term / sum(others)), 0))
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
      labels[query],
      cameras[query],
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


def resize(image, size, interpolation):
  """Antialiased resizing of uint8 [height, width, 3], columns before rows.

  Each new pixel is the mean of the old ones around its centre, weighted by the
  filter, which is as much wider as the image gets smaller. Each pass is rounded
  and clipped to 0..255.
  """
  reach, weigh = {
    'bilinear': (1, lambda x: max(0, 1 - abs(x))),
    'bicubic': (2, _bicubic),
  }[interpolation]
  pixels = np.asarray(image, np.float64)
  for axis, length in ((1, size[1]), (0, size[0])):
    old = pixels.shape[axis]
    step = old / length
    wide = max(step, 1)
    rows = np.moveaxis(pixels, axis, 0)
    result = []
    for i in range(length):
      centre = (i + 0.5) * step
      first = max(int(centre - reach * wide + 0.5), 0)
      last = min(int(centre + reach * wide + 0.5), old)
      weights = [weigh((j + 0.5 - centre) / wide) for j in range(first, last)]
      total = sum(w * rows[j] for w, j in zip(weights, range(first, last)))
      result.append(np.clip(np.floor(total / sum(weights) + 0.5), 0, 255))
    pixels = np.moveaxis(np.array(result), 0, axis)
  return pixels


def _bicubic(x, a=-0.5):
  """Keys' cubic convolution, https://doi.org/10.1109/TASSP.1981.1163711."""
  x = abs(x)
  if x < 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0
