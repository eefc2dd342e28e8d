"""Slow NumPy reference implementations, in float64 and with loops."""

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
  """Computes the loss from squared distances, example by example."""
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
    # Subtracting the largest score keeps the exponentials finite.
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
  """Computes the sums over proxies and over the batch term by term."""
  x, p = unit(embeddings), unit(proxies)
  pulls, pushes = [], []
  for index, proxy in enumerate(p):
    positives = [v @ proxy for v, label in zip(x, labels) if label == index]
    negatives = [v @ proxy for v, label in zip(x, labels) if label != index]
    pull = sum(np.exp(-alpha * (s - margin)) for s in positives)
    push = sum(np.exp(alpha * (s + margin)) for s in negatives)
    pulls.append(np.log1p(pull))
    pushes.append(np.log1p(push))
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
    targets = set(assignment[label].tolist())
    others = [s for i, s in enumerate(scores) if i not in targets]
    losses.append(_log_sum(others) - max(scores[i] for i in targets))
  return np.array(losses)


def dynamic_proxy_nca_loss(embeddings, proxies, labels, *, temperature=1 / 9):
  x, p = unit(embeddings), unit(proxies)
  nearest = [min(p, key=lambda proxy, v=v: _squared(v, proxy)) for v in x]
  losses = []
  for i, anchor in enumerate(x):
    scores = [-_squared(anchor, proxy) / temperature for proxy in nearest]
    negatives = [s for s, label in zip(scores, labels) if label != labels[i]]
    positives = [
      scores[j] for j in range(len(x)) if labels[j] == labels[i] and j != i
    ]
    has_both = positives and negatives
    losses.append(_log_sum(negatives) - np.mean(positives) if has_both else 0)
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


def adaface_loss(
  embeddings,
  proxies,
  labels,
  *,
  scale=64,
  margin=0.4,
  concentration=0.333,
  at=None,
):
  """`at`: the embeddings whose norms count, if these are moved from there."""
  norms = np.linalg.norm(embeddings if at is None else at, axis=1)
  norms = np.clip(np.asarray(norms, np.float64), 1e-3, 100)
  z = (norms - norms.mean()) / (norms.std(ddof=1) + 1e-3)
  z = np.clip(concentration * z, -1, 1)
  cosines = unit(embeddings) @ unit(proxies).T
  logits = scale * cosines
  for i, label in enumerate(labels):
    angle = np.arccos(cosines[i, label]) - margin * z[i]
    target = np.cos(np.clip(angle, 0, np.pi)) - margin * z[i] - margin
    logits[i, label] = scale * target
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
  return _triplets(d, labels, mining, lambda p, n: max(p + margin - n, 0))


def soft_margin_triplet_loss(embeddings, labels, *, mining='batch_hard'):
  d = _lengths(embeddings)
  return _triplets(d, labels, mining, lambda p, n: np.log1p(np.exp(p - n)))


def _triplets(d, labels, mining, penalty):
  pairs, _ = _pairs(labels)
  hinges = []
  if mining == 'batch_hard':
    for a in sorted({a for a, _ in pairs}):
      others = [d[a, n] for n in range(len(d)) if labels[n] != labels[a]]
      farthest = max(d[a, p] for b, p in pairs if b == a)
      hinges += [penalty(farthest, min(others))] if others else []
    return _mean(hinges)
  for a, p in pairs:
    others = [d[a, n] for n in range(len(d)) if labels[n] != labels[a]]
    if mining == 'semi_hard' and others:
      others = [min([n for n in others if n > d[a, p]], default=max(others))]
    hinges += [penalty(d[a, p], n) for n in others]
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
    near = [s[pair] for pair in positives if pair[0] == i]
    far = [s[pair] for pair in negatives if pair[0] == i]
    if not near or not far:
      losses.append(0)
      continue
    pulls = [p for p in near if p < max(far) + epsilon]
    pushes = [n for n in far if n > min(near) - epsilon]
    losses.append(
      np.log1p(sum(np.exp(-alpha * (p - base)) for p in pulls)) / alpha
      + np.log1p(sum(np.exp(beta * (n - base)) for n in pushes)) / beta
    )
  return np.array(losses)


def _rows(embeddings, labels):
  """Yields the cosines of each example, by positives and negatives."""
  s = unit(embeddings) @ unit(embeddings).T
  for i in range(len(s)):
    others = [j for j in range(len(s)) if j != i]
    near = [s[i, j] for j in others if labels[j] == labels[i]]
    yield near, [s[i, j] for j in others if labels[j] != labels[i]]


def sup_con_loss(embeddings, labels, *, temperature=0.1):
  losses = []
  for near, far in _rows(embeddings, labels):
    log_sum = _log_sum([s / temperature for s in near + far])
    losses.append(_mean([log_sum - s / temperature for s in near]))
  return np.array(losses)


def nt_xent_loss(embeddings, labels, *, temperature=0.1):
  losses = []
  for near, far in _rows(embeddings, labels):
    terms = [_log_sum([(x - s) / temperature for x in [s, *far]]) for s in near]
    losses.append(_mean(terms))
  return np.array(losses)


def circle_loss(embeddings, labels, *, scale=80, margin=0.4, at=None):
  """`at`: the embeddings that give the weights, if these are moved."""
  losses = []
  fixed = _rows(embeddings if at is None else at, labels)
  for (near, far), (near_at, far_at) in zip(_rows(embeddings, labels), fixed):
    pulls = [
      -scale * max(1 + margin - a, 0) * (s - 1 + margin)
      for s, a in zip(near, near_at)
    ]
    pushes = [
      scale * max(a + margin, 0) * (s - margin) for s, a in zip(far, far_at)
    ]
    has_both = pulls and pushes
    total = _log_sum(pulls) + _log_sum(pushes) if has_both else -np.inf
    losses.append(np.logaddexp(0, total))
  return np.array(losses)


def smooth_ap_loss(embeddings, labels, *, temperature=0.01):
  def above(scores, score):
    return sum(1 / (1 + np.exp((score - s) / temperature)) for s in scores)

  losses = []
  for near, far in _rows(embeddings, labels):
    relevant = [1.0, *near]  # The example itself comes first.
    precisions = []
    for i, score in enumerate(relevant):
      rank = 1 + above(relevant[:i] + relevant[i + 1 :], score)
      precisions.append(rank / (rank + above(far, score)))
    losses.append(1 - np.mean(precisions) if near else 0)
  return np.array(losses)


def facility_location_loss(
  embeddings, labels, *, margin_multiplier=1.0, num_refinements=5
):
  """Searches greedily over lists of medoids, then exchanges them in order."""
  d = _lengths(embeddings)
  points = range(len(d))
  classes = sorted(set(labels.tolist()))

  def score(medoids):
    medoids = sorted(medoids)
    clusters = [min(medoids, key=lambda j, i=i: d[i, j]) for i in points]
    facility = -sum(d[i, j] for i, j in zip(points, clusters))
    norm = np.sqrt(entropy(labels) * entropy(clusters))
    nmi = information(labels, clusters) / norm if norm else len(classes) == 1
    return facility + margin_multiplier * (1 - nmi), clusters

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
  targets = [
    min(_squared(v, c) for c in centers[label]) for v, label in zip(x, labels)
  ]
  variance = sum(targets) / (len(x) - 1)
  losses = []
  for v, label, d in zip(x, labels, targets):
    others = [
      np.exp(-_squared(v, c) / (2 * variance))
      for k, row in enumerate(centers)
      for c in row
      if k != label
    ]
    target = np.exp(-d / (2 * variance) - alpha)
    losses.append(max(-np.log(target / sum(others)), 0))
  return np.array(losses)


def gradient(function, x, step=1e-5):
  """Returns the central differences of a scalar function of an array."""
  x = np.array(x, np.float64)
  result = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    ahead, behind = x.copy(), x.copy()
    ahead[index] += step
    behind[index] -= step
    result[index] = (function(ahead) - function(behind)) / (2 * step)
  return result


def ranking(similarities, labels, query, is_query=None, cameras=None):
  """Sorts a query's items, nearest first, and returns which are positives.

  Among ties negatives come first, so that ties count against the query.
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
  """Computes the means over queries with a positive from their rankings."""
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
    ranks = [rank for rank, hit in enumerate(hits, 1) if hit]
    scores['map'].append(
      sum(i / rank for i, rank in enumerate(ranks, 1)) / num_positives
    )
  return {name: float(np.mean(values)) for name, values in scores.items()}


def lloyd(points, centroids, num_iterations):
  """Returns the assignments after some updates; no cluster may get empty."""
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
  """Returns the probability of each ordered choice of k-means++."""
  probabilities = {}

  def extend(chosen, probability):
    if len(chosen) == num_clusters:
      probabilities[chosen] = probability
      return
    weights = np.ones(len(points))
    if chosen:
      differences = points[:, None] - points[list(chosen)][None]
      weights = np.min(np.sum(differences**2, axis=2), axis=1)
    for index, weight in enumerate(weights):
      if weight > 0:
        extend((*chosen, index), probability * weight / weights.sum())

  extend((), 1.0)
  return probabilities


def entropy(values):
  fractions = [list(values).count(v) / len(values) for v in set(values)]
  return -sum(p * np.log(p) for p in fractions)


def information(labels, clusters):
  """Returns I from the probabilities of each pair of values."""
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
  """Returns 2 I / (H + H)."""
  total = entropy(labels) + entropy(clusters)
  return 2 * information(labels, clusters) / total if total else 1.0


def expected_information(labels, clusters):
  """Returns the mean of I over all distinct orders of the clusters."""
  orders = set(itertools.permutations(clusters))
  return sum(information(labels, order) for order in orders) / len(orders)


def pair_counts(labels, clusters):
  """Counts pairs that share (both, a label, a cluster), and all pairs."""
  pairs = list(itertools.combinations(range(len(labels)), 2))
  in_labels = [labels[i] == labels[j] for i, j in pairs]
  in_clusters = [clusters[i] == clusters[j] for i, j in pairs]
  both = [a and b for a, b in zip(in_labels, in_clusters)]
  return sum(both), sum(in_labels), sum(in_clusters), len(pairs)


def resize(image, size, interpolation):
  """Resizes uint8 [height, width, 3] with antialiasing, first the columns.

  Each new pixel is the mean of the old ones around its center, weighted by the
  filter, which is widened by the factor of a reduction. Each of the two passes
  is rounded and clipped to [0, 255].
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
      center = (i + 0.5) * step
      first = max(int(center - reach * wide + 0.5), 0)
      last = min(int(center + reach * wide + 0.5), old)
      weights = [weigh((j + 0.5 - center) / wide) for j in range(first, last)]
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
