"""Measures of how much each layer stores of the teacher: LASP, cross-validated ridge and CKA of pooled states.

LASP reuses BiT-C's projection, which was trained on layer 0, so it needs layers of the tokens' width. Ridge fits a map
of its own to every layer; CKA compares geometries and fits nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..config import DOMAINS
from .scores import LayerScores

PENALTIES = torch.logspace(-4, 4, 17, dtype=torch.float64)  # of ridge, relative to the mean eigenvalue
ROUNDING = 1e-12  # a sum of squares that a difference leaves below this share of its terms is float64's rounding

Score = Callable[[torch.Tensor], torch.Tensor]  # one layer's states (times, n, D) to scores (times, n), both float64


class PooledStates(NamedTuple):
    """Time-means of C clips' states in L layers of width D, over valid frames, with the teacher's vectors."""

    hidden: torch.Tensor  # (L, C, times, D) fp32: masked time-mean of every block's output
    condition: torch.Tensor  # (C, D_tok) fp32: masked time-mean of the token condition (layer 0)
    teacher: dict[str, torch.Tensor]  # domain -> (C, E) fp32; rows of clips of other domains are never read
    domain: torch.Tensor  # (C,) index into DOMAINS
    times: tuple[float, ...]
    step: int | None = None


@torch.no_grad()
def lasp(states: PooledStates, projections: dict[str, torch.Tensor], *, recipe: str = "corrected") -> LayerScores:
    """Return LASP, layer-wise analysis via shared projection (AG-REPA, arXiv 2603.01006): cos(z_l, teacher).

    z_l = P norm(h_l) with BiT-C's bias-free map P (E, D_tok) of the clip's domain, negated where <z_l, z_0> < 0, with
    z_0 = P norm(condition): a sign anchor for each clip and time. recipe "corrected": norm is the layer norm without
    affine that BiT-C trains P on; "official": the L2 norm of the release's probe_layers, which keeps a mean that P has
    never seen. 0 where either side of the cosine is 0.

    Raises ValueError for another recipe, when D is not D_tok, and when a domain of the clips has no projection.
    """
    if recipe not in _NORMS:
        raise ValueError(f"recipe={recipe!r}: {' or '.join(_NORMS)}")
    width, token_width = states.hidden.shape[-1], states.condition.shape[-1]
    if width != token_width:
        raise ValueError(f"LASP needs layers as wide as the token condition: D = {width}, D_tok = {token_width}")
    norm = _NORMS[recipe]

    def prepare(domain: str, clips: torch.Tensor, teacher: torch.Tensor) -> Score:
        if domain not in projections:
            raise ValueError(f"{len(clips)} clips are of {domain}; there are projections for {sorted(projections)}")
        projection = projections[domain].cpu().double()
        anchor = F.linear(norm(states.condition[clips].cpu().double()), projection)
        return lambda hidden: _anchored_cosine(F.linear(norm(hidden), projection), anchor, teacher)

    return _measure(states, "lasp", 1, prepare, recipe)


@torch.no_grad()
def ridge(states: PooledStates, folds: int = 5) -> LayerScores:
    """Return how well a linear map predicts the teacher from each layer: cos(prediction, teacher) of held-out clips,
    (L, C, times, 1).

    One map for each domain, layer, time and fold; of a domain's n clips the i-th is held out in fold i % min(folds, n).
    The other folds alone standardise the features, centre both sides of the cosine, and choose the penalty: out of
    PENALTIES times the mean eigenvalue of X X', the one of least leave-one-out error. With R = penalty (X X' +
    penalty)^-1 - 11'/n the residual of clip i, left out, is (R Y)_i / R_ii (Golub, Heath and Wahba 1979; exact for an
    unpenalised intercept). All is dual, as D may exceed n. 0 where either side of the cosine is 0.

    Raises ValueError for fewer than 2 folds or 4 clips of a domain.
    """
    if folds < 2:
        raise ValueError(f"ridge needs at least 2 folds, not {folds}")

    def prepare(domain: str, clips: torch.Tensor, teacher: torch.Tensor) -> Score:
        fold = torch.arange(len(clips)) % min(folds, len(clips))
        held_out = [fold == number for number in fold.unique()]
        centred = [_centred(teacher, ~held) for held in held_out]
        targets = [y @ torch.linalg.qr(y.T).Q for y in centred]  # n wide, not E, with the same inner products
        return lambda hidden: _held_out_cosines(hidden, held_out, targets)

    return _measure(states, "ridge", 4, prepare)


@torch.no_grad()
def cka(states: PooledStates) -> LayerScores:
    """Return debiased linear CKA of each layer and the teacher, as jackknife pseudo-values of the clips.

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with Gram matrices K = X X', L = Y Y' and the unbiased HSIC(K, L) =
    <K, L> / (n (n - 3)) of U-centred matrices (Song et al. 2012; Nguyen, Raghu and Kornblith 2021). The pseudo-value of
    clip i is n CKA - (n - 1) CKA without i: their mean is the jackknife-corrected CKA, their standard error the
    jackknife's, and a single one may leave [-1, 1]. The CKA of constant features is 0.

    Raises ValueError for fewer than 6 clips of a domain.
    """

    def prepare(domain: str, clips: torch.Tensor, teacher: torch.Tensor) -> Score:
        target = _u_centred_gram(teacher)
        return lambda hidden: _cka_pseudo_values(_u_centred_gram(hidden), target)

    return _measure(states, "cka", 6, prepare)


def _measure(
    states: PooledStates, measure: str, smallest: int, prepare: Callable[..., Score], recipe: str = "corrected"
) -> LayerScores:
    """Return the scores of every layer. prepare(domain, clips (n,), teacher (n, E)) is called once per domain and
    returns the score of a layer's states."""
    if not (finite := states.hidden.flatten(2).isfinite().all(2)).all():
        layer, clip = (~finite).nonzero()[0].tolist()
        raise ValueError(f"probe clip {clip}, layer {layer + 1}: the hidden state is not finite")
    values, members = torch.zeros(states.hidden.shape[:3]), states.domain.cpu()
    for number, domain in enumerate(DOMAINS):
        clips = (members == number).nonzero().squeeze(1)
        if len(clips) == 0:
            continue
        if len(clips) < smallest:
            raise ValueError(f"{measure} needs at least {smallest} clips of {domain}, not {len(clips)}")
        score = prepare(domain, clips, states.teacher[domain][clips].cpu().double())
        for layer, hidden in enumerate(states.hidden):
            values[layer, clips] = score(hidden[clips].transpose(0, 1).cpu().double()).T.float()
    floor = torch.zeros(len(members))
    return LayerScores(values[..., None], floor, members, states.times, recipe, states.step, measure)


def _l2_norm(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=-1, eps=1e-300)


def _layer_norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:])


_NORMS = {"corrected": _layer_norm, "official": _l2_norm}


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (_l2_norm(a) * _l2_norm(b)).sum(-1)


def _anchored_cosine(z: torch.Tensor, anchor: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    opposite = (z * anchor).sum(-1, keepdim=True) < 0
    return _cosine(torch.where(opposite, -z, z), teacher)


def _centred(x: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """x (..., n, D) minus its mean over these rows: exactly 0 where they hold one fp32 value, whose sums are exact."""
    return x - x[..., rows, :].mean(-2, keepdim=True)


def _standardised(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x (..., n, D) with mean 0 and variance 1 over these rows; columns that are constant there are 0 in all rows."""
    x = _centred(x, rows)
    deviation = x[..., rows, :].square().mean(-2, keepdim=True).sqrt()
    return x / torch.where(deviation > 0, deviation, torch.inf)


def _held_out_cosines(hidden: torch.Tensor, held_out: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """(times, n) from hidden (times, n, D), and of each fold its clips (n,) and the teacher it centres (n, E)."""
    scores = hidden.new_empty(hidden.shape[:2])
    for held, y in zip(held_out, targets, strict=True):
        x = _standardised(hidden, ~held)
        gram = x @ x[:, ~held].mT
        eigenvalues, vectors = torch.linalg.eigh(gram[:, ~held])
        along = vectors.mT @ y[~held]
        penalty = _best_penalty(eigenvalues, vectors, along)
        dual = vectors @ (along / (eigenvalues + penalty)[..., None])
        scores[:, held] = _cosine(gram[:, held] @ dual, y[held])
    return scores


def _best_penalty(eigenvalues: torch.Tensor, vectors: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """(times, 1), from eigenvalues (times, n) and vectors (times, n, n) of X X', and along = vectors' Y."""
    mean = eigenvalues.mean(-1, keepdim=True).clamp(min=1)  # less than 1 only for constant features, where it is 0
    penalties = mean * PENALTIES
    shrinkage = penalties[..., None] / (eigenvalues[:, None] + penalties[..., None])  # (times, penalties, n)
    residual = vectors[:, None] @ (shrinkage[..., None] * along[:, None])
    diagonal = vectors.square()[:, None] @ shrinkage[..., None] - 1 / eigenvalues.shape[-1]
    error = (residual / diagonal).square().sum((-2, -1))
    return penalties.gather(1, error.argmin(1, keepdim=True))


def _u_centred_gram(x: torch.Tensor) -> torch.Tensor:
    """(..., n, n) for x (..., n, D): X X' with its diagonal 0 and minus what makes its rows and columns sum to 0."""
    n = x.shape[-2]
    x = _centred(x)  # for precision: U-centring takes it out again
    gram = x @ x.mT
    off_diagonal = 1 - torch.eye(n, dtype=gram.dtype)
    sums = (gram * off_diagonal).sum(-1, keepdim=True)
    common = (sums + sums.mT) / (n - 2) - sums.sum(-2, keepdim=True) / ((n - 1) * (n - 2))
    centred = (gram - common) * off_diagonal
    remains = centred.square().sum((-2, -1)) > ROUNDING**2 * gram.square().sum((-2, -1))
    return centred * remains[..., None, None]


def _cka_pseudo_values(layer: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """(times, n) from U-centred Gram matrices (times, n, n) and (n, n).

    Without clip i the rows of K sum to -K_i; centred anew, <K, L> loses 2 (n - 2) / (n - 3) <K_i, L_i>.
    """
    n = len(teacher)
    hsic = []  # of all clips and without each, times factors that cancel
    for a, b in ((layer, teacher), (layer, layer), (teacher, teacher)):
        rows = (a * b).sum(-1)
        whole = rows.sum(-1, keepdim=True)
        hsic.append(torch.cat((whole, whole - 2 * (n - 2) / (n - 3) * rows), -1))
    both, own, other = hsic
    defined = (own > ROUNDING * own[..., :1]) & (other > ROUNDING * other[..., :1])
    values = torch.where(defined, both / (own * other).sqrt(), 0)
    return n * values[..., :1] - (n - 1) * values[..., 1:]
