"""Exact match as an `evaluate` metric, shipped with the package because a hub may be out of reach."""

import datasets
import evaluate

DESCRIPTION = "Share of predictions that equal their reference after surrounding white space is removed."


class ExactMatch(evaluate.Metric):
    """`compute(predictions=[...], references=[...]) -> {"exact_match": share in [0, 1]}`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: lists of strings of one length.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        matches = [p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": sum(matches) / len(matches) if matches else 0.0}
