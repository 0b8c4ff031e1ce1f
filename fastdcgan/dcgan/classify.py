"""A linear SVM on features, and how well it does with few labels.

Radford et al. (2015), section 5.1: an L2-SVM (squared hinge loss, L2 regularisation), its regularisation chosen by
cross-validation on the training part.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdcgan.dcgan.console import track
from fastdcgan.dcgan.files import writing

REGULARISATIONS = (0.1, 1.0, 10.0)  # C, for features of mean squared length 1
_FOLDS = 3
_MOST_TO_CHOOSE_BY = 1000  # labels; more hardly change the choice
_ITERATIONS = 2000
_MOST_BYTES = 2**30  # of a classifier


@dataclass(frozen=True)
class LinearSVM:
    """One linear function per class; made by `fit`. `classes` are the labels it knows, `c` the regularisation."""

    weight: np.ndarray  # [classes, F]
    bias: np.ndarray  # [classes]
    classes: np.ndarray  # int64 [classes]
    c: float

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray, seed: int = 0) -> LinearSVM:
        """Fit to features [N, F] and labels int [N]. With less than two of some class nothing can be chosen by
        cross-validation: then C is 1.

        Raises ValueError for less than two classes, ModuleNotFoundError without scikit-learn.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
        from sklearn.svm import LinearSVC

        classes, counts = np.unique(labels, return_counts=True)
        if len(classes) < 2:
            raise ValueError(f"the labels are of {len(classes)} class: expected at least 2")
        mean = features.mean(0, dtype=np.float64)
        centred = features - mean
        # By one number: the layers keep their proportions, and C means the same for all features.
        length = float(np.sqrt(np.square(centred).sum(1).mean())) or 1.0
        points, basis = _rotated(centred / length)
        random = np.random.RandomState(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # at large C; the choice of C judges those too
            c, folds = 1.0, min(_FOLDS, counts.min())
            if folds > 1:
                search = GridSearchCV(
                    LinearSVC(dual=True, max_iter=_ITERATIONS, random_state=seed),
                    {"C": REGULARISATIONS},
                    cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
                    refit=False,
                    error_score="raise",
                )
                some = balanced(labels, min(len(labels), _MOST_TO_CHOOSE_BY), random)
                search.fit(_rotated(points[some])[0], labels[some])
                c = search.best_params_["C"]
            svm = LinearSVC(C=c, dual=True, max_iter=_ITERATIONS, random_state=seed).fit(points, labels)
        weight = (svm.coef_ if basis is None else svm.coef_ @ basis) / length
        bias = svm.intercept_ - weight @ mean
        if len(classes) == 2:  # scikit-learn has one function for both
            weight, bias = np.concatenate([-weight, weight]), np.concatenate([-bias, bias])
        return cls(weight.astype(np.float32), bias.astype(np.float32), classes.astype(np.int64), c)

    def decision(self, features: np.ndarray) -> np.ndarray:
        """[N, F] -> [N, classes]: the larger, the surer."""
        if features.ndim != 2 or features.shape[1] != self.weight.shape[1]:
            raise ValueError(f"features have shape {list(features.shape)}: expected [N, {self.weight.shape[1]}]")
        return features @ self.weight.T + self.bias

    def predict(self, features: np.ndarray) -> np.ndarray:
        """[N, F] -> labels int64 [N]."""
        return self.classes[self.decision(features).argmax(1)]

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        return float((self.predict(features) == labels).mean())

    def save(self, path: Path, **more: Any) -> None:
        """An `.npz` of its fields and `more` arrays, written atomically; nothing in it is pickled."""
        save_npz(path, weight=self.weight, bias=self.bias, classes=self.classes, c=self.c, **more)

    @classmethod
    def load(cls, path: str | Path) -> LinearSVM:
        """Raises ValueError for a file that is none."""
        try:
            if not Path(path).is_file():  # from a pipe it would wait for ever
                raise ValueError("there is no such file")
            with zipfile.ZipFile(path) as archive:  # few bytes may say that they are many
                size = sum(member.file_size for member in archive.infolist())
            if size > _MOST_BYTES:
                raise ValueError(f"{size} bytes when unpacked, of at most {_MOST_BYTES}")
            with np.load(path, allow_pickle=False) as saved:
                weight, bias, classes = (saved[name] for name in ("weight", "bias", "classes"))
                if weight.dtype.kind + bias.dtype.kind + classes.dtype.kind not in ("ffi", "ffu"):
                    raise ValueError(f"weight {weight.dtype}, bias {bias.dtype}, classes {classes.dtype}")
                if weight.ndim != 2 or not bias.shape == classes.shape == weight.shape[:1]:
                    raise ValueError(f"weight {weight.shape}, bias {bias.shape}, classes {classes.shape}")
                if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                    raise ValueError("values that are not finite")
                return cls(weight, bias, classes, float(saved["c"]))
        except Exception as error:  # whatever a damaged archive, or one with other things in it, makes numpy raise
            raise ValueError(f"{path} is no classifier: {error or type(error).__name__}") from error


def _rotated(points: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Points [N, F] in an orthonormal basis [N, F] of the space they span, where that has less dimensions. The SVM is
    the same one: its loss and its penalty see only scalar products, and its weights are a sum of points."""
    n, f = points.shape
    if n >= f:
        return points, None
    q, r = np.linalg.qr(points.T)
    return r.T, q.T


def balanced(labels: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
    """`count` indices, drawn without putting back, as many of each class as possible (and as there are). Shuffled.

    Raises ValueError if there are less than `count`, or `count` is less than the number of classes.
    """
    classes = np.unique(labels)
    if not len(classes) <= count <= len(labels):
        raise ValueError(f"can't draw {count} labels: expected at least {len(classes)}, at most {len(labels)}")
    order = random.permutation(len(labels))
    # The first of every class, then the second of every class, ...
    rank = np.empty(len(labels), dtype=np.int64)
    for c in classes:
        members = order[labels[order] == c]
        rank[members] = np.arange(len(members))
    chosen = order[np.argsort(rank[order], kind="stable")][:count]
    return random.permutation(chosen)


@dataclass(frozen=True)
class Score:
    """Accuracies on the test part, one for each draw of `labels` labels."""

    features: str
    dimensions: int
    labels: int
    accuracies: list[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))

    @property
    def spread(self) -> float:
        """Standard deviation over the draws; 0 for one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.spread:.1f}" if len(self.accuracies) > 1 else "")


def compare(
    features: dict[str, np.ndarray],
    labels: np.ndarray,
    test: np.ndarray,
    counts: Sequence[int] = (10, 100, 1000),
    draws: int = 5,
    seed: int = 0,
) -> list[Score]:
    """Every set of features [N, F] by name, with SVMs on `counts` labels of the training part and on all of it, on the
    `test` part (bool [N]). All features get the same draws. A count that is not possible (`balanced`) is left out."""
    train = np.flatnonzero(~test)
    possible = [count for count in counts if len(np.unique(labels[train])) <= count < len(train)]
    random = np.random.RandomState(seed)
    drawn = {count: [train[balanced(labels[train], count, random)] for _ in range(draws)] for count in possible}
    drawn[len(train)] = [train]
    work = [(name, count) for name in features for count in drawn]
    scores = []
    for name, count in track(work, "classifiers", len(work)):
        x = features[name]
        accuracies = [
            LinearSVM.fit(x[rows], labels[rows], seed + i).accuracy(x[test], labels[test])
            for i, rows in enumerate(drawn[count])
        ]
        scores.append(Score(name, x.shape[1], count, accuracies))
    return scores


def to_markdown(scores: Sequence[Score]) -> str:
    """One row for each set of features, one column for each number of labels, accuracies in %."""
    counts = sorted({score.labels for score in scores})
    lines = [
        "| features | dimensions | " + " | ".join(f"{count} labels" for count in counts) + " |",
        "|---|---|" + "---|" * len(counts),
    ]
    for name in dict.fromkeys(score.features for score in scores):
        row = {score.labels: score for score in scores if score.features == name}
        dimensions = next(iter(row.values())).dimensions
        lines.append(f"| {name} | {dimensions} | " + " | ".join(str(row[count]) for count in counts) + " |")
    return "\n".join(lines)


def save_npz(path: Path, **arrays: Any) -> None:
    """Arrays by name, written atomically."""
    with writing(path) as file:
        np.savez(file, **arrays)
