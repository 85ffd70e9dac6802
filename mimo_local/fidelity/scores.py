"""Two models' logits, block after block of the vocabulary, to divergence, agreement and perplexity.

Pure arithmetic: nothing of the size of all logits is ever held (1.5 GB for 2 500 tokens of the real
model). Called by `run`.
"""

from __future__ import annotations

import math

import torch

from quant.quality import Figures


class _Running:
    """Of one model's rows: log of the summed exponentials, likeliest token, logit of the target."""

    def __init__(self, targets: torch.Tensor) -> None:
        n = targets.shape[0]
        self.targets = targets
        self.most = torch.full((n,), -torch.inf, dtype=torch.float64)
        self.sum = torch.zeros(n, dtype=torch.float64)
        self.best = torch.zeros(n, dtype=torch.int64)
        self.target = torch.zeros(n, dtype=torch.float64)

    def add(self, first: int, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z (T, B) f64, tokens from `first` on -> how older sums shrink (T,), weights (T, B)."""
        most, best = z.max(dim=1)
        self.best = torch.where(most > self.most, best + first, self.best)
        most = torch.maximum(most, self.most)
        shrunk = (self.most - most).exp()
        weights = (z - most[:, None]).exp_()
        self.sum = self.sum * shrunk + weights.sum(dim=1)
        self.most = most
        inside = (self.targets >= first) & (self.targets < first + z.shape[1])
        at = (self.targets - first).clamp(0, z.shape[1] - 1)
        self.target = torch.where(inside, z.gather(1, at[:, None])[:, 0], self.target)
        return shrunk, weights

    @property
    def log_sum(self) -> torch.Tensor:
        return self.most + self.sum.log()

    @property
    def losses(self) -> torch.Tensor:
        """Negative log-likelihoods of the targets."""
        return self.log_sum - self.target


class Scores:
    """Rows that predict `targets` (T,), for the pack and, if there is one, the source."""

    def __init__(self, targets: torch.Tensor, *, two: bool) -> None:
        self._pack = _Running(targets)
        self._source = _Running(targets) if two else None
        self._apart = torch.zeros(targets.shape[0], dtype=torch.float64)
        self._seen = 0

    def add(self, pack: torch.Tensor, source: torch.Tensor | None) -> None:
        """The next logits (T, B) of both."""
        z = pack.double()
        self._pack.add(self._seen, z)
        if self._source is not None and source is not None:
            exact = source.double()
            shrunk, weights = self._source.add(self._seen, exact)
            self._apart = self._apart * shrunk + (weights * (exact - z)).sum(dim=1)
        self._seen += pack.shape[1]

    def broken(self) -> str | None:
        """Whose logits are no numbers: "pack", "source" or nobody's."""
        for name, side in (("source", self._source), ("pack", self._pack)):
            if side is not None and not bool(side.losses.isfinite().all()):
                return name
        return None

    def figures(self, rows: slice) -> Figures:
        """Over some rows, once all logits were added."""
        losses = self._pack.losses[rows]
        n, perplexity = losses.shape[0], _exp(losses.mean())
        if self._source is None:
            return Figures(n, _digits(perplexity))
        exact = self._source.losses[rows]
        more = losses - exact
        change = _exp(more.mean()) - 1
        spread = float(more.std()) / n**0.5 if n > 1 else 0.0
        kl = self._divergence()[rows]
        same = self._pack.best[rows] == self._source.best[rows]
        return Figures(
            positions=n,
            perplexity=_digits(perplexity),
            source_perplexity=_digits(_exp(exact.mean())),
            change=_digits(change),
            change_error=_digits((1 + change) * spread),
            kl=_digits(float(kl.mean())),
            kl_99=_digits(float(kl.quantile(0.99))),
            top1=_digits(float(same.double().mean())),
        )

    def _divergence(self) -> torch.Tensor:
        """Source from pack (T,): sum of p (z_p - z_q), less the difference of the log sums."""
        assert self._source is not None
        mean = self._apart / self._source.sum
        return (mean - self._source.log_sum + self._pack.log_sum).clamp_(min=0)


def _exp(value: torch.Tensor) -> float:
    """Its exponential; of what no float can hold, the largest one."""
    return math.exp(min(float(value), 700.0))


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
