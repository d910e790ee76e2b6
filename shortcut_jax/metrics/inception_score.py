"""The Inception score of Salimans et al., https://arxiv.org/abs/1606.03498."""

import numpy as np

from shortcut_jax.metrics.summaries import Marginals


def inception_score(marginals: Marginals) -> tuple[float, float]:
    """exp of the mean over samples of KL(p(y|x) || p(y)), for each split: mean and deviation.

    p(y) is the mean of p(y|x) over the samples of a split. The score is at least 1 and at most the
    number of classes. Both numbers are torch-fidelity's with samples_shuffle=False; ADM's evaluator
    reports the mean alone (of splits of 5,000, see `Marginals`). Both take the logits of Inception
    without the bias.

    Args:
        marginals: of all samples.

    Returns:
        Mean over the splits and their standard deviation with divisor `splits` (not splits - 1).

    Raises:
        ValueError: samples are missing.
    """
    p, p_log_p = marginals.means
    # sum over classes of mean(p log p) - mean(p) log mean(p), where 0 log 0 is 0.
    log_p = np.log(p, out=np.zeros_like(p), where=p > 0)
    scores = np.exp(p_log_p - (p * log_p).sum(axis=1))
    return float(scores.mean()), float(scores.std())
