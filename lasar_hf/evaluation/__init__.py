"""Ranking metrics, baselines, significance tests and reports over item indices; recommending for many samples."""

from .baselines import (
    ease_matrix,
    ease_ranking,
    item_knn_matrix,
    item_knn_ranking,
    markov_ranking,
    matrix_ranking,
    popular_items,
    popularity_ranking,
)
from .explicit import write_chains
from .memory import build_memory, fit_gate
from .memory_matrix import memory_matrix, similar_items, tune_memory
from .metrics import (
    RankingMetrics,
    hits_per_user,
    ndcg_per_user,
    ranking_metrics,
    ranks,
    repeat_share,
    score_predictions,
)
from .neighbours import neighbour_draws
from .recommendations import RankingEvaluator, Recommendations, recommend_samples
from .report import (
    comparison_table,
    evaluate_recommendations,
    exclusion_note,
    save_report,
    slice_report,
    slice_table,
)
from .sasrec import has_sasrec, sasrec_ranking
from .significance import BootstrapResult, mean_interval, paired_bootstrap
from .slices import slices
from .tuning import (
    BASELINES,
    WITH_MEMORY,
    Tuning,
    baseline_rankings,
    compare_exclusion,
    tune,
    tune_item_knn,
    tuning_notes,
)


__all__ = [
    "BASELINES",
    "WITH_MEMORY",
    "BootstrapResult",
    "RankingEvaluator",
    "RankingMetrics",
    "Recommendations",
    "Tuning",
    "baseline_rankings",
    "build_memory",
    "compare_exclusion",
    "comparison_table",
    "ease_matrix",
    "ease_ranking",
    "evaluate_recommendations",
    "exclusion_note",
    "fit_gate",
    "has_sasrec",
    "hits_per_user",
    "item_knn_matrix",
    "item_knn_ranking",
    "markov_ranking",
    "matrix_ranking",
    "mean_interval",
    "memory_matrix",
    "ndcg_per_user",
    "neighbour_draws",
    "paired_bootstrap",
    "popular_items",
    "popularity_ranking",
    "ranking_metrics",
    "ranks",
    "recommend_samples",
    "repeat_share",
    "sasrec_ranking",
    "save_report",
    "score_predictions",
    "similar_items",
    "slice_report",
    "slice_table",
    "slices",
    "tune",
    "tune_item_knn",
    "tune_memory",
    "tuning_notes",
    "write_chains",
]
